"""The named set on which a reward model's mean and standard deviation are measured, for scoring.json.

InstructGPT's rewards are 0 on average over its demonstrations (arXiv 2203.02155, section 3.5): those may be named.
"""

from dataclasses import dataclass

from rm.config import setting
from rm.data import dataset
from rm.data.examples import Examples
from rm.data.tokenizer import Tokenizer

ENOUGH = 256  # examples of a training, where no set is named


@dataclass(frozen=True, kw_only=True)
class RewardSetSettings:
    """Scale of the rewards"""

    reward_set_path: tuple[str, ...] = setting(
        (),
        "files of demonstrations, as train_sft.py reads them, whose mean reward and its deviation go into "
        "scoring.json; none: the better replies of 256 examples",
        may_change=True,
    )


def choose(train: Examples, held_out: Examples | None, settings) -> tuple[Examples, str]:
    """The set, and its name. Held-out examples where there are any and nothing is named, else those trained on."""
    if settings.reward_set_path:
        tokenizer = Tokenizer(settings.model_name_or_path)
        examples, _ = dataset.read_once(dataset.texts, settings.reward_set_path, settings, tokenizer)
        return examples, f"{len(examples)} demonstrations of {' '.join(settings.reward_set_path)}"
    examples = (held_out or train)[:ENOUGH]
    return examples, f"{len(examples)} examples {'held out' if held_out else 'trained on'}"
