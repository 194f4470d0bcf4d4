"""tests/acceptance: what it runs on a CPU, and that every stage refuses the fault that is put into it."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rm import demo
from tests import commands
from tests.acceptance import __main__ as acceptance
from tests.acceptance import all_reduce, numerics, processes, short_training, speed
from tests.acceptance.report import Report
from tests.ranks import run_ranks


@pytest.fixture
def accept(tmp_path, monkeypatch):
    """A function that runs the command with some arguments: (exit status, acceptance.json)."""

    def run(*arguments: str) -> tuple[int, dict]:
        file = tmp_path / "acceptance.json"
        monkeypatch.setattr(sys, "argv", ["accept", "--out", str(file), *arguments])
        return acceptance.main(), json.loads(file.read_text())

    return run


@pytest.fixture
def two_runs(monkeypatch):
    """Only two of the methods, so that the stage takes a second."""
    names = ("reward LISA, moments on the CPU", "lm LoRA")
    monkeypatch.setattr(short_training, "RUNS", {name: short_training.RUNS[name] for name in names})
    exact = {}
    with numerics.dist.session(0):
        for name in names:
            norms, weights = short_training.train(name, "float32", forbid_waits=False)
            exact |= {f"{name}.norms": norms, f"{name}.weights": weights}
    nothing = SimpleNamespace(stdout="")
    monkeypatch.setattr(numerics.subprocess, "run", lambda *_, **__: nothing)  # the reference of all methods
    monkeypatch.setattr(numerics, "load_file", lambda _: exact)


@pytest.fixture
def real_runs(monkeypatch):
    """In place of whole runs: the losses that each run would have logged."""
    expected = torch.linspace(0.7, 0.5, processes.STEPS)
    seen = []

    def run(words: list, **_):
        if "tests.acceptance.all_reduce" in words:
            return SimpleNamespace(stdout='torchrun says this\n{"bytes_per_second": 3e11, "wait": 1e-4}\n')
        seen.append(words)
        out = Path(words[words.index("--output_dir") + 1])
        out.mkdir(parents=True, exist_ok=True)
        shift = 0.01 if "--seed" in words else 0.0
        lines = [json.dumps({"step": n + 1, "loss": loss.item() + shift}) for n, loss in enumerate(expected)]
        (out / "metrics.jsonl").write_text("\n".join(lines))

    monkeypatch.setattr(processes, "run", run)
    monkeypatch.setattr(processes, "demo", lambda: Path("demo"))
    monkeypatch.setattr(processes, "one_process", lambda: expected)
    monkeypatch.setattr(processes, "processes", lambda: 4)
    return seen


def test_without_gpus_it_is_never_accepted_and_says_what_did_not_run(accept):
    status, record = accept("--stages", "environment", "kernel", "speed")
    assert status == 1 and record["verdict"].startswith("INCOMPLETE")
    assert record["not_run"]["speed"] == "no GPU" and "steps" in record["not_run"]
    assert all(check["passed"] for check in record["checks"]) and len(record["checks"]) == 2
    assert record["environment"]["torch"] == torch.__version__


@pytest.mark.parametrize("stage", ["environment", "kernel", "attention"])
def test_a_stage_refuses_its_fault_and_no_later_stage_runs(accept, stage):
    status, record = accept("--stages", stage, "ranks", "--fault", stage)
    assert status == 1 and record["verdict"].startswith("NOT ACCEPTED")
    assert {check["stage"] for check in record["checks"]} == {stage}


@pytest.mark.parametrize("fault", [False, True])
def test_steps_compare_gradient_norms_and_weights_of_every_method(accept, two_runs, fault):
    _, record = accept("--stages", "steps", *(["--fault", "steps"] if fault else []))
    failed = [check["check"] for check in record["checks"] if not check["passed"]]
    assert len(record["checks"]) == 4
    assert failed == ([f"{name}: gradient norms" for name in short_training.RUNS] if fault else [])


def test_a_compiled_layer_that_computes_something_else_is_refused(accept, monkeypatch):
    rewards = torch.linspace(-1, 1, 20)
    monkeypatch.setattr(short_training, "rewards_of_lengths", lambda *_, **__: (rewards, 0))
    assert accept("--stages", "compile")[1]["checks"][0]["passed"]
    assert not accept("--stages", "compile", "--fault", "compile")[1]["checks"][0]["passed"]


@pytest.mark.parametrize("fault", [False, True])
def test_ranks_compares_all_processes_and_groups_with_one_process(accept, real_runs, fault):
    _, record = accept("--stages", "ranks", *(["--fault", "ranks"] if fault else []))
    differences = {check["check"]: check["passed"] for check in record["checks"] if "difference" in check["check"]}
    assert differences == {
        "4 processes: largest difference of a loss": not fault,
        "4 processes in groups of 2: largest difference of a loss": True,
    }
    assert [("--nproc-per-node=4" in words, "--shard_group_size" in words) for words in real_runs] == [
        (True, False),
        (True, True),
    ]


@pytest.mark.parametrize(
    ("gpu", "share"),
    [
        ("NVIDIA H100 80GB HBM3", 0.67),
        ("NVIDIA A100-SXM4-40GB", 1.0),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-PCIE-40GB", None),
        ("NVIDIA L4", None),
    ],
)
def test_an_all_reduce_is_compared_with_nvlink_where_there_is_one(accept, real_runs, monkeypatch, gpu, share):
    facts = dict(is_available=lambda: True, get_device_name=lambda: gpu)
    monkeypatch.setattr(processes, "torch", SimpleNamespace(cuda=SimpleNamespace(**facts), tensor=torch.tensor))
    for least, passed in ((0.6, True), (1.1, False)):
        monkeypatch.setattr(processes, "LEAST_OF_THE_LINK", least)
        _, record = accept("--stages", "ranks")
        checks = {check["check"]: check for check in record["checks"]}
        assert checks["seconds that a step waits for the flags of the others"]["passed"]
        assert record["notes"]["all_reduce"]["bytes_per_second"] == 3e11
        found = checks.get("all-reduce, share of the link")
        assert found is None if share is None else (found["value"], found["passed"]) == (share, passed)


def test_an_all_reduce_is_measured_over_ranks():
    for measured in run_ranks(2, all_reduce.measure):
        assert measured["bytes_per_second"] > 1e6 and 0 < measured["wait"] < 1


def test_an_exported_model_whose_head_was_changed_is_refused(accept, monkeypatch, tmp_path):
    """A training, and an evaluation of what it exported, on a few of the pairs."""

    run = subprocess.run

    def forked(words: list, **options) -> subprocess.CompletedProcess:
        if words[0] != sys.executable:
            return run(words, **options)  # of git, by the training
        done = commands.run(*words[1:])
        return subprocess.CompletedProcess(words, done.returncode, done.stdout + done.stderr)

    monkeypatch.setattr(processes.subprocess, "run", forked)
    monkeypatch.setattr(processes, "STEPS", 2)
    monkeypatch.setattr(processes, "demo", lambda: tmp_path)
    demo.main([str(tmp_path / "whole")])
    (tmp_path / "whole" / "model").rename(tmp_path / "model")
    for name in ("rm_train.jsonl", "rm_test.jsonl"):
        lines = (tmp_path / "whole" / name).read_text().splitlines(keepends=True)
        (tmp_path / name).write_text("".join(lines[:64]))
    _, record = accept("--stages", "end", "--fault", "end")
    assert [check["check"] for check in record["checks"] if not check["passed"]] == ["eval_rm.py on the exported model"]
    assert "scoring.json" in record["checks"][-1]["value"]


@pytest.mark.parametrize(("peak", "passed"), [(1.05, True), (1.2, False), (0.8, False)])
def test_a_whole_run_that_takes_other_memory_than_planned_is_refused(tmp_path, monkeypatch, peak, passed):
    def run(words: list) -> SimpleNamespace:
        return SimpleNamespace(stdout=f"memory: {peak:.2f} GiB at the peak (allocated), planned 1.00: {peak - 1:+.1%}")

    monkeypatch.setattr(processes, "run", run)
    for name in ("demo", "_model_of_400m"):
        monkeypatch.setattr(processes, name, lambda: tmp_path)
    report = Report(tmp_path / "acceptance.json", fault=None)
    processes._memory_of_whole_runs(report)
    found = [(check["check"].partition(":")[0], check["passed"]) for check in report.checks]
    assert found == [("all weights", passed), ("LoRA", passed)]


def test_a_run_that_resumes_without_its_moments_is_refused(accept, monkeypatch):
    """The real processes, without torchrun: a whole run, one that is interrupted, and the one that goes on."""
    monkeypatch.setattr(processes, "STEPS", 8)
    monkeypatch.setattr(processes, "INTERRUPTED_AT", 2)
    monkeypatch.setattr(processes, "processes", lambda: 1)
    command = processes.command
    monkeypatch.setattr(processes, "command", lambda out, *more, n=None, **script: command(out, *more, **script))
    monkeypatch.setattr(processes, "_fails", lambda report: None)
    _, record = accept("--stages", "interruption", "--fault", "interruption")
    assert [(check["check"], check["passed"]) for check in record["checks"]] == [
        ("steps at the interruption", True),
        ("resumed: steps logged", True),
        ("resumed: largest difference of a loss", False),
    ]


def test_an_interrupted_run_goes_on_in_all_processes_and_in_one(accept, real_runs, monkeypatch, tmp_path):
    interrupted = tmp_path / "interrupted"
    interrupted.mkdir()
    (interrupted / "metrics.jsonl").write_text('{"step": 1, "loss": 0.7}')
    monkeypatch.setattr(processes, "_interrupted", lambda n: interrupted)
    monkeypatch.setattr(processes, "_fails", lambda report: None)
    _, record = accept("--stages", "interruption")
    assert ["--nproc-per-node=4" in words for words in real_runs] == [True, False]
    passed = {check["check"]: check["passed"] for check in record["checks"] if "resumed" in check["check"]}
    assert len(passed) == 4 and all(passed.values())


FAILS, SAYS_WHY, STAYS = "print('this process fails now')", "print('CUDA out of memory')", "time.sleep(60)"


@pytest.mark.parametrize(
    ("does", "passed"),
    [([FAILS, SAYS_WHY], [True, True]), ([FAILS], [False, True]), ([FAILS, SAYS_WHY, STAYS], [True, False])],
    ids=["well", "silent", "hanging"],
)
def test_a_failure_that_is_not_heard_or_does_not_end_all_processes_is_refused(accept, monkeypatch, does, passed):
    monkeypatch.setattr(
        processes, "command", lambda *_, **__: [sys.executable, "-Suc", "; ".join(["import time", *does])]
    )
    monkeypatch.setattr(processes, "_resumes", lambda report: None)
    monkeypatch.setattr(processes, "GONE_WITHIN", 2)
    _, record = accept("--stages", "interruption")
    assert [check["passed"] for check in record["checks"]] == passed


FAST = dict(tflops=400.0, busy=0.95, reserved_over_allocated=1.05, allocated_gib=30.0)


@pytest.mark.parametrize(
    ("changes", "fault", "refused"),
    [
        ({}, [], None),
        ({}, ["--fault", "speed"], "model FLOPs utilisation"),
        ({"tflops": 200.0}, [], "model FLOPs utilisation"),
        ({"busy": 0.5}, [], "time in which the device computes"),
        ({"reserved_over_allocated": 1.3}, [], "memory reserved / allocated"),
        ({"allocated_gib": 36.0}, [], "memory allocated / planned"),
    ],
)
def test_a_gpu_that_is_slow_or_takes_other_memory_than_planned_is_refused(accept, monkeypatch, changes, fault, refused):
    gpu = SimpleNamespace(total_memory=40 * 2**30)
    facts = dict(is_available=lambda: True, get_device_name=lambda: "NVIDIA H100", get_device_properties=lambda _: gpu)
    monkeypatch.setattr(speed, "torch", SimpleNamespace(cuda=SimpleNamespace(**facts)))
    monkeypatch.setattr(speed.dist, "session", lambda seed: contextlib.nullcontext())
    monkeypatch.setattr(speed, "_planned", lambda run: 30.0)
    monkeypatch.setattr(speed, "measure", lambda run: FAST | changes)
    _, record = accept("--stages", "speed", *fault)
    failed = {check["check"].partition(": ")[2] for check in record["checks"] if not check["passed"]}
    assert len(record["checks"]) == 8  # of two models of 1B
    assert failed == ({refused} if refused else set())


def test_an_error_within_a_stage_is_in_the_record(accept, monkeypatch):
    def broken(report: Report) -> None:
        """a stage"""
        raise RuntimeError("no CUDA driver")

    monkeypatch.setitem(acceptance.STAGES, "kernel", broken)
    status, record = accept("--stages", "environment", "kernel", "attention")
    assert status == 1 and record["checks"][-1]["value"] == "RuntimeError: no CUDA driver"
    assert "attention" not in {check["stage"] for check in record["checks"]}


def test_model_flops_of_a_pair_are_those_counted_by_hand():
    """A Llama of one layer, D = 8, 2 heads of 4, 1 kv head, F = 16, V = 32; a pair of (3, 2, 2) tokens."""
    config = speed.LLAMA_1B | dict(
        hidden_size=8, num_attention_heads=2, num_key_value_heads=1, head_dim=4, intermediate_size=16, vocab_size=32,
        num_hidden_layers=1,
    )  # fmt: skip
    run = speed.Run("tiny", speed.RewardModel, config, {}, 0)
    with numerics.dist.session(0):
        _, model = speed._build(run)
    examples = speed.Examples.build(
        iter([speed.Example(*_ids(3), (*_ids(2), *_ids(2)), (torch.zeros(2).bool().numpy(),) * 2)])
    )
    batch = speed.pack(examples, [0])
    step = speed.StepBatches([batch], 1, 0, 7, 0)
    qkv, behind = 8 * 8 + 2 * 8 * 4, 8 * 8 + 3 * 8 * 16  # weights of q, k, v; of o, gate, up, down
    attention = 12 * 8 * (25 / 2 + 2 * (3 + 1))
    assert speed.flops(model, step, run) == 6 * (qkv * 7 + behind * 2) + attention


def _ids(n: int) -> list:
    return [torch.arange(n, dtype=torch.int32).numpy()]
