"""What a run needs and takes, before there is a GPU or any weights: `--plan true`.

From config.json and the lengths of the data alone: the first epoch's step with the longest micro-batch is run with fake
tensors (`rm.plan.memory`) and the attention kernel that a GPU would use. So a run that will not fit is refused here,
with what would fit, and not on the cluster. The plan is written to plan.json in `--output_dir`, and the run that
follows prints at its end how far it was off. `docs/scale.md` shows the plans of 7B to 70B models.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from rm.config import as_saved, updated
from rm.data.batch import Loader
from rm.data.examples import Examples
from rm.distributed import process_group as dist
from rm.files import write_json
from rm.hf import build, weights
from rm.model import lisa, losses
from rm.model.attention import VarlenAttention
from rm.model.losses import LossSettings
from rm.model.nf4 import count_parameters
from rm.model.transformer import ModelConfig, Transformer
from rm.plan import memory, roofline
from rm.plan.memory import Footprint, PlannedCappedAttention, PlannedSplitAttention
from rm.plan.settings import FILE, GIB, PlanSettings
from rm.training.flops import PEAKS, attention_flops, step_flops
from rm.training.settings import TrainingSettings

LIBRARIES = 3 * GIB  # assumed: CUDA context, buffers of NCCL and cuBLAS
FRAGMENTATION = 0.1  # assumed: memory that the allocator cannot use, as a share of the peak
# What takes less memory for the same training, the fastest first.
SAVING = (
    {"activation_offloading": True},
    {"optimizer_state_dtype": "bfloat16"},
    {"cpu_offload": True},
    {"cpu_offload": True, "activation_offloading": True},
)


@dataclass(frozen=True)
class Heaviest:
    """The step of the first epoch in which some rank has the longest micro-batch."""

    tokens: int  # in that micro-batch
    micro_batches: float  # of a rank in a step, on average over the epoch
    footprint: Footprint  # of that rank in that step
    work: roofline.Work  # of the micro-batches that were simulated
    simulated: tuple[int, int]  # the tokens and the number of these

    @property
    def reserved(self) -> float:
        """Bytes that the device must have."""
        return reserved(self.footprint)


def reserved(footprint: Footprint) -> float:
    """Bytes that a device must have for it."""
    return footprint.peak * (1 + FRAGMENTATION) + LIBRARIES


def show(
    cls: type[Transformer],
    settings: TrainingSettings,
    plan_settings: PlanSettings,
    examples: Examples,
    loss: LossSettings | None = None,
    new_ids: Sequence[int] = (),
) -> None:
    """Print what a run with these settings needs and takes.

    Args:
        cls: LanguageModel or RewardModel; `loss` is a reward model's.
        examples: to train on.
        new_ids: of tokens that are added to the vocabulary.

    Raises:
        ValueError: the run will not fit; with advice.
    """
    processes = plan_settings.world_size or dist.world_size()
    if not dist.is_main():
        return
    if settings.parallel.dtype == "auto":
        settings = updated(settings, dtype="bfloat16")
    on_a_gpu = settings.parallel.dtype == "bfloat16"
    config, *_ = weights.read_config(settings.model.model_name_or_path)
    kernel = kernel_of(config, on_a_gpu)
    with dist.fake_process_group(processes), logits_of_a_gpu() if on_a_gpu else contextlib.nullcontext():
        plan = Plan(cls, settings, plan_settings, examples, kernel, loss, new_ids)
        for line in plan.lines():
            dist.say(line)
        if not plan.fits(plan.heaviest):
            raise ValueError(plan.advice())
    _write(plan.heaviest.footprint, settings, processes)


def kernel_of(config: ModelConfig, on_a_gpu: bool) -> type:
    """A class of `rm.model.attention` that holds as much memory as the one that a run would use."""
    if config.attn_softcap:
        return PlannedCappedAttention
    return VarlenAttention if on_a_gpu else PlannedSplitAttention


def state_dtype(settings: TrainingSettings) -> torch.dtype:
    """What Adam's moments are kept in."""
    return getattr(torch, settings.optim.optimizer_state_dtype)


@contextlib.contextmanager
def logits_of_a_gpu() -> Iterator[None]:
    """Hold as many logits at a time as on a GPU: the fake tensors of a plan are on the CPU."""
    on_cpu = losses.LOGITS_AT_ONCE["cpu"]
    losses.LOGITS_AT_ONCE["cpu"] = losses.LOGITS_AT_ONCE["cuda"]
    try:
        yield
    finally:
        losses.LOGITS_AT_ONCE["cpu"] = on_cpu


def _write(footprint: Footprint, settings: TrainingSettings, processes: int) -> None:
    folder = Path(settings.run.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    plan = {"processes": processes, "peak": footprint.peak, "footprint": dataclasses.asdict(footprint)}
    write_json(folder / FILE, plan | {"settings": as_saved(settings)})


class Plan:
    """The plan of a run in the present process group, which may be a fake one."""

    def __init__(
        self,
        cls: type[Transformer],
        settings: TrainingSettings,
        plan_settings: PlanSettings,
        examples: Examples,
        kernel: type,
        loss: LossSettings | None = None,
        new_ids: Sequence[int] = (),
    ):
        """`kernel` is a class of `rm.model.attention`; the other arguments are as for `show`."""
        self.cls, self.settings, self.plan_settings, self.examples = cls, settings, plan_settings, examples
        self.kernel, self.loss, self.new_ids = kernel, loss, new_ids
        self.model = self._model(settings)
        self.loader = self._loader(settings)
        self.heaviest = self.simulate()

    def _model(self, settings: TrainingSettings, step: int = 0) -> Transformer:
        """As it trains in a step."""
        model = build.build(
            self.cls,
            settings.model.model_name_or_path,
            settings.parallel,
            # What is offloaded is counted, not done: the fake tensors of a plan are all on the CPU.
            training=build.Training(replace(settings.memory, cpu_offload=False), settings.lora, settings.lisa),
            loss=self.loss,
            kernel=self.kernel,
            new_ids=self.new_ids,
            max_length=settings.text.max_length,
        )
        no_optimizer = SimpleNamespace(state={})  # there are no moments to move
        lisa.activate_layers(model, no_optimizer, step, settings.lisa, settings.run.seed)
        return model

    def _loader(self, settings: TrainingSettings) -> Loader:
        cost = self.model.config.attention_cost
        label_chosen = self.loss is not None and self.loss.has_sft_loss
        return Loader(self.examples, settings.batch, settings.packing, settings.run.seed, cost, label_chosen)

    def simulate(self, **changes) -> Heaviest:
        """The heaviest step, with some settings changed."""
        settings = updated(self.settings, **changes)
        loader = self._loader(settings)
        longest = _longest_micro_batch(loader)
        # Two micro-batches suffice: the longest one last, next to the gradients of the one before.
        batches = loader.step_batches(longest.step, longest.assigned[-2:])
        model = self._model(settings, longest.step)
        keeps_moments = settings.lisa.use_lisa and settings.lisa.lisa_state == "keep"
        footprint, work = memory.simulate(
            model,
            batches,
            all_moments=keeps_moments,
            state_dtype=state_dtype(settings),
            offload=settings.memory.cpu_offload,
        )
        if model.config.attn_softcap:
            recompute = settings.memory.gradient_checkpointing == "full"
            for batch in batches.micro_batches:
                work += roofline.capped_attention(model.config, batch.segments, model.compute_dtype, recompute)
        # Measured over these micro-batches; a step has `mean_count` of them. What is exchanged once a step stays.
        scale = longest.mean_count / len(batches.micro_batches)
        footprint = replace(
            footprint,
            gather_traffic=footprint.gather_traffic * scale,
            reduce_traffic=footprint.reduce_traffic * (scale if settings.parallel.sync_each_batch else 1),
        )
        tokens = sum(int(loader.lengths[indices].sum()) for indices in longest.assigned[-2:])
        simulated = (tokens, len(batches.micro_batches))
        return Heaviest(longest.tokens, longest.mean_count, footprint, work, simulated)

    @property
    def device_bytes(self) -> float:
        return self.plan_settings.device_memory_gb * GIB

    def fits(self, heaviest: Heaviest) -> bool:
        return heaviest.reserved <= self.device_bytes

    def largest_max_tokens(self, known: Heaviest, **changes) -> int:
        """The largest --max_tokens that was found to fit, 0 if none was.

        By the secant method, since memory is nearly linear in the tokens of a micro-batch.

        Args:
            known: the heaviest step with `changes` and the present --max_tokens.
        """
        least = int(self.loader.lengths.max())
        all_tokens = int(self.loader.lengths.sum())
        most = _longest_micro_batch(self._loader(updated(self.settings, max_tokens=all_tokens))).tokens
        best = known.tokens if self.fits(known) else 0
        guess = min(most, 2 * known.tokens) if best else max(least, known.tokens // 2)
        for _ in range(4):
            if guess == best or guess < least:
                break
            new = self.simulate(**changes, max_tokens=guess)
            if self.fits(new):
                best = max(best, guess)
            slope = (new.reserved - known.reserved) / ((new.tokens - known.tokens) or 1)  # bytes per token
            free = self.device_bytes - new.reserved
            known, last = new, guess
            guess = min(most, math.floor((new.tokens + free / slope) / 64) * 64) if slope > 0 else most
            if abs(guess - last) <= 0.02 * last and self.fits(new):
                break
        return best

    def advice(self) -> str:
        """What to change where the run does not fit."""
        full = self.simulate(gradient_checkpointing="full")
        needed, available = self.heaviest.reserved / GIB, self.plan_settings.device_memory_gb
        message = f"does not fit: {needed:.1f} GiB of {available:g} a device. "
        if self.fits(full):
            tokens = self.largest_max_tokens(full, gradient_checkpointing="full")
            return message + f"Try --gradient_checkpointing full, which fits up to --max_tokens {tokens}"
        # What more processes would divide. A base in 4 bits is whole on each, and what is offloaded is not counted.
        whole = sum(x.nbytes for x in self.model.buffers())
        states = full.footprint.weights + full.footprint.gradients + full.footprint.optimizer - whole
        room = self.device_bytes - full.reserved + states * (1 + FRAGMENTATION)  # for these, beside everything else
        is_offloaded = self.settings.memory.cpu_offload
        if room > states or is_offloaded:
            if tokens := self.largest_max_tokens(full, gradient_checkpointing="full"):
                return message + f"Try --gradient_checkpointing full --max_tokens {tokens}"
        ways = ["devices with more memory"]
        if room > 0 and not is_offloaded:
            ways = [f"about {math.ceil(states * (1 + FRAGMENTATION) * dist.world_size() / room)} devices or more"]
        for changes in SAVING:
            is_new = not changes.items() <= vars(self.settings.memory).items()
            if is_new and self.fits(self.simulate(gradient_checkpointing="full", **changes)):
                flags = " ".join(f"--{name} {str(value).lower()}" for name, value in changes.items())
                ways.append(f"--gradient_checkpointing full {flags}, which fits")
                break
        lora = self.settings.lora
        if not (lora.use_lora and lora.load_in_4bit):
            ways.append("--load_in_4bit true" if lora.use_lora else "--use_lora true")
        what = "What is computed at a time is" if is_offloaded else "Weights and optimizer alone are"
        return message + f"{what} too much: use {', or '.join(ways)}"

    def lines(self) -> Iterator[str]:
        """The plan, line by line, as it is computed."""
        settings, loader, heaviest = self.settings, self.loader, self.heaviest
        memory_gb = self.plan_settings.device_memory_gb
        yield f"plan for {dist.world_size()} processes with {memory_gb:g} GiB each, {settings.parallel.dtype}"
        parameters = count_parameters(self.model)
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        yield _line("parameters", f"{parameters / 1e9:.3f} billion, of which {trained / 1e9:.3f} billion train")
        tokens, longest = loader.lengths.sum(), loader.lengths.max()  # of a preference, with all its replies
        yield _line("data", f"{len(self.examples):,} examples, {tokens:,} tokens; the longest example {longest:,}")
        count = f"{heaviest.micro_batches:.2f} micro-batches per process and step"
        yield _line("steps", f"{loader.steps:,}, {loader.steps_per_epoch:,} an epoch; {count}")
        max_tokens = settings.packing.max_tokens
        yield _line("micro-batch", f"the longest has {heaviest.tokens:,} tokens; --max_tokens {max_tokens:,}")
        yield from self._memory_lines()
        yield _line("recomputation", self._recomputation())
        if self.fits(heaviest):
            how = f"with --gradient_checkpointing {settings.memory.gradient_checkpointing}"
            yield _line("largest", f"--max_tokens {self.largest_max_tokens(heaviest):,} fits {how}")
        yield from self._time_lines()

    def _memory_lines(self) -> Iterator[str]:
        footprint, reserved = self.heaviest.footprint, self.heaviest.reserved / GIB
        kinds = ("weights", "gradients", "optimizer", "activations", "gathered")
        values = dataclasses.asdict(footprint)
        yield _line("memory, GiB", ", ".join(f"{kind} {values[kind] / GIB:.2f}" for kind in kinds))
        yield _line("", f"at the end of the run {footprint.end / GIB:.2f}; in host memory {footprint.host / GIB:.2f}")
        verdict = "fits" if self.fits(self.heaviest) else "does NOT fit"
        assumed = f"assuming {LIBRARIES / GIB:g} for libraries and {FRAGMENTATION:.0%} fragmentation"
        yield _line("", f"peak {footprint.peak / GIB:.2f}; {assumed}: {reserved:.1f}, {verdict}")

    def _recomputation(self) -> str:
        if self.settings.memory.gradient_checkpointing == "none":
            return "none" if self.fits(self.heaviest) else "needed, or a smaller --max_tokens"
        without = self.simulate(gradient_checkpointing="none")
        needed = "not needed" if self.fits(without) else "needed"
        return f"{needed}: without it {without.reserved / GIB:.1f} GiB"

    def _time_lines(self) -> Iterator[str]:
        plan, loader, footprint = self.plan_settings, self.loader, self.heaviest.footprint
        flops = step_flops(self.model, loader, self.settings.memory.gradient_checkpointing)
        yield _line("computation", f"{flops:.2e} operations a step, {flops * loader.steps:.2e} in all")
        traffic = {"within a group": footprint.group_traffic, "between groups": footprint.replica_traffic}
        for where, size in traffic.items():
            if size:
                yield _line("communication", f"{size / GIB:.1f} GiB per step and process {where}")
        if plan.device_tflops is not None:
            seconds = flops / (dist.world_size() * plan.device_tflops * 1e12 * plan.device_utilization)
            rate = f"at {plan.device_utilization:.0%} of {plan.device_tflops:g} TFLOP/s"
            yield _line("time", f"{self._duration(seconds)}, {rate}{self._hidden(seconds)}")
        elif self.settings.memory.cpu_offload or self.settings.memory.activation_offloading:
            name = "cpu_offload" if self.settings.memory.cpu_offload else "activation_offloading"
            yield _line("time", f"on paper not with --{name}: the roofline knows no copies to the host")
        elif self.model.compute_dtype == torch.bfloat16:
            yield from self._lines_on_paper()
        else:
            yield _line("time", "in float32 only with --device_tflops and --device_utilization")

    def _duration(self, seconds: float) -> str:
        hours = seconds * self.loader.steps / 3600
        in_all = f"{hours:.2f} hours" if hours >= 0.1 else f"{60 * hours:.1f} minutes"
        return f"{seconds:.2f} s a step, {in_all} in all"

    def _hidden(self, seconds: float) -> str:
        """The bandwidth at which the communication within a group takes no longer than the computation."""
        traffic = self.heaviest.footprint.group_traffic
        return f", communication hidden above {traffic / seconds / 1e9:.1f} GB/s" if traffic else ""

    def _lines_on_paper(self) -> Iterator[str]:
        kernels = self.heaviest.work.count / self.heaviest.simulated[1]
        yield _line("time on paper", f"about {kernels:,.0f} kernels a micro-batch; with all processes on one machine:")
        for gpu in roofline.GPUS:
            step, tokens_per_second, utilization = self.on_paper(gpu)
            speed = f"{tokens_per_second:,.0f} tokens/s each, MFU {utilization:.0%}, limited by {step.limit}"
            yield _line("", f"{gpu}: {self._duration(step.total)}, {speed}{self._hidden(step.device)}")

    def on_paper(self, gpu: str) -> tuple[roofline.Step, float, float]:
        """A mean step on a GPU of `roofline.GPUS`: its parts, tokens per second of one GPU, and MFU."""
        heaviest, loader, recompute = self.heaviest, self.loader, self.settings.memory.gradient_checkpointing
        tokens = float(loader.lengths.sum()) / loader.steps_per_epoch / dist.world_size()
        simulated_tokens, simulated_count = heaviest.simulated
        # In `work` already, where no kernel fuses it.
        attention = 0 if self.model.config.attn_softcap else attention_flops(self.model, loader, recompute)
        step = roofline.step(
            gpu,
            heaviest.work,
            scale=tokens / simulated_tokens,
            launches=heaviest.work.count * heaviest.micro_batches / simulated_count,
            attention=attention / dist.world_size(),
            trained=heaviest.footprint.optimizer // (2 * state_dtype(self.settings).itemsize),
            traffic=heaviest.footprint.group_traffic,
        )
        flops = step_flops(self.model, loader) / dist.world_size()
        return step, tokens / step.total, flops / step.total / (PEAKS[gpu] * 1e12)


@dataclass(frozen=True)
class LongestMicroBatch:
    """Of the first epoch."""

    tokens: int
    step: int
    assigned: list[np.ndarray]  # its rank's micro-batches in that step, from short to long
    mean_count: float  # of micro-batches of a rank in a step


def _longest_micro_batch(loader: Loader) -> LongestMicroBatch:
    longest, count, steps = (0, 0, []), 0, min(loader.steps, loader.steps_per_epoch)
    for step in range(steps):
        for assigned in loader.assign_to_ranks(step):
            sizes = [int(loader.lengths[indices].sum()) for indices in assigned]
            if max(sizes) > longest[0]:
                by_size = sorted(range(len(assigned)), key=sizes.__getitem__)
                longest = (max(sizes), step, [assigned[i] for i in by_size])
        count += len(assigned)  # the same on every rank
    tokens, step, assigned = longest
    return LongestMicroBatch(tokens, step, assigned, count / steps)


def _line(name: str, text: str) -> str:
    return f"  {name:14} {text}"
