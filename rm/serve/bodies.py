"""What clients post, and what they are answered: the shapes of this server, of OpenRLHF and of vLLM."""

import re
import reprlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rm.data.chat import Rendered
from rm.data.messages import Message, Text
from rm.scoring.scorer import Scorer
from rm.serve.written import WrittenTexts, of_ids


@dataclass(frozen=True)
class Request:
    """What a body asks for.

    Shapes: N texts.
    """

    texts: list[np.ndarray]  # N arrays of token ids
    answer: Callable[[np.ndarray], dict]  # (N,) fp32 rewards -> the body of the answer


class Reader:
    """Reads the bodies of requests, as JSON values. Every key is read, known to be without effect, or refused."""

    def __init__(self, scorer: Scorer, name: str):
        """
        Args:
            name: of the model, in answers.
        """
        self.scorer, self.name = scorer, name
        self.written = WrittenTexts(scorer.encoder)

    def score(self, body: dict) -> Request:
        """{"conversations": [...]} or {"prompts": [...], "responses": [[...], ...]}: this server's own shape.

        A conversation is a string or a list of messages, as `Scorer.score` takes it; prompts and responses are as
        `Scorer.score_responses` takes them.
        """
        _check_keys(body, ("conversations", "prompts", "responses", "normalized", "return_tokens"))
        normalized, return_tokens = (_flag(body, key) for key in ("normalized", "return_tokens"))
        if normalized:
            self.scorer.check_scale()
        if "conversations" in body:
            if "prompts" in body or "responses" in body:
                raise ValueError("has 'conversations' beside 'prompts' or 'responses'; give the one or the others")
            conversations = _list(body["conversations"], "conversations")
            checked = [_conversation(text, f"conversations {n}") for n, text in enumerate(conversations)]
            groups = [[self.scorer.full_text(text)] for text in checked]
        elif "prompts" in body and "responses" in body:
            prompts, responses = _list(body["prompts"], "prompts"), _list(body["responses"], "responses")
            if len(prompts) != len(responses):
                raise ValueError(f"has {len(prompts)} prompts and {len(responses)} lists of responses")
            lists = [_list(texts, f"responses {n}") for n, texts in enumerate(responses)]
            groups = []
            for n, (prompt, texts) in enumerate(zip(prompts, lists, strict=True)):
                try:
                    groups.append(self.scorer.full_texts(prompt, texts))
                except ValueError as error:
                    raise ValueError(f"prompts {n}: {error}") from None
        else:
            raise ValueError("needs 'conversations', or 'prompts' and 'responses'")

        texts = self._tokens(groups)

        def nested(values: Sequence) -> list:
            """One value per conversation, or a list per prompt."""
            remaining = iter(values)
            lists = [[next(remaining) for _ in group] for group in groups]
            return [value for (value,) in lists] if "conversations" in body else lists

        def answer(rewards: np.ndarray) -> dict:
            if normalized:
                rewards = self.scorer.normalize(torch.from_numpy(rewards)).numpy()
            answered = {"rewards": nested(rewards.tolist())}
            if return_tokens:
                answered["token_ids"] = nested([ids.tolist() for ids in texts])
                answered["tokens"] = nested([list(map(self._string_of, ids.tolist())) for ids in texts])
            return answered

        return Request(texts, answer)

    def openrlhf(self, body: dict) -> Request:
        """{"query": [...], "prompts": ..., "labels": ...}: written texts, as OpenRLHF posts to a remote model."""
        _check_keys(body, ("query", "prompts", "labels"))  # a query contains its prompt; labels are for rules
        queries = _list(body.get("query"), "query")
        texts = [self.written.read(_string(query, f"query {n}")) for n, query in enumerate(queries)]

        def answer(rewards: np.ndarray) -> dict:
            return {"rewards": rewards.tolist(), "scores": rewards.tolist(), "extra_logs": {}}

        return Request(self._tokens([[text] for text in texts]), answer)

    def classify(self, body: dict) -> Request:
        """{"input": ...} or {"messages": [...]}: as vLLM's /classify, to which verl posts written texts.

        `input` is a written text or token ids, or a list of either.
        """
        _check_keys(body, ("model", "input", "messages", "use_activation", "activation", "add_special_tokens", "user"))
        if body.get("use_activation") or body.get("activation"):
            raise ValueError("asks for an activation: a reward has none; set use_activation to false")
        if ("input" in body) == ("messages" in body):
            raise ValueError("needs 'input' or 'messages', and not both")
        if "messages" in body:
            inputs: list[Text | Rendered] = [_conversation(body["messages"], "messages")]
        else:
            value = body["input"]
            is_one = isinstance(value, str) or (isinstance(value, list) and value and type(value[0]) is int)
            values = [value] if is_one else _list(value, "input")
            inputs = [self._input(one, f"input {n}") for n, one in enumerate(values)]
        texts = self._tokens([[text] for text in inputs])

        def answer(rewards: np.ndarray) -> dict:
            data = [
                {"index": i, "label": None, "probs": [reward], "num_classes": 1}
                for i, reward in enumerate(rewards.tolist())
            ]
            tokens = sum(map(len, texts))
            usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0}
            return {"object": "list", "created": int(time.time()), "model": self.name, "data": data, "usage": usage}

        return Request(texts, answer)

    def _input(self, value: Any, key: str) -> Text | Rendered:
        if isinstance(value, str):
            return self.written.read(_string(value, key))
        size = self.scorer.model.config.vocab_size
        ids = _list(value, key)
        if not ids or not all(type(i) is int and 0 <= i < size for i in ids):
            raise ValueError(f"{key!r} is {reprlib.repr(value)}; expected a string, or token ids from 0 to {size - 1}")
        return of_ids(ids)

    def _tokens(self, groups: list[list[Text | Rendered]]) -> list[np.ndarray]:
        """The token ids of each text."""
        if not any(groups):
            return []
        examples = self.scorer.encoder.examples(groups)
        return [np.concatenate([example.prefix, reply]) for example in examples for reply in example.replies]

    def _string_of(self, index: int) -> str:
        return self.scorer.encoder.tokenizer.string_of(index) or f"[{index}]"


def _check_keys(body: dict, known: tuple[str, ...]) -> None:
    if unknown := [key for key in body if key not in known]:
        raise ValueError(f"has the key {reprlib.repr(unknown[0])}; known are {', '.join(known)}")


def _flag(body: dict, key: str) -> bool:
    value = body.get(key, False)
    if type(value) is not bool:
        raise ValueError(f"{key!r} is {reprlib.repr(value)}; expected true or false")
    return value


def _list(value: Any, key: str) -> list:
    if not isinstance(value, list):
        raise ValueError(f"{key!r} is {reprlib.repr(value)}; expected a list")
    return value


def _string(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key!r} is {reprlib.repr(value)}; expected a string")
    if not value.isascii() and re.search("[\ud800-\udfff]", value):  # JSON can write it, UTF-8 cannot
        raise ValueError(f"{key!r} has half of a surrogate pair, which is no character; remove it")
    return value


def _conversation(value: Any, key: str) -> Text:
    if isinstance(value, str):
        return _string(value, key)
    messages = _list(value, key)
    return [_message(message, f"{key}: message {n}") for n, message in enumerate(messages)]


def _message(value: Any, key: str) -> Message:
    if not isinstance(value, dict) or value.keys() != {"role", "content"}:
        raise ValueError(f"{key} is {reprlib.repr(value)}; expected an object with 'role' and 'content' only")
    return {name: _string(value[name], f"{key}: {name}") for name in ("role", "content")}
