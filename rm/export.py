"""Write a model anew: an adapter merged into its base, another dtype, files of another size.

    python -m rm.export --model_name_or_path runs/rm/adapter --output_dir reward-model --dtype bfloat16
    torchrun --nproc_per_node 8 -m rm.export ...      where one process has not the memory: 4 bytes a parameter

Reads whatever the training scripts read, and writes what they write: a Hugging Face folder. `docs/exports.md` says who
reads it and how.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from rm import cli
from rm.config import REQUIRED, parse, require_positive, setting
from rm.distributed import process_group as dist
from rm.distributed import sharding
from rm.files import read_json
from rm.hf import build, hub, weights
from rm.model import heads
from rm.model.attention import SplitAttention
from rm.scoring import contract


@dataclass(frozen=True, kw_only=True)
class Settings(build.ModelSettings):
    """Export"""

    output_dir: str = setting(REQUIRED, "folder to write: new, or of a model that is replaced")
    dtype: str = setting("bfloat16", "of all but a score head, which is float32", ("float32", "bfloat16", "float16"))
    max_shard_gb: float = setting(5.0, "the most that one safetensors file holds, 10^9 bytes")

    def check(self) -> None:
        require_positive(self, "max_shard_gb")


def main(settings: Settings) -> None:
    """All ranks call it; each holds its shards, in float32, so that an adapter's sum is rounded once."""
    settings = hub.fetched(settings)
    source = settings.model_name_or_path
    config, *_ = weights.read_config(source)
    with torch.device("meta"):
        model = (heads.RewardModel if is_reward_model(source) else heads.LanguageModel)(config, SplitAttention)
    sharding.apply(model, sharding.ParallelSettings(dtype="float32"))
    if weights.load(model, source):
        raise ValueError(f"{source} calls itself a reward model, but holds no {weights.SCORE}")
    weights.save(model, settings.output_dir, source, getattr(torch, settings.dtype), int(settings.max_shard_gb * 10**9))
    if is_reward_model(source):
        contract.carry(source, settings.output_dir)
    dist.say(f"saved {settings.output_dir}")


def is_reward_model(folder: str) -> bool:
    """What a folder says of itself, a model or an adapter."""
    adapter, config = (read_json(Path(folder) / name) for name in ("adapter_config.json", "config.json"))
    said = [adapter.get("task_type") or "", *(config.get("architectures") or [])]
    return any(name == "SEQ_CLS" or "SequenceClassification" in name for name in said)


if __name__ == "__main__":
    with cli.one_line_errors():
        settings = parse(Settings, __doc__)
        with dist.session(0):
            main(settings)
