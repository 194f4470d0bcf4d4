"""The files next to the weights in a Hugging Face folder: config.json and the tokenizer's files."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rm import json_keys
from rm.data.chat import ChatTemplate, choose_template
from rm.data.dataset import TextSettings
from rm.data.tokenizer import Tokenizer
from rm.distributed.sharding import dtype_name
from rm.files import check_regular, read_json, write_json
from rm.hf.families.rope import legacy_spelling
from rm.json_keys import Key, check_keys

TOKENIZER_FILES = """tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json
    added_tokens.json vocab.json merges.txt chat_template.jinja""".split()

# The padding of families whose class in transformers has one: config.json may leave it out.
DEFAULT_PADDING = {
    "gemma": 0, "gemma2": 0, "gemma3_text": 0, "glm4": 151329, "ministral3": 11, "olmo2": 1, "olmo3": 1, "phi3": 32000,
    "seed_oss": 1, "smollm3": 128004,
}  # fmt: skip

_IDS = Key((int, list), items=Key(int))
# generation_config.json holds many settings of `generate`, which are copied. It has no say in what is trained.
GENERATION_KEYS = {"bos_token_id": _IDS, "eos_token_id": _IDS, "pad_token_id": _IDS}

_SAMPLE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]  # to see how a template ends


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
    file = base / "generation_config.json"
    config = json_keys.read(base / "config.json", {"text_config": Key(dict)}, others=True)
    config |= config.get("text_config") or {}  # of a model that also reads images
    # Without the file, transformers takes these from config.json.
    content = read_json(file) if file.is_file() else {name: config[name] for name in GENERATION_KEYS if name in config}
    check_keys(file, content, GENERATION_KEYS, others=True)
    ends = content.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    ends = list(dict.fromkeys([*ends, eos_id, *([] if turn_end is None else [turn_end])]))
    return content | {"eos_token_id": ends[0] if len(ends) == 1 else ends}


def check_files(folder: Path) -> None:
    """Raise ValueError for a FIFO, a device, a link to nothing or a folder in place of a model's file, which would pass
    for a file that is not there."""
    for file in sorted(folder.glob("[!.]*")):  # hidden ones are of other software
        check_regular(file)
        if file.is_dir() and file.suffix in (".json", ".jinja", ".model", ".safetensors"):
            raise ValueError(f"{file} is a folder; a file is expected there")


def describe(
    folder: Path,
    source: Path,
    tokenizer: Path,
    hf: dict,
    architecture: str,
    head: str,
    dtype: torch.dtype,
    texts: TextFiles | None = None,
    labels: Sequence[str] = (),
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
        labels: the names of a reward head's outputs.
    """
    config = hf | legacy_spelling(hf) | {"architectures": [architecture]}
    config.pop("auto_map", None)  # names code in the folder that this one is made from; this one has none
    # transformers 4 writes torch_dtype, transformers 5 dtype: keep the spelling of the source.
    spellings = [name for name in ("torch_dtype", "dtype") if name in hf] or ["dtype"]
    for name in spellings:
        config[name] = dtype_name(dtype)
    copy_tokenizer(folder, tokenizer, texts)
    generation = source / "generation_config.json"
    if head == "reward":
        # transformers takes the number of outputs from these.
        config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        config["label2id"] = {label: i for i, label in enumerate(labels)}
        # Without it, transformers' pipeline and vLLM apply a sigmoid to the reward.
        config["problem_type"] = "regression"
        # OpenRLHF reads the name of the head from this setting.
        config["value_head_prefix"] = "score"
    elif texts is not None:
        write_json(folder / generation.name, texts.generation)
    elif generation.is_file():
        shutil.copyfile(generation, folder / generation.name)
    write_json(folder / "config.json", config)
    if head == "reward" and not (_is_reward_model(hf) and padding_id(hf) is not None):
        name_padding(folder, hf, None if texts is None else texts.template)
    # safetensors creates files that only their owner may read; give them the permissions of the other files.
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", file)


def copy_tokenizer(folder: Path, source: Path, texts: TextFiles | None = None) -> None:
    """Copy the tokenizer's files, the chat template among them, with what a training has changed.

    Args:
        source: the folder to copy from; with `texts`, that of its tokenizer is taken.
    """
    if texts is not None:
        source = texts.tokenizer.folder
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if texts is not None:
        texts.tokenizer.write_new_tokens(folder)
        _write_template(folder, texts)
        if (folder / "adapter_config.json").is_file():
            _complete_settings(folder, texts.tokenizer)


def forget_code(folder: Path) -> None:
    """Remove what tokenizer_config.json says about code in the folder that this one is made from: this one has none."""
    file = folder / "tokenizer_config.json"
    settings = read_json(file)
    if settings.pop("auto_map", None):
        settings.pop("tokenizer_class", None)  # a class of that code
        write_json(file, settings | _class_of(folder, Tokenizer(folder)))


def _is_reward_model(hf: dict) -> bool:
    """Whether a config.json is of a reward model, whose rewards depend on its padding token."""
    return any(name.endswith(("ForSequenceClassification", "ForRewardModel")) for name in hf.get("architectures") or [])


def padding_id(hf: dict) -> int | None:
    """The token that transformers takes for padding, by a config.json."""
    return hf["pad_token_id"] if "pad_token_id" in hf else DEFAULT_PADDING.get(hf["model_type"])


def name_padding(folder: Path, hf: dict, template: ChatTemplate | None = None) -> None:
    """Name a token for padding that ends no text, in the files of a reward model or of its adapter.

    transformers reads the reward of a text at its last token that is not padding, also if the text itself ends in that
    token.

    Args:
        hf: content of the model's config.json.
        template: writes its dialogues; None: its own chat template does, if it has one.
    """
    set_padding(folder, *_padding(folder, hf, template))


def set_padding(folder: Path, token: str | None, pad_id: int) -> None:
    """Write a padding token into config.json and the tokenizer's files, those of them that the folder has."""
    if (folder / "config.json").is_file():
        write_json(folder / "config.json", read_json(folder / "config.json") | {"pad_token_id": pad_id})
    if token is not None:
        file, legacy_file = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
        # Padding on the left would shift learned positions.
        write_json(file, read_json(file) | {"pad_token": token, "padding_side": "right"})
        if legacy_file.is_file():
            write_json(legacy_file, read_json(legacy_file) | {"pad_token": token})


def _complete_settings(folder: Path, tokenizer: Tokenizer) -> None:
    """Add to tokenizer_config.json what config.json tells elsewhere: beside an adapter there is none."""
    file = folder / "tokenizer_config.json"
    settings = {name: token for name, token in tokenizer.named.items() if name == "eos_token"} | read_json(file)
    settings.pop("auto_map", None)
    write_json(file, settings | _class_of(folder, tokenizer))


def _class_of(folder: Path, tokenizer: Tokenizer) -> dict:
    """The class that splits texts as the tokenizer does here, as tokenizer_config.json names it."""
    if not (folder / "tokenizer.json").is_file() and tokenizer.class_name is None:
        return {}
    return {"tokenizer_class": tokenizer.class_name or "PreTrainedTokenizerFast"}


def _write_template(folder: Path, texts: TextFiles) -> None:
    """Write the template that a setting has named: it is the model's own from now on."""
    template = texts.template
    # A plain format would be taken for the model's template by a training that follows, whose texts may be plain.
    if template is None or not template.explicit or template.plain:
        return
    source = template.for_other_software(texts.tokenizer)
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    settings = read_json(folder / "tokenizer_config.json")
    if settings.pop("chat_template", None) is not None:  # another one
        write_json(folder / "tokenizer_config.json", settings)


def _padding(folder: Path, hf: dict, template: ChatTemplate | None) -> tuple[str | None, int]:
    """The padding token for batches of a reward model, None if the folder has no tokenizer, and its id.

    A plain text ends in EOS, and most templates end every dialogue in the same token: any other will do. A token that
    the tokenizer already treats as special is best. A dialogue whose template ends no turn may end in any token that
    text can have, which includes <unk>.

    GPT-2's tokenizer has no special token but EOS. There an entry of the vocabulary is taken that starts with the
    marker of a space, and if possible ends in the first byte of a character: no text ends in the middle of a character.
    As a special token it matches only where a text has the marker itself, which no real text has. A token such as "!"
    would match in texts, and change how "!!" is tokenized.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None, 1 if hf.get("eos_token_id") == 0 else 0

    tokenizer = Tokenizer(folder)
    template = template or choose_template(None, None, tokenizer)
    ends, written, is_open = _tokens_of_dialogues(tokenizer, template)
    # The vocabulary may be larger than the embedding: such ids have no row in it.
    candidates = {token: i for token, i in tokenizer.vocabulary.items() if i not in ends and i < hf["vocab_size"]}
    settings = read_json(folder / "special_tokens_map.json") | read_json(folder / "tokenizer_config.json")
    pad, unk, bos = (_string(settings.get(name)) for name in ("pad_token", "unk_token", "bos_token"))
    special = sorted(tokenizer.special, key=lambda token: ("pad" not in token.lower(), tokenizer.special[token]))
    unused = [token for token in special if token != bos and tokenizer.special[token] not in written]
    if is_open:
        of_text = {unk, "<unk>"}
        preferred = [token for token in (pad, *unused, bos) if token in tokenizer.special and token not in of_text]
    else:
        preferred = [pad, unk, "<unk>", *unused, bos]
    for token in (*preferred, "<0xFF>"):  # a byte that UTF-8 never has
        if token in candidates:
            return token, candidates[token]

    def preference(token: str) -> tuple[bool, bool, int, str]:
        has_space_marker = token.startswith(("\u0120", "\u2581"))  # byte-level BPE, sentencepiece
        # Byte-level BPE writes the bytes 0xC0 to 0xFF, which begin a character of several bytes, as these characters.
        ends_midway = token[0] == "\u0120" and "\u00c0" <= token[-1] <= "\u00ff"
        return ends_midway, has_space_marker, len(token), token

    token = max(candidates, key=preference)
    return token, candidates[token]


def _turn_end_id(template: ChatTemplate) -> int | None:
    """The id with which a chat template ends a dialogue; None if it has no such token."""
    try:
        text = template.render(_SAMPLE, find_replies=False)
    except ValueError:
        # The template does not accept this dialogue or is broken: the model was not trained with it.
        return None
    return text.end_id


def _tokens_of_dialogues(tokenizer: Tokenizer, template: ChatTemplate | None) -> tuple[set[int], set[int], bool]:
    """(tokens in which texts end or end a turn, tokens that a template writes, whether a dialogue may end in any)"""
    ends, written, is_open = {tokenizer.eos_id}, set(), False
    if template is None or template.plain:
        return ends, written, is_open
    for reply in ("b", ""):
        dialogue = [_SAMPLE[0], {"role": "assistant", "content": reply}]
        try:
            text = template.render(dialogue, find_replies=False)
        except ValueError:
            # The template does not accept this dialogue or is broken: the model was not trained with it.
            continue
        ((ids, _),) = tokenizer.encode_parts([text.parts])
        ends |= {text.end_id, *ids[-1:]}
        written |= set(ids)
        is_open |= text.end is None
    return ends, written, is_open


def _string(token: str | dict | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token
