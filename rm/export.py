"""Write a model again: an adapter merged into its base, another dtype, files of another size.

    python -m rm.export --model_name_or_path runs/rm/adapter --output_dir reward-model --dtype bfloat16
    torchrun --nproc_per_node 8 -m rm.export ...      where one process has too little memory: 4 bytes a parameter

Reads what the training scripts read, and writes what they write: a Hugging Face folder. `docs/exports.md` says which
software reads it, and how.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from rm import cli
from rm.config import REQUIRED, SettingsGroup, parse, require_positive, setting
from rm.data.dataset import TextSettings
from rm.data.tokenizer import Tokenizer
from rm.distributed import process_group as dist
from rm.distributed import sharding
from rm.distributed.sharding import ParallelSettings
from rm.hf import build, hub, weights
from rm.hf.build import ModelSettings
from rm.hf.folder import TextFiles
from rm.model.attention import SplitAttention
from rm.model.heads import RewardModel
from rm.scoring import contract


@dataclass(frozen=True, kw_only=True)
class ExportSettings(SettingsGroup):
    """Export"""

    output_dir: str = setting(REQUIRED, "folder to write: new, or of a model that is replaced")
    dtype: str = setting(
        "bfloat16", "of all weights but a score head, which is float32", ("float32", "bfloat16", "float16")
    )
    max_shard_gb: float = setting(5.0, "largest size of one safetensors file in 10^9 bytes")

    def check(self) -> None:
        require_positive(max_shard_gb=self.max_shard_gb)


@dataclass(frozen=True, kw_only=True)
class Settings(SettingsGroup):
    """Settings of an export"""

    model: ModelSettings
    export: ExportSettings


def main(settings: Settings) -> None:
    """All ranks call it; each holds its shards, in float32, so that a merged adapter is rounded once."""
    settings = hub.fetched(settings)
    source, export = settings.model.model_name_or_path, settings.export
    cls = build.head_of(source)
    agreed = contract.read(source)
    parallel, max_length = ParallelSettings(dtype="float32"), None if agreed is None else agreed.max_length
    # The kernel computes nothing here.
    label = settings.model.reward_label
    model = build.build(cls, source, parallel, kernel=SplitAttention, max_length=max_length, reward_label=label)
    build.load(model, source)
    max_shard_bytes = int(export.max_shard_gb * 10**9)
    weights.save(model, export.output_dir, source, getattr(torch, export.dtype), max_shard_bytes, _texts(source))
    sharding.release(model)
    if cls is RewardModel:
        contract.copy_to(source, export.output_dir)
    dist.say(f"saved {export.output_dir}")


def _texts(source: str) -> TextFiles | None:
    """What an adapter's folder says about texts, beyond its base; None where it has no tokenizer of its own."""
    if hub.base_of(source) is None or hub.tokenizer_folder(source) != Path(source):
        return None
    return TextFiles.of_training(weights.base_folder(source), Tokenizer(source), TextSettings())


if __name__ == "__main__":
    with cli.one_line_errors():
        settings = parse(Settings, __doc__)
        with dist.session(0):
            main(settings)
