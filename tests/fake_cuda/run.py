"""python -m tests.fake_cuda.run [NAME ...]: run all cases, or those with these names; prints what was found as JSON."""

import json
import sys

from tests.fake_cuda import load

try:
    load.load()  # before torch is imported, below
except load.CannotBuild as reason:
    print(json.dumps({"skipped": str(reason)}))
    sys.exit()

import functools
import itertools
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch._dynamo.utils import counters

import train_rm
import train_sft
from rm.config import compose
from rm.data.batch import StepBatches, pack
from rm.distributed import offload
from rm.distributed.sharding import allocate, local
from rm.hf import build
from rm.model import lisa
from rm.model.heads import LanguageModel, RewardModel
from rm.model.losses import LossSettings
from rm.training import optim
from tests import made, training_runs
from tests.fake_cuda import cases, faults, world
from tests.fake_cuda.cases import Case

SCRIPTS = {"train_rm": (train_rm, RewardModel), "train_sft": (train_sft, LanguageModel)}
LISA_SEED = 2  # draws the layers 1, 0 and 1 again


@dataclass(frozen=True, kw_only=True)
class Settings(training_runs.Settings):
    """Settings of some steps, of a reward model too"""

    loss: LossSettings


@dataclass
class Found:
    """What a case did."""

    build: str = "CPU" if torch.version.cuda is None else "CUDA"  # of torch
    error: str = ""  # the traceback
    kernel: str = ""  # the attention kernel
    waits: Counter = field(default_factory=Counter)  # of all steps, as in Watch
    misplaced: set[str] = field(default_factory=set)  # what of a trained parameter is not on the device, in any step
    active_layers: list[list[int]] = field(default_factory=list)  # of each step, with LISA
    kernels: int = 0  # of the last step
    collectives: dict[str, int] = field(default_factory=dict)  # of the last step
    graphs: list[int] = field(default_factory=list)  # how many were compiled until each step's end
    graph_breaks: list[str] = field(default_factory=list)
    cpu_inputs: int = 0  # tensors on the CPU that compiled graphs take
    seconds: float = 0.0


def run(case: Case) -> Found:
    found, start = Found(), time.perf_counter()
    settings = compose(Settings, **case.settings)
    try:
        counters.clear()
        CPU_INPUTS.clear()
        with world.gpus(case.world_size, watched=not settings.parallel.torch_compile) as watch:
            train(case, settings, watch, found)
    except Exception:
        found.error = traceback.format_exc()
    found.seconds = round(time.perf_counter() - start, 2)
    return found


def train(case: Case, settings: Settings, watch: world.Watch, found: Found) -> None:
    """The steps of a case, as a script's main() runs them."""
    script, cls = SCRIPTS[case.script]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(cases.config(case)))
        loss = settings.loss if cls is RewardModel else None
        model = build.build(cls, folder, settings.parallel, training=settings.training, loss=loss)
    allocate(model)
    optimizer = optim.adamw(model, settings.optim)
    for step in range(case.steps):
        batches = step_batches(case, step)
        lisa.activate_layers(model, optimizer, step, settings.lisa, LISA_SEED)
        if case.fault and step == case.steps - 1:
            batches = getattr(faults, case.fault)(model, optimizer, batches)
        watch.clear()
        try:
            script.train_step(model, optimizer, batches, settings.optim.max_grad_norm)
        finally:
            found.waits += watch.waits
        found.misplaced |= set(misplaced(model, optimizer))
        if settings.lisa.use_lisa:
            found.active_layers.append(lisa.active_layers(step, case.layers, LISA_SEED, settings.lisa))
        found.graphs.append(counters["stats"]["unique_graphs"])
    found.graph_breaks, found.cpu_inputs = list(counters["graph_break"]), len(CPU_INPUTS)
    found.kernel, found.kernels, found.collectives = model.kernel.__name__, watch.kernels, watch.collectives


def step_batches(case: Case, step: int) -> StepBatches:
    """The micro-batches of a step; each step has others."""
    n = sum(case.micro_batches)
    if case.rankings:
        examples = made.ranking_examples(*made.token_rankings(case.steps * n))
    else:
        examples = training_runs.examples_of(SCRIPTS[case.script][1], case.steps * n)
    ends = itertools.accumulate(case.micro_batches, initial=step * n)
    label_chosen = "sft_loss_coefficient" in case.settings
    micro_batches = [
        pack(examples, range(*ends_of_one), label_chosen=label_chosen) for ends_of_one in itertools.pairwise(ends)
    ]
    return StepBatches(micro_batches, num_examples=n, num_labels=n, num_tokens=n, seed=0)


def misplaced(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    """The trained parameters, and their optimizer states, that are not on the device."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            state = {key: local(x).device.type for key, x in optimizer.state[p].items()}
            for key, device in {"value": local(p).device.type, **(state or {"optimizer state": "nowhere"})}.items():
                if device != "cuda":
                    yield f"{name}: {key} is on {device}"


CPU_INPUTS: list[torch.Tensor] = []


def trace(module: torch.fx.GraphModule, inputs: list) -> Callable:
    """A backend of torch.compile that generates no code."""
    CPU_INPUTS.extend(x for x in inputs if isinstance(x, torch.Tensor) and x.device.type == "cpu")
    return module.forward


def main(names: list[str]) -> None:
    load.install()
    offload.SMALLEST = 1  # bytes: everything here is small
    compile = functools.partial(torch.compile, backend=trace)
    # To choose an attention kernel, the product compares two, which takes a second: once for each dtype is enough.
    choose_kernel = functools.cache(build.choose_kernel)
    with mock.patch.object(torch, "compile", compile), mock.patch.object(build, "choose_kernel", choose_kernel):
        found = {name: vars(run(case)) for name, case in cases.ALL.items() if name in names or not names}
    print(json.dumps(found, default=sorted, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
