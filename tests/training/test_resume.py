"""rm.training.resume: where a run begins, whatever its folder holds: checkpoints of other numbers of ranks, corrupt
checkpoints, other settings, planted pickles.
"""

import functools
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_rm
from rm.distributed import checkpoint, offload
from rm.hf import hub, weights
from rm.scoring import contract
from rm.training import trackers
from rm.training.signals import FIRST_STEP
from tests.ranks import run_ranks
from tests.runs import (
    assert_same,
    checkpoints,
    fault,
    main,
    outcome,
    settings,
    steps_saved,
    undisturbed,
    world,
)


@functools.cache
def killed(processes: int, step: int, **changes) -> Path:
    """The folder of a run that was killed in this step."""
    folder = Path(tempfile.mkdtemp(dir=world())) / "out"
    with pytest.raises(RuntimeError):
        run_ranks(processes, main, settings(folder, **changes), fault(train_rm, "train_step", step))
    return folder


def interrupted(out: Path, processes: int = 1, step: int = 9, **changes):
    """The settings of a run that was killed in this step: in 9 the checkpoints are of 4 and 6, in 5 of 2."""
    shutil.copytree(killed(processes, step, **changes), out)
    return settings(out, **changes)


@pytest.mark.parametrize("changes", [{}, {"use_lora": True, "lora_dropout": 0.0}], ids=["all weights", "lora"])
def test_a_run_resumes_with_other_numbers_of_processes_and_micro_batches(changes, tmp_path):
    config = settings(tmp_path / "out", **changes)
    for processes, step, max_tokens, group_size in ((2, 4, 200, 1), (4, 4, 100, 2)):
        part = settings(tmp_path / "out", max_tokens=max_tokens, shard_group_size=group_size, save_steps=1, **changes)
        with pytest.raises(RuntimeError):
            run_ranks(processes, main, part, fault(train_rm, "train_step", step))
    run_ranks(1, main, config)
    resumed, expected = outcome(config), undisturbed(1, **changes)
    assert [line["step"] for line in resumed[1]] == [line["step"] for line in expected[1]]
    for name in ("loss", "grad_norm", "eval_loss"):
        one, two = ([line[name] for line in lines if name in line] for lines in (resumed[1], expected[1]))
        assert one == pytest.approx(two, rel=1e-4)
    for name, values in resumed[0].items():
        assert (values - expected[0][name]).norm() <= 1e-3 * expected[0][name].norm()


def test_a_run_on_pairs_grouped_by_prompt_with_an_sft_loss_resumes_bit_identically(tmp_path):
    changes = dict(
        dataset_path=(str(world() / "prompts.json"),), group_by_prompt=True, sft_loss_coefficient=0.01, save_steps=2
    )
    config = interrupted(tmp_path / "out", step=5, **changes)
    run_ranks(1, main, config)
    assert_same(outcome(config), undisturbed(1, **changes))
    line = next(line for line in outcome(config)[1] if "sft_loss" in line)
    assert line["pairs_per_step"] >= 8 and line["prompts_per_step"] < 4


@pytest.mark.parametrize("state", ["drop", "cpu"])
def test_within_lisas_interval_a_run_resumes_with_the_same_layers_and_moments(state, tmp_path):
    dtype = "bfloat16" if state == "cpu" else "float32"
    lisa = {"use_lisa": True, "lisa_activated_layers": 1, "lisa_interval_steps": 3, "lisa_state": state}
    lisa |= {"optimizer_state_dtype": dtype}
    config = interrupted(tmp_path / "out", processes=2, step=6, save_steps=1, **lisa)
    assert steps_saved(config)[-1] % 3  # not where layers are redrawn
    run_ranks(2, main, config)
    assert_same(outcome(config), undisturbed(2, save_steps=1, **lisa))


def test_a_run_resumes_bit_equal_with_its_states_and_activations_in_host_memory(tmp_path, monkeypatch):
    interrupted(tmp_path / "out", processes=2)
    config = settings(tmp_path / "out", cpu_offload=True, activation_offloading=True)
    monkeypatch.setattr(offload, "SMALLEST", 1)
    run_ranks(2, main, config)
    assert_same(outcome(config), undisturbed(2))


def slow_disk(slow: int):
    """A fault: one rank takes long to read each tensor of weights and checkpoints."""

    def inject() -> None:
        if int(os.environ["RANK"]) == slow:
            for module, name in ((weights, "_copy"), (checkpoint, "_copy_overlap")):
                read = getattr(module, name)
                setattr(module, name, lambda *args, read=read: (time.sleep(0.06), read(*args))[1])

    return inject


def test_the_others_wait_for_a_process_that_reads_slowly(tmp_path):
    """As from a busy network disk: weights and checkpoint take longer than --stall_timeout allows a step."""
    interrupted(tmp_path / "out", processes=2)
    config = settings(tmp_path / "out", stall_timeout=2)
    began = time.monotonic()
    run_ranks(2, main, config, slow_disk(slow=1))
    assert time.monotonic() - began > 2 * FIRST_STEP
    assert_same(outcome(config), undisturbed(2))


@pytest.mark.parametrize("changes", [{}, {"use_lora": True}], ids=["all weights", "lora"])
def test_after_a_full_disk_at_the_contract_only_the_end_is_done_again(changes, tmp_path):
    """The model has been written by then; without its contract the run is not finished."""
    full = fault(contract, "write", 1, lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    config = settings(tmp_path / "out", **changes)
    with pytest.raises(RuntimeError, match="No space left"):
        run_ranks(1, main, config, full)
    assert (tmp_path / "out" / "model").exists() and not (
        tmp_path / "out" / contract.last_file(config.lora.use_lora)
    ).exists()
    run_ranks(1, main, config)
    assert_same(outcome(config), undisturbed(1, **changes))
    assert (tmp_path / "out" / contract.last_file(config.lora.use_lora)).exists()

    (tmp_path / "out" / "exit.json").unlink()  # a full disk prevents that it is written
    run_ranks(1, main, config)
    assert json.loads((tmp_path / "out" / "exit.json").read_text())["status"] == "finished"


def cut(folder: Path) -> None:
    file = folder / "rank_00000.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def flip(name: str):
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-50] ^= 4
        (folder / name).write_bytes(content)

    return damage


def without(name: str):
    return lambda folder: (folder / name).unlink()


def half_written(folder: Path) -> None:
    for name in ("COMPLETE", "state.json"):
        (folder / name).unlink()


# what is wrong with a checkpoint -> (processes, what does it, the message)
DAMAGE = {
    "truncated": (1, cut, "bytes instead of"),
    "a bit flipped in one rank's file": (2, flip("rank_00001.safetensors"), "does not have its checksum"),
    "a bit flipped in state.json": (1, flip("state.json"), "has changed since it was written"),
    "half-written": (1, half_written, "has no COMPLETE"),
    "a file gone": (2, without("rank_00000.safetensors"), "cannot be read"),
}


@pytest.mark.parametrize(("processes", "damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_corrupt_checkpoint_is_skipped_for_the_one_before(processes, damage, message, tmp_path, capfd):
    config = interrupted(tmp_path / "out", processes=processes)
    assert steps_saved(config) == [4, 6]
    damage(checkpoints(config)[-1])
    run_ranks(processes, main, config)
    printed = capfd.readouterr()
    assert f"skipping a corrupt checkpoint: {tmp_path}" in printed.err and message in printed.err
    assert "resuming from" in printed.out and "step_4" in printed.out.split("resuming from")[1].splitlines()[0]
    assert_same(outcome(config), undisturbed(processes))


def test_a_run_whose_checkpoints_are_all_corrupt_does_not_start_anew(tmp_path):
    config = interrupted(tmp_path / "out", step=5)
    for folder in checkpoints(config):
        cut(folder)
    with pytest.raises(RuntimeError, match="all checkpoints in .* are corrupt: delete them to start anew"):
        run_ranks(1, main, config)
    assert steps_saved(config) == [2]


def other_model(tmp_path) -> str:
    """The same architecture, other weights."""
    shutil.copytree(world() / "model", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-2000:] = bytes(2000)
    file.write_bytes(content)
    return str(tmp_path / "model")


def other_data(tmp_path) -> tuple[str, ...]:
    records = json.loads((world() / "pairs.json").read_text())
    records[3]["positive"] += " Indeed."
    (tmp_path / "data.json").write_text(json.dumps(records))
    return (str(tmp_path / "data.json"),)


def listed(folder: Path) -> dict:
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()}


def test_another_training_is_refused_by_name_and_changes_nothing(tmp_path):
    interrupted(tmp_path / "out", step=5)
    before = listed(tmp_path / "out")
    different = {
        "learning_rate: then 0.001, now 0.002": dict(learning_rate=2e-3),
        "seed: then 0, now 1": dict(seed=1),
        "global_batch_size: then 8, now 4": dict(global_batch_size=4),
        "num_train_epochs: then 3, now 4.0": dict(num_train_epochs=4.0),
        "use_lora: then False, now True": dict(use_lora=True),
        "dtype: then float32, now bfloat16": dict(dtype="bfloat16"),
        "data: then .*, now ": dict(dataset_path=other_data(tmp_path)),
        "model: then .*, now ": dict(model_name_or_path=other_model(tmp_path)),
        "already holds another run": dict(resume_from_checkpoint="none"),
    }
    for message, changes in different.items():
        with pytest.raises(RuntimeError, match=f"ValueError: .*{message}"):
            run_ranks(1, main, settings(tmp_path / "out", **changes))
        assert listed(tmp_path / "out") == before


def test_settings_that_do_not_change_the_result_may_change_on_resume(tmp_path):
    interrupted(tmp_path / "out", step=5)
    moved = tmp_path / "moved.json"
    shutil.copy(world() / "pairs.json", moved)
    config = settings(
        tmp_path / "out", dataset_path=(str(moved),), save_steps=3, save_total_limit=5, max_tokens=300,
        gradient_checkpointing="full", stall_timeout=60.0,
    )  # fmt: skip
    run_ranks(1, main, config)
    starts = json.loads((tmp_path / "out" / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 2] and steps_saved(config) == [2, 3, 6, 9]


def offline() -> None:
    """For `main`: neither the hub nor a tracker answers."""

    def refuse(*_, **__):
        raise ConnectionError

    hub.fetched = trackers.log_in = refuse  # in that process only


def test_a_finished_run_is_reported_offline_and_left_alone(tmp_path, capfd):
    out = tmp_path / "out"
    run_ranks(1, main, settings(out))
    run = json.loads((out / "run.json").read_text())
    run["settings"]["chat_template"], run["given"] = "/cache/a.jinja", {"chat_template": "hub:o/n/a.jinja"}
    (out / "run.json").write_text(json.dumps(run))
    before = listed(out)
    for name in ("hub:o/n/a.jinja", "/cache/a.jinja"):
        run_ranks(2, main, settings(out, chat_template=name), offline)
        assert "this run is finished; nothing to do" in capfd.readouterr().out
    assert listed(out) == before
    with pytest.raises(RuntimeError, match="chat_template: then /cache.*b.jinja; learning_rate: then 0.001, now 0.5"):
        run_ranks(1, main, settings(out, chat_template="hub:o/n/b.jinja", learning_rate=0.5))


@pytest.mark.parametrize("changes", [{}, {"use_lora": True}], ids=["all weights", "lora"])
def test_the_end_of_a_finished_run_whose_weights_are_damaged_is_done_again(changes, tmp_path, capfd):
    config = settings(tmp_path / "out", **changes)
    run_ranks(1, main, config)
    last = tmp_path / "out" / contract.last_file(config.lora.use_lora)
    file = last.parent / ("adapter_model.safetensors" if changes else "model.safetensors")
    size = file.stat().st_size
    os.truncate(file, size - 100)
    run_ranks(1, main, config)
    assert f"this run is finished, but {file} is not a whole safetensors file" in capfd.readouterr().out
    assert file.stat().st_size == size and last.exists()
    assert_same(outcome(config), undisturbed(1, **changes))
    file.unlink()
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    with pytest.raises(RuntimeError, match="its weights are damaged, and it has no checkpoint"):
        run_ranks(1, main, config)


def test_a_run_killed_before_its_first_checkpoint_starts_anew(tmp_path):
    config = interrupted(tmp_path / "out", step=2)
    run_ranks(1, main, config)
    assert_same(outcome(config), undisturbed(1))


def test_a_new_folder_may_start_from_another_folders_checkpoint(tmp_path):
    config = interrupted(tmp_path / "out", step=9)
    other = settings(tmp_path / "other", resume_from_checkpoint=str(checkpoints(config)[-1]))
    run_ranks(1, main, other)
    resumed_weights, lines = outcome(other)
    assert_same((resumed_weights, []), (undisturbed(1)[0], []))
    assert [line["step"] for line in lines] == [6, 8, 9, 9]
    for wrong in ("latest", str(tmp_path / "out" / "checkpoints")):
        with pytest.raises(RuntimeError, match="expected auto, none or the folder of a checkpoint"):
            run_ranks(1, main, settings(tmp_path / "third", resume_from_checkpoint=wrong))


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match="cannot be written: .*file is a file"):
        run_ranks(1, main, settings(tmp_path / "file" / "out", model_name_or_path="nowhere"))
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount a read-only file system")
    try:
        with pytest.raises(RuntimeError, match="cannot be written: .*disk is read-only"):
            run_ranks(1, main, settings(disk / "out", model_name_or_path="nowhere"))
    finally:
        subprocess.run(["umount", disk], check=True)


class Bomb:
    """Its pickle runs a command when it is loaded."""

    def __init__(self, touched: Path):
        self.touched = touched

    def __reduce__(self):
        return os.system, (f"touch {self.touched}",)


def plant(touched: Path, file: Path) -> None:
    with open(file, "wb") as out:
        torch.save(Bomb(touched), out)


def test_planted_pickles_are_never_executed(tmp_path):
    config = interrupted(tmp_path / "out", step=5)
    (folder,) = checkpoints(config)
    touched, model = tmp_path / "touched", tmp_path / "model"
    shutil.copytree(world() / "model", model)
    for place in (folder, folder.parent, tmp_path / "out", model):
        for name in (".metadata", "rng_00000.pt", "optimizer.pt", "training_args.bin", "pytorch_model.bin", "x.pkl"):
            plant(touched, place / name)
    config = settings(tmp_path / "out", model_name_or_path=str(model))
    run_ranks(1, main, config)
    assert_same(outcome(config), undisturbed(1))

    plant(touched, model / "model.safetensors")
    with pytest.raises(RuntimeError, match="is not a whole safetensors file"):
        run_ranks(1, main, settings(tmp_path / "second", model_name_or_path=str(model)))
    (model / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="pickled weights .*are not read here"):
        run_ranks(1, main, settings(tmp_path / "third", model_name_or_path=str(model)))
    again = interrupted(tmp_path / "fourth", step=5)
    plant(touched, checkpoints(again)[0] / "rank_00000.safetensors")
    with pytest.raises(RuntimeError, match="all checkpoints in .* are corrupt"):
        run_ranks(1, main, again)
    assert not touched.exists()
    torch.load(model / "x.pkl", weights_only=False)  # the bomb works
    assert touched.exists()


CONSTANT = dict(lr_scheduler_type="constant", save_steps=4)


@pytest.mark.parametrize("changes", [{}, {"use_lora": True}], ids=["all weights", "lora"])
def test_a_finished_run_of_a_constant_learning_rate_can_be_extended(changes, tmp_path, capfd):
    longer = undisturbed(1, warmup_ratio=0.0, **CONSTANT, **changes)
    short = settings(tmp_path / "out", num_train_epochs=2, warmup_ratio=0.0, **CONSTANT, **changes)
    run_ranks(1, main, short)
    of_step_6 = outcome(short)[0]
    config = settings(tmp_path / "out", warmup_ratio=0.0, **CONSTANT, **changes)
    with pytest.raises(RuntimeError):  # killed on the way: the model of the shorter run is not taken for the longer's
        run_ranks(1, main, config, fault(train_rm, "train_step", 4))
    capfd.readouterr()
    run_ranks(1, main, config)
    extended = outcome(config)
    assert all(torch.equal(extended[0][name], values) for name, values in longer[0].items())
    evaluations = [[line for line in lines if "eval_loss" in line] for lines in (extended[1], longer[1])]
    assert evaluations[0] == evaluations[1]
    kept = weights_of(tmp_path / "out" / "model_step_6")
    assert all(torch.equal(kept[name], values) for name, values in of_step_6.items())
    run_ranks(1, main, config)
    assert "this run is finished; nothing to do" in capfd.readouterr().out


def weights_of(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


def test_a_run_that_cannot_be_extended_says_why_in_a_line(tmp_path):
    run_ranks(1, main, settings(tmp_path / "linear", num_train_epochs=1))
    with pytest.raises(
        RuntimeError, match="then 1, now 3. With --lr_scheduler_type linear the learning rate depends on"
    ):
        run_ranks(1, main, settings(tmp_path / "linear"))
    out = tmp_path / "constant"
    run_ranks(1, main, settings(out, num_train_epochs=2, **CONSTANT))
    for changes, message in (
        ({"max_steps": 3}, "step_4 is of step 4, and the training would end at 3: give it more steps"),
        ({"max_steps": 200}, "step_4 is of step 4, and in a training of 200 steps the learning rate rises until 6"),
        ({"num_train_epochs": 3, "learning_rate": 1e-4}, "learning_rate: then 0.001, now 0.0001. Give the same values"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run_ranks(1, main, settings(out, **CONSTANT | changes))
        assert (out / "model" / "scoring.json").exists()
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(RuntimeError, match="is finished, and --save_steps has left no checkpoint to extend it from"):
        run_ranks(1, main, settings(out, **CONSTANT))
