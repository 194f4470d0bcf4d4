"""What a run needs and takes, before there is a GPU or a weight: `--plan true`.

From config.json and the lengths of the data alone: the step of the first epoch with the longest row is run on paper
(`rm.plan.memory`), with the attention kernel that a GPU would choose. So a run that will not fit is refused here,
with what would fit, and not on the cluster. The plan stays in `--output_dir` as plan.json, and the run that follows
says at its end how far it was off. `docs/scale.md` shows what it says of 7B to 70B.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

from torch import nn

from rm.config import as_dict, changed, require_positive, setting
from rm.data import batch, dataset
from rm.data.examples import Examples
from rm.data.tokenizer import Tokenizer
from rm.distributed import process_group as dist
from rm.distributed import sharding
from rm.files import read_json, write_json
from rm.hf import build
from rm.model import lisa
from rm.model.attention import SplitAttention, VarlenAttention
from rm.plan import memory
from rm.plan.memory import Footprint

FILE = "plan.json"
GIB = 2**30
LIBRARIES = 3 * GIB  # assumed: CUDA context, buffers of NCCL and cuBLAS
FRAGMENTS = 0.1  # assumed: what the allocator cannot use, as a share of the peak


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Plan"""

    plan: bool = setting(
        False, "say what this run would need and take, and stop: no GPU is used, no weight is read", may_change=True
    )
    world_size: int | None = setting(
        None, "processes to plan for, one a GPU; none: as many as were started", may_change=True
    )
    device_memory_gb: float = setting(80.0, "what a GPU holds, in GiB", may_change=True)
    device_tflops: float = setting(
        312.0, "what it computes in bfloat16, 10^12 operations a second: A100 312, H100 989", may_change=True
    )
    device_utilization: float = setting(0.4, "the share of that which training reaches", may_change=True)

    def check(self) -> None:
        for name in ("device_memory_gb", "device_tflops", "device_utilization"):
            require_positive(self, name)
        if self.world_size is not None:
            require_positive(self, "world_size")
        if self.device_utilization > 1:
            raise ValueError(f"--device_utilization is a share, at most 1, got {self.device_utilization}")


@dataclass(frozen=True)
class Heaviest:
    """The step of the first epoch in which some rank has the longest row."""

    tokens: int  # in that row
    rows: float  # a rank's rows in a step, on average over the epoch
    footprint: Footprint  # of that rank in that step

    @property
    def reserved(self) -> float:
        """Bytes that the device must have."""
        return self.footprint.peak * (1 + FRAGMENTS) + LIBRARIES


def show(cls: type, read: Callable, settings) -> None:
    """Say what a run with these settings needs and takes; ValueError with advice if it will not fit.

    Args:
        cls: LanguageModel or RewardModel.
        read: of `rm.data.dataset`, as the script reads its training data.
        settings: the script's.
    """
    examples, *_ = dataset.load(read, settings, Tokenizer(settings.model_name_or_path), dist.say)
    processes = settings.world_size or dist.world_size()
    if not dist.is_main():
        return
    if settings.dtype == "auto":
        settings = replace(settings, dtype="bfloat16")
    with dist.fake_process_group(processes):
        plan = Plan(cls, settings, examples, VarlenAttention if settings.dtype == "bfloat16" else SplitAttention)
        for line in plan.lines():
            dist.say(line)
        if not plan.fits(plan.heaviest):
            raise ValueError(plan.advice())
    _keep(plan.heaviest.footprint, settings, processes)


def _keep(footprint: Footprint, settings, processes: int) -> None:
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    plan = {"processes": processes, "peak": footprint.peak, "footprint": dataclasses.asdict(footprint)}
    write_json(folder / FILE, plan | {"settings": as_dict(settings)})


def compare(settings) -> None:
    """At a run's end: the memory that rank 0 took at its highest and, where there is a plan, what that had said."""
    file, peak = Path(settings.output_dir) / FILE, dist.peak_memory()
    what = "allocated" if dist.device().type == "cuda" else "resident, with Python and libraries"
    said = f"memory: {peak / GIB:.2f} GiB at the peak ({what})"
    if file.is_file():
        plan = read_json(file)
        before = plan["settings"]
        now = replace(settings, dtype=str(sharding.compute_dtype(settings)).removeprefix("torch."))
        free = (name for name in ("max_tokens", "gradient_checkpointing") if before[name] != getattr(now, name))
        other = [*changed(now, before), *free]
        other += ["world_size"] * (plan["processes"] != dist.world_size())
        said += f", planned {plan['peak'] / GIB:.2f}"
        said += f" with another {', '.join(other)}" if other else f": {peak / plan['peak'] - 1:+.1%}"
    dist.say(said)


class Plan:
    """A run in the group that there is, on paper or not; `kernel` is that of its attention."""

    def __init__(self, cls: type, settings, examples: Examples, kernel: type):
        self.cls, self.settings, self.examples, self.kernel = cls, settings, examples, kernel
        self.model = build.arrange(cls, settings, kernel=kernel)
        self.loader = self._loader(settings)
        self.heaviest = self.simulate()

    def simulate(self, **changes) -> Heaviest:
        """The heaviest step with some settings changed."""
        settings = replace(self.settings, **changes)
        loader = self._loader(settings)
        tokens, step, rows, mean_rows = _longest_row(loader)
        work = loader.step_batches(step, rows[-2:])  # the longest row as last, beside the gradients of those before
        model = build.arrange(self.cls, settings, kernel=self.kernel)
        lisa.switch(model, SimpleNamespace(state={}), step, settings)  # there are no moments to place
        footprint = memory.of_step(model, work, settings.use_lisa and settings.lisa_state == "keep")
        traffic = {name: getattr(footprint, name) / len(work.rows) * mean_rows
                   for name in ("gather_traffic", "replica_traffic")}  # fmt: skip
        return Heaviest(tokens, mean_rows, replace(footprint, **traffic))

    def fits(self, heaviest: Heaviest) -> bool:
        return heaviest.reserved <= self.settings.device_memory_gb * GIB

    def largest_max_tokens(self, known: Heaviest, **changes) -> int:
        """The largest --max_tokens that is seen to fit, 0 if none is, by the secant: memory is nearly linear in it.

        Args:
            known: the heaviest step with `changes` and --max_tokens as it is.
        """
        least = int(self.loader.lengths.max())
        most = _longest_row(self._loader(replace(self.settings, max_tokens=int(self.loader.lengths.sum()))))[0]
        best = known.tokens if self.fits(known) else 0
        guess = min(most, 2 * known.tokens) if best else max(least, known.tokens // 2)
        for _ in range(4):
            if guess == best or not least <= guess:
                break
            new = self.simulate(**changes, max_tokens=guess)
            best = max(best, guess) if self.fits(new) else best
            slope = (new.reserved - known.reserved) / ((new.tokens - known.tokens) or 1)
            room = self.settings.device_memory_gb * GIB - new.reserved
            known, last = new, guess
            guess = min(most, math.floor((new.tokens + room / slope) / 64) * 64) if slope > 0 else most
            if abs(guess - last) <= 0.02 * last and self.fits(new):
                break
        return best

    def advice(self) -> str:
        """What to change where it does not fit."""
        full, have = self.simulate(gradient_checkpointing="full"), self.settings.device_memory_gb * GIB
        said = f"does not fit: {self.heaviest.reserved / GIB:.1f} GiB of {have / GIB:g} a device. "
        states = full.footprint.weights + full.footprint.gradients + full.footprint.optimizer
        room = have - full.reserved + states * (1 + FRAGMENTS)  # for what more processes would divide
        tokens = self.largest_max_tokens(full, gradient_checkpointing="full") if room > states else 0
        if self.fits(full):
            return said + f"Try --gradient_checkpointing full, which fits up to --max_tokens {tokens}"
        if tokens:
            return said + f"Try --gradient_checkpointing full --max_tokens {tokens}"
        more = math.ceil(states * (1 + FRAGMENTS) * dist.world_size() / room) if room > 0 else 0
        devices = f"about {more} devices or more" if more else "devices with more memory"
        adapters = "" if getattr(self.settings, "use_lora", True) else ", or --use_lora true"
        return said + f"Weights and optimizer alone are too much: use {devices}{adapters}"

    def lines(self) -> Iterator[str]:
        """The plan, line by line, as it is computed."""
        settings, loader, found = self.settings, self.loader, self.heaviest
        yield f"plan for {dist.world()} processes with {settings.device_memory_gb:g} GiB each, {settings.dtype}"
        counts = [sum(p.numel() for p in self.model.parameters() if p.requires_grad or frozen) for frozen in (1, 0)]
        yield _line("parameters", f"{counts[0] / 1e9:.3f} billion, of which {counts[1] / 1e9:.3f} billion train")
        tokens, longest = loader.lengths.sum(), loader.lengths.max()
        yield _line("data", f"{len(self.examples):,} examples, {tokens:,} tokens; the longest {longest:,}")
        yield _line(
            "steps", f"{loader.steps:,}, {loader.steps_per_epoch:,} an epoch; {found.rows:.2f} rows a process and step"
        )
        yield _line("longest row", f"{found.tokens:,} tokens; --max_tokens {settings.max_tokens:,}")
        yield from _memory_lines(found, settings)
        yield _line("recomputation", self._recomputation())
        if self.fits(found):
            how = f" with --gradient_checkpointing {settings.gradient_checkpointing}"
            yield _line("largest", f"--max_tokens {self.largest_max_tokens(found):,} fits{how}")
        yield from self._time_lines()

    def _recomputation(self) -> str:
        if self.settings.gradient_checkpointing == "none":
            return "none" if self.fits(self.heaviest) else "needed, or shorter rows"
        without = self.simulate(gradient_checkpointing="none")
        needed = "not needed" if self.fits(without) else "needed"
        return f"{needed}: without it {without.reserved / GIB:.1f} GiB"

    def _time_lines(self) -> Iterator[str]:
        settings, loader, footprint = self.settings, self.loader, self.heaviest.footprint
        flops = step_flops(self.model, loader, settings)
        seconds = flops / (dist.world_size() * settings.device_tflops * 1e12 * settings.device_utilization)
        yield _line("computation", f"{flops:.2e} operations a step, {flops * loader.steps:.2e} in all")
        share = f"{settings.device_utilization:.0%} of {settings.device_tflops:g} TFLOP/s"
        yield _line("time", f"{seconds:.2f} s a step, {seconds * loader.steps / 3600:.2f} hours in all, at {share}")
        for name, traffic in (("a group", footprint.gather_traffic), ("groups", footprint.replica_traffic)):
            if traffic:
                hidden = f"hidden behind the computation above {traffic / seconds / 1e9:.1f} GB/s"
                where = f"{'within' if name == 'a group' else 'between'} {name}"
                yield _line("communication", f"{traffic / GIB:.1f} GiB a step and process {where}; {hidden}")

    def _loader(self, settings) -> batch.Loader:
        return batch.Loader(self.examples, settings, settings.seed, self.model.config.attention_cost)


def _longest_row(loader: batch.Loader) -> tuple[int, int, list, float]:
    """Of the first epoch: tokens of the longest row, its step, its rank's rows from short to long, rows on average."""
    longest, rows_in_all, steps = (0, 0, []), 0, min(loader.steps, loader.steps_per_epoch)
    for step in range(steps):
        for rows in loader.assign_to_ranks(step):
            sizes = [int(loader.lengths[row].sum()) for row in rows]
            if max(sizes) > longest[0]:
                longest = (max(sizes), step, [rows[i] for i in sorted(range(len(rows)), key=sizes.__getitem__)])
        rows_in_all += len(rows)
    return *longest, rows_in_all / steps


def step_flops(model: nn.Module, loader: batch.Loader, settings) -> float:
    """Operations of a mean step over all processes, recomputation included.

    A product with a matrix of n numbers is 2n a token forward, 2n for the gradient of what went in, and 2n for the
    matrix' own where it trains. Attention's backward is twice its forward. Behind the attention of the last layer there
    are only the tokens that the head asks for.
    """
    passes = 2 + (settings.gradient_checkpointing == "full")

    def products(*modules: nn.Module) -> int:
        matrices = [p for module in modules for p in module.parameters() if p.ndim == 2]
        return 2 * sum(p.numel() * (passes + p.requires_grad) for p in matrices)

    behind = products(model.layers[-1].attn.o_proj, model.layers[-1].mlp)
    tokens, sights = loader.lengths.sum(), loader.costs.sum() - loader.lengths.sum()
    base = sum(layer.weight.numel() for layer in model.layers.modules() if isinstance(layer, nn.Linear))
    flops = tokens * (products(model.layers) - behind) + 2 * sights * (passes + 1) * base
    if model.head == "lm":
        head = model.embed if model.config.tie_embeddings else model.lm_head
        flops += loader.labels.sum() * (behind + 2 * head.weight.numel() * (2 + head.weight.requires_grad))
    else:
        flops += len(loader.examples.grade) * behind
    return float(flops) / loader.steps_per_epoch


def _memory_lines(found: Heaviest, settings) -> Iterator[str]:
    parts = ("weights", "gradients", "optimizer", "activations", "gathered")
    said = ", ".join(f"{name} {getattr(found.footprint, name) / GIB:.2f}" for name in parts)
    yield _line("memory, GiB", said)
    verdict = "fits" if found.reserved <= settings.device_memory_gb * GIB else "does NOT fit"
    assumed = f"{LIBRARIES / GIB:g} for libraries and {FRAGMENTS:.0%} for fragments assumed"
    yield _line("", f"peak {found.footprint.peak / GIB:.2f}; {assumed}: {found.reserved / GIB:.1f}, {verdict}")


def _line(name: str, text: str) -> str:
    return f"  {name:14} {text}"
