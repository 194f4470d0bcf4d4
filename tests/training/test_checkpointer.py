"""rm.training.checkpointer: a run that is killed, stopped or out of disk at any moment loses nothing that was saved,
and goes on.

Every run is the script's own `main` in forked processes; who is killed is killed with SIGKILL.
"""

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
from rm.hf import weights
from rm.training import checkpointer
from tests.ranks import run_ranks
from tests.runs import (
    assert_same,
    at_call,
    befalls,
    checkpoints,
    exit_marker,
    flags,
    main,
    outcome,
    settings,
    steps_saved,
    undisturbed,
)

ROOT = Path(__file__).parents[2]
PHASES = {
    "in a step": (train_rm, "train_step", 6),
    "in an evaluation": (batch.EvalBatches, "__iter__", 2),
    "before its file is whole": (checkpoint, "save_file", 2),
    "between its file and its description": (checkpoint, "sync", 2 * 5 + 2),
    "before the rename": (checkpoint.os, "rename", 3),
    "between rename and prune": (checkpointer.Checkpointer, "_prune", 3),
    "in the middle of pruning": (checkpoint.shutil, "rmtree", 2),
    "in the export": (weights, "save", 1),
}


@pytest.mark.parametrize(("phase", "processes"), [(phase, 1 + i % 2) for i, phase in enumerate(PHASES)])
def test_killed_at_any_moment_it_goes_on_bit_for_bit(phase, processes, tmp_path):
    chosen = settings(tmp_path / "out")
    with pytest.raises(RuntimeError, match="failed|died"):
        run_ranks(processes, main, chosen, befalls(*PHASES[phase]))
    assert not (tmp_path / "out" / "model").exists() and not (tmp_path / "out" / "exit.json").exists()
    assert steps_saved(chosen)

    run_ranks(processes, main, chosen)
    assert_same(outcome(chosen), undisturbed(processes))
    assert exit_marker(chosen)["status"] == "finished"
    assert len(steps_saved(chosen)) == 2 and not list((tmp_path / "out" / "checkpoints").glob(".*"))


def signalled(owner, name: str, call: int, rank: int = 0, number: int = signal.SIGUSR1):
    """A misfortune: one rank alone gets a signal, twice, when `owner.name` is called for this time."""

    def twice():
        for _ in range(2):
            os.kill(os.getpid(), number)
        time.sleep(0.2)  # the thread that listens has heard it

    return befalls(owner, name, call, twice, rank)


METHODS = {
    "adapters with dropout": dict(script=train_rm, use_lora=True, lora_dropout=0.2),
    "one layer at a time": dict(script=train_sft, use_lisa=True, lisa_activated_layers=1, lisa_interval_steps=3),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_signal_to_one_rank_makes_all_save_at_the_same_step_and_leave(method, tmp_path):
    chosen = settings(tmp_path / "out", save_steps=0, **method)
    run_ranks(2, main, chosen, signalled(method["script"], "train_step", 5, rank=1))
    marker = exit_marker(chosen)
    assert marker["status"] == "stopped" and marker["steps"] == 9
    assert steps_saved(chosen) == [marker["step"]] and 5 <= marker["step"] <= 6
    run_ranks(2, main, chosen)
    assert_same(outcome(chosen), undisturbed(2, save_steps=0, **method))


def test_a_signal_during_an_evaluation_ends_it_and_the_evaluation_is_made_up_for(tmp_path):
    chosen = settings(tmp_path / "out", max_tokens=40)  # an evaluation of several rows
    run_ranks(1, main, chosen, signalled(batch.EvalBatches, "__iter__", 2, number=signal.SIGTERM))
    assert exit_marker(chosen) | {"time": 0} == {
        "status": "stopped", "step": 6, "steps": 9, "reason": "SIGTERM", "time": 0,
    }  # fmt: skip
    lines = [json.loads(line) for line in open(tmp_path / "out" / "metrics.jsonl")]
    assert not any(line["step"] == 6 and "eval_loss" in line for line in lines)
    run_ranks(1, main, chosen)
    assert_same(outcome(chosen), undisturbed(1, max_tokens=40))


def test_a_signal_while_a_checkpoint_is_being_written_waits_for_it(tmp_path):
    chosen = settings(tmp_path / "out", save_steps=4)

    def slow_disk_and_signal():
        checkpoint.save_file = at_call(1, lambda: time.sleep(0.5), checkpoint.save_file)
        signalled(train_rm, "train_step", 5)()

    run_ranks(2, main, chosen, slow_disk_and_signal)
    step = exit_marker(chosen)["step"]
    assert exit_marker(chosen)["status"] == "stopped" and steps_saved(chosen) == [4, step]
    run_ranks(2, main, chosen)
    assert_same(outcome(chosen), undisturbed(2, save_steps=4))


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path):
    chosen = settings(tmp_path / "out", save_steps=3)
    order = []

    def slowly():
        checkpoint.save_file = at_call(1, lambda: time.sleep(0.3) or order.append("written"), checkpoint.save_file)
        train_rm.train_step = at_call(5, lambda: order.append("step 5"), train_rm.train_step)

    def run():
        main(chosen, slowly)
        return order

    assert run_ranks(1, run) == [["step 5", "written"]]
    blocked = [line.get("checkpoint_blocked_seconds") for line in map(json.loads, open(tmp_path / "out/metrics.jsonl"))]
    assert any(blocked) and len(steps_saved(chosen)) == 2


def test_a_checkpoint_that_fails_is_told_and_the_next_one_tried_and_two_in_a_row_end_the_run(tmp_path, capfd):
    def full(*_):
        raise OSError(28, "No space left on device")

    one = settings(tmp_path / "one")
    run_ranks(2, main, one, befalls(checkpoint, "save_file", 2, full, rank=1))
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
    """A file system of its own, of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip(f"cannot mount a small file system: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full_ends_the_run_with_one_line_and_harms_nothing(small_disk):
    chosen = settings(small_disk / "out")
    command = [sys.executable, "train_rm.py", *flags(chosen)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("No space left on device") == 2  # once for every checkpoint that was tried
    assert done.stderr.splitlines()[-1].startswith("error: two checkpoints in a row could not be written")
    assert steps_saved(chosen) == [2, 4]
    assert all(checkpoint.read(folder) for folder in checkpoints(chosen))
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    run_ranks(1, main, chosen)
    assert_same(outcome(chosen), undisturbed(1))


def test_a_loss_that_is_not_finite_is_never_saved(tmp_path):
    chosen = settings(tmp_path / "out", logging_steps=100, eval_steps=None)
    step = train_rm.train_step

    def broken(*args):
        sums = step(*args)
        return sums | {"loss": sums["loss"] * math.nan}

    def from_six():
        calls = []
        train_rm.train_step = lambda *args: calls.append(1) or (broken if len(calls) > 5 else step)(*args)

    with pytest.raises(RuntimeError, match="step 6: the loss is nan"):
        run_ranks(2, main, chosen, from_six)
    assert steps_saved(chosen) == [2, 4]
    assert exit_marker(chosen)["status"] == "failed" and "the loss is nan" in exit_marker(chosen)["reason"]
    run_ranks(2, main, chosen)
    assert_same(outcome(chosen), undisturbed(2, logging_steps=100, eval_steps=None))


def test_save_total_limit_keeps_the_newest_and_zero_keeps_all(tmp_path):
    for limit, expected in ((1, [8]), (3, [4, 6, 8]), (0, [2, 4, 6, 8])):
        chosen = settings(tmp_path / str(limit), save_total_limit=limit)
        run_ranks(1, main, chosen)
        assert steps_saved(chosen) == expected


def test_memory_files_and_threads_of_a_run_are_given_back(tmp_path):
    def counted():
        def now():
            return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

        main(settings(tmp_path / "first"))
        before = now()
        main(settings(tmp_path / "second"))
        return before, now()

    ((before, after),) = run_ranks(1, counted)
    assert after[0] <= before[0] and after[1] <= before[1] + 1  # the loader's packer is joined by the collector


def test_sigterm_under_torchrun_saves_at_one_step_and_the_same_command_goes_on(tmp_path):
    """Real torchrun, real signal; sent three times, as a scheduler may."""
    changes = dict(num_train_epochs=40.0, save_steps=500, logging_steps=1)
    chosen = settings(tmp_path / "out", **changes)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "train_rm.py"]
    process = subprocess.Popen(
        [sys.executable, *launch, *flags(chosen)],
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
    marker = exit_marker(chosen)
    assert marker["status"] == "stopped" and marker["reason"] == "SIGTERM" and 0 < marker["step"] < marker["steps"]
    assert steps_saved(chosen) == [marker["step"]]
    run_ranks(2, main, chosen)
    assert_same(outcome(chosen), undisturbed(2, **changes))
