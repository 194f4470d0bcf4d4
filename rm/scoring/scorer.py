"""Rewards from your own code, in one process, without a launcher.

    from rm.scoring.scorer import Scorer
    scorer = Scorer("runs/rm/model")
    rewards = scorer.score_responses(["###Human: Is 7 prime?###Assistant:"], [[" Yes.", " No.", " 42"]])

Shapes: R replies.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rm.data import batch
from rm.data.examples import Examples
from rm.data.formats import Text, preference, split_turns
from rm.distributed import sharding
from rm.files import read_json
from rm.hf import build
from rm.scoring.contract import Contract, check, encoding, settled
from rm.scoring.score import local_rewards
from rm.scoring.settings import TextSettings


class Scorer:
    """A reward model to call from your own code, in one process, without a launcher.

    Under torchrun every process holds a whole model and scores what it is given by itself. A text is a string, taken as
    training took strings, or a list of {"role", "content"} messages, which the model's template writes.

    Attributes:
        contract: what scoring.json says, None for a model without one.
        scale: (mean, standard deviation) of its rewards, None where the model names none.
        text: how texts become tokens.
    """

    def __init__(
        self,
        path: str | Path,
        dtype: str = "auto",
        max_length: int | None = None,
        chat_template: str | None = None,
        dialogue_format: str | None = None,
        max_tokens: int = 4096,
    ):
        """
        Args:
            path: a reward model's folder, or an adapter's.
            dtype, max_length, chat_template, dialogue_format: as the flags of eval_rm.py: None is as in training.
            max_tokens: computed at a time, more where one prompt and its responses have more.

        Raises:
            ValueError: for a folder that is no reward model, or whose contract does not hold.
        """
        asked = TextSettings(str(path), chat_template, dialogue_format, max_length)
        settings, self.contract = settled(asked, say=lambda said: None)
        self.text, self.max_tokens = encoding(settings, self.contract), max_tokens
        computed = sharding.compute_dtype(sharding.ParallelSettings(dtype=dtype))
        self.model = build.load_whole(path, computed)
        self.scale = _scale(Path(path), self.contract)
        if self.contract:
            check(self.contract, path, self.text, computed, self._rewards)

    def score(self, conversations: Sequence[Text], normalized: bool = False) -> list[float]:
        """The reward of each whole conversation.

        Args:
            normalized: less the mean and over the standard deviation that the model names: in its contract, or in
                config.json, where OpenRLHF writes them.

        Raises:
            ValueError: for a text longer than training took, where it did not shorten them.
        """
        split = self.text.as_messages
        groups = [[split_turns(one) if split and isinstance(one, str) else one] for one in conversations]
        return [rewards[0] for rewards in self._score(groups, normalized)]

    def score_responses(
        self, prompts: Sequence[Text], responses: Sequence[Sequence[Text]], normalized: bool = False
    ) -> list[list[float]]:
        """The rewards of any number of responses to each prompt; what they share is computed once.

        Args:
            prompts: strings or messages.
            responses: for each prompt a list of what follows it.
        """
        groups = []
        for prompt, texts in zip(prompts, responses, strict=True):
            record = {"prompt": prompt, "responses": list(texts)}
            groups.append(preference(record, self.text.as_messages).texts if texts else [])
        return self._score(groups, normalized)

    def _score(self, groups: list[list[Text]], normalized: bool) -> list[list[float]]:
        if normalized and not self.scale:
            raise ValueError("the model names no mean and standard deviation of its rewards: take them as they are")
        rewards = self._rewards(self.text.examples(groups)) if any(groups) else torch.zeros(0)
        if normalized:
            mean, deviation = self.scale
            rewards = (rewards - mean) / deviation
        given = iter(rewards.tolist())
        return [[next(given) for _ in group] for group in groups]

    def _rewards(self, examples: Examples) -> Tensor:
        """(R,) fp32"""
        lengths = examples.lengths
        numbers = batch.plan_micro_batches(lengths, lengths, max(self.max_tokens, int(lengths.max())), world=1)[0]
        rows = (batch.pack(examples, np.array(row, np.int64)) for row in numbers)
        replies, rewards = local_rewards(self.model, rows, examples.reply_offsets)
        return rewards[replies.argsort()]


def _scale(folder: Path, contract: Contract | None) -> tuple[float, float] | None:
    if contract:
        return None if contract.reward_std is None else (contract.reward_mean, contract.reward_std)
    config = read_json(folder / "config.json")
    return (config["mean"], config["std"]) if {"mean", "std"} <= config.keys() else None
