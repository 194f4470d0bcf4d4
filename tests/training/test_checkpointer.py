"""rm.training.checkpointer: a run that is killed or stopped, or whose disk is full, loses nothing that was saved, and
resumes.

Every run is the script's own `main` in forked processes; processes are killed with SIGKILL.
"""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train_rm
import train_sft
from rm.data import batch
from rm.distributed import checkpoint
from rm.hf import saving
from rm.training import checkpointer
from tests import commands
from tests.ranks import run_ranks
from tests.runs import (
    assert_same,
    at_call,
    checkpoints,
    exit_marker,
    fault,
    flags,
    main,
    outcome,
    settings,
    steps_saved,
    undisturbed,
)

ROOT = Path(__file__).parents[2]
# when a run is killed -> (its processes, the owner and name of a function, the call at which rank 0 is killed)
PHASES = {
    "in a step": (2, train_rm, "train_step", 6),
    "in an evaluation": (1, batch.EvalBatches, "__iter__", 2),
    "before its file is written": (2, checkpoint, "save_file", 2),
    "between its file and its description": (1, checkpoint, "sync", 2 * 4 + 1),  # 4 calls for each checkpoint
    "before the rename": (2, checkpoint.os, "rename", 3),
    "between rename and prune": (1, checkpointer.Checkpointer, "_prune", 3),
    "in the middle of pruning": (1, checkpoint.shutil, "rmtree", 2),
    "in the export": (1, saving, "save", 1),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_killed_at_any_moment_resumes_bit_for_bit(phase, tmp_path):
    processes, *call = PHASES[phase]
    config = settings(tmp_path / "out")
    with pytest.raises(RuntimeError, match="failed|died"):
        run_ranks(processes, main, config, fault(*call))
    assert not (tmp_path / "out" / "model").exists() and not (tmp_path / "out" / "exit.json").exists()
    assert steps_saved(config)

    run_ranks(processes, main, config)
    assert_same(outcome(config), undisturbed(processes))
    assert exit_marker(config)["status"] == "finished"
    assert len(steps_saved(config)) == 2 and not list((tmp_path / "out" / "checkpoints").glob(".*"))


def signalled(owner, name: str, call: int, rank: int = 0, number: int = signal.SIGUSR1):
    """A fault: one rank alone receives a signal, twice, at its call of this number of `owner.name`."""

    def twice():
        for _ in range(2):
            os.kill(os.getpid(), number)
        time.sleep(0.2)  # for the watchdog's thread to notice it

    return fault(owner, name, call, twice, rank)


METHODS = {
    "adapters with dropout": dict(script=train_rm, use_lora=True, lora_dropout=0.2),
    "one layer at a time": dict(script=train_sft, use_lisa=True, lisa_activated_layers=1, lisa_interval_steps=3),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_signal_to_one_rank_makes_all_save_at_the_same_step_and_stop(method, tmp_path):
    config = settings(tmp_path / "out", save_steps=0, **method)
    run_ranks(2, main, config, signalled(method["script"], "train_step", 5, rank=1))
    marker = exit_marker(config)
    assert marker["status"] == "stopped" and marker["steps"] == 9
    assert steps_saved(config) == [marker["step"]] and 5 <= marker["step"] <= 6
    run_ranks(2, main, config)
    assert_same(outcome(config), undisturbed(2, save_steps=0, **method))


def test_an_evaluation_ended_by_a_signal_is_done_again_on_resume(tmp_path):
    config = settings(tmp_path / "out", max_tokens=40)  # an evaluation of several micro-batches
    run_ranks(1, main, config, signalled(batch.EvalBatches, "__iter__", 2, number=signal.SIGTERM))
    assert exit_marker(config) | {"time": 0} == {
        "status": "stopped", "step": 6, "steps": 9, "reason": "SIGTERM", "time": 0,
    }  # fmt: skip
    lines = [json.loads(line) for line in open(tmp_path / "out" / "metrics.jsonl")]
    assert not any(line["step"] == 6 and "eval_loss" in line for line in lines)
    run_ranks(1, main, config)
    assert_same(outcome(config), undisturbed(1, max_tokens=40))


def test_a_stop_waits_for_the_checkpoint_that_is_being_written(tmp_path):
    config = settings(tmp_path / "out", save_steps=4)

    def slow_disk_and_signal():
        checkpoint.save_file = at_call(1, lambda: time.sleep(0.5), checkpoint.save_file)
        signalled(train_rm, "train_step", 5)()

    run_ranks(2, main, config, slow_disk_and_signal)
    step = exit_marker(config)["step"]
    assert exit_marker(config)["status"] == "stopped" and steps_saved(config) == [4, step]
    run_ranks(2, main, config)
    assert_same(outcome(config), undisturbed(2, save_steps=4))


def test_training_continues_while_a_checkpoint_is_written(tmp_path):
    config = settings(tmp_path / "out", save_steps=3)
    order = []

    def slowly():
        checkpoint.save_file = at_call(1, lambda: time.sleep(0.3) or order.append("written"), checkpoint.save_file)
        train_rm.train_step = at_call(5, lambda: order.append("step 5"), train_rm.train_step)

    def run():
        main(config, slowly)
        return order

    assert run_ranks(1, run) == [["step 5", "written"]]
    blocked = [line.get("checkpoint_blocked_seconds") for line in map(json.loads, open(tmp_path / "out/metrics.jsonl"))]
    assert any(blocked) and len(steps_saved(config)) == 2


def test_one_failed_checkpoint_is_reported_and_two_in_a_row_end_the_run(tmp_path, capfd):
    def full(*_):
        raise OSError(28, "No space left on device")

    one = settings(tmp_path / "one")
    run_ranks(2, main, one, fault(checkpoint, "save_file", 2, full, rank=1))
    assert "error [rank 1]: no checkpoint of step 4: [Errno 28] No space left on device" in capfd.readouterr().err
    assert steps_saved(one) == [6, 8] and not list((tmp_path / "one" / "checkpoints").glob(".*"))
    assert_same(outcome(one), undisturbed(2))

    two = settings(tmp_path / "two")

    def from_the_second_on():
        save = checkpoint.save_file
        checkpoint.save_file = lambda tensors, file: save(tensors, file) if ".step_2." in str(file) else full()

    with pytest.raises(RuntimeError, match="two checkpoints in a row could not be written; the newest is of step 2"):
        run_ranks(2, main, two, from_the_second_on)
    assert steps_saved(two) == [2] and exit_marker(two)["status"] == "failed"
    run_ranks(2, main, two)
    assert_same(outcome(two), undisturbed(2))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_ends_the_run_with_one_line_and_spoils_no_checkpoint(small_disk):
    config = settings(small_disk / "out")
    done = commands.run("train_rm.py", *flags(config))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("No space left on device") == 2  # once for every checkpoint that was tried
    assert done.stderr.splitlines()[-1].startswith("error: two checkpoints in a row could not be written")
    assert steps_saved(config) == [2, 4]
    assert all(checkpoint.read(folder) for folder in checkpoints(config))
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    run_ranks(1, main, config)
    assert_same(outcome(config), undisturbed(1))


def test_a_loss_that_is_not_finite_is_never_saved(tmp_path):
    config = settings(tmp_path / "out", logging_steps=100, eval_steps=None)
    step = train_rm.train_step

    def nan_from_step_six():
        calls = itertools.count(1)

        def broken(*args):
            sums, grad_norm = step(*args)
            return (sums if next(calls) < 6 else sums | {"loss": sums["loss"] * math.nan}), grad_norm

        train_rm.train_step = broken

    with pytest.raises(RuntimeError, match="step 6: the loss is nan"):
        run_ranks(2, main, config, nan_from_step_six)
    assert steps_saved(config) == [2, 4]
    assert exit_marker(config)["status"] == "failed" and "the loss is nan" in exit_marker(config)["reason"]
    run_ranks(2, main, config)
    assert_same(outcome(config), undisturbed(2, logging_steps=100, eval_steps=None))


def test_save_total_limit_keeps_the_newest_checkpoints_and_zero_keeps_all(tmp_path):
    for limit, expected in ((1, [8]), (3, [4, 6, 8]), (0, [2, 4, 6, 8])):
        config = settings(tmp_path / str(limit), save_total_limit=limit)
        run_ranks(1, main, config)
        assert steps_saved(config) == expected


def test_a_run_closes_its_files_and_ends_its_threads(tmp_path):
    def counted():
        def open_now():
            return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

        train_rm.main(settings(tmp_path / "first"))  # with the HTML report, unlike runs.main
        before = open_now()
        train_rm.main(settings(tmp_path / "second"))
        return before, open_now()

    ((before, after),) = run_ranks(1, counted)
    assert after[0] <= before[0] and after[1] <= before[1] + 1  # the loader's packing thread ends when it is collected
    assert (tmp_path / "second" / "report.html").exists()


def test_after_sigterm_under_torchrun_the_same_command_resumes(tmp_path):
    """With torchrun itself, and a signal that is sent three times, as a scheduler may."""
    changes = dict(num_train_epochs=12.0, save_steps=500, logging_steps=1, eval_steps=None)
    config = settings(tmp_path / "out", **changes)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train_rm.py"]
    process = subprocess.Popen(
        [sys.executable, *launch, *flags(config)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    metrics = tmp_path / "out" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    process.communicate(timeout=30)
    marker = exit_marker(config)
    assert marker["status"] == "stopped" and marker["reason"] == "SIGTERM" and 0 < marker["step"] < marker["steps"]
    assert steps_saved(config) == [marker["step"]]
    run_ranks(2, main, config)
    assert_same(outcome(config), undisturbed(2, **changes))
