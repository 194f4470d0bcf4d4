"""rm.training.resume: where a run begins, whatever lies in its folder: other ranks, damage, other settings, planted
pickles.
"""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

import train_rm
from rm.distributed import checkpoint
from rm.hf import weights
from rm.scoring import contract
from tests.ranks import run_ranks
from tests.runs import (
    assert_same,
    befalls,
    checkpoints,
    main,
    outcome,
    settings,
    steps_saved,
    undisturbed,
    world,
)


def interrupted(out: Path, processes: int = 1, script=train_rm, step: int = 9, **changes):
    """The settings of a run that was killed in this step: in 9 the checkpoints are of 4 and 6, in 5 of 2."""
    chosen = settings(out, script, **changes)
    with pytest.raises(RuntimeError):
        run_ranks(processes, main, chosen, befalls(script, "train_step", step))
    return chosen


@pytest.mark.parametrize("changes", [{}, {"use_lora": True, "lora_dropout": 0.0}], ids=["all weights", "lora"])
def test_it_goes_on_with_other_numbers_of_processes_and_other_rows(changes, tmp_path):
    chosen = settings(tmp_path / "out", **changes)
    for processes, step, max_tokens, group in ((2, 4, 200, 1), (4, 4, 100, 2)):
        part = settings(tmp_path / "out", max_tokens=max_tokens, shard_group_size=group, save_steps=1, **changes)
        with pytest.raises(RuntimeError):
            run_ranks(processes, main, part, befalls(train_rm, "train_step", step))
    run_ranks(1, main, chosen)
    ours, theirs = outcome(chosen), undisturbed(1, **changes)
    assert [line["step"] for line in ours[1]] == [line["step"] for line in theirs[1]]
    for name in ("loss", "grad_norm", "eval_loss"):
        one, two = ([line[name] for line in lines if name in line] for lines in (ours[1], theirs[1]))
        assert one == pytest.approx(two, rel=1e-4)
    for name, values in ours[0].items():
        assert (values - theirs[0][name]).norm() <= 1e-3 * theirs[0][name].norm()


@pytest.mark.parametrize("kept", ["drop", "keep", "cpu"])
def test_in_the_middle_of_lisas_interval_it_goes_on_with_the_same_layers_and_moments(kept, tmp_path):
    lisa = {"use_lisa": True, "lisa_activated_layers": 1, "lisa_interval_steps": 3, "lisa_state": kept}
    chosen = interrupted(tmp_path / "out", processes=2, step=6, save_steps=1, **lisa)
    assert steps_saved(chosen)[-1] % 3  # not where layers are drawn anew
    run_ranks(2, main, chosen)
    assert_same(outcome(chosen), undisturbed(2, save_steps=1, **lisa))


def crawls(slow: int):
    """To be called in every rank: one whose disk takes its time with every tensor of weights and checkpoints."""

    def prepare() -> None:
        if int(os.environ["RANK"]) == slow:
            for module, name in ((weights, "_copy"), (checkpoint, "_copy_overlap")):
                read = getattr(module, name)
                setattr(module, name, lambda *args, read=read: (time.sleep(0.15), read(*args))[1])

    return prepare


def test_one_process_that_reads_slowly_is_waited_for(tmp_path):
    """As from a busy network disk: longer than --stall_timeout allows a step, weights and checkpoint alike."""
    chosen = interrupted(tmp_path / "out", processes=2, stall_timeout=2)
    began = time.monotonic()
    run_ranks(2, main, chosen, crawls(slow=1))
    assert time.monotonic() - began > 0.15 * 20
    assert_same(outcome(chosen), undisturbed(2))


@pytest.mark.parametrize("changes", [{}, {"use_lora": True}], ids=["all weights", "lora"])
def test_a_disk_that_is_full_when_the_contract_is_written_costs_no_more_than_the_end(changes, tmp_path):
    """The model is there by then; without its contract the run is not finished, and half a file is none."""
    full = befalls(contract, "write", 1, lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    chosen = settings(tmp_path / "out", **changes)
    with pytest.raises(RuntimeError, match="No space left"):
        run_ranks(1, main, chosen, full)
    assert (tmp_path / "out" / "model").exists() and not (tmp_path / "out" / contract.last_file(chosen)).exists()
    run_ranks(1, main, chosen)
    assert_same(outcome(chosen), undisturbed(1, **changes))
    assert (tmp_path / "out" / contract.last_file(chosen)).exists()

    (tmp_path / "out" / "exit.json").unlink()  # which a full disk keeps from being written
    run_ranks(1, main, chosen)
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


DAMAGE = {
    "truncated": (cut, "bytes instead of"),
    "a bit flipped": (flip("rank_00001.safetensors"), "does not have its checksum"),
    "a bit flipped in its description": (flip("state.json"), "is not as it was written"),
    "half-written": (half_written, "has no COMPLETE"),
    "a file gone": (without("rank_00000.safetensors"), "cannot be read"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damage, message, tmp_path, capfd):
    chosen = interrupted(tmp_path / "out", processes=2)
    assert steps_saved(chosen) == [4, 6]
    damage(checkpoints(chosen)[-1])
    run_ranks(2, main, chosen)
    said = capfd.readouterr()
    assert f"damaged checkpoint, passed over: {tmp_path}" in said.err and message in said.err
    assert "going on from" in said.out and "step_4" in said.out.split("going on from")[1].splitlines()[0]
    assert_same(outcome(chosen), undisturbed(2))


def test_where_no_checkpoint_is_good_the_run_says_so_and_does_not_begin_anew(tmp_path):
    chosen = interrupted(tmp_path / "out", step=5)
    for folder in checkpoints(chosen):
        cut(folder)
    with pytest.raises(RuntimeError, match="none of the checkpoints in .* is good: to begin anew delete them"):
        run_ranks(1, main, chosen)
    assert steps_saved(chosen) == [2]


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


def test_another_training_is_refused_by_name_and_harms_nothing(tmp_path):
    interrupted(tmp_path / "out", step=5)
    before = listed(tmp_path / "out")
    different = {
        "learning_rate is 0.001 there, 0.002 here": dict(learning_rate=2e-3),
        "seed is 0 there, 1 here": dict(seed=1),
        "global_batch_size is 8 there, 4 here": dict(global_batch_size=4),
        "num_train_epochs is 3 there, 4.0 here": dict(num_train_epochs=4.0),
        "use_lora is False there, True here": dict(use_lora=True),
        "dtype is float32 there, bfloat16 here": dict(dtype="bfloat16"),
        "data is .* there": dict(dataset_path=other_data(tmp_path)),
        "model is .* there": dict(model_name_or_path=other_model(tmp_path)),
        "already holds another run": dict(resume_from_checkpoint="none"),
    }
    for message, changes in different.items():
        with pytest.raises(RuntimeError, match=f"ValueError: .*{message}"):
            run_ranks(1, main, settings(tmp_path / "out", **changes))
        assert listed(tmp_path / "out") == before


def test_what_leaves_the_mathematics_alone_may_change(tmp_path):
    interrupted(tmp_path / "out", step=5)
    moved = tmp_path / "moved.json"
    shutil.copy(world() / "pairs.json", moved)
    changed = settings(
        tmp_path / "out", dataset_path=(str(moved),), save_steps=3, save_total_limit=5, max_tokens=300,
        gradient_checkpointing="full", stall_timeout=60.0,
    )  # fmt: skip
    run_ranks(1, main, changed)
    starts = json.loads((tmp_path / "out" / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 2] and steps_saved(changed) == [2, 3, 6, 9]


def test_a_finished_run_is_said_to_be_finished_and_left_alone(tmp_path, capfd):
    chosen = settings(tmp_path / "out")
    run_ranks(1, main, chosen)
    before = listed(tmp_path / "out")
    run_ranks(2, main, chosen)
    assert "this run is finished; nothing to do" in capfd.readouterr().out
    assert listed(tmp_path / "out") == before
    with pytest.raises(RuntimeError, match="learning_rate is 0.001 there, 0.5 here"):
        run_ranks(1, main, settings(tmp_path / "out", learning_rate=0.5))


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    chosen = interrupted(tmp_path / "out", step=2)
    run_ranks(1, main, chosen)
    assert_same(outcome(chosen), undisturbed(1))


def test_a_new_folder_begins_with_another_folders_checkpoint(tmp_path):
    chosen = interrupted(tmp_path / "out", step=9)
    other = settings(tmp_path / "other", resume_from_checkpoint=str(checkpoints(chosen)[-1]))
    run_ranks(1, main, other)
    weights_there, lines = outcome(other)
    assert_same((weights_there, []), (undisturbed(1)[0], []))
    assert [line["step"] for line in lines] == [6, 8, 9, 9]
    with pytest.raises(RuntimeError, match="expected auto, none or the folder of a checkpoint"):
        run_ranks(1, main, settings(tmp_path / "third", resume_from_checkpoint="latest"))


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
    """What a pickle of it does when it is read."""

    def __init__(self, touched: Path):
        self.touched = touched

    def __reduce__(self):
        return os.system, (f"touch {self.touched}",)


def plant(touched: Path, file: Path) -> None:
    with open(file, "wb") as out:
        torch.save(Bomb(touched), out)


def test_planted_pickles_are_never_executed(tmp_path):
    chosen = interrupted(tmp_path / "out", step=5)
    (folder,) = checkpoints(chosen)
    touched, model = tmp_path / "touched", tmp_path / "model"
    shutil.copytree(world() / "model", model)
    for place in (folder, folder.parent, tmp_path / "out", model):
        for name in (".metadata", "rng_00000.pt", "optimizer.pt", "training_args.bin", "pytorch_model.bin", "x.pkl"):
            plant(touched, place / name)
    chosen = settings(tmp_path / "out", model_name_or_path=str(model))
    run_ranks(1, main, chosen)
    assert_same(outcome(chosen), undisturbed(1))

    plant(touched, model / "model.safetensors")
    with pytest.raises(RuntimeError, match="is not a whole safetensors file"):
        run_ranks(1, main, settings(tmp_path / "second", model_name_or_path=str(model)))
    (model / "model.safetensors").unlink()
    with pytest.raises(RuntimeError, match="pickled weights .*are not read here"):
        run_ranks(1, main, settings(tmp_path / "third", model_name_or_path=str(model)))
    again = interrupted(tmp_path / "fourth", step=5)
    plant(touched, checkpoints(again)[0] / "rank_00000.safetensors")
    with pytest.raises(RuntimeError, match="none of the checkpoints"):
        run_ranks(1, main, again)
    assert not touched.exists()
    torch.load(model / "x.pkl", weights_only=False)  # the bomb is live
    assert touched.exists()
