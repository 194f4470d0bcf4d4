"""Short trainings of tiny models, without the scripts: for tests of steps, adapters and frozen layers.

settings = compose(Settings, use_lora=True, lora_r=4)          # flat names, as on the command line
run_ranks(2, train_lora, folder, out, settings)
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rm.config import SettingsGroup, compose
from rm.data.batch import BatchSettings, EvalBatches, Loader, PackingSettings, StepBatches
from rm.data.examples import Examples
from rm.distributed import process_group as dist
from rm.distributed import sharding
from rm.distributed.sharding import MemorySettings, ParallelSettings
from rm.hf import build
from rm.model import lora as lora_adapters
from rm.model.heads import RewardModel
from rm.model.lisa import LisaSettings
from rm.model.lora import LoraSettings
from rm.model.transformer import Transformer
from rm.scoring.score import all_rewards
from rm.training import optim
from rm.training.optim import OptimSettings
from tests import made
from train_rm import train_step

ATTENTION_COST = 0.01


@dataclass(frozen=True, kw_only=True)
class Settings(SettingsGroup):
    """The groups of settings that a few steps need"""

    batch: BatchSettings
    packing: PackingSettings
    optim: OptimSettings
    lora: LoraSettings
    lisa: LisaSettings
    parallel: ParallelSettings
    memory: MemorySettings

    @property
    def training(self) -> build.Training:
        return build.Training(self.memory, self.lora, self.lisa)


def lora_settings(**changes) -> Settings:
    """Settings of `train_lora`, from flat names: all linear layers, without dropout."""
    tiny = dict(
        use_lora=True, lora_r=4, lora_dropout=0.0, lora_target_modules=("all-linear",), learning_rate=1e-2,
        global_batch_size=6, max_tokens=60,
    )  # fmt: skip
    return compose(Settings, **tiny | changes)


def examples_of(cls: type[Transformer], n: int) -> Examples:
    """Pairs for a reward model, their chosen texts for a language model."""
    pairs = made.token_pairs(n, seed=1)
    return made.pair_examples(pairs) if cls is RewardModel else made.text_examples([chosen for chosen, _ in pairs])


def sharded(
    model: Transformer,
    parallel: ParallelSettings = ParallelSettings(),  # noqa: B008
    recompute: str = "none",
    lora: LoraSettings | None = None,
    offload_activations: bool = False,
) -> Transformer:
    """A copy of a plain model such as `made.model`'s: made on the meta device, sharded, and filled.

    Args:
        recompute: a value of --gradient_checkpointing.
        lora: adapt the copy; its adapters have their initial values, of seed 0.
    """
    options = {"loss": model.loss} if isinstance(model, RewardModel) else {}
    with torch.device("meta"):
        copy = type(model)(model.config, model.kernel, **options)
    copy.compute_dtype = sharding.compute_dtype(parallel.dtype)
    if lora is not None:
        lora_adapters.adapt(copy, lora, copy.compute_dtype)
        if not lora.shard_base:
            parallel = replace(parallel, shard_group_size=1)
    sharding.parallelize(copy, parallel, recompute, offload_activations=offload_activations)
    copy.to_empty(device=dist.device())
    values, generator = dict(model.named_parameters()), torch.Generator().manual_seed(0)
    for name, parameter in copy.named_parameters():
        if lora_adapters.is_adapter(name):
            sharding.fill(parameter, lora_adapters.initial_values(name, parameter.shape, generator))
        else:
            sharding.fill(parameter, values[name].detach())
    return copy


def run_step(
    model: Transformer, optimizer: torch.optim.Optimizer, batches: StepBatches, max_grad_norm: float = 1.0
) -> tuple[float, float]:
    """One step of training: the mean loss over all ranks, and the gradient norm before clipping."""
    sums, grad_norm = train_step(model, optimizer, batches, max_grad_norm)
    loss = dist.sum_over_ranks(sums["loss"].clone()) / model.count(batches)
    return loss.item(), grad_norm.item()


@dataclass(frozen=True)
class LoraResult:
    """What `train_lora` returns."""

    lines: list[tuple[float, float]]  # (mean loss, gradient norm) of every step
    scores: Tensor  # (10,) rewards of `made.token_pairs(5, seed=9)` after training
    trained: set[str]  # names of the parameters that require a gradient
    states: set[str]  # names of the parameters that have an optimizer state


def train_lora(folder: str | Path, out: Path | None, settings: Settings | None = None, steps: int = 3) -> LoraResult:
    """Train a reward model on the base in a folder, for some steps.

    Args:
        out: the adapter and the merged model are saved in it; None: they are not.
        settings: `lora_settings()` by default.
    """
    settings = settings or lora_settings()
    model = load_reward_model(folder, settings)
    optimizer = optim.adamw(model, settings.optim)
    examples = made.pair_examples(made.token_pairs(12))
    loader = Loader(examples, settings.batch, settings.packing, seed=0, attention_cost=ATTENTION_COST)
    lines = [run_step(model, optimizer, loader.at(s), settings.optim.max_grad_norm) for s in range(steps)]
    if out is not None:
        model = build.save(model, out, str(folder), settings.lora, made.pair_examples(made.token_pairs(3)))
    held_out = EvalBatches(made.pair_examples(made.token_pairs(5, seed=9)), settings.packing)
    return LoraResult(
        lines,
        all_rewards(model, held_out),
        trained={name for name, p in model.named_parameters() if p.requires_grad},
        states={name for name, p in model.named_parameters() if p in optimizer.state},
    )


def load_reward_model(folder: str | Path, settings: Settings, train: bool = True) -> RewardModel:
    """The reward model of a folder, sharded; with new adapters where the settings say so and it is to be trained."""
    training = settings.training if train else None
    model = build.build(RewardModel, folder, settings.parallel, training=training)
    return build.load(model, folder, seed=0 if train else None)
