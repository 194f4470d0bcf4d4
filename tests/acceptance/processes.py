"""Stages in processes of their own: whole runs of the scripts, as a user starts them."""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from rm.plan.roofline import GPUS
from rm.scoring import Scorer
from tests.acceptance.report import Report

ROOT = Path(__file__).parent.parent.parent
STEPS, INTERRUPTED_AT = 20, 7
STARTS_WITHIN = 300  # seconds
LEAST_OF_THE_LINK, MOST_WAIT = 0.6, 1e-3  # of the bandwidth; seconds
MESSAGE_WITHIN, GONE_WITHIN = 60, 120  # seconds from the failure of one process


def processes() -> int:
    """One for each GPU; two on a CPU."""
    return torch.cuda.device_count() or 2


@cache
def _temporary() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="acceptance-")  # removed when the command ends


@cache
def demo() -> Path:
    """The folder of the quickstart's synthetic data and model."""
    folder = Path(_temporary().name) / "demo"
    subprocess.run([sys.executable, "-m", "rm.demo", folder], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    return folder


def command(out: Path, *more: str, n: int | None = None, script: str = "train_rm.py", **changes) -> list[str]:
    """A training of STEPS steps in float32 that saves a checkpoint every fifth; in `n` processes of torchrun.

    Args:
        more, changes: further flags, and other values of these.
    """
    torchrun = [] if n is None else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    flags = dict(
        model_name_or_path=demo() / "model", dataset_path=demo() / "rm_train.jsonl", output_dir=out, dtype="float32",
        max_steps=STEPS, global_batch_size=16, max_tokens=512, logging_steps=1, save_steps=5, learning_rate=4e-4,
        cache_dir=_temporary().name + "/cache",
    ) | changes  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, *torchrun, script, *words, *more]


def options() -> dict:
    """Of a process that runs a command; scripts in tests/acceptance/ import from ROOT."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return dict(
        cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run(words: list[str]) -> subprocess.CompletedProcess:
    done = subprocess.run(words, **options())
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done


def losses(out: Path) -> torch.Tensor:
    lines = [json.loads(line) for line in open(out / "metrics.jsonl")]
    return torch.tensor([line["loss"] for line in lines if "loss" in line])


def _difference(report: Report, name: str, out: Path, expected: torch.Tensor, limit: float) -> None:
    found = losses(out)
    report.check(f"{name}: steps logged", len(found), len(expected), len(found) == len(expected))
    report.check(f"{name}: largest difference of a loss", (found - expected).abs().max().item(), limit)


@cache
def one_process() -> torch.Tensor:
    """The losses of a run in one process."""
    out = Path(_temporary().name) / "one"
    run(command(out))
    return losses(out)


def ranks(report: Report) -> None:
    """the same training in one process, in all, and in two groups"""
    n, expected = processes(), one_process()
    other_seed = ("--seed", "1") if report.has_fault() else ()
    variants = {f"{n} processes": other_seed}
    if n > 2:
        variants[f"{n} processes in groups of {n // 2}"] = ("--shard_group_size", str(n // 2))
    for name, flags in variants.items():
        out = Path(_temporary().name) / name.replace(" ", "_")
        run(command(out, *flags, n=n))
        _difference(report, name, out, expected, 1e-4)
    if n == 1:
        report.not_run["ranks on several GPUs"] = "this machine has one"
    else:
        _all_reduce(report, n)


def _all_reduce(report: Report, n: int) -> None:
    """Check how long the host waits, and what NCCL reaches of NVLink; elsewhere the numbers are noted."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    done = run([*words, "-m", "tests.acceptance.all_reduce"])
    measured = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    report.note(all_reduce=measured)
    if torch.cuda.is_available():  # on a CPU the processes compete for it
        report.check("seconds that a step waits for the flags of the others", measured["wait"], MOST_WAIT)
    if link := _nvlink():
        share = round(measured["bytes_per_second"] / link, 2)
        report.check("all-reduce, share of the link", share, LEAST_OF_THE_LINK, share >= LEAST_OF_THE_LINK)


def _nvlink() -> float | None:
    """Bytes per second in one direction between two GPUs of this machine; None where they have no NVLink."""
    words = re.split("[ -]", torch.cuda.get_device_name().upper() if torch.cuda.is_available() else "")
    if "PCIE" in words or "NVL" in words:  # the second: bridges between pairs
        return None
    return next((GPUS[name].link for name in ("H200", "H100", "A100") if name in words), None)


def interruption(report: Report) -> None:
    """a run that is stopped and goes on is the run that was not; a process that fails is heard and ends all"""
    _resumes(report)
    _fails(report)


def _resumes(report: Report) -> None:
    n, expected = processes(), one_process()
    out = _interrupted(n)
    steps = len(losses(out))
    report.check("steps at the interruption", steps, f"fewer than {STEPS}", steps < STEPS)
    script = "tests/acceptance/forgetful.py" if report.has_fault() else "train_rm.py"
    runs = {"resumed": n} | ({"resumed by one process": None} if n > 1 else {})
    copies = {name: shutil.copytree(out, out.with_name(name.replace(" ", "_"))) for name in runs}
    for name, processes_then in runs.items():
        run(command(copies[name], n=processes_then, script=script))
        _difference(report, name, copies[name], expected, 1e-4)


def _interrupted(n: int) -> Path:
    """The folder of a run in `n` processes that was stopped by a signal."""
    out = Path(_temporary().name) / "interrupted"
    with subprocess.Popen(
        command(out, n=n), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as interrupted:
        _wait_for(lambda: (out / "metrics.jsonl").exists() and len(losses(out)) >= INTERRUPTED_AT, interrupted)
        interrupted.send_signal(signal.SIGTERM)
        interrupted.wait(timeout=GONE_WITHIN)
    return out


def _fails(report: Report) -> None:
    words = command(Path(_temporary().name) / "failed", n=processes(), script="tests/acceptance/failing.py")
    with subprocess.Popen(words, **options()) as failing:
        failed, heard, gone = _times_of_a_failure(failing.stdout.fileno())
        failing.kill()  # torchrun, where it waits; its processes end with it
    for what, time_of, limit in (("its message", heard, MESSAGE_WITHIN), ("all processes are gone", gone, GONE_WITHIN)):
        seconds = None if time_of is None else round(time_of - failed, 1)
        report.check(f"seconds until {what}", seconds, limit, seconds is not None and seconds <= limit)


def _times_of_a_failure(pipe: int) -> tuple[float, float | None, float | None]:
    """When a process failed, when its message was printed, and when the last process closed the pipe.

    None: not within GONE_WITHIN seconds of the failure.
    """
    began, output, failed, heard = time.monotonic(), b"", None, None
    deadline = began + STARTS_WITHIN + GONE_WITHIN
    while select.select([pipe], [], [], max(0, deadline - time.monotonic()))[0]:
        printed, now = os.read(pipe, 2**16), time.monotonic()
        if not printed:
            return failed or began, heard, now
        output += printed
        if failed is None and b"this process fails now" in output:
            failed, deadline = now, now + GONE_WITHIN
        if heard is None and b"out of memory" in output.lower():
            heard = now
    return failed or began, heard, None


def _wait_for(condition, process: subprocess.Popen, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with {process.returncode} before it could be interrupted")
        if time.monotonic() > deadline:
            raise RuntimeError(f"the run did not come so far in {timeout:.0f} s")
        time.sleep(0.05)


def end(report: Report) -> None:
    """the exported model gives the scores that it had when it was trained"""
    out = Path(_temporary().name) / "end"
    run(command(out, "--dtype", "auto"))
    model = out / "model"
    if report.has_fault():
        tensors = load_file(model / "model.safetensors")
        tensors["score.weight"] = tensors["score.weight"] * 1.5
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        (model / "SHA256SUMS").unlink()  # the scores have to tell, also where no checksum does
    evaluation = subprocess.run(
        [sys.executable, "eval_rm.py", "--model_name_or_path", model, "--dataset_path", demo() / "rm_test.jsonl"]
        + ["--output_dir", out / "eval"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    last = (evaluation.stdout.strip().splitlines() or [""])[-1]
    report.check("eval_rm.py on the exported model", last, "a report", evaluation.returncode == 0)
    if evaluation.returncode:
        return
    record = json.loads((demo() / "rm_test.jsonl").read_text().splitlines()[0])
    scored = json.loads((out / "eval" / "scores.jsonl").read_text().splitlines()[0])
    rewards = Scorer(model).score([record["positive"], record["negative"]])
    difference = max(abs(a - b) for a, b in zip(rewards, scored["scores"], strict=True))
    report.check("Scorer against eval_rm.py", difference, 0.05)
    if torch.cuda.is_available():
        _memory_of_whole_runs(report)
    else:
        report.not_run["memory of a whole run against its plan"] = "no GPU"


def _memory_of_whole_runs(report: Report) -> None:
    """Check what is allocated at the peak of two short runs, their ends included, against their plans."""
    base = _model_of_400m()
    for name, flags in {"all weights": {}, "LoRA": {"use_lora": "true"}}.items():
        out = Path(_temporary().name) / f"memory of {name}"
        words = command(out, model_name_or_path=base, max_steps=2, save_steps=0, **flags)
        run([*words, "--plan", "true"])
        found = re.search(r"memory: ([\d.]+) GiB at the peak \(allocated\), planned ([\d.]+): ", run(words).stdout)
        peak, planned = map(float, found.groups())
        ratio = round(peak / planned, 3)
        report.check(f"{name}: memory of the run / planned", ratio, "0.9 to 1.1", 0.9 <= ratio <= 1.1)


def _model_of_400m() -> Path:
    """The demo's model with more and wider layers, beside which a device's fixed costs are small; random weights."""
    folder = Path(_temporary().name) / "400m"
    shutil.copytree(demo() / "model", folder)
    config = json.loads((folder / "config.json").read_text()) | dict(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=32, num_attention_heads=16, num_key_value_heads=16
    )
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    return folder
