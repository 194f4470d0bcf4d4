"""Text to token ids: one class over `tokenizers` (tokenizer.json) and sentencepiece (tokenizer.model).

A model's folder decides three things: how a text is cut into ids, whether a document opens with BOS, and
which id ends it. So a text becomes what it was in pretraining, and text stays text: "</s>" typed by a user is
four characters, not the end of a document. `rm.data.dataset` puts BOS and EOS around the ids.

A chat template writes special tokens of its own. It hands its text over in parts, strings and ids, so that the ids
are those it means and whatever a user typed is still text.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import sentencepiece
import tokenizers

from rm.files import read_json

Parts = Sequence[str | int]  # a text whose special tokens are given as ids
Spans = list[tuple[int, int]]  # for each token, where its text begins and ends; an id counts as one character.
# Of a character in several tokens each may have all of it, or, in sentencepiece, the last all and the others nothing.
MARKS = "\ufdd0\ufdd1\ufdd2\ufdd3"  # stand for special tokens: Unicode keeps these from being characters


class Tokenizer:
    """The tokenizer of the model in `folder`; where both kinds of file are there, tokenizer.json is used.

    Attributes:
        bos_id: the id that opens every document, or None when the model's own settings say there is none.
        eos_id: the id that ends every document.
        vocab_size: the highest id that can occur, plus one: an embedding needs at least this many rows.
        special: the strings of the special tokens, which only a template may write, and their ids.
        named: the strings of "bos_token", "eos_token" and so on, by which templates know them.
        folder: where it came from.
        fingerprint: sha256 of all that decides the ids; it names the tokenizer in caches and contracts.
    """

    def __init__(self, folder: str | Path):
        kinds = {"tokenizer.json": _JsonModel, "tokenizer.model": _SentencePieceModel}
        self.folder = folder = _home(Path(folder), list(kinds))
        file = next((folder / name for name in kinds if (folder / name).is_file()), None)
        if file is None:
            raise ValueError(f"{folder}: no {' or '.join(kinds)} there; give the folder of a model with one")
        self._model = model = kinds[file.name](file)
        self.eos_id = _special_id("eos", model, folder)
        if self.eos_id is None:
            raise ValueError(f"{folder}: names no EOS token; set eos_token in its tokenizer_config.json")
        self.bos_id = _bos_id(model, folder)
        settings = read_json(folder / "tokenizer_config.json")
        names = _special_names(settings)
        model.keep_as_text(names)
        self.vocab_size = 1 + max(model.highest_id(), self.eos_id, self.bos_id or 0)
        added = _added_tokens(folder, settings)
        self.special = model.special() | {token: added[token] for token in names if token in added}
        self.named = _named(model, settings, {"bos_token": self.bos_id, "eos_token": self.eos_id})
        # Not the settings files: they also hold what changes no id, such as the chat template.
        ends = f"\nbos {self.bos_id} eos {self.eos_id} special {sorted(self.special.items())}".encode()
        self.fingerprint = hashlib.sha256(file.read_bytes() + ends).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of plain text: no BOS, no EOS, and the strings of special tokens are text as well."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, in parallel."""
        return self._model.encode_batch(list(texts))

    def encode_parts(self, texts: Sequence[Parts]) -> list[tuple[list[int], Spans]]:
        """(ids, where they are) of texts with special tokens in them: as transformers tokenizes the whole string."""
        return self._model.encode_parts(texts)


class _JsonModel:
    """A tokenizer.json: any algorithm, run by the `tokenizers` library."""

    own_eos_id = None  # the file does not say which token ends a document

    def __init__(self, file: Path):
        try:
            self.model = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # `tokenizers` raises nothing more precise
            raise ValueError(f"{file}: not readable ({error}); copy it again or upgrade tokenizers") from None
        self.model.no_truncation()  # a file may ask for both; lengths are decided by rm.data.dataset, in the open
        self.model.no_padding()
        self.model.encode_special_tokens = True  # as text, that is: "</s>" is not parsed as the token </s>
        # The file's own BOS is what its post-processor puts before a text.
        plain, full = (self.model.encode("a", add_special_tokens=special).ids for special in (False, True))
        self.own_bos_id = full[0] if full != plain and full[1 : 1 + len(plain)] == plain else None

    def id_of(self, token: str) -> int | None:
        return self.model.token_to_id(token)

    def string_of(self, index: int) -> str | None:
        return self.model.id_to_token(index)

    def keep_as_text(self, tokens: list[str]) -> None:
        """Some files list BOS or EOS as an added token that is not special; it would be parsed."""
        self.model.add_special_tokens([token for token in tokens if self.id_of(token) is not None])

    def highest_id(self) -> int:
        special = {i for i, token in self.model.get_added_tokens_decoder().items() if token.special}
        return max(set(self.model.get_vocab().values()) - special, default=0)

    def special(self) -> dict[str, int]:
        return {token.content: i for i, token in self.model.get_added_tokens_decoder().items() if token.special}

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.model.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_parts(self, texts: Sequence[Parts]) -> list[tuple[list[int], Spans]]:
        marks, first = self._marks
        joined = ["".join(part if isinstance(part, str) else marks.get(part, MARKS[0]) for part in p) for p in texts]
        encodings = self._marked.encode_batch(joined, add_special_tokens=False)
        return [self._fill(encoding, parts, first) for encoding, parts in zip(encodings, texts, strict=True)]

    @staticmethod
    def _fill(encoding: tokenizers.Encoding, parts: Parts, first: int) -> tuple[list[int], Spans]:
        """The ids that the marks (ids from `first` on) stand for, in their places, without the blanks they swallow."""
        ids, spans, at = encoding.ids, encoding.offsets, 0
        marks = (i for i, token in enumerate(ids) if token >= first)
        for part in parts:
            if isinstance(part, str):
                at += len(part)
            else:
                i = next(marks)
                ids[i], spans[i], at = part, (at, at + 1), at + 1
        return ids, spans

    @cached_property
    def _marked(self) -> tokenizers.Tokenizer:
        """This tokenizer, but for marks: the library cuts a text at them as it would at the special tokens.

        That two copies of "<s>" in one text can differ, one written by a template and one by a user, is not in the
        library; but special tokens can be off and these, which are not special, on.
        """
        model = tokenizers.Tokenizer.from_str(self.model.to_str())
        model.encode_special_tokens = True
        model.post_processor = None  # it may trim spaces from the offsets
        for i, mark in enumerate(MARKS):
            lstrip, rstrip = bool(i & 1), bool(i & 2)
            model.add_tokens([tokenizers.AddedToken(mark, lstrip=lstrip, rstrip=rstrip, normalized=False)])
        return model

    @cached_property
    def _marks(self) -> tuple[dict[int, str], int]:
        """(special id -> the mark that swallows the same spaces around it, the lowest id of a mark)"""
        added = self.model.get_added_tokens_decoder().items()
        marks = {i: MARKS[token.lstrip + 2 * token.rstrip] for i, token in added}
        return marks, self._marked.token_to_id(MARKS[0])


class _SentencePieceModel:
    """A tokenizer.model, as LLaMA has it. Its control symbols are never parsed from text."""

    def __init__(self, file: Path):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{file}: not readable by sentencepiece ({error}); copy it again") from None
        ends = self.model.bos_id(), self.model.eos_id()  # -1 for none
        self.own_bos_id, self.own_eos_id = (None if i < 0 else i for i in ends)

    def id_of(self, token: str) -> int | None:
        index = self.model.piece_to_id(token)  # the id of <unk> when there is no such piece
        return index if self.model.id_to_piece(index) == token else None

    def string_of(self, index: int) -> str | None:
        return self.model.id_to_piece(index) if index < self.model.vocab_size() else None

    def keep_as_text(self, tokens: list[str]) -> None:
        pass

    def highest_id(self) -> int:
        return self.model.vocab_size() - 1

    def special(self) -> dict[str, int]:
        return {self.model.id_to_piece(i): i for i in range(self.model.vocab_size()) if self.model.is_control(i)}

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self.model.encode(texts)

    def encode_parts(self, texts: Sequence[Parts]) -> list[tuple[list[int], Spans]]:
        """The strings between special tokens are encoded each on its own, as the first LLaMAs were trained."""
        found = []
        for parts in texts:
            ids, spans, at = [], [], 0
            for part in parts:
                if isinstance(part, str):
                    encoding = self.model.encode(part, out_type="offset_mapping")
                    ids += encoding["ids"]
                    spans += [(at + start, at + end) for start, end in encoding["offsets"]]
                else:
                    ids.append(part)
                    spans.append((at, at + 1))
                at += len(part) if isinstance(part, str) else 1
            found.append((ids, spans))
        return found


def _home(folder: Path, kinds: list[str]) -> Path:
    """An adapter without a tokenizer of its own has that of its base."""
    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    own = any((folder / name).is_file() for name in kinds)
    return folder if own or not base or not Path(base).is_dir() else _home(Path(base), kinds)


def _bos_id(model: _JsonModel | _SentencePieceModel, folder: Path) -> int | None:
    """tokenizer_config.json's add_bos_token decides; without it, what the model file itself does."""
    asked = read_json(folder / "tokenizer_config.json").get("add_bos_token")
    if asked is None:
        return model.own_bos_id
    index = _special_id("bos", model, folder) if asked else None
    if asked and index is None:
        raise ValueError(f"{folder}: asks for BOS but names none; set bos_token in tokenizer_config.json")
    return index


def _special_id(name: str, model: _JsonModel | _SentencePieceModel, folder: Path) -> int | None:
    """The id of "bos" or "eos": by tokenizer_config.json, else by config.json, else the model file's own."""
    settings = read_json(folder / "tokenizer_config.json")
    token = _content(settings.get(f"{name}_token"))
    if token is not None:
        index = model.id_of(token)
        index = _added_tokens(folder, settings).get(token) if index is None else index
        if index is None:
            raise ValueError(f"{folder}: {name}_token {token!r} is not in the vocabulary; correct it")
        return index
    index = read_json(folder / "config.json").get(f"{name}_token_id")
    if isinstance(index, list) and index:  # the first ends a document; the others may end a turn
        index = index[0]
    if index is not None and type(index) is not int:
        raise ValueError(f"{folder}/config.json: expected an id or ids as {name}_token_id, got {index!r}")
    return getattr(model, f"own_{name}_id") if index is None else index


def _added_tokens(folder: Path, settings: dict) -> dict[str, int]:
    """What a fine-tune added beside a tokenizer.model, in either of the two places that are in use."""
    listed = {_content(token): int(i) for i, token in settings.get("added_tokens_decoder", {}).items()}
    return listed | read_json(folder / "added_tokens.json")


def _named(model: _JsonModel | _SentencePieceModel, settings: dict, ids: dict[str, int | None]) -> dict[str, str]:
    """The special tokens that tokenizer_config.json names, and those of `ids` that it does not name."""
    found = {name: model.string_of(i) for name, i in ids.items() if i is not None}
    found |= {name: _content(settings.get(name)) for name in settings if name.endswith("_token")}
    return {name: string for name, string in sorted(found.items()) if string is not None}


def _special_names(settings: dict) -> list[str]:
    """The tokens that tokenizer_config.json calls special, whatever the tokenizer's own file says."""
    found = [settings.get("bos_token"), settings.get("eos_token"), *(settings.get("additional_special_tokens") or [])]
    found += [token for token in settings.get("added_tokens_decoder", {}).values() if token.get("special")]
    return [name for name in map(_content, found) if name is not None]


def _content(token) -> str | None:
    """A token in tokenizer_config.json: a string, {"content": string}, null, or (LLaMA 1) an empty string."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None
