"""The last stage: how fast and how lean training is on this device."""

import gc
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from rm.config import compose
from rm.data.batch import StepBatches, pack
from rm.data.examples import Example, Examples
from rm.distributed import checkpoint, sharding
from rm.distributed import process_group as dist
from rm.hf import build
from rm.model.attention import VarlenAttention
from rm.model.heads import LanguageModel, RewardModel
from rm.model.lora import checkpointed
from rm.plan import memory, plan
from rm.training import optim
from rm.training.flops import PEAKS
from tests.acceptance.report import Report
from tests.training_runs import Settings
from train_rm import train_step

COMMON = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=128256, num_attention_heads=32,
    num_key_value_heads=8, rms_norm_eps=1e-5, hidden_act="silu", max_position_embeddings=8192, rope_theta=5e5,
)  # fmt: skip
LLAMA_1B = COMMON | dict(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64, tie_word_embeddings=True
)
LLAMA_8B = COMMON | dict(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, head_dim=128, tie_word_embeddings=False
)
PAIRS, PROMPT, REPLY = 22, 200, 80  # a micro-batch of 7,920 tokens, with the lengths of HH-RLHF
WARMUP, STEPS, MICRO_BATCHES = 3, 5, 2
LEAST_UTILIZATION = {"H100": 0.28, "H200": 0.28, "A100": 0.38}  # share of a device's peak that a step has to reach


@dataclass(frozen=True)
class Run:
    name: str
    cls: type
    config: dict
    flags: dict
    memory_gib: int  # of a device on which it fits


RUNS = (
    Run("1B reward model", RewardModel, LLAMA_1B, {}, 38),
    Run("1B SFT", LanguageModel, LLAMA_1B, {}, 38),
    Run("8B reward model, LoRA", RewardModel, LLAMA_8B, dict(use_lora=True, lora_target_modules=("all-linear",)), 70),
)


def speed(report: Report) -> None:
    """model FLOPs utilisation, whether the device waits for the host, memory as planned"""
    if not torch.cuda.is_available():
        return report.skip("speed", "no GPU")
    name, available = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / 2**30
    device = next((device for device in LEAST_UTILIZATION if device in name), None)
    if device is None:
        return report.skip("speed", f"the peak of {name} is not known here")
    peak, least = PEAKS[device], LEAST_UTILIZATION[device]
    runs = [run for run in RUNS if available >= run.memory_gib]
    if not runs:
        return report.skip("speed", f"the smallest model needs {RUNS[0].memory_gib} GiB")
    with dist.session(0):
        planned = {run.name: _planned(run) for run in runs}
    with dist.session(0):
        for run in runs:
            facts = measure(run) | {"planned_gib": planned[run.name]}
            utilisation = facts["tflops"] / (peak * (100 if report.has_fault() else 1))
            report.note(**{run.name: facts})
            report.check(f"{run.name}: model FLOPs utilisation", round(utilisation, 3), least, utilisation >= least)
            report.check(f"{run.name}: time in which the device computes", facts["busy"], 0.9, facts["busy"] >= 0.9)
            report.check(f"{run.name}: memory reserved / allocated", facts["reserved_over_allocated"], 1.15)
            ratio = round(facts["allocated_gib"] / facts["planned_gib"], 3)
            report.check(f"{run.name}: memory allocated / planned", ratio, "0.9 to 1.1", 0.9 <= ratio <= 1.1)


def measure(run: Run) -> dict:
    """Times and memory of some steps of a model with random weights."""
    torch.cuda.reset_peak_memory_stats()
    settings, model = _build(run)
    sharding.allocate(model)
    with torch.no_grad():
        for parameter in model.parameters():
            sharding.local(parameter).normal_(0, 0.02) if parameter.ndim > 1 else sharding.local(parameter).fill_(1)
    optimizer = optim.adamw(model, settings.optim)
    batches = _batches(run.cls, run.config["vocab_size"])
    times = []
    for _ in range(WARMUP + STEPS):
        times.append(_timed_step(model, optimizer, batches))
    seconds = float(np.median(times[WARMUP:]))
    kernels, slowest = _kernels_of_a_step(model, optimizer, batches)
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    facts = dict(
        step_seconds=round(seconds, 4),
        tokens_per_second=round(batches.num_tokens / seconds),
        tflops=round(flops(model, batches, run) / seconds / 1e12, 1),
        busy=round(sum(slowest.values()) / seconds, 3),
        kernels=kernels,
        allocated_gib=round(allocated / 2**30, 2),
        reserved_over_allocated=round(reserved / allocated, 3),
    )
    report_of_kernels = sorted(slowest.items(), key=lambda item: -item[1])[:12]
    facts["milliseconds_by_kernel"] = {name[:60]: round(1000 * seconds, 2) for name, seconds in report_of_kernels}
    pinned: dict[str, torch.Tensor] = {}
    # The first one, and later ones.
    facts["snapshot_seconds"] = [_seconds_of_a_snapshot(model, optimizer, pinned) for _ in range(2)]
    del model, optimizer
    gc.collect()  # a sharded model refers to itself
    torch.cuda.empty_cache()
    return facts


def _build(run: Run, kernel: type | None = None) -> tuple[Settings, torch.nn.Module]:
    settings = compose(Settings, dtype="bfloat16", **run.flags)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(run.config))
        return settings, build.build(run.cls, folder, settings.parallel, training=settings.training, kernel=kernel)


def _planned(run: Run) -> float:
    """GiB at the peak of a step, as `--plan` finds them."""
    with dist.fake_process_group(1), plan.logits_of_a_gpu():
        _, model = _build(run, VarlenAttention)
        footprint = memory.of_step(model, _batches(run.cls, run.config["vocab_size"]))
    return round(footprint.peak / 2**30, 2)


def _timed_step(model, optimizer, batches: StepBatches) -> float:
    """Seconds of a step, the device's work included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    train_step(model, optimizer, batches, 1.0)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def _seconds_of_a_snapshot(model, optimizer, pinned: dict[str, torch.Tensor]) -> float:
    """Seconds that training stands still when a checkpoint is due; the first one pins the memory."""
    start = time.perf_counter()
    checkpoint.snapshot(checkpointed(model), optimizer, pinned)
    return round(time.perf_counter() - start, 3)


def _kernels_of_a_step(model, optimizer, batches: StepBatches) -> tuple[int, dict[str, float]]:
    """How many kernels a step runs, and the seconds that each name takes together."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        _timed_step(model, optimizer, batches)
    totals: dict[str, float] = {}
    count = 0
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            totals[event.name] = totals.get(event.name, 0) + event.device_time_total / 1e6
            count += 1
    return count, totals


def _batches(cls: type, vocab: int) -> StepBatches:
    random = np.random.default_rng(0)

    def ids(n: int) -> np.ndarray:
        return random.integers(0, vocab, n).astype(np.int32)

    examples = []
    for _ in range(PAIRS):
        replies = tuple(ids(REPLY) for _ in range(2 if cls is RewardModel else 1))
        if cls is RewardModel:
            examples.append(Example(ids(PROMPT), replies, tuple(np.zeros(REPLY, bool) for _ in replies)))
        else:  # one text of the same number of tokens, all of which carry loss
            text = ids(PROMPT + 2 * REPLY)
            examples.append(Example(text[:0], (text,), (np.ones(len(text), bool),)))
    batch = pack(Examples.build(iter(examples)), range(PAIRS))
    micro_batches = [batch] * MICRO_BATCHES
    return StepBatches(
        micro_batches, PAIRS * MICRO_BATCHES, len(batch.targets) * MICRO_BATCHES, len(batch.tokens) * MICRO_BATCHES, 0
    )


def flops(model: torch.nn.Module, batches: StepBatches, run: Run) -> float:
    """Model FLOPs of a step: 2 a weight and token forward, 4 backward (2 where the weight is frozen), attention."""
    total = 0.0
    linear = {n: m for n, m in model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    weights = sum(m.in_features * m.out_features for m in linear.values())
    last = f"{len(model.layers) - 1}."
    behind = sum(  # what the last layer computes for the needed positions alone
        m.in_features * m.out_features
        for n, m in linear.items()
        if n.startswith(last) and n.rpartition(".")[2] not in ("q_proj", "k_proj", "v_proj")
    )
    factor = 4 if run.flags.get("use_lora") else 6
    for batch in batches.micro_batches:
        tokens = len(batch.tokens)
        needed = len(batch.reply_end) if run.cls is RewardModel else len(batch.targets)
        total += factor * ((weights - behind) * tokens + behind * needed)
        if run.cls is LanguageModel:
            total += 6 * run.config["vocab_size"] * run.config["hidden_size"] * needed
        heads = run.config["num_attention_heads"] * run.config["head_dim"]
        for prefix, first, *others in batch.segments:
            pairs = (prefix + first) ** 2 / 2 + sum(reply * (prefix + reply / 2) for reply in others)
            total += 12 * heads * run.config["num_hidden_layers"] * pairs
    return total
