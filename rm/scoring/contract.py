"""The scoring contract: what it takes to get the rewards that training got, in a file beside the weights.

A reward belongs to a text as the model saw it: template, BOS and EOS, length, and the token that is read. Where one of
them differs, numbers still come out and mean nothing. So train_rm.py writes all of it to scoring.json, with a few
neutral texts and their fp32 scores, and whoever loads the model scores those texts first.

Shapes: R replies.
"""

import reprlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from rm.data import batch, chat
from rm.data.encode import Encoding
from rm.data.examples import Examples
from rm.data.formats import Text, split_turns
from rm.data.tokenizer import Tokenizer
from rm.distributed import process_group as dist
from rm.distributed import sharding
from rm.files import read_json, write_json
from rm.hf import build
from rm.model.heads import RewardModel
from rm.scoring.score import all_rewards, reward_statistics
from rm.scoring.settings import ScoreSettings, TextSettings

FILE, VERSION = "scoring.json", 1
SCORED = "the last token of a text: the one that ends the template's last turn, else an EOS that is appended"
DEFAULTS = {"max_length": 512, "overlong": "filter", "truncation_side": "left"}  # of a model without a contract
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}  # of a score, times its size where that is above 1
GOLDEN = (  # nobody's data: what they say is of no account, only that their scores stay
    "###Human: What is the capital of France?###Assistant: The capital of France is Paris.",
    "###Human: What is the capital of France?###Assistant: I will not tell you.",
    "###Human: How do I boil an egg?###Assistant: Put it into boiling water for eight minutes, then into cold water.",
    "###Human: Hi!###Assistant: Hello, how can I help?###Human: Name a prime number.###Assistant: 7",
    "###Human: Wie heißt „Danke“ auf Französisch? 🙂###Assistant: „Merci“.",
)


@dataclass(frozen=True)
class Golden:
    """A text or dialogue, the ids it becomes, and its reward."""

    text: Text
    tokens: list[int]
    score: float


@dataclass(frozen=True)
class Contract:
    """The content of scoring.json."""

    template_sha256: str | None  # of all that decides what the template writes; None: there is none
    template_asked: bool  # by a setting, for plain texts too; else it is the model's own, for messages alone
    chat_template: str | None  # its Jinja text, for whoever scores elsewhere
    dialogue_format: str | None
    bos_token_id: int | None
    eos_token_id: int
    max_length: int
    overlong: str
    truncation_side: str
    dtype: str  # training computed in it; scores here are of float32
    golden: tuple[Golden, ...]
    reward_mean: float | None = None  # of the best replies of `reward_set`: minus it, those are 0 on average
    reward_std: float | None = None
    reward_set: str | None = None
    scored_token: str = SCORED
    version: int = VERSION


def encoding(settings, contract: Contract | None) -> Encoding:
    """As `rm.data.dataset` reads files with these settings, which `settled` has made the contract's.

    Raises:
        ValueError: where the template is not the contract's.
    """
    folder = settings.model_name_or_path
    tokenizer = Tokenizer(folder)
    template = chat.choose(settings.chat_template, settings.dialogue_format, tokenizer)
    found = template and template.fingerprint
    if contract and found != contract.template_sha256:
        raise ValueError(
            f"{Path(folder) / FILE} does not hold: the chat template of {folder} is another than in training"
        )
    cut = settings.truncation_side if settings.overlong == "truncate" else None
    return Encoding(tokenizer, template, settings.max_length, cut)


def read(folder: str | Path) -> Contract | None:
    """The contract of a reward model's folder; None where it has none, as a model from elsewhere."""
    file = Path(folder) / FILE
    if not file.is_file():
        return None
    found = read_json(file)
    try:
        if found["version"] != VERSION:
            raise TypeError(f"its version is {found['version']!r}, here it is {VERSION}")
        golden = tuple(Golden(**entry) for entry in found["golden"])
        return Contract(**found | {"golden": golden})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is no scoring contract ({error}): restore it, or delete it to do without") from None


def settled(settings, say: Callable[[str], None] = dist.say) -> tuple:
    """(settings with what the contract of their model fixes, the contract or None); said where there is none.

    Args:
        settings: `model_name_or_path` and what DataSettings has on texts; None is what is left to the contract.
    """
    folder = settings.model_name_or_path
    contract = read(folder)
    if contract is None:
        say(f"{folder} has no {FILE}: texts are scored as training here would have them by these settings")
        left = {name: value for name, value in DEFAULTS.items() if getattr(settings, name) is None}
        return replace(settings, **left), None
    own = str(folder) if contract.template_asked and contract.dialogue_format is None else None
    fixed = {"dialogue_format": contract.dialogue_format, "chat_template": own}
    for name, value in fixed.items():
        if getattr(settings, name) not in (None, value):
            asked = f"--{name} {getattr(settings, name)}"
            had = f"--{name} {value}" if value else f"no --{name}"
            raise ValueError(f"{asked}: training had {had}, as {Path(folder) / FILE} says; leave the flag out")
    left = {name: getattr(contract, name) for name in DEFAULTS if getattr(settings, name) is None}
    return replace(settings, **fixed | left), contract


def write(folder: str | Path, settings, reward_statistics: dict | None = None) -> None:
    """scoring.json beside the weights in `folder`, read back from disk in fp32 to be scored. All ranks call it.

    Args:
        settings: of the training: what DataSettings has on texts, and dtype.
        reward_statistics: `reward_mean`, `reward_std` and `reward_set`.
    """
    used = chat.choose(settings.chat_template, settings.dialogue_format, Tokenizer(settings.model_name_or_path))
    if dist.is_main() and settings.chat_template:  # it is the model's own from now on
        (Path(folder) / "chat_template.jinja").write_text(used.source, encoding="utf-8")
    dist.barrier()
    theirs = str(folder) if settings.chat_template else None
    text = encoding(replace(settings, model_name_or_path=str(folder), chat_template=theirs), None)
    golden = _golden(text)
    loaded = ScoreSettings(model_name_or_path=str(folder), dtype="float32", max_length=settings.max_length)
    model = build.load(RewardModel, loaded, train=False)
    examples = text.examples([[one] for one in golden])
    scores = score_examples(model, examples).tolist()
    tokens = [[*example.prefix.tolist(), *example.replies[0].tolist()] for example in examples]
    contract = Contract(
        template_sha256=text.template and text.template.fingerprint,
        template_asked=text.as_messages,
        chat_template=text.template and text.template.source,
        dialogue_format=settings.dialogue_format,
        bos_token_id=text.tokenizer.bos_id,
        eos_token_id=text.tokenizer.eos_id,
        max_length=settings.max_length,
        overlong=settings.overlong,
        truncation_side=settings.truncation_side,
        dtype=str(sharding.compute_dtype(settings)).removeprefix("torch."),
        golden=tuple(Golden(*one) for one in zip(golden, tokens, scores, strict=True)),
        **reward_statistics or {},
    )
    if dist.is_main():
        write_json(Path(folder) / FILE, asdict(contract))
    dist.barrier()


def carry(source: str | Path, folder: str | Path) -> None:
    """The contract of `source` for the same model, written anew to `folder`: its golden texts score as they do there.

    All ranks call it. Raises ValueError where they moved by more than rounding to bfloat16 may move them.
    """
    contract = read(source)
    if contract is None:
        return
    if dist.is_main():
        if contract.template_asked and contract.dialogue_format is None:
            (Path(folder) / "chat_template.jinja").write_text(contract.chat_template, encoding="utf-8")
        write_json(Path(folder) / FILE, asdict(contract))
    dist.barrier()
    text = encoding(settled(TextSettings(str(folder)))[0], contract)
    loaded = ScoreSettings(model_name_or_path=str(folder), dtype="float32", max_length=contract.max_length)
    model = build.load(RewardModel, loaded, train=False)
    scores = check(contract, folder, text, torch.bfloat16, partial(score_examples, model))
    golden = tuple(replace(one, score=now) for one, now in zip(contract.golden, scores, strict=True))
    if dist.is_main():
        write_json(Path(folder) / FILE, asdict(replace(contract, golden=golden)))
    dist.barrier()


def _golden(text: Encoding) -> list[Text]:
    """The golden texts in the forms that a model with this template is given, those that it can take."""
    plain = [] if text.as_messages else list(GOLDEN)
    found = []
    for one in [*plain, *(map(split_turns, GOLDEN) if text.template else [])]:
        try:
            text.examples([[one]])
        except ValueError:  # too long, or not a dialogue that the template writes
            continue
        found.append(one)
    return found


def last_file(settings) -> str:
    """What `conclude` writes last, within the output folder: with it a training is finished."""
    return f"{'adapter' if settings.use_lora else 'model'}/{FILE}"


def conclude(model: nn.Module, folder: Path, reward_set: tuple[Examples, str], settings) -> None:
    """At the end of a training: the contract of `folder/model`, and of `folder/adapter` where LoRA left one.

    `reward_set` has the examples on whose best replies rewards are measured, and its name.
    """
    examples, name = reward_set
    statistics = reward_statistics(model, batch.EvalBatches(examples, settings)) | {"reward_set": name}
    for form in [folder / "model"] + [folder / "adapter"] * settings.use_lora:
        if dist.any_rank(not form.is_dir()):
            dist.say(f"{form} is not there for every process to read: it gets no {FILE}")
        else:
            write(form, settings, statistics)


def score_examples(model: nn.Module, examples: Examples) -> Tensor:
    """(R,) fp32 rewards from a sharded model. All ranks call it."""
    return all_rewards(model, batch.EvalBatches(examples, batch.PackingSettings()))


def check(contract: Contract, folder: str | Path, text: Encoding, dtype: torch.dtype, score: Callable) -> list[float]:
    """Score the golden texts again, and compare. All ranks call it.

    Args:
        dtype: that the model computes in, which decides the tolerance.
        score: Examples -> (R,) rewards.

    Returns:
        Their scores now.

    Raises:
        ValueError: that says which text moved, and by how much.
    """
    if not contract.golden:
        return []
    # As long as they were then, whatever is asked for now
    text = replace(text, max_length=max(len(golden.tokens) for golden in contract.golden), cut=None)
    examples = text.examples([[golden.text] for golden in contract.golden])
    scores = score(examples).tolist()
    name = str(dtype).removeprefix("torch.")
    for number, (golden, example, now) in enumerate(zip(contract.golden, examples, scores, strict=True), start=1):
        broken = f"{Path(folder) / FILE} does not hold: golden text {number}, {reprlib.repr(golden.text)},"
        if golden.tokens != [*example.prefix.tolist(), *example.replies[0].tolist()]:
            raise ValueError(f"{broken} becomes other tokens than after training; put the model's own tokenizer there")
        allowed = TOLERANCE[name] * max(1.0, abs(golden.score))
        gap = abs(now - golden.score)
        if not gap <= allowed:
            raise ValueError(
                f"{broken} scored {golden.score:.5g} after training and moved by {gap:.2g}, more than {allowed:.2g} in "
                f"{name}; restore the weights and files that were saved with it, or delete it to do without"
            )
    return scores
