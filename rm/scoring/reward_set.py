"""The named set on which a reward model's mean and standard deviation are measured, for scoring.json.

InstructGPT's rewards are 0 on average over its demonstrations (arXiv 2203.02155, section 3.5): a file of demonstrations
may be given for that.
"""

from dataclasses import dataclass

from rm.config import SettingsGroup, setting
from rm.data.dataset import TextSettings, TrainingData, read_cached
from rm.data.encode import Task
from rm.data.examples import Examples
from rm.data.reader import KeySettings
from rm.data.tokenizer import Tokenizer

ENOUGH = 256  # examples of the training data, where no set is given


@dataclass(frozen=True, kw_only=True)
class RewardSetSettings(SettingsGroup):
    """Scale of the rewards"""

    reward_set_path: tuple[str, ...] = setting(
        (),
        "files of demonstrations, as train_sft.py reads them, whose mean reward and standard deviation go into "
        "scoring.json; none: the better replies of 256 examples",
        may_change=True,
        hub="data",
    )


@dataclass(frozen=True)
class RewardSet:
    """The examples on whose best replies rewards are measured."""

    examples: Examples
    name: str


def choose(
    settings: RewardSetSettings,
    data: TrainingData,
    text: TextSettings,
    tokenizer: Tokenizer,
    cache_dir: str | None,
    keys: KeySettings | None = None,
) -> RewardSet:
    """The given set; else held-out examples where there are any, of all sets alike, else examples trained on."""
    if settings.reward_set_path:
        examples, _ = read_cached(
            Task.SCORED_DEMONSTRATIONS, settings.reward_set_path, text, tokenizer, cache_dir, keys=keys
        )
        return RewardSet(examples, f"{len(examples)} demonstrations of {' '.join(settings.reward_set_path)}")
    kind = "held out" if data.held_out else "trained on"
    sets = list(data.held_out.values()) or [data.train]
    examples = Examples.concatenate([examples[: max(1, ENOUGH // len(sets))] for examples in sets])
    return RewardSet(examples, f"{len(examples)} examples {kind}")
