"""A reward model as a reward function of TRL's trainers (GRPO, RLOO and others).

    from rm.scoring import reward_function
    trainer = GRPOTrainer(model=policy, reward_funcs=reward_function("runs/rm/model"), ...)

TRL also takes the folder itself as `reward_funcs`. That is right for conversational prompts. To plain-text prompts TRL
appends no EOS, where the reward is read; this function does.
"""

import json
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path

from rm.data.messages import Text
from rm.scoring.scorer import Scorer

ScoreResponses = Callable[[list[Text], list[list[Text]]], list[list[float]]]


def reward_function(path: str | Path, **scorer) -> Callable[..., list[float]]:
    """A function (prompts, completions, **columns) -> rewards, which scores as `Scorer` does.

    Prompts and completions are strings, or lists of messages. Columns of the data set are not used. A completion that
    is longer than the model was trained on is an error; `max_length` and `overlong` are for that.

    Args:
        path: a reward model's folder, or an adapter's.
        scorer: other arguments of `Scorer`.
    """
    model = Scorer(path, **scorer)
    special = tuple(model.encoder.tokenizer.special)

    def reward(prompts: Sequence[Text], completions: Sequence[Text], **columns) -> list[float]:
        return score_completions(model.score_responses, special, prompts, completions)

    reward.__name__ = "/".join(Path(path).parts[-2:])  # TRL's name for the metric, such as rm/model
    return reward


def score_completions(
    score_responses: ScoreResponses, special: tuple[str, ...], prompts: Sequence[Text], completions: Sequence[Text]
) -> list[float]:
    """The reward of each completion; those of one prompt are scored together, so that its tokens are computed once.

    Args:
        score_responses: as `Scorer.score_responses`.
        special: strings of the tokenizer's special tokens, with which no prompt may begin.
    """
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str) and prompt.startswith(special):
            raise ValueError(
                f"the prompt {reprlib.repr(prompt)} begins with a special token: a chat template has been applied "
                f"to it already; give prompts as messages"
            )
        groups.setdefault(json.dumps(prompt), []).append(i)
    scores = score_responses(
        [prompts[group[0]] for group in groups.values()],
        [[completions[i] for i in group] for group in groups.values()],
    )
    rewards = [0.0] * len(prompts)
    for group, group_scores in zip(groups.values(), scores, strict=True):
        for i, score in zip(group, group_scores, strict=True):
            rewards[i] = score
    return rewards
