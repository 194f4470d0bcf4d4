"""Where text and weights meet: a Transformer with a head takes a row and returns sums.

Sums are never means: `loss`, what else is measured, and the `count` that all of them are to be divided by, once, over
the whole global batch (`rm.training.step`). So neither the gradient nor a metric depends on rows, ranks or packing.

Shapes: T tokens in a row, L labelled tokens, N prompts and R replies in a row, K replies of the prompt that has most,
D width.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rm.config import REQUIRED, setting
from rm.data.batch import MicroBatch
from rm.data.examples import Examples
from rm.distributed import process_group as dist
from rm.distributed import sharding
from rm.hf import adapter, weights
from rm.hf.folder import copy_tokenizer
from rm.model import lisa, lora, losses
from rm.model.attention import choose_kernel
from rm.model.heads import RewardModel
from rm.model.transformer import Transformer

MERGE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # on rewards of size 1
NO_SCORE = "{folder} is not a reward model: it holds no score.weight. Train one with train_rm.py"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Model"""

    model_name_or_path: str = setting(
        REQUIRED,
        "Hugging Face folder (config.json, *.safetensors, tokenizer) or hub id, org/name or org/name@revision",
        may_change=True,
    )


def check_ids(model: Transformer, *sets: Examples) -> None:
    """Raise ValueError where a text has a token that the model has no embedding for: of another tokenizer, or template.

    Asked of the data at the start, since an embedding that is asked on a GPU ends the process without a word of it.
    """
    for examples in sets:
        highest = int(examples.tokens.max(initial=0))
        if highest >= model.config.vocab_size:
            raise ValueError(
                f"a text has the token id {highest}, and the model only {model.config.vocab_size} embeddings: its "
                "tokenizer or chat template knows tokens that it was not trained with; give those of this model"
            )


def load(cls: type, settings, train: bool = True) -> Transformer:
    """A LanguageModel or RewardModel from `--model_name_or_path`: shapes, then shards, then each rank's numbers.

    To be trained, it gets adapters where LoraSettings ask for them, and a reward model that starts from a language
    model a new score head, N(0, 1/sqrt(D + 1)) (Stiennon et al., arXiv 2009.01325), from `--seed`, the same for every
    world size. Otherwise a folder without a score head is refused.
    """
    model, folder = arrange(cls, settings, train), settings.model_name_or_path
    model.to_empty(device=dist.device())
    new = weights.load(model, folder)
    if weights.SCORE in new and not train:
        raise ValueError(NO_SCORE.format(folder=folder))
    if new:
        _draw(model, new, settings.seed)
    return model


def arrange(cls: type, settings, train: bool = True, kernel: type | None = None) -> Transformer:
    """The model that `load` fills: shapes, adapters if it is to be trained, and shards, on the meta device.

    Args:
        kernel: of `rm.model.attention`; None: the fastest here.
    """
    folder = settings.model_name_or_path
    config, *_ = weights.read_config(folder)
    if config.positions == "learned" and settings.max_length > config.max_positions:
        raise ValueError(
            f"--max_length {settings.max_length} is more than the {config.max_positions} positions of {folder}"
        )
    dtype = sharding.compute_dtype(settings)
    fastest = (dist.device(), dtype, config.n_heads, config.n_kv_heads, config.head_dim)
    with torch.device("meta"):
        model = cls(config, kernel or choose_kernel(*fastest))
    if train:
        lisa.check_depth(config.n_layers, settings)
    if train and settings.use_lora:
        lora.adapt(model, settings, dtype)
        settings = settings if settings.shard_base else replace(settings, shard_group_size=1)
    if isinstance(settings, losses.LossSettings):
        model.loss_settings = settings
    sharding.parallelize(model, settings, train)
    return model


def load_whole(folder: str | Path, dtype: torch.dtype) -> RewardModel:
    """A reward model for this process alone, not sharded: it needs no process group and meets no other rank."""
    config, *_ = weights.read_config(folder)
    with torch.device("meta"):
        kernel = choose_kernel(dist.device(), dtype, config.n_heads, config.n_kv_heads, config.head_dim)
        model = RewardModel(config, kernel)
    sharding.place(model, dtype)
    if weights.load(model, folder):
        raise ValueError(NO_SCORE.format(folder=folder))
    return model.requires_grad_(False)


def _draw(model: Transformer, new: set[str], seed: int) -> None:
    """First values of what no file holds, drawn whole and in order on every rank: the same for any world size."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name in new:
            if name == weights.SCORE:
                values = torch.randn(parameter.shape, generator=generator) / (model.config.dim + 1) ** 0.5
            else:
                values = lora.drawn(name, parameter.shape, generator)
            sharding.fill(parameter, values)


def save(model: Transformer, folder: Path, settings, probe: MicroBatch) -> None:
    """What a training leaves: `folder/model`, and with LoRA `folder/adapter`, which the model is the merged form of.

    Args:
        probe: a row of any examples, on which the two forms are compared: their rewards, or a language model's mean
            loss. Where they differ by more than rounding, the adapter is saved and the merged model is refused.
    """
    base, dtype = settings.model_name_or_path, sharding.compute_dtype(settings)
    if settings.use_lora:
        _, family, hf = weights.read_config(base)
        adapter.save(model, folder / "adapter", base, settings, family)
        if dist.is_main():
            copy_tokenizer(folder / "adapter", weights.foundation(base), hf, model.head)
        before = _reading(model, probe)
        adapter.merge(model)
        gap, size = (_reading(model, probe) - before).abs().max().item(), before.abs().max().item()
        if not gap <= MERGE_TOLERANCE[dtype] * max(1.0, size):
            raise ValueError(
                f"merging moves what the model says by {gap:.2g} (of {size:.2g}) in {dtype}, more than rounding does: "
                f"{folder / 'adapter'} is saved, {folder / 'model'} is not; merge it with --dtype float32"
            )
        dist.say(f"adapter and merged model differ by at most {gap:.1e}")
    weights.save(model, folder / "model", base, dtype)
    dist.say(f"saved {folder / 'model'}")


@torch.no_grad()
def _reading(model: Transformer, row: MicroBatch) -> Tensor:
    """What a model says of a row: its rewards, or the mean loss of a language model."""
    training = model.training
    row = row.to(dist.device())
    model.eval()
    if isinstance(model, RewardModel):
        said = model.rewards(row)
    else:
        sums = model(row)
        said = sums["loss"] / sums["count"]
    model.train(training)
    return said
