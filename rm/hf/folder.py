"""The files next to the weights in a Hugging Face folder: config.json and the tokenizer's files."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from rm.data.chat import ChatTemplate, choose_template
from rm.data.dataset import TextSettings
from rm.data.tokenizer import Tokenizer
from rm.distributed.sharding import dtype_name
from rm.files import read_json, write_json
from rm.hf.families.rope import legacy_spelling

TOKENIZER_FILES = """tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json
    added_tokens.json vocab.json merges.txt chat_template.jinja""".split()


@dataclass(frozen=True)
class TextFiles:
    """What a training says about its texts in the folders that it writes.

    Attributes:
        tokenizer: whose files are copied, with its new tokens.
        template: that dialogues were written by, None for none.
        generation: the content of generation_config.json: generation ends at every token that ended a text or a turn.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    generation: dict

    @classmethod
    def of_training(cls, base: Path, tokenizer: Tokenizer, text: TextSettings) -> "TextFiles":
        """Made before the training, so that a mistake in a file is found then.

        Args:
            base: the folder of the full model.
        """
        template = choose_template(text.chat_template, text.dialogue_format, tokenizer)
        turn_end = None if template is None else _turn_end_id(template)
        return cls(tokenizer, template, _generation(base, tokenizer.eos_id, turn_end))


def _generation(base: Path, eos_id: int, turn_end: int | None) -> dict:
    file, config = base / "generation_config.json", read_json(base / "config.json")
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    # Without the file, transformers takes these from config.json.
    content = read_json(file) if file.is_file() else {name: config[name] for name in names if name in config}
    ends = content.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(type(i) is int for i in ends):
        raise ValueError(f"{file}: eos_token_id has to be an id or a list of ids, got {content['eos_token_id']!r}")
    ends = list(dict.fromkeys([*ends, eos_id, *([] if turn_end is None else [turn_end])]))
    return content | {"eos_token_id": ends[0] if len(ends) == 1 else ends}


def describe(
    folder: Path,
    source: Path,
    tokenizer: Path,
    hf: dict,
    architecture: str,
    head: str,
    dtype: torch.dtype,
    texts: TextFiles | None = None,
) -> None:
    """Write config.json and the tokenizer's files, with what transformers needs to use a reward head.

    Args:
        source: the folder of the full model that `folder` is derived from.
        tokenizer: the folder whose tokenizer's files are copied; an adapter on the full model may have its own.
        hf: content of its config.json.
        architecture: class name in transformers.
        head: "lm" or "reward".
        dtype: of the weights in `folder`.
        texts: of a training; None: the files of `source` are copied as they are.
    """
    config = hf | legacy_spelling(hf) | {"architectures": [architecture]}
    # transformers 4 writes torch_dtype, transformers 5 dtype: keep the spelling of the source.
    spellings = [name for name in ("torch_dtype", "dtype") if name in hf] or ["dtype"]
    for name in spellings:
        config[name] = dtype_name(dtype)
    pad_id = copy_tokenizer(folder, tokenizer, hf, head, texts)
    generation = source / "generation_config.json"
    if head == "reward":
        config["pad_token_id"] = pad_id
        # transformers takes the number of outputs from these.
        config["id2label"], config["label2id"] = {"0": "LABEL_0"}, {"LABEL_0": 0}
        # Without it, transformers' pipeline and vLLM apply a sigmoid to the reward.
        config["problem_type"] = "regression"
        # OpenRLHF reads the name of the head from this setting.
        config["value_head_prefix"] = "score"
    elif texts is not None:
        write_json(folder / generation.name, texts.generation)
    elif generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
    write_json(folder / "config.json", config)
    # safetensors creates files that only their owner may read; give them the permissions of the other files.
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", file)


def copy_tokenizer(folder: Path, source: Path, hf: dict, head: str, texts: TextFiles | None = None) -> int | None:
    """Copy the tokenizer's files to `folder`, with what a training has changed; a reward model gets a padding token.

    Args:
        source: the folder to copy from; with `texts`, that of its tokenizer is taken.

    Returns:
        The id of the padding token; None for a language model.
    """
    if texts is not None:
        source = texts.tokenizer.folder
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if texts is not None:
        texts.tokenizer.write_new_tokens(folder)
        _write_template(folder, texts.template)
        if (folder / "adapter_config.json").is_file():
            _complete_settings(folder, texts.tokenizer)
    if head == "lm":
        return None
    token, pad_id = _padding(source, hf, texts)
    if token is not None:
        file, legacy_file = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
        # Padding on the left would shift learned positions.
        write_json(file, read_json(file) | {"pad_token": token, "padding_side": "right"})
        if legacy_file.is_file():
            write_json(legacy_file, read_json(legacy_file) | {"pad_token": token})
    return pad_id


def _complete_settings(folder: Path, tokenizer: Tokenizer) -> None:
    """Add to tokenizer_config.json what config.json tells elsewhere: beside an adapter there is none."""
    file = folder / "tokenizer_config.json"
    settings = {name: token for name, token in tokenizer.named.items() if name == "eos_token"} | read_json(file)
    if (folder / "tokenizer.json").is_file() or tokenizer.class_name is not None:
        settings["tokenizer_class"] = tokenizer.class_name or "PreTrainedTokenizerFast"
    write_json(file, settings)


def _write_template(folder: Path, template: ChatTemplate | None) -> None:
    """Write the template that a setting has named: it is the model's own from now on."""
    if template is None or not template.explicit or template.plain:
        return
    (folder / "chat_template.jinja").write_text(template.source, encoding="utf-8")
    settings = read_json(folder / "tokenizer_config.json")
    if settings.pop("chat_template", None) is not None:  # another one
        write_json(folder / "tokenizer_config.json", settings)


def _padding(source: Path, hf: dict, texts: TextFiles | None) -> tuple[str | None, int]:
    """The padding token for batches of a reward model, None if the folder has no tokenizer, and its id.

    transformers reads the score at the last token of a sequence that is not padding. Our sequences end in EOS or in the
    token with which the chat template ends a turn: every other token can be the padding.

    A token that the tokenizer already treats as special is best. GPT-2's tokenizer has no special token but EOS. There
    the longest entry of the vocabulary that starts with the marker of a space is taken. As a special token it matches
    only where a text has that marker character itself, which no real text has. A token such as "!" would match in
    texts, and change how "!!" is tokenized.
    """
    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None, 1 if hf.get("eos_token_id") == 0 else 0

    tokenizer = Tokenizer(source) if texts is None else texts.tokenizer
    template = choose_template(None, None, tokenizer) if texts is None else texts.template
    end_ids = {tokenizer.eos_id, None if template is None else _turn_end_id(template)}
    # The vocabulary may be larger than the embedding: such ids have no row in it.
    candidates = {token: i for token, i in tokenizer.vocabulary.items() if i not in end_ids and i < hf["vocab_size"]}
    settings = read_json(source / "special_tokens_map.json") | read_json(source / "tokenizer_config.json")
    for token in (settings.get("pad_token"), settings.get("unk_token"), "<unk>", settings.get("bos_token")):
        if isinstance(token, dict):
            token = token["content"]
        if token in candidates:
            return token, candidates[token]

    def preference(token: str) -> tuple[bool, int, str]:
        has_space_marker = token.startswith(("\u0120", "\u2581"))  # byte-level BPE, sentencepiece
        return has_space_marker, len(token), token

    token = max(candidates, key=preference)
    return token, candidates[token]


def _turn_end_id(template: ChatTemplate) -> int | None:
    """The id with which a chat template ends a dialogue; None if it has no such token."""
    try:
        text = template.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    except ValueError:
        # The template does not accept this dialogue or is broken: the model was not trained with it.
        return None
    return text.parts[-1] if text.ended else None
