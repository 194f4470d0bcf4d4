"""The record of an acceptance run: one line for each check, and acceptance.json."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

VARIABLES = ("CUDA_", "GLOO_", "NCCL_", "OMP_", "PYTORCH_", "TORCH_")  # of the environment, in the record


class Refused(Exception):
    """A check of this stage failed: later stages do not run."""


class Report:
    """Collects checks and prints each when it is made."""

    def __init__(self, file: Path, fault: str | None):
        """`fault`: the stage into which a fault is put on purpose, to see that it is found."""
        self.file, self.fault = file, fault
        self.checks: list[dict] = []
        self.notes: dict[str, object] = {}
        self.not_run: dict[str, str] = {}  # stage -> reason
        self.stage = ""
        self.started = time.monotonic()

    def begin(self, stage: str, description: str) -> None:
        self.stage = stage
        print(f"--- {stage}: {description}", flush=True)

    def check(self, name: str, value, limit, passed: bool | None = None) -> None:
        """Record a value and whether it is within its limit: `value <= limit` unless `passed` says."""
        passed = bool(value <= limit if passed is None else passed)
        shown = f"{value:.2e}" if isinstance(value, float) else value
        self.checks.append(dict(stage=self.stage, check=name, value=value, limit=limit, passed=passed))
        print(f"{'PASS' if passed else 'FAIL'}  {name}: {shown} (allowed: {limit})", flush=True)

    def note(self, **facts) -> None:
        """Facts that have no limit."""
        self.notes |= facts
        for name, fact in facts.items():
            print(f"      {name}: {fact}", flush=True)

    def skip(self, stage: str, reason: str) -> None:
        self.not_run[stage] = reason
        print(f"--- {stage}: not run: {reason}", flush=True)

    def end_stage(self) -> None:
        """Raise Refused where a check of this stage failed."""
        if not all(check["passed"] for check in self.checks):
            raise Refused(self.stage)

    def has_fault(self) -> bool:
        """Whether this stage is to be given its fault."""
        return self.fault == self.stage

    def write(self) -> bool:
        """Write acceptance.json and print the verdict; return whether the machine is accepted."""
        failed = [check["check"] for check in self.checks if not check["passed"]]
        accepted = not failed and not self.not_run
        if failed:
            verdict = "NOT ACCEPTED: " + "; ".join(failed)
        elif self.not_run:
            verdict = "INCOMPLETE: every check that ran has passed; not run: " + ", ".join(self.not_run)
        else:
            verdict = "ACCEPTED"
        record = dict(
            verdict=verdict, seconds=round(time.monotonic() - self.started, 1), environment=environment(),
            checks=self.checks, notes=self.notes, not_run=self.not_run, fault=self.fault,
        )  # fmt: skip
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(record, indent=1, default=str) + "\n")
        print(f"{verdict} ({record['seconds']:.0f} s); written to {self.file}", flush=True)
        return accepted


def environment() -> dict:
    """What a maintainer needs to know of the machine."""
    packages = ("rm-trainer", "numpy", "safetensors", "tokenizers", "sentencepiece")
    facts = dict(
        python=sys.version.split()[0], platform=platform.platform(), torch=torch.__version__, cuda=torch.version.cuda,
        packages={name: _version(name) for name in packages}, git_commit=_printed("git", "rev-parse", "HEAD"),
        variables={name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
    )  # fmt: skip
    if torch.cuda.is_available():
        facts |= dict(
            devices=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            capability=torch.cuda.get_device_capability(),
            memory_gib=round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
            nccl=torch.cuda.nccl.version(),
            cudnn=torch.backends.cudnn.version(),
            driver=_printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            topology=_printed("nvidia-smi", "topo", "-m"),
        )
    return facts


def _printed(*command: str) -> str | None:
    """What a command prints; None where there is no such command."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ImportError:  # PackageNotFoundError: it runs from a checkout that is not installed
        return None
