"""Rewards from your own code, in one process, without a launcher.

    from rm.scoring import Scorer
    scorer = Scorer("runs/rm/model")
    rewards = scorer.score_responses(["###Human: Is 7 prime?###Assistant:"], [[" Yes.", " No.", " 42"]])

Shapes: R replies.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rm import json_keys
from rm.data.batch import PackingSettings, new_texts, pack, plan_micro_batches
from rm.data.examples import Examples
from rm.data.messages import Text, split_turns
from rm.data.schemas import preference
from rm.distributed.sharding import ParallelSettings
from rm.hf import build, hub
from rm.hf.outputs import HeadSettings
from rm.json_keys import Key
from rm.model.heads import RewardModel
from rm.scoring.contract import resolve, text_encoder, verify
from rm.scoring.contract_file import Contract
from rm.scoring.score import local_rewards
from rm.scoring.settings import ScoringTextSettings

SCALE_KEYS = {"mean": Key(float), "std": Key(float, minimum=1e-12)}  # of config.json, in OpenRLHF's models


class Scorer:
    """A reward model that scores texts in one process.

    Under torchrun every process holds the whole model and scores by itself what it is given. A text is a string,
    treated as training treated strings, or a list of {"role", "content"} messages, which the model's template writes.
    The reward of a model without scoring.json is read where transformers reads it.

    Attributes:
        contract: the content of scoring.json, None for a model without one.
        scale: (mean, standard deviation) of its rewards, None where the model states none.
        encoder: how texts become tokens.
    """

    def __init__(
        self,
        path: str | Path,
        dtype: str = "auto",
        max_length: int | None = None,
        chat_template: str | None = None,
        dialogue_format: str | None = None,
        max_tokens: int = 4096,
        bare_text: str | None = None,
        reward_label: str | int | None = None,
        overlong: str | None = None,
        truncation_side: str | None = None,
        reward_weights: Sequence[float] = (),
    ):
        """
        Args:
            path: a reward model's folder, or an adapter's; or a name on the hub, org/name or org/name@revision.
            max_tokens: computed at a time; more where a single text has more.
            dtype, max_length, chat_template, dialogue_format, bare_text, reward_label, overlong, truncation_side,
                reward_weights: as the flags of eval_rm.py; None: as in training.

        Raises:
            ValueError: for a folder that is no reward model, or whose contract is violated.
        """
        path, chat_template = hub.model(str(path)), chat_template and hub.template(chat_template)
        requested = ScoringTextSettings(
            chat_template=chat_template,
            dialogue_format=dialogue_format,
            bare_text=bare_text,
            max_length=max_length,
            overlong=overlong,
            truncation_side=truncation_side,
        )
        text, self.contract = resolve(path, requested, say=lambda line: None)
        self.encoder, self.max_tokens = text_encoder(path, text, self.contract), max_tokens
        parallel, max_length = ParallelSettings(dtype=dtype), self.encoder.max_length
        label = None if reward_label is None else str(reward_label)
        head = HeadSettings(reward_label=label, reward_weights=tuple(map(float, reward_weights)))
        model = build.build(RewardModel, path, parallel, sharded=False, max_length=max_length, head=head)
        build.check_data(model, max_length)
        self.model = build.load(model, path).requires_grad_(False)
        self.scale = _scale(Path(path), self.contract)
        if self.contract:
            self.contract = self.contract.of_output(model.reward_output)
            verify(self.contract, path, self.encoder, self.model.compute_dtype, self.rewards)

    def score(self, conversations: Sequence[Text], normalized: bool = False) -> list[float]:
        """The reward of each full conversation.

        Args:
            normalized: subtract the mean and divide by the standard deviation that the model states: in its contract,
                or in config.json, where OpenRLHF writes them.

        Raises:
            ValueError: for a text longer than training took, where it did not shorten texts.
        """
        groups = [[self.full_text(text)] for text in conversations]
        return [rewards[0] for rewards in self._score(groups, normalized)]

    def score_responses(
        self, prompts: Sequence[Text], responses: Sequence[Sequence[Text]], normalized: bool = False
    ) -> list[list[float]]:
        """The rewards of any number of responses to each prompt; what they share is computed once.

        Args:
            prompts: strings or messages.
            responses: for each prompt, a list of what follows it. A prompt and a response that are both strings are
                written as in training: as a dialogue, or joined as they stand.
        """
        groups = [self.full_texts(prompt, texts) for prompt, texts in zip(prompts, responses, strict=True)]
        return self._score(groups, normalized)

    def _score(self, groups: list[list[Text]], normalized: bool) -> list[list[float]]:
        if normalized:
            self.check_scale()
        rewards = self.rewards(self.encoder.examples(groups)) if any(groups) else torch.zeros(0)
        remaining = iter((self.normalize(rewards) if normalized else rewards).tolist())
        return [[next(remaining) for _ in group] for group in groups]

    # The steps of scoring, for code that batches by itself: texts, `encoder.examples`, rewards.

    def full_text(self, conversation: Text) -> Text:
        """A full conversation as the encoder takes it: a string is split into turns where training did that."""
        is_split = self.encoder.as_messages and isinstance(conversation, str)
        return split_turns(conversation) if is_split else conversation

    def full_texts(self, prompt: Text, responses: Sequence[Text]) -> list[Text]:
        """The full conversation of a prompt with each of its responses.

        Raises:
            ValueError: the prompt or a response is no text.
        """
        if not responses:
            return []
        record = {"prompt": prompt, "responses": list(responses)}
        return preference(record).written(self.encoder.bare_as_dialogue, self.encoder.as_messages)

    def check_scale(self) -> None:
        """Raise ValueError where the model states no mean and standard deviation of its rewards."""
        if not self.scale:
            raise ValueError("the model states no mean and standard deviation of its rewards: use normalized=False")

    def normalize(self, rewards: Tensor) -> Tensor:
        """(R,) rewards minus their stated mean, in units of their stated standard deviation."""
        mean, deviation = self.scale
        return (rewards - mean) / deviation

    def rewards(self, examples: Examples) -> Tensor:
        """The reward of every reply, in order: (R,) fp32 on the CPU. Each distinct text is scored once."""
        texts, place = new_texts(examples, PackingSettings(max_tokens=self.max_tokens), {})
        lengths = texts.lengths
        (assigned,) = plan_micro_batches(lengths, lengths, max(self.max_tokens, int(lengths.max())), world_size=1)
        batches = (pack(texts, indices) for indices in assigned)
        replies, rewards = local_rewards(self.model, batches, texts.reply_offsets)
        return rewards[replies.argsort()][place]


def _scale(folder: Path, contract: Contract | None) -> tuple[float, float] | None:
    if contract:
        return None if contract.reward_std is None else (contract.reward_mean, contract.reward_std)
    config = json_keys.read(folder / "config.json", SCALE_KEYS, others=True)
    if config.get("mean") is None or config.get("std") is None:
        return None
    return config["mean"], config["std"]
