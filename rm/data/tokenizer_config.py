"""The settings files of a tokenizer: tokenizer_config.json, special_tokens_map.json, added_tokens.json.

Other software keeps settings of its own in these files. Those that decide which ids a text gets are declared here, and
read or refused. All others concern decoding, padding, truncation, or classes of families that are not supported: the
file that holds the vocabulary, tokenizer.json or tokenizer.model, decides the rest.
"""

from pathlib import Path

from rm import json_keys
from rm.files import read_json
from rm.json_keys import Key

FLAG = Key(bool)
TOKEN_KEYS = {
    "content": Key(str, required=True),
    "single_word": FLAG,
    "lstrip": FLAG,
    "rstrip": FLAG,
    "normalized": FLAG,
    "special": FLAG,
    "__type": Key(str),
}
TOKEN = Key((str, dict), keys=TOKEN_KEYS)
NAMED_TOKENS = {
    "bos_token": TOKEN,
    "eos_token": TOKEN,
    "unk_token": TOKEN,
    "sep_token": TOKEN,
    "pad_token": TOKEN,
    "cls_token": TOKEN,
    "mask_token": TOKEN,
    "additional_special_tokens": Key((list, dict), items=TOKEN),
    "extra_special_tokens": Key((list, dict), items=TOKEN),
}
TEMPLATE_KEYS = {"name": Key(str, required=True), "template": Key(str, required=True)}
KEYS = NAMED_TOKENS | {
    "added_tokens_decoder": Key(dict, items=Key(dict, keys=TOKEN_KEYS)),
    "chat_template": Key((str, list), items=Key(dict, keys=TEMPLATE_KEYS)),
    "tokenizer_class": Key(str),
    "add_bos_token": FLAG,
    "add_prefix_space": FLAG,
    "legacy": FLAG,
    "split_special_tokens": FLAG,  # `rm.data.backend` refuses these two where they change ids
    "fix_mistral_regex": FLAG,
    "sp_model_kwargs": Key(dict, keys={}),  # of sentencepiece: sampling
}


MODEL_KEYS = {  # of config.json, as far as they concern the tokenizer
    "model_type": Key(str),
    "tokenizer_class": Key(str),
    "transformers_version": Key(str),
    "eos_token_id": Key((int, list), items=Key(int)),
}


def read_model_config(folder: Path) -> dict:
    """config.json, {} if there is none, as beside an adapter."""
    return json_keys.read(folder / "config.json", MODEL_KEYS, others=True)


def read(folder: Path) -> dict:
    """tokenizer_config.json, {} if there is none; ValueError for a setting of another type or a refused one."""
    file = folder / "tokenizer_config.json"
    content = json_keys.read(file, KEYS, others=True)
    for index in content.get("added_tokens_decoder") or {}:
        if not index.isdecimal():
            raise ValueError(f"{file}: added_tokens_decoder has to name tokens by their ids, got {index!r}")
    return content


def read_special_tokens_map(folder: Path) -> dict:
    """special_tokens_map.json, {} if there is none."""
    return json_keys.read(folder / "special_tokens_map.json", NAMED_TOKENS, others=True)


def read_added_tokens(folder: Path) -> dict[str, int]:
    """added_tokens.json, {} if there is none: token -> id."""
    file = folder / "added_tokens.json"
    content = read_json(file)
    for token, index in content.items():
        if problem := Key(int, minimum=0).problem(f"the id of {token!r},", index):
            raise ValueError(f"{file}: {problem}")
    return content
