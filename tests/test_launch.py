"""launch/: the scripts parse, explain themselves, and refuse what they cannot run; when a SLURM job queues again."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.slurm")])


def bash(*args, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", *map(str, args)], capture_output=True, text=True, timeout=60, **kwargs)


def program(file: Path, script: str) -> None:
    file.write_text(f"#!/bin/bash\n{script}\n")
    file.chmod(0o755)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_every_script_parses(script):
    assert bash("-n", script).returncode == 0


@pytest.mark.parametrize(
    ("has_torch", "named", "installed"),
    [(False, "", ["torch==2.13.*"]), (True, "", []), (True, "torch==2.15.0", ["torch==2.15.0"])],
)
def test_a_new_environment_gets_the_torch_of_the_tests_unless_it_has_one_or_another_is_named(
    has_torch, named, installed, tmp_path
):
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "activate").touch()
    program(programs / "python", f'case "$*" in *show*) exit {1 - has_torch} ;; *) echo "$*" > call ;; esac')
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "TORCH": named}
    done = bash("-euc", f"source {LAUNCH}/venv.sh test", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "call").read_text().partition(" --editable ")[2].split() == [".[test]", *installed]


@pytest.mark.parametrize("script", ["quickstart.sh", "hh_rlhf.sh", "hh_table.sh", "multi_node.sh", "train.slurm"])
def test_help_says_how_to_use_a_real_model_and_runs_nothing(script, tmp_path):
    done = bash(LAUNCH / script, "--help", cwd=tmp_path)
    assert (
        done.returncode == 0
        and "pairs.json" in done.stdout
        and "set -" not in done.stdout
        and "#SBATCH" not in done.stdout
    )
    assert not list(tmp_path.iterdir())


def test_quickstart_leaves_an_earlier_one_alone(tmp_path):
    done = bash(LAUNCH / "quickstart.sh", tmp_path)
    assert done.returncode == 2 and f"error: {tmp_path} exists already" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "m", "--sft", "s"], "--rm is missing"),
        (["--model", "m", "--rm", "r"], "--sft is missing"),
        (["--modle", "m"], "unknown option --modle"),
    ],
)
def test_the_recipe_names_what_is_wrong_with_its_flags(flags, message):
    done = bash(LAUNCH / "hh_rlhf.sh", *flags)
    assert done.returncode == 2 and message in done.stderr


class Recipe:
    """launch/ in a repository whose `python` writes its command line to `calls`, and what eval_rm.py writes last."""

    def __init__(self, folder: Path):
        self.folder, self.out = folder, folder / "out"
        for name in ("hh_rlhf.sh", "hh_table.sh", "torchrun.sh"):
            (folder / "launch").mkdir(exist_ok=True)
            (folder / "launch" / name).write_text((LAUNCH / name).read_text())
        (folder / "launch" / "venv.sh").touch()
        (folder / ".venv" / "bin").mkdir(parents=True)
        (folder / ".venv" / "bin" / "activate").touch()
        act = """case "$*" in *"$STOP"*) exit 1 ;; *eval_rm*) mkdir -p "${!#}" && touch "${!#}/report.json" ;; esac"""
        program(folder / "python", f'echo "$*" >> {folder}/calls\n{act}')

    def run(self, script: str, *flags, stop_at: str = "nowhere") -> tuple[int, list[dict[str, str]]]:
        """Its status, and the trainings and evaluations that it has started, as {flag: value}."""
        (self.folder / "calls").write_text("")
        path = {"PATH": f"{self.folder}:/usr/bin:/bin", "STOP": stop_at}
        given = "--model m --sft s.json --rm r.json --nproc 2".split()
        done = bash(self.folder / "launch" / script, "--out", self.out, *given, *flags, env=path)
        calls = (self.folder / "calls").read_text().splitlines()
        return done.returncode, [self.parsed(call) for call in calls if ".py " in call]

    def parsed(self, call: str) -> dict[str, str]:
        script, _, flags = call.partition(".py ")
        pairs = (words.partition(" ") for words in f" {flags}".split(" --")[1:])
        return {"script": script.rpartition("/")[2]} | {name: value for name, _, value in pairs}


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    return Recipe(tmp_path)


def test_the_recipe_gives_each_script_its_flags(recipe):
    sft_flags = "--max_length 1024 --learning_rate 1e-5"
    code, (sft, rm, evaluation) = recipe.run("hh_rlhf.sh", "--test", "t", "--sft_flags", sft_flags, "--", "--seed", 3)
    assert code == 0 and [sft["script"], rm["script"], evaluation["script"]] == ["train_sft", "train_rm", "eval_rm"]
    assert sft["learning_rate"] == "1e-5" and sft["max_length"] == "1024" and "seed" not in sft
    assert rm["seed"] == "3" and "max_length" not in rm and rm["reward_set_path"] == "s.json"
    assert rm["model_name_or_path"] == f"{sft['output_dir']}/model" == f"{recipe.out}/sft/model"
    assert evaluation["model_name_or_path"] == f"{rm['output_dir']}/model" and evaluation["dataset_path"] == "t"


def test_the_recipe_without_sft_starts_from_the_model(recipe):
    code, (rm,) = recipe.run("hh_rlhf.sh", "--sft_epochs", 0)
    assert code == 0 and rm["script"] == "train_rm" and rm["model_name_or_path"] == "m"


def test_the_table_has_a_reward_model_for_each_cell_and_goes_on_where_it_was_stopped(recipe):
    flags = ("--test", "t", "--sft_epochs", "0 1", "--ranks", "2 4", "--", "--seed", 3)
    code, calls = recipe.run("hh_table.sh", *flags, stop_at="sft_0_lora_4/rm/model")
    assert code == 1 and [call["script"] for call in calls] == ["train_rm", "eval_rm", "train_rm", "eval_rm"]
    code, calls = recipe.run("hh_table.sh", *flags)
    assert code == 0
    runs = [call["output_dir"].removeprefix(f"{recipe.out}/") for call in calls if call["script"] != "eval_rm"]
    assert runs == ["sft_0_lora_4/rm", "sft_1", "sft_1_lora_2/rm", "sft_1", "sft_1_lora_4/rm"]
    assert [call["lora_r"] for call in calls if call["script"] == "train_rm"] == ["4", "2", "4"]
    assert all(call["num_train_epochs"] == "1" for call in calls if call["script"] == "train_sft")
    assert all(call["seed"] == "3" for call in calls if call["script"] == "train_rm")
    assert recipe.run("hh_table.sh", *flags) == (0, []), "all is there"
    assert f"-m rm.report.recipe_table {recipe.out}" in (recipe.folder / "calls").read_text()
    assert recipe.run("hh_table.sh", *flags[:-1], 4) == (2, []), "cells of another seed"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--nodes", "2", "train_rm.py"], "--head is missing"),
        (["--nodes", "2", "--head", "h"], "no such file"),
        (["--noodles", "2"], "unknown option --noodles"),
    ],
)
def test_the_plain_launcher_names_what_is_wrong_with_its_flags(flags, message):
    done = bash(LAUNCH / "multi_node.sh", *flags)
    assert done.returncode == 2 and message in done.stderr


def test_the_plain_launcher_gives_torchrun_what_a_restart_and_a_stop_need(tmp_path):
    program(tmp_path / "python", 'printf "%s " "$@" && env | grep ^TORCH')
    (tmp_path / "launch").mkdir()
    for name in ("multi_node.sh", "torchrun.sh"):
        (tmp_path / "launch" / name).write_text((LAUNCH / name).read_text())
    (tmp_path / "train_rm.py").touch()
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    flags = ("--nodes", "2", "--head", "h0:1234", "--nproc", "4", tmp_path / "train_rm.py", "--seed", "1")
    said = bash(tmp_path / "launch" / "multi_node.sh", *flags, env=path).stdout
    for flag in ("--max-restarts 3", "SIGUSR1", "--nnodes 2", "--nproc-per-node 4", "--rdzv-backend c10d", "h0:1234"):
        assert flag in said
    assert f"{tmp_path}/train_rm.py --seed 1" in said and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in said


# ---------------------------------------------------------------- train.slurm, with programs that stand in for SLURM


class Slurm:
    """One job on a cluster that is three scripts; `calls` is what the job asked of it."""

    def __init__(self, folder: Path):
        self.folder, self.out = folder, folder / "out"
        (folder / "bin").mkdir()
        record = f'echo "${{0##*/}} $*" >> {folder}/calls\n'
        program(folder / "bin" / "scancel", record + f"touch {folder}/cancelled")
        scontrol = 'case "$2" in hostnames) echo n1 ;; job) echo "JobId=7 JobState=$JOB_STATE Reason=None" ;; esac'
        program(folder / "bin" / "scontrol", record + scontrol)
        self.record = record
        self.until_cancelled = f"touch {folder}/started; until [ -e {folder}/cancelled ]; do sleep 0.05; done"

    def training(self, status: str, step: int, code: int, first: str = "") -> None:
        """What srun does: the training's last words, after the commands `first`."""
        marker = f"""echo '{{"status": "{status}", "step": {step}}}' > {self.out}/exit.json""" if status else ""
        save = f"mkdir -p {self.out}/checkpoints/step_{step}" if step else ""
        program(self.folder / "bin" / "srun", "\n".join([self.record, first, save, marker, f"exit {code}"]))

    def start(self, restart: int = 0, state: str = "RUNNING", flags: tuple = ()) -> subprocess.Popen:
        """`--output-dir` is spelt with a dash, as the scripts accept it too, where no other `flags` are given."""
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", "JOB_STATE": state}
        path = {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "SLURM_RESTART_COUNT": str(restart)}
        flags = flags or ("--output-dir", self.out, "--seed", "1")
        command = ["bash", LAUNCH / "train.slurm", ROOT / "train_rm.py", *flags]
        return subprocess.Popen(command, env=os.environ | job | path, stdout=subprocess.PIPE, text=True)

    def run(self, **job) -> tuple[int, str, bool]:
        """The job's status, the last line it said and whether it queued itself again."""
        (self.folder / "calls").write_text("")
        running = self.start(**job)
        said = running.communicate(timeout=60)[0]
        return running.returncode, said.splitlines()[-1], "scontrol requeue 7" in self.calls()

    def warned(self, number: int) -> tuple[str, int]:
        """The last line and the status of a job that gets a signal while its training, `until_cancelled`, runs."""
        for name in ("started", "cancelled"):
            (self.folder / name).unlink(missing_ok=True)
        job = self.start()
        while not (self.folder / "started").exists():
            assert job.poll() is None
            time.sleep(0.02)
        job.send_signal(number)
        said = job.communicate(timeout=60)[0]
        return said.splitlines()[-1], job.returncode

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def slurm(tmp_path) -> Slurm:
    return Slurm(tmp_path)


def test_the_exit_marker_decides_and_not_the_code_of_torchrun(slurm):
    slurm.training("failed", step=9, code=0)
    code, said, requeued = slurm.run()
    assert code == 1 and said.endswith(": failed") and not requeued
    slurm.training("stopped", step=12, code=1)
    code, said, requeued = slurm.run()
    assert code == 0 and said.endswith(": requeue") and requeued
    slurm.training("finished", step=15, code=1)
    code, said, requeued = slurm.run()
    assert code == 0 and said.endswith(": finished") and not requeued


def test_a_job_that_is_killed_without_a_word_goes_on_only_if_it_had_saved_something_new(slurm):
    slurm.training("", step=10, code=137)
    assert slurm.run()[::2] == (0, True)
    assert slurm.run(restart=1)[::2] == (137, False)


@pytest.mark.parametrize("before", ["finished", "stopped"])
def test_a_marker_from_an_earlier_run_is_not_believed(slurm, before):
    slurm.training(before, step=9, code=0)
    slurm.run()
    slurm.training("", step=0, code=1)
    assert slurm.run()[::2] == (1, False)
    slurm.training("", step=0, code=0)
    assert slurm.run()[::2] == (0, False)
    assert (slurm.out / "exit.json").exists() == (before == "finished"), "the script itself looks whether it is done"


def test_two_runs_in_a_row_without_progress_are_the_last(slurm):
    slurm.training("stopped", step=10, code=1)
    assert slurm.run()[2]
    assert slurm.run(restart=1)[2], "preempted while it started: may happen once"
    slurm.training("stopped", step=9, code=1)
    code, said, requeued = slurm.run(restart=2)
    assert code == 1 and "no progress" in said and not requeued
    slurm.training("stopped", step=100, code=1)
    assert slurm.run(restart=3)[2], "steps are numbers, not names: 100 comes after 10"


def test_a_job_is_queued_again_a_limited_number_of_times(slurm):
    slurm.training("stopped", step=10, code=1)
    code, said, requeued = slurm.run(restart=100)
    assert code == 1 and "MAX_REQUEUES=100" in said and not requeued


def test_a_cancelled_job_is_not_brought_back(slurm):
    slurm.training("stopped", step=10, code=1)
    code, said, requeued = slurm.run(state="CANCELLED")
    assert code == 1 and said.endswith(": left to SLURM") and not requeued


def test_evaluation_leaves_no_marker_and_is_judged_by_its_code(slurm):
    for code in (0, 3):
        slurm.training("", step=0, code=code)
        assert slurm.run()[::2] == (code, False)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_warning_reaches_the_step_through_slurm_and_the_job_waits_for_it(slurm, number):
    slurm.training("stopped", step=5, code=1, first=slurm.until_cancelled)
    said, code = slurm.warned(number)
    assert said.endswith(": requeue") and code == 0
    assert [call for call in slurm.calls() if not call.startswith(("srun", "scontrol show"))] == [
        "scancel --signal=TERM 7.0",
        "scontrol requeue 7",
    ]


def test_a_warning_while_the_training_starts_ends_it_without_a_marker_and_queues_it_again_once(slurm):
    slurm.training("", step=0, code=1, first=slurm.until_cancelled)
    assert slurm.warned(signal.SIGUSR1)[1] == 0
    said, code = slurm.warned(signal.SIGUSR1)
    assert "no progress" in said and code == 1


def test_torchrun_gets_the_nodes_a_meeting_point_and_an_id_of_this_restart(slurm):
    slurm.training("finished", step=1, code=0)
    slurm.run(restart=3)
    (srun,) = [call for call in slurm.calls() if call.startswith("srun")]
    for flag in ("--nnodes 2", "--rdzv-endpoint n1:20007", "--rdzv-id 7.3", "SIGUSR1", f"{slurm.out}/slurm/7.3.log"):
        assert flag in srun
    assert srun.endswith(f"{ROOT}/train_rm.py --output-dir {slurm.out} --seed 1")


def test_the_output_folder_may_be_that_of_a_recipe_or_of_an_earlier_run(slurm, tmp_path):
    slurm.training("finished", step=1, code=0)
    recipe, run = tmp_path / "recipe.json", tmp_path / "run.json"
    recipe.write_text(json.dumps({"output_dir": str(slurm.out), "seed": 1}))
    run.write_text(json.dumps({"settings": {"model_name_or_path": "m", "output_dir": str(slurm.out)}}, indent=2))
    for restart, file in enumerate((recipe, run)):
        assert slurm.run(restart=restart, flags=("--config", file))[0] == 0
        assert (slurm.out / "slurm").is_dir() and f"{slurm.out}/slurm/7.{restart}.log" in slurm.calls()[-1]
    odd = slurm.out / 'é, "of 1" line'
    recipe.write_text(json.dumps({"given": {"output_dir": "wrong"}, "settings": {"output_dir": str(odd)}}))
    slurm.run(flags=("--config", recipe))
    assert (odd / "slurm").is_dir()
    slurm.run(flags=("--config", recipe, f"--output_dir={tmp_path / 'other'}"))
    assert f"{tmp_path}/other/slurm/7.0.log" in slurm.calls()[-1], "flags take precedence"


def test_a_job_without_an_output_folder_or_a_script_says_so():
    job = os.environ | {"SLURM_JOB_ID": "7"}
    done = bash(LAUNCH / "train.slurm", ROOT / "train_rm.py", "--seed", "1", env=job)
    assert done.returncode == 2 and "error: --output_dir is missing" in done.stderr
    for file, problem in (
        ("none.json", "no such file"),
        ("/dev/zero", "no such file"),
        (LAUNCH / "venv.sh", "no JSON"),
    ):
        done = bash(LAUNCH / "train.slurm", ROOT / "train_rm.py", "--config", file, env=job)
        assert done.returncode == 2 and done.stderr.startswith(f"error: --config {file}") and problem in done.stderr
    done = bash(LAUNCH / "train.slurm", "train_mr.py", "--output_dir", "o", env=job)
    assert done.returncode == 2 and "error: train_mr.py: no such file" in done.stderr
    done = bash(LAUNCH / "train.slurm", "train_rm.py")
    assert done.returncode == 1 and "give it to sbatch" in done.stderr
