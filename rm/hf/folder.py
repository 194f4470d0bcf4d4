"""The files next to the weights in a Hugging Face folder: config.json and the tokenizer's files."""

import shutil
from pathlib import Path

import torch

from rm.data import chat
from rm.data.tokenizer import Tokenizer
from rm.distributed.sharding import dtype_name
from rm.files import read_json, write_json
from rm.hf.families.rope import legacy_spelling

TOKENIZER_FILES = """tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json
    added_tokens.json vocab.json merges.txt chat_template.jinja""".split()


def describe(
    folder: Path, source: Path, tokenizer: Path, hf: dict, architecture: str, head: str, dtype: torch.dtype
) -> None:
    """Write config.json and the tokenizer's files, with what transformers needs to use a reward head.

    Args:
        source: the folder of the full model that `folder` is derived from.
        tokenizer: the folder whose tokenizer's files are copied; an adapter on the full model may have its own.
        hf: content of its config.json.
        architecture: class name in transformers.
        head: "lm" or "reward".
        dtype: of the weights in `folder`.
    """
    config = hf | legacy_spelling(hf) | {"architectures": [architecture]}
    # transformers 4 writes torch_dtype, transformers 5 dtype: keep the spelling of the source.
    spellings = [name for name in ("torch_dtype", "dtype") if name in hf] or ["dtype"]
    for name in spellings:
        config[name] = dtype_name(dtype)
    pad_id = copy_tokenizer(folder, tokenizer, hf, head)
    if head == "reward":
        config["pad_token_id"] = pad_id
        # transformers takes the number of outputs from these.
        config["id2label"], config["label2id"] = {"0": "LABEL_0"}, {"LABEL_0": 0}
        # Without it, transformers' pipeline and vLLM apply a sigmoid to the reward.
        config["problem_type"] = "regression"
        # OpenRLHF reads the name of the head from this setting.
        config["value_head_prefix"] = "score"
    elif (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    write_json(folder / "config.json", config)
    # safetensors creates files that only their owner may read; give them the permissions of the other files.
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", file)


def copy_tokenizer(folder: Path, source: Path, hf: dict, head: str) -> int | None:
    """Copy the tokenizer's files from `source` to `folder`; for a reward model, also set a padding token.

    Returns:
        The id of the padding token; None for a language model, whose files are not changed.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if head == "lm":
        return None
    token, pad_id = _padding(source, hf)
    if token is not None:
        file, legacy_file = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
        # Padding on the left would shift learned positions.
        write_json(file, read_json(file) | {"pad_token": token, "padding_side": "right"})
        if legacy_file.is_file():
            write_json(legacy_file, read_json(legacy_file) | {"pad_token": token})
    return pad_id


def _padding(source: Path, hf: dict) -> tuple[str | None, int]:
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

    tokenizer = Tokenizer(source)
    end_ids = {tokenizer.eos_id, _turn_end_id(tokenizer)}
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


def _turn_end_id(tokenizer: Tokenizer) -> int | None:
    """The id with which the model's own chat template ends a dialogue; None if it has no template or no such token."""
    template = chat.choose_template(None, None, tokenizer)
    if template is None:
        return None
    try:
        text = template.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    except ValueError:
        # The template does not accept this dialogue or is broken: the model was not trained with it.
        return None
    return text.parts[-1] if text.ended else None
