"""SETTINGS"""

from dataclasses import dataclass

from rm.distributed import sharding
from rm.hf import build


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(build.ModelSettings, sharding.ParallelSettings):
    """What it takes to load a reward model in order to score."""

    max_length: int


@dataclass(frozen=True)
class TextSettings:
    """What DataSettings has on texts, for a caller without a command line; None is left to the contract."""

    model_name_or_path: str
    chat_template: str | None = None
    dialogue_format: str | None = None
    max_length: int | None = None
    overlong: str | None = None
    truncation_side: str | None = None
