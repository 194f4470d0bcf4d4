"""rm.distributed.lease: one run at a time in a folder, and nothing that ended stands in the way of the next."""

import json
import os
import re
import signal
import time
from dataclasses import replace

import pytest

from rm.distributed import lease
from rm.distributed import process_group as dist
from rm.distributed.lease import FILE, RUNS_OUT_AFTER, Lease
from tests import commands
from tests.ranks import run_ranks


def in_child(function) -> int:
    """The pid of a forked process that runs `function`, and then ends without giving anything back."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        finally:
            os._exit(1)
    return pid


def wait_for(condition, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def left(tmp_path):
    """Leaves the lease of a process that was killed in the folder, with changes; returns the folder."""

    def leave(age: float = 0.0, **changes):
        (tmp_path / FILE).unlink(missing_ok=True)
        held = Lease(tmp_path)
        held.holder = replace(held.holder, id="of another", pid=2**31 - 1, **changes)
        (tmp_path / FILE).write_text(json.dumps(vars(held.holder)))
        os.utime(tmp_path / FILE, (time.time() - age,) * 2)
        held.released.set()
        return tmp_path

    return leave


def test_a_second_run_is_refused_by_name_until_the_first_ends(tmp_path):
    out = tmp_path / "runs" / "rm"
    first = Lease(out)
    with pytest.raises(ValueError, match=rf"{out} is in use by process {os.getpid()} on .* since 20.*name another fol"):
        Lease(out)
    assert [file.name for file in out.iterdir()] == [FILE]
    first.release()
    assert not (tmp_path / "runs").exists()  # made by the lease, and nothing was written
    out.mkdir(parents=True)
    Lease(out).release()
    assert list(out.iterdir()) == []


def test_the_scripts_refuse_a_folder_in_use_on_all_ranks(tmp_path):
    held = Lease(tmp_path)
    for script, processes in (("train_rm.py", 2), ("eval_rm.py", 0)):
        flags = ("--model_name_or_path", "m", "--dataset_path", "d", "--output_dir", tmp_path)
        done = commands.run(script, *flags, processes=processes)
        assert done.returncode == 2 and re.search(r"^error: --output_dir .* is in use by process", done.stderr, re.M)
    held.release()
    assert not (tmp_path / FILE).exists()


def test_a_process_that_was_killed_does_not_stand_in_the_way(tmp_path):
    pid = in_child(lambda: (Lease(tmp_path), signal.pause()))
    wait_for((tmp_path / FILE).exists)
    with pytest.raises(ValueError, match=f"process {pid} "):
        Lease(tmp_path)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: lease._process_start(pid) == "ended")  # a zombie is no process that writes
    Lease(tmp_path).release()
    wait(pid)


def test_a_process_number_that_was_given_out_again_is_no_run(left):
    Lease(left(process_start="0")).release()
    folder = left()
    content = json.loads((folder / FILE).read_text()) | {"pid": os.getpid(), "process_start": "0"}
    (folder / FILE).write_text(json.dumps(content))
    Lease(folder).release()


@pytest.mark.parametrize(
    ("age", "changes", "environment", "free"),
    [
        (RUNS_OUT_AFTER - 20, {}, {}, False),
        (RUNS_OUT_AFTER + 1, {}, {}, True),
        (-RUNS_OUT_AFTER - 1, {}, {}, True),  # of the future: a clock was set back
        (0, {"slurm_job": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, True),  # requeued
        (0, {"slurm_job": "7"}, {"SLURM_JOB_ID": "7"}, False),  # two steps of one job
        (0, {"slurm_job": "7"}, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}, False),
        (0, {"torchrun": "7.0"}, {"TORCHELASTIC_RUN_ID": "7.0"}, True),  # rank 0 moved to another machine
        (0, {"torchrun": "none"}, {"TORCHELASTIC_RUN_ID": "none"}, False),  # the default of every torchrun
    ],
)
def test_a_lease_of_another_machine_runs_out_but_for_the_same_job(age, changes, environment, free, left, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    folder = left(age, machine="another", host="node7", **changes)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if free:
        Lease(folder).release()
    else:
        with pytest.raises(ValueError, match=f"on node7.* last seen .* s ago.* free {RUNS_OUT_AFTER} s after"):
            Lease(folder)


def test_of_many_that_find_an_ended_run_one_takes_over(left):
    folder = left()

    def contend():
        try:
            Lease(folder)
        except ValueError:
            os._exit(3)
        (folder / f"winner {os.getpid()}").touch()
        signal.pause()  # holds it while the others try

    children = [in_child(contend) for _ in range(12)]
    wait_for(lambda: sum(lease._process_start(pid) == "ended" for pid in children) >= 11)
    (winner,) = folder.glob("winner *")
    os.kill(int(winner.name.split()[1]), signal.SIGKILL)
    winner.unlink()
    assert sorted(wait(pid) for pid in children) == [-signal.SIGKILL] + [3] * 11
    assert [file.name for file in folder.iterdir()] == [FILE]


def test_a_lease_is_renewed_and_a_process_that_lost_it_ends(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(lease, "RENEWED_EVERY", 0.02)
    pid = in_child(lambda: (Lease(tmp_path), signal.pause()))
    wait_for((tmp_path / FILE).exists)
    os.utime(tmp_path / FILE, (0, 0))
    wait_for(lambda: (tmp_path / FILE).stat().st_mtime > 0)
    content = json.loads((tmp_path / FILE).read_text())
    (tmp_path / "new").write_text(json.dumps(content | {"id": "x", "host": "node7\n\x1b"}))
    os.replace(tmp_path / "new", tmp_path / FILE)
    assert wait(pid) == 2
    assert rf"was taken over by process {pid} on node7\n\x1b since" in capfd.readouterr().err


@pytest.mark.parametrize("content", [b"", b"\xff{", b"[1]", b'{"id": 5}', b"[" * 100000])
def test_a_damaged_lease_runs_out_as_well(content, tmp_path):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ValueError, match=f"a run whose {FILE} cannot be read"):
        Lease(tmp_path)
    os.utime(tmp_path / FILE, (0, 0))
    Lease(tmp_path).release()


def test_what_is_no_file_is_refused_in_place_of_a_lease(tmp_path):
    makers = (os.mkfifo, lambda file: file.symlink_to("/dev/zero"), lambda file: file.symlink_to("nothing"))
    for name, make in zip("abc", makers, strict=True):
        (tmp_path / name).mkdir()
        make(tmp_path / name / FILE)
        with pytest.raises(ValueError, match=f"{name}/{FILE}: is .*give a file"):
            Lease(tmp_path / name)


def test_what_a_killed_process_left_half_written_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "sync", lambda file: (file.write_text(""), os.kill(os.getpid(), signal.SIGKILL)))
    assert wait(in_child(lambda: Lease(tmp_path))) == -signal.SIGKILL
    monkeypatch.undo()
    (left,) = tmp_path.iterdir()
    of_a_living_one = left.with_name(left.name.replace(left.name.split(".")[-2], str(os.getpid())))
    of_a_living_one.touch()
    Lease(tmp_path).release()
    assert list(tmp_path.iterdir()) == [of_a_living_one]


def test_without_hard_links_the_second_run_is_refused_as_well(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    first = Lease(tmp_path)
    with pytest.raises(ValueError, match="in use by process"):
        Lease(tmp_path)
    first.release()
    assert list(tmp_path.iterdir()) == []


def test_the_lease_of_a_group_is_that_of_its_first_rank(tmp_path):
    def hold():
        with lease.held(str(tmp_path)):
            found = os.getpid(), json.loads((tmp_path / FILE).read_text())["pid"]
            dist.barrier()  # the first rank releases it
        return found

    (first, holder), (second, _) = run_ranks(2, hold)
    assert first == holder != second and not (tmp_path / FILE).exists()
