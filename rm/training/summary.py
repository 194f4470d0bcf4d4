"""What a training says before its first step: what it does, and which of its settings look like a mistake."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from rm.config import SettingsGroup, flags, flatten
from rm.data import show
from rm.data.batch import Loader
from rm.data.dataset import TrainingData
from rm.distributed import process_group as dist
from rm.distributed.sharding import dtype_name
from rm.model.nf4 import count_parameters
from rm.model.transformer import Transformer
from rm.training import disk_space
from rm.training.best import Best
from rm.training.run_log import Start
from rm.training.settings import TrainingSettings

NAMES = 14  # columns of the names on the left
# The usual learning rate is a script's default, for adapters ten times as much; not of small models, which learn
# faster.
ADAPTERS, SMALL_MODEL = 10, 100_000_000


def say_start(
    settings: TrainingSettings, model: Transformer, data: TrainingData, loader: Loader, start: Start, unit: str
) -> None:
    """Print the summary and the warnings of a training.

    Args:
        start: the steps that are done.
        unit: what an example is called ("pairs").
    """
    screen = show.Screen(sys.stdout)
    for name, text in _facts(settings, model, data, loader, start, unit):
        _say_lines(screen.wrapped(f"{name:<{NAMES}}{text}", indent=" " * NAMES))
    _say_precision(model)
    out, steps = Path(settings.run.output_dir), loader.steps - start.step
    no_room = disk_space.too_little(out, model, settings.checkpoint, settings.optim, steps)
    said = list(warnings(settings, _sizes(model)[0], data.facts["train"]["kept"]))
    for warning in said + ([no_room] if no_room else []):
        _say_lines(screen.wrapped(f"warning: {warning}", indent="  "))


def _say_lines(lines: Iterable[str]) -> None:
    for line in lines:  # one at a time: `say` shows a line break as \n
        dist.say(line)


def say_what_runs(model: Transformer) -> None:
    """Print one line: devices, dtype, attention kernel, parameters; and a warning where the dtype is a slow choice."""
    dist.say(f"{_runs_on(model)}; {_sizes(model)[0]:,} parameters")
    _say_precision(model)


def _facts(
    settings: TrainingSettings, model: Transformer, data: TrainingData, loader: Loader, start: Start, unit: str
) -> Iterator[tuple[str, str]]:
    """(name, text) of each line."""
    report = data.facts["train"]
    read, kept, trained_on = report["kept"] + sum(report["dropped"].values()), report["kept"], len(data.train)
    yield "data", f"{read:,} records read, {kept:,} kept; trained on {trained_on:,} {unit}"
    sets = [f"{name} {len(examples):,}".strip() for name, examples in data.held_out.items()]
    yield "held out", f"{', '.join(sets)} {unit}" if sets else "none"
    batch, epochs = min(settings.batch.global_batch_size, trained_on), loader.steps / loader.steps_per_epoch
    tokens = loader.lengths.sum() / trained_on * batch
    more = " or more" if loader.batch.group_by_prompt else ""
    size = f"{batch:,} {unit}{more}, {tokens:,.0f} tokens"
    resumed = _resumed(settings, data, loader.steps, start)
    yield "steps", f"{loader.steps:,}, each of {size}; epochs: {epochs:.3g}{resumed}"
    parameters, trained = _sizes(model)
    yield "parameters", f"{trained:,} of {parameters:,} train{_method(settings)}"
    yield "runs on", _runs_on(model)
    yield "output", settings.run.output_dir


def _resumed(settings: TrainingSettings, data: TrainingData, steps: int, start: Start) -> str:
    if start.step == 0:
        return ""
    if Best(settings.best, data.facts["held_out"], start.best).stops:
        return f"; stopped early at step {start.step:,}"
    return "; all are done" if start.step == steps else f"; the next is step {start.step + 1:,}"


def _sizes(model: Transformer) -> tuple[int, int]:
    """(all parameters, those that train)"""
    return count_parameters(model), sum(p.numel() for p in model.parameters() if p.requires_grad)


def _method(settings: TrainingSettings) -> str:
    if settings.lora.use_lora:
        return f" (LoRA, rank {settings.lora.lora_r})"
    if settings.lisa.use_lisa:
        return f" (LISA, {settings.lisa.lisa_activated_layers} layers at a time)"
    return ""


def _runs_on(model: Transformer) -> str:
    return (
        f"{dist.world_size()} x {dist.device().type} ({dist.device_name()}), {dtype_name(model.compute_dtype)}, "
        f"{model.kernel.__name__}"
    )


def _say_precision(model: Transformer) -> None:
    config = model.config
    if config.long_ropes:
        which = "long" if config.ropes == config.long_ropes else "short"
        limit = f"{'above' if which == 'long' else 'at most'} {config.long_beyond}"
        dist.say(f"rotary positions: {which}_factor for all texts, as --max_length is {limit}")
    if model.compute_dtype == torch.bfloat16 and dist.device().type == "cpu" and not _cpu_has_bfloat16():
        dist.say("warning: this CPU has no bfloat16 units and emulates them: --dtype float32 is up to 100 times faster")


def _cpu_has_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last: of ARM


def warnings(settings: TrainingSettings, parameters: int, records: int) -> Iterator[str]:
    """A line for each setting that has no effect, or that is far from what is usual.

    Args:
        parameters: of the model.
        records: that are kept, held out or not.
    """
    optim, split, text = settings.optim, settings.split, settings.text
    for switch, is_on, group in (
        ("use_lora", settings.lora.use_lora, settings.lora), ("use_lisa", settings.lisa.use_lisa, settings.lisa)
    ):  # fmt: skip
        if not is_on and (changed := _changed(group)):
            yield f"without --{switch} true this has no effect: {', '.join(changed)}"
    if optim.loraplus_lr_ratio != 1 and not settings.lora.use_lora:
        yield "--loraplus_lr_ratio has no effect without --use_lora true"
    if optim.min_lr_ratio and optim.lr_scheduler_type == "constant":
        yield "--min_lr_ratio has no effect on a constant learning rate: --lr_scheduler_type linear or cosine"
    if settings.memory.activation_offloading and dist.device().type == "cpu":
        yield "--activation_offloading true only costs time here: activations are in host memory anyway"
    if split.validation_split_by != "conversation" and not split.validation_split_percentage:
        yield "--validation_split_by has no effect without --validation_split_percentage"
    if text.truncation_side != "left" and text.cut is None:
        yield "--truncation_side has no effect without --overlong truncate: longer texts are left out"
    if settings.run.eval_steps is not None and not split.holds_out:
        yield (
            f"--eval_steps {settings.run.eval_steps} has no effect: nothing is held out; --eval_dataset_path or "
            f"--validation_split_percentage would"
        )
    percentage = split.validation_split_percentage
    if 0 < percentage < 1:
        yield (
            f"--validation_split_percentage {percentage:g} is {percentage:g} % of {records:,} records; "
            f"{100 * percentage:g} would be {percentage:g} of them"
        )
    yield from _rate_warning(settings, parameters)


def _changed(group: SettingsGroup) -> list[str]:
    """The flags of the settings that do not have their defaults."""
    known = flags(type(group))
    return [f"--{name}" for name, value in flatten(group).items() if value != known[name].default]


def _rate_warning(settings: TrainingSettings, parameters: int) -> Iterator[str]:
    """Warn of a rate that is about ten times off, such as that of all weights for adapters."""
    default, rate = flags(type(settings))["learning_rate"].default, settings.optim.learning_rate
    usual = default * ADAPTERS if settings.lora.use_lora else default
    if parameters >= SMALL_MODEL and not 0.11 < rate / usual < 9:
        what = "adapters" if settings.lora.use_lora else "all weights"
        yield f"--learning_rate {rate:g} is far from what is usual for {what}, about {usual:g} (docs/recipes.md)"
