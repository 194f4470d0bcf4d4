"""The scoring contract: everything needed to reproduce the rewards of training, in scoring.json beside the weights.

A reward depends on the text as the model reads it: template, BOS and EOS, length, and the token at which the reward is
read. Where one of them differs, a model still returns numbers, and they are wrong. So train_rm.py writes all of it to
scoring.json, with a few probe texts and their fp32 scores, and whoever loads the model scores these texts first.

A model without scoring.json comes from elsewhere. Its rewards are read where transformers reads them.

Shapes: R replies.
"""

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rm.data.batch import EvalBatches, PackingSettings
from rm.data.chat import ChatTemplate, bare_as_dialogue, choose_template
from rm.data.dataset import TextSettings
from rm.data.examples import Examples
from rm.data.messages import Text, split_turns
from rm.data.text_encoder import TextEncoder
from rm.data.tokenizer import Tokenizer
from rm.distributed import checkpoint, sharding
from rm.distributed import process_group as dist
from rm.distributed.sharding import ParallelSettings, dtype_name
from rm.files import read_json, write_atomically, write_json
from rm.hf import build, checksums, hub, saving, weights
from rm.hf.checkpoint_folder import ModelFiles
from rm.hf.folder import TextFiles, name_padding, padding_id, set_padding
from rm.hf.outputs import Output
from rm.model.heads import RegressionModel, RewardModel, reward_model
from rm.model.lora import LoraSettings
from rm.model.losses import LossSettings
from rm.scoring import contract_file
from rm.scoring.contract_file import FILE, Contract, Golden, read
from rm.scoring.reward_set import RewardSet
from rm.scoring.score import all_rewards, reward_statistics
from rm.scoring.settings import ScoringTextSettings

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}  # of a score, times its size where that is above 1
PROBE_TEXTS = (  # fixed; only the stability of their scores matters
    "###Human: What is the capital of France?###Assistant: The capital of France is Paris.",
    "###Human: What is the capital of France?###Assistant: I will not tell you.",
    "###Human: How do I boil an egg?###Assistant: Put it into boiling water for eight minutes, then into cold water.",
    "###Human: Hi!###Assistant: Hello, how can I help?###Human: Name a prime number.###Assistant: 7",
    "###Human: Wie heißt „Danke“ auf Französisch? 🙂###Assistant: „Merci“.",
)


def resolve(
    folder: str | Path, requested: ScoringTextSettings, say: Callable[[str], None] = dist.say
) -> tuple[TextSettings, Contract | None]:
    """(how a model's texts are written, its contract): what is not requested is as in training.

    Args:
        say: is given a line where there is no contract.

    Raises:
        ValueError: a request differs from the contract in what a reward depends on.
    """
    given = {name: value for name, value in vars(requested).items() if value is not None}
    contract = read(folder)
    if contract is None:
        say(
            f"{folder} has no {FILE}: texts are written as training here would write them with these settings, and "
            f"rewards are read as transformers reads them, at the last token that is not config.json's pad_token_id"
        )
        return TextSettings(**given), None
    if checkpoint.is_checkpoint(folder):
        say(
            f"{folder} is a checkpoint: texts are written as in its training, and no golden scores show that its "
            f"rewards are those of the training"
        )
    lengths = {name: vars(contract)[name] for name in ("max_length", "overlong", "truncation_side")}
    if contract.template_sha256 is None and {"chat_template", "dialogue_format"} & given.keys():
        return TextSettings(**lengths | given), contract  # how messages are written is open
    own_template = str(folder) if contract.template_explicit and contract.dialogue_format is None else None
    trained = {
        "dialogue_format": contract.dialogue_format,
        "chat_template": own_template,
        "bare_text": contract.bare_text,
        "parse_special_tokens": bool(contract.parse_special_tokens),
    }
    for name in trained.keys() & given.keys():
        if not _agrees(name, given[name], folder, contract):
            flag = f"--{name} {trained[name]}" if trained[name] else f"no --{name}"
            raise ValueError(
                f"--{name} {given[name]}: training had {flag}, as {Path(folder) / FILE} says; leave the flag out"
            )
    return TextSettings(**lengths | given | trained), contract


def _agrees(name: str, value: str, folder: str | Path, contract: Contract) -> bool:
    """Whether a setting says what the contract says."""
    if name != "chat_template":
        return value == vars(contract)[name] or (name, value) == ("bare_text", "auto")
    template = choose_template(value, None, Tokenizer(hub.tokenizer_folder(folder)))
    return template.fingerprint == contract.template_sha256 or template.source == contract.chat_template


def text_encoder(folder: str | Path, text: TextSettings, contract: Contract | None) -> TextEncoder:
    """Encodes texts in memory as `rm.data.dataset` encodes files with these settings.

    Raises:
        ValueError: where the folder's template, BOS or EOS is not the contract's.
    """
    encoder = _encoder(folder, text)
    if contract is None:
        return replace(encoder, padding_id=_padding_id(folder, encoder.tokenizer))
    file, template, tokenizer = Path(folder) / FILE, encoder.template, encoder.tokenizer
    # Where training had no template, messages may be written by one that a setting names.
    fingerprint = None if template is None else template.fingerprint
    if fingerprint != contract.template_sha256 and not (contract.template_sha256 is None and template.explicit):
        raise ValueError(f"{file} is violated: the chat template of {folder} is not that of training")
    if (tokenizer.bos_id, tokenizer.eos_id) != (contract.bos_token_id, contract.eos_token_id):
        raise ValueError(
            f"{file} is violated: BOS and EOS of {folder} are {tokenizer.bos_id} and {tokenizer.eos_id}, and were "
            f"{contract.bos_token_id} and {contract.eos_token_id} in training; restore its tokenizer_config.json"
        )
    return encoder


def _encoder(folder: str | Path, text: TextSettings) -> TextEncoder:
    tokenizer = Tokenizer(hub.tokenizer_folder(folder))
    template = choose_template(text.chat_template, text.dialogue_format, tokenizer)
    as_dialogue = bare_as_dialogue(text.bare_text, template)
    return TextEncoder(
        tokenizer, template, text.max_length, text.cut, as_dialogue, parse_special_tokens=text.parse_special_tokens
    )


def _padding_id(folder: str | Path, tokenizer: Tokenizer) -> int | None:
    """The token that transformers takes for padding in a model from elsewhere."""
    # An adapter has no config.json. TRL, which trained it, took the padding of the tokenizer that is saved with it.
    pad_token = tokenizer.named.get("pad_token")
    if pad_token is not None and hub.base_of(folder) is not None:
        return tokenizer.special.get(pad_token, tokenizer.vocabulary.get(pad_token))
    _, _, hf = weights.read_config(folder)
    return padding_id(hf)


def write(
    folder: str | Path,
    text: TextSettings,
    dtype: torch.dtype,
    statistics: dict | None = None,
    labels: Sequence[str] | None = None,
) -> None:
    """Write scoring.json beside the weights in `folder`, which are read back in fp32 to score the probe texts.

    All ranks call it.

    Args:
        text: of the training.
        dtype: that the training computed in.
        statistics: `reward_mean`, `reward_std` and `reward_set`.
        labels: the names of the head's outputs, where they are not one reward.
    """
    folder = Path(folder)
    template, written = _template(folder, text)
    if dist.is_main():
        _write_template(folder, template, written)
        checksums.write_again(folder)
    dist.barrier()
    encoder, contract = _describe(folder, text, dtype, written, labels)
    probes = _probe_texts(encoder)
    examples = encoder.examples([[probe] for probe in probes])
    scores = _scores_on_disk(folder, text.max_length, labels, examples).tolist()
    tokens = [[*example.prefix.tolist(), *example.replies[0].tolist()] for example in examples]
    golden = tuple(Golden(*golden) for golden in zip(probes, tokens, scores, strict=True))
    if dist.is_main():
        contract_file.write(folder, replace(contract, golden=golden, **statistics or {}))
    dist.barrier()


def checkpoint_files(
    model: RewardModel, base: str, lora: LoraSettings, texts: TextFiles, text: TextSettings
) -> ModelFiles:
    """What makes each checkpoint of a training a reward model's folder. All ranks call it.

    Its scoring.json has no golden scores: checkpoints are written while training goes on, and not scored.

    Args:
        base, lora, texts: as for `build.save`.
        text: of the training.
    """

    def write(folder: Path) -> None:
        saving.save_description(model, folder, base, model.compute_dtype, texts)
        template, written = _template(folder, text)
        _write_template(folder, template, written)
        _, contract = _describe(folder, text, model.compute_dtype, written, _labels(model))
        write_json(folder / FILE, asdict(contract))

    return ModelFiles.written_by(write, base, lora)


def _template(folder: Path, text: TextSettings) -> tuple[ChatTemplate | None, str | None]:
    """(the template of a training's dialogues, as the folder's other users read it)"""
    tokenizer = Tokenizer(hub.tokenizer_folder(folder))
    template = choose_template(text.chat_template, text.dialogue_format, tokenizer)
    return template, None if template is None else template.for_other_software(tokenizer)


def _write_template(folder: Path, template: ChatTemplate | None, written: str | None) -> None:
    """Write the template of a training's dialogues, and name a padding token by it."""
    if written is not None:
        write_atomically(folder / "chat_template.jinja", written)
    _, _, hf = weights.read_config(folder)
    name_padding(folder, hf, template)


def _describe(
    folder: Path, text: TextSettings, dtype: torch.dtype, chat_template: str | None, labels: Sequence[str] | None
) -> tuple[TextEncoder, Contract]:
    """(encodes texts as the training has, the contract of its model without golden scores)

    Args:
        chat_template: what the folder's chat_template.jinja holds.
    """
    if text.chat_template:  # from now on it is the model's own
        text = replace(text, chat_template=str(folder))
    encoder = _encoder(folder, text)
    return encoder, Contract(
        template_sha256=None if encoder.template is None else encoder.template.fingerprint,
        template_explicit=encoder.as_messages,
        chat_template=chat_template,
        dialogue_format=text.dialogue_format,
        bare_text="dialogue" if encoder.bare_as_dialogue else "plain",
        parse_special_tokens=text.parse_special_tokens,
        bos_token_id=encoder.tokenizer.bos_id,
        eos_token_id=encoder.tokenizer.eos_id,
        max_length=text.max_length,
        overlong=text.overlong,
        truncation_side=text.truncation_side,
        dtype=dtype_name(dtype),
        golden=(),
        labels=labels and list(labels),
    )


def _labels(model: nn.Module) -> Sequence[str] | None:
    return model.labels if isinstance(model, RegressionModel) else None


def mean_reward(folder: str | Path) -> float:
    """`reward_mean` of a model's contract; minus it, rewards are 0 on average over `reward_set`.

    Raises:
        ValueError: the model has no contract, or it states no mean.
    """
    contract = read(folder)
    if contract is None or contract.reward_mean is None:
        raise ValueError(
            f"--center_rewards: {folder} has no {FILE} that states the mean of its rewards (reward_mean); train_rm.py "
            f"writes one, but for --loss regression"
        )
    return contract.reward_mean


def copy_to(source: str | Path, folder: str | Path, shift: float = 0.0, chosen: Output = None) -> None:
    """Write the contract of `source` beside the same model, exported to `folder`, with the scores that it has there.

    A model from elsewhere has none. It keeps its padding token, on which its rewards depend. A checkpoint has one
    without golden scores, which are computed here.

    Args:
        shift: what all rewards of the exported model are higher by.
        chosen: which of the outputs of `source` it has.

    All ranks call it. Raises ValueError where a score moved by more than rounding to bfloat16 explains.
    """
    contract, folder = read(source), Path(folder)
    if contract is None:
        tokenizer = Tokenizer(hub.tokenizer_folder(source))
        pad_id = _padding_id(source, tokenizer)
        if dist.is_main() and pad_id is not None:  # its rewards are read before it
            set_padding(folder, tokenizer.string_of(pad_id), pad_id)
            checksums.write_again(folder)
        dist.barrier()
        return
    contract = contract.of_output(chosen)
    if checkpoint.is_checkpoint(source):
        text, _ = resolve(source, ScoringTextSettings(), say=lambda line: None)
        step = checkpoint.read(Path(source))["step"]
        return write(folder, text, getattr(torch, contract.dtype), {"step": step}, contract.labels)
    if shift:
        golden = tuple(replace(one, score=one.score + shift) for one in contract.golden)
        contract = replace(contract, golden=golden, reward_mean=contract.reward_mean + shift)
    if dist.is_main():
        if contract.chat_template is not None:
            write_atomically(folder / "chat_template.jinja", contract.chat_template)
        write_json(folder / FILE, asdict(contract))
    dist.barrier()
    text, _ = resolve(folder, ScoringTextSettings())
    if dist.is_main():
        name_padding(folder, read_json(folder / "config.json"), _encoder(folder, text).template)
        checksums.write_again(folder)
    dist.barrier()
    scores = verify(
        contract,
        folder,
        text_encoder(folder, text, contract),
        torch.bfloat16,
        partial(_scores_on_disk, folder, text.max_length, contract.labels),
    )
    golden = tuple(replace(old, score=new) for old, new in zip(contract.golden, scores, strict=True))
    if dist.is_main():
        contract_file.write(folder, replace(contract, golden=golden))
    dist.barrier()


def _scores_on_disk(folder: str | Path, max_length: int, labels: Sequence[str] | None, examples: Examples) -> Tensor:
    """(R,) rewards from the files in a folder, (R, A) of a head with labels, computed in fp32. All ranks call it.

    The model is sharded over the ranks, and on a GPU its shards stay in host memory: training may have taken half as
    many bytes for each parameter as fp32 does.
    """
    parallel = ParallelSettings(dtype="float32")
    loss = LossSettings.of_outputs(labels or ())
    model = build.build(reward_model(loss), folder, parallel, loss=loss, offload=True, max_length=max_length)
    build.load(model, folder)
    rewards = score_examples(model, examples)
    sharding.release(model)
    return rewards


def _probe_texts(encoder: TextEncoder) -> list[Text]:
    """The probe texts in the forms that this model's template takes: plain, as messages, or both."""
    candidates = [] if encoder.as_messages else list(PROBE_TEXTS)
    if encoder.template:
        candidates += map(split_turns, PROBE_TEXTS)
    accepted = []
    for text in candidates:
        try:
            encoder.examples([[text]])
        except ValueError:  # too long, or not a dialogue that the template writes
            continue
        accepted.append(text)
    return accepted


def last_file(use_lora: bool) -> str:
    """The file, relative to the output folder, that `write_all` writes last: with it a training is finished."""
    return f"{'adapter' if use_lora else 'model'}/{FILE}"


def write_all(
    model: nn.Module, folder: Path, reward_set: RewardSet, text: TextSettings, packing: PackingSettings, step: int
) -> None:
    """At the end of a training: the contract of `folder/model`, and of `folder/adapter` where LoRA left one.

    All ranks call it. The other arguments are as for `write`. The model is released: what is scored next is read from
    disk, and there may be no memory for a second model.
    """
    statistics, labels = {"step": step}, _labels(model)
    if labels is None:  # attributes have a scale of their own
        statistics |= reward_statistics(model, EvalBatches(reward_set.examples, packing))
        statistics["reward_set"] = reward_set.name
    sharding.release(model)
    forms = [folder / "model"]
    if dist.any_rank((folder / "adapter").is_dir()):
        forms.append(folder / "adapter")
    for form in forms:
        if dist.any_rank(not form.is_dir()):
            dist.say(f"{form} is not visible to every process, so that it gets no {FILE}")
        else:
            write(form, text, model.compute_dtype, statistics, labels)


def score_examples(model: nn.Module, examples: Examples) -> Tensor:
    """(R,) fp32 rewards from a sharded model. All ranks call it."""
    return all_rewards(model, EvalBatches(examples, PackingSettings()))


def verify(
    contract: Contract,
    folder: str | Path,
    encoder: TextEncoder,
    dtype: torch.dtype,
    score: Callable[[Examples], Tensor],
) -> list[float]:
    """Score the probe texts again, and compare with the contract. All ranks call it.

    Args:
        dtype: that the model computes in, which decides the tolerance.
        score: Examples -> (R,) rewards, or (R, A) outputs.

    Returns:
        The scores now.

    Raises:
        ValueError: that names the text whose score moved, and by how much.
    """
    if not contract.golden:
        return []
    # The texts are as long as they were in training, whatever max_length is requested now.
    cut = contract.truncation_side if contract.overlong == "truncate" else None
    encoder = replace(encoder, max_length=contract.max_length, cut=cut)
    try:
        examples = encoder.examples([[golden.text] for golden in contract.golden])
    except ValueError as error:
        raise ValueError(f"{Path(folder) / FILE} is violated: a probe text cannot be written ({error})") from None
    scores = score(examples).tolist()
    for number, (golden, example, found) in enumerate(zip(contract.golden, examples, scores, strict=True), start=1):
        violated = f"{Path(folder) / FILE} is violated: probe text {number}, {reprlib.repr(golden.text)},"
        if golden.tokens != [*example.prefix.tolist(), *example.replies[0].tolist()]:
            raise ValueError(
                f"{violated} has other tokens than after training; restore the tokenizer that was saved with the model"
            )
        # Of several outputs the one that has moved most.
        then, now = np.atleast_1d(golden.score), np.atleast_1d(found)
        excess = np.abs(now - then) / np.maximum(1.0, np.abs(then))
        worst = int(excess.argmax())
        allowed = TOLERANCE[dtype_name(dtype)] * max(1.0, abs(then[worst]))
        difference = abs(now[worst] - then[worst])
        if not difference <= allowed:
            raise ValueError(
                f"{violated} scored {then[worst]:.5g} after training and moved by {difference:.2g}, more than "
                f"{allowed:.2g} in {dtype_name(dtype)}; restore the weights and files that were saved with it, or "
                f"delete it to score without a contract"
            )
    return scores
