"""What lies beside the weights in a Hugging Face folder: config.json and the tokenizer's files."""

import shutil
from pathlib import Path

import sentencepiece
import tokenizers
import torch

from rm.data import chat
from rm.data.tokenizer import Tokenizer
from rm.files import read_json, write_json

TOKENIZER_FILES = """tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json
    added_tokens.json vocab.json merges.txt chat_template.jinja""".split()


def describe(folder: Path, source: Path, hf: dict, architecture: str, head: str, dtype: torch.dtype) -> None:
    """config.json and the tokenizer's files, changed where transformers has to know of the reward head."""
    config = hf | {"architectures": [architecture]}
    for spelling in hf.keys() & {"torch_dtype", "dtype"} or {"dtype"}:  # transformers 4, transformers 5
        config[spelling] = str(dtype).removeprefix("torch.")
    padding = copy_tokenizer(folder, source, hf, head)
    if head == "reward":
        config |= {"pad_token_id": padding}
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}  # one label, that is
        config |= {"problem_type": "regression"}  # or transformers' pipeline and vLLM put a sigmoid on the reward
        config |= {"value_head_prefix": "score"}  # OpenRLHF's word for what the head is called
    elif (source / "generation_config.json").is_file():
        shutil.copyfile(source / "generation_config.json", folder / "generation_config.json")
    write_json(folder / "config.json", config)
    for file in folder.glob("*.safetensors"):  # the library lets nobody but the owner read what it writes
        shutil.copymode(folder / "config.json", file)


def copy_tokenizer(folder: Path, source: Path, hf: dict, head: str) -> int | None:
    """The tokenizer's files; for a reward model, with the padding that its readers need, whose id is returned."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if head == "lm":
        return None
    token, number = _padding(source, hf)
    if token is not None:
        file, legacy = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
        # On the right: on the left it would shift learned positions.
        write_json(file, read_json(file) | {"pad_token": token, "padding_side": "right"})
        if legacy.is_file():
            write_json(legacy, read_json(legacy) | {"pad_token": token})
    return number


def _padding(source: Path, hf: dict) -> tuple[str | None, int]:
    """The token that pads a reward model's batches, and its id.

    transformers scores a row's last token that is not padding, and our texts end in EOS or in what the template ends a
    turn with: any other will do.
    Best is one that the tokenizer treats as special already. GPT-2's has nothing special but EOS: there it is
    the longest entry that begins with the mark of a space, a string that no text holds. Declaring one like
    "!" special would change how "!!" is cut.
    """
    if (source / "tokenizer.json").is_file():
        ids = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json")).get_vocab()
    elif (source / "tokenizer.model").is_file():
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
        ids = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    else:
        return None, int(hf.get("eos_token_id") == 0)

    tokenizer = Tokenizer(source)
    ends = {tokenizer.eos_id, _turns_end(tokenizer)}
    ids = {token: i for token, i in ids.items() if i not in ends and i < hf["vocab_size"]}  # some have no row
    settings = read_json(source / "special_tokens_map.json") | read_json(source / "tokenizer_config.json")
    named = settings.get("pad_token"), settings.get("unk_token"), "<unk>", settings.get("bos_token")
    named = [token["content"] if isinstance(token, dict) else token for token in named]
    unspelled = max(ids, key=lambda token: (token.startswith(("\u0120", "\u2581")), len(token), token))
    token = next(token for token in (*named, unspelled) if token in ids)
    return token, ids[token]


def _turns_end(tokenizer: Tokenizer) -> int | None:
    """The token that the model's own chat template, if it has one, ends a text with."""
    template = chat.choose(None, None, tokenizer)
    try:
        text = template and template.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    except ValueError:  # it is for other dialogues, or unsound: nothing was trained on it
        return None
    return text.parts[-1] if text and text.ended else None
