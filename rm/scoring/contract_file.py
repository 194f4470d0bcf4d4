"""The content of scoring.json, what the file may hold, reading and writing it."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from rm.data.chat import DIALOGUE_FORMATS
from rm.data.messages import Text
from rm.files import read_json, write_atomically
from rm.hf import checksums
from rm.hf.outputs import Output, one_of
from rm.json_keys import Key, check_keys

FILE, VERSION = "scoring.json", 2
SCORED = "the last: of a dialogue the last that its chat template writes, of a plain text the EOS behind it"


@dataclass(frozen=True)
class Golden:
    """A probe text or dialogue, its token ids, and its reward; or, where a head has names for them, its outputs."""

    text: Text
    tokens: list[int]
    score: float | list[float]


@dataclass(frozen=True)
class Contract:
    """The content of scoring.json."""

    template_sha256: str | None  # of everything that decides what the template writes; None: there is no template
    template_explicit: bool  # chosen by a setting, also for full texts that are strings; else the model's own
    chat_template: str | None  # its Jinja text, as it is in the folder
    dialogue_format: str | None
    bare_text: str  # a prompt and a reply that are bare strings: "dialogue", or "plain" if they are joined
    parse_special_tokens: bool | None  # strings of special tokens in a plain text are these tokens; else characters
    bos_token_id: int | None  # put before a plain text
    eos_token_id: int  # put behind a plain text; a dialogue has the BOS and EOS that its template writes
    max_length: int
    overlong: str
    truncation_side: str
    dtype: str  # that training computed in; the scores here are in float32
    golden: tuple[Golden, ...]
    reward_mean: float | None = None  # over the best replies of `reward_set`: minus it, their mean reward is 0
    reward_std: float | None = None
    reward_set: str | None = None
    step: int | None = None  # of the training: the last one, or that of the best evaluation
    labels: list[str] | None = None  # the names of the head's outputs, where they are not one reward
    scored_token: str = SCORED
    version: int = VERSION

    def of_output(self, chosen: Output) -> "Contract":
        """The contract of the model whose reward is one of the outputs, or a weighted sum of them."""
        if chosen is None or self.labels is None:
            return self
        scores = [one_of(torch.tensor(one.score), chosen).item() for one in self.golden]
        golden = tuple(replace(one, score=score) for one, score in zip(self.golden, scores, strict=True))
        return replace(self, golden=golden, labels=None)


MESSAGE_KEYS = {"role": Key(str, required=True), "content": Key(str, required=True)}
GOLDEN_KEYS = {
    "text": Key((str, list), items=Key(dict, keys=MESSAGE_KEYS), required=True),
    "tokens": Key(list, items=Key(int, minimum=0), required=True),
    "score": Key((float, list), items=Key(float), required=True),
}
KEYS = {
    "version": Key(int, only=(VERSION,), required=True),
    "scored_token": Key(str, only=(SCORED,), required=True),
    "template_sha256": Key(str),
    "template_explicit": Key(bool, required=True),
    "chat_template": Key(str),
    "dialogue_format": Key(str, only=tuple(DIALOGUE_FORMATS)),
    "bare_text": Key(str, only=("dialogue", "plain"), required=True),
    "parse_special_tokens": Key(bool),
    "bos_token_id": Key(int, minimum=0),
    "eos_token_id": Key(int, minimum=0, required=True),
    "max_length": Key(int, minimum=1, required=True),
    "overlong": Key(str, only=("filter", "truncate"), required=True),
    "truncation_side": Key(str, only=("left", "right"), required=True),
    "dtype": Key(str, only=("float32", "bfloat16"), required=True),
    "golden": Key(list, items=Key(dict, keys=GOLDEN_KEYS), required=True),
    "reward_mean": Key(float),
    "reward_std": Key(float, minimum=0),
    "reward_set": Key(str),
    "step": Key(int, minimum=0),
    "labels": Key(list, items=Key(str)),
}


def read(folder: str | Path) -> Contract | None:
    """The contract of a reward model's folder; None where there is none, as for a model from elsewhere."""
    file = Path(folder) / FILE
    if not file.is_file():
        return None
    content = read_json(file)
    if content.get("version") == 1:
        raise ValueError(
            f"{file} is version 1, of a model whose rewards were read at another token: train the model again"
        )
    try:
        check_keys(file, content, KEYS)
    except ValueError as error:
        raise ValueError(f"{error}; restore it, or delete it to score without a contract") from None
    labels = content.get("labels")
    outputs = {len(one["score"]) if isinstance(one["score"], list) else None for one in content["golden"]}
    if outputs - {len(labels) if labels else None}:
        raise ValueError(f"{file}: golden scores are not one for each of labels: restore it, or delete it")
    values = {name: content.get(name) for name in KEYS}
    golden = tuple(Golden(**{name: entry[name] for name in GOLDEN_KEYS}) for entry in content["golden"])
    return Contract(**values | {"golden": golden})


def write(folder: Path, contract: Contract) -> None:
    """Write scoring.json, and before it its checksum: where scoring.json is there, everything is."""
    text = json.dumps(asdict(contract), indent=2, ensure_ascii=False) + "\n"
    checksums.write_again(folder, **{FILE: hashlib.sha256(text.encode()).hexdigest()})
    write_atomically(folder / FILE, text)
