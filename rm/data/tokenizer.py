"""Converts text to token ids: one class over `tokenizers` (tokenizer.json) and sentencepiece (tokenizer.model).

A model's folder decides three things: how a text is split into tokens, whether a document begins with BOS, and which
token ends it. So a text gets the tokens that it had in pretraining. Special tokens are never parsed from text: "</s>"
typed by a user is four characters, not the end of a document. `rm.data.encode` puts BOS and EOS around the ids.

A chat template writes special tokens of its own. It passes its text in parts, strings and ids, so that these become
the ids that it means, and the same characters in a user's message remain text.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import sentencepiece
import tokenizers

from rm.files import read_json

Parts = Sequence[str | int]  # a text whose special tokens are given as ids

# For each token the (start, end) of its text in characters; a special token given as an id counts as one character.
# If one character is several tokens, each has the span of that character, or, in sentencepiece, only the last one has
# it and the others have an empty span.
Spans = list[tuple[int, int]]

# Unicode noncharacters that stand for special tokens in the text given to `tokenizers`: one for each combination of
# stripping white space on the left and on the right.
PLACEHOLDERS = "\ufdd0\ufdd1\ufdd2\ufdd3"


class Tokenizer:
    """The tokenizer of the model in a folder.

    Args:
        folder: holds a tokenizer.json or a tokenizer.model; if it holds both, tokenizer.json is used.

    Attributes:
        bos_id: the id that begins every document, or None if the model's settings say that there is none.
        eos_id: the id that ends every document.
        vocab_size: the highest id that can occur, plus one: an embedding needs at least this many rows.
        special: special-token strings, which only a template may write, and their ids.
        named: "bos_token", "eos_token" and so on -> the token's string; templates use these names.
        folder: the folder it was read from.
        fingerprint: sha256 of everything that determines the ids; it identifies the tokenizer in caches and contracts.

    Raises:
        ValueError: a file is missing or broken, or no EOS token is named.
    """

    def __init__(self, folder: str | Path):
        self.folder = folder = Path(folder)
        if (folder / "tokenizer.json").is_file():
            file = folder / "tokenizer.json"
            model = _JsonModel(file)
        elif (folder / "tokenizer.model").is_file():
            file = folder / "tokenizer.model"
            model = _SentencePieceModel(file)
        else:
            raise ValueError(
                f"{folder}: no tokenizer.json or tokenizer.model there; give the folder of a model with one"
            )
        self._model = model
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
        # The settings files as a whole are left out: they also hold what changes no id, such as the chat template.
        ends = f"\nbos {self.bos_id} eos {self.eos_id} special {sorted(self.special.items())}".encode()
        self.fingerprint = hashlib.sha256(file.read_bytes() + ends).hexdigest()

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token string -> id, for every token in the tokenizer.json or tokenizer.model itself."""
        return self._model.vocabulary()

    def string_of(self, index: int) -> str | None:
        """The token with an id, as the vocabulary spells it; None if there is none."""
        return self._model.string_of(index)

    def encode(self, text: str) -> list[int]:
        """The ids of plain text: without BOS and EOS, and special-token strings are text, too."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many plain texts (see `encode`), in parallel."""
        return self._model.encode_batch(list(texts))

    def encode_parts(self, texts: Sequence[Parts]) -> list[tuple[list[int], Spans]]:
        """(ids, spans) of texts with special tokens in them, with the ids that transformers gives the whole string."""
        return self._model.encode_parts(texts)


class _JsonModel:
    """A tokenizer.json, of any algorithm, run by the `tokenizers` library.

    Attributes:
        own_bos_id, own_eos_id: what the file itself says, None if nothing.
    """

    own_eos_id = None  # a tokenizer.json does not say which token ends a document

    def __init__(self, file: Path):
        try:
            self.model = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # `tokenizers` raises nothing more precise
            raise ValueError(f"{file}: not readable ({error}); copy it again or upgrade tokenizers") from None
        # A file may enable truncation and padding, which would happen silently; rm.data.encode limits lengths.
        self.model.no_truncation()
        self.model.no_padding()
        self.model.encode_special_tokens = True  # as ordinary text: "</s>" is not parsed as the token </s>
        # The file's own BOS is the token that its post-processor puts before a text.
        plain = self.model.encode("a", add_special_tokens=False).ids
        processed = self.model.encode("a", add_special_tokens=True).ids
        has_bos = processed != plain and processed[1 : 1 + len(plain)] == plain
        self.own_bos_id = processed[0] if has_bos else None

    def id_of(self, token: str) -> int | None:
        return self.model.token_to_id(token)

    def string_of(self, index: int) -> str | None:
        return self.model.id_to_token(index)

    def vocabulary(self) -> dict[str, int]:
        return self.model.get_vocab()

    def keep_as_text(self, tokens: list[str]) -> None:
        """Make these tokens special, as some files do not list BOS or EOS: they are not parsed from text then."""
        self.model.add_special_tokens([token for token in tokens if self.id_of(token) is not None])

    def highest_id(self) -> int:
        """The highest id that text can have: without special tokens, for which a model may lack embedding rows."""
        special = {i for i, token in self.model.get_added_tokens_decoder().items() if token.special}
        return max(set(self.model.get_vocab().values()) - special, default=0)

    def special(self) -> dict[str, int]:
        return {token.content: i for i, token in self.model.get_added_tokens_decoder().items() if token.special}

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.model.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_parts(self, texts: Sequence[Parts]) -> list[tuple[list[int], Spans]]:
        placeholders, first_placeholder_id = self._placeholders
        joined = []
        for parts in texts:
            strings = [part if isinstance(part, str) else placeholders.get(part, PLACEHOLDERS[0]) for part in parts]
            joined.append("".join(strings))
        encodings = self._with_placeholders.encode_batch(joined, add_special_tokens=False)
        return [
            self._replace_placeholders(encoding, parts, first_placeholder_id)
            for encoding, parts in zip(encodings, texts, strict=True)
        ]

    @staticmethod
    def _replace_placeholders(
        encoding: tokenizers.Encoding, parts: Parts, first_placeholder_id: int
    ) -> tuple[list[int], Spans]:
        """The encoding of a text, with the special tokens' ids in place of those of their placeholders."""
        ids, spans = encoding.ids, encoding.offsets
        placeholder_tokens = [i for i, token in enumerate(ids) if token >= first_placeholder_id]
        special_parts, position = [], 0  # (id, position in characters) of each special token
        for part in parts:
            if isinstance(part, str):
                position += len(part)
            else:
                special_parts.append((part, position))
                position += 1
        for i, (special_id, position) in zip(placeholder_tokens, special_parts, strict=False):
            ids[i] = special_id
            # The token's offsets would include the white space that it strips, which is no text of its own.
            spans[i] = (position, position + 1)
        return ids, spans

    @cached_property
    def _with_placeholders(self) -> tokenizers.Tokenizer:
        """This tokenizer with the placeholders as added tokens: it splits a text at them as at its special tokens.

        The library cannot tell a "<s>" that a template wrote from one that a user typed, as it parses special tokens
        in the whole text or nowhere. So it parses none, and placeholders mark those of the template: as added tokens
        that are not special, they are parsed in any case.
        """
        model = tokenizers.Tokenizer.from_str(self.model.to_str())
        model.encode_special_tokens = True
        model.post_processor = None  # it may exclude white space from the offsets
        for i, placeholder in enumerate(PLACEHOLDERS):
            lstrip, rstrip = bool(i & 1), bool(i & 2)
            model.add_tokens([tokenizers.AddedToken(placeholder, lstrip=lstrip, rstrip=rstrip, normalized=False)])
        return model

    @cached_property
    def _placeholders(self) -> tuple[dict[int, str], int]:
        """(special token's id -> the placeholder that strips the same white space, the lowest id of a placeholder)"""
        placeholders = {}
        for i, token in self.model.get_added_tokens_decoder().items():
            placeholders[i] = PLACEHOLDERS[token.lstrip + 2 * token.rstrip]
        return placeholders, self._with_placeholders.token_to_id(PLACEHOLDERS[0])


class _SentencePieceModel:
    """A tokenizer.model, as LLaMA has it, run by sentencepiece, which never parses control symbols from text.

    Attributes:
        own_bos_id, own_eos_id: what the file itself says, None if nothing.
    """

    def __init__(self, file: Path):
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{file}: not readable by sentencepiece ({error}); copy it again") from None
        bos_id, eos_id = self.model.bos_id(), self.model.eos_id()  # -1 for none
        self.own_bos_id = None if bos_id < 0 else bos_id
        self.own_eos_id = None if eos_id < 0 else eos_id

    def id_of(self, token: str) -> int | None:
        index = self.model.piece_to_id(token)  # the id of <unk> when there is no such piece
        return index if self.model.id_to_piece(index) == token else None

    def string_of(self, index: int) -> str | None:
        return self.model.id_to_piece(index) if index < self.model.vocab_size() else None

    def vocabulary(self) -> dict[str, int]:
        return {self.model.id_to_piece(i): i for i in range(self.model.vocab_size())}

    def keep_as_text(self, tokens: list[str]) -> None:
        pass  # see the class

    def highest_id(self) -> int:
        return self.model.vocab_size() - 1

    def special(self) -> dict[str, int]:
        return {self.model.id_to_piece(i): i for i in range(self.model.vocab_size()) if self.model.is_control(i)}

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self.model.encode(texts)

    def encode_parts(self, texts: Sequence[Parts]) -> list[tuple[list[int], Spans]]:
        """Encodes each string between special tokens separately, as the first LLaMAs were trained."""
        encoded = []
        for parts in texts:
            ids, spans, position = [], [], 0
            for part in parts:
                if isinstance(part, str):
                    encoding = self.model.encode(part, out_type="offset_mapping")
                    ids += encoding["ids"]
                    spans += [(position + start, position + end) for start, end in encoding["offsets"]]
                    position += len(part)
                else:
                    ids.append(part)
                    spans.append((position, position + 1))
                    position += 1
            encoded.append((ids, spans))
        return encoded


def _bos_id(model: _JsonModel | _SentencePieceModel, folder: Path) -> int | None:
    """The id that begins a document: add_bos_token in tokenizer_config.json decides, otherwise the model file."""
    add_bos_token = read_json(folder / "tokenizer_config.json").get("add_bos_token")
    if add_bos_token is None:
        return model.own_bos_id
    if not add_bos_token:
        return None
    index = _special_id("bos", model, folder)
    if index is None:
        raise ValueError(
            f"{folder}: add_bos_token is set, but no BOS token is named; set bos_token in tokenizer_config.json"
        )
    return index


def _special_id(name: str, model: _JsonModel | _SentencePieceModel, folder: Path) -> int | None:
    """The id of "bos" or "eos": by tokenizer_config.json, otherwise by config.json, otherwise the model file's own."""
    settings = read_json(folder / "tokenizer_config.json")
    token = _content(settings.get(f"{name}_token"))
    if token is not None:
        index = model.id_of(token)
        if index is None:
            index = _added_tokens(folder, settings).get(token)
        if index is None:
            raise ValueError(f"{folder}: {name}_token {token!r} is not in the vocabulary; correct it")
        return index
    index = read_json(folder / "config.json").get(f"{name}_token_id")
    if isinstance(index, list) and index:
        index = index[0]  # the first ends a document; the others may end a turn
    if index is None:
        return model.own_bos_id if name == "bos" else model.own_eos_id
    if type(index) is not int:
        raise ValueError(f"{folder}/config.json: expected an id or a list of ids as {name}_token_id, got {index!r}")
    return index


def _added_tokens(folder: Path, settings: dict) -> dict[str, int]:
    """Tokens that a fine-tune added to a tokenizer.model, from either of the two files that are in use for them."""
    from_settings = {_content(token): int(i) for i, token in settings.get("added_tokens_decoder", {}).items()}
    return from_settings | read_json(folder / "added_tokens.json")


def _named(model: _JsonModel | _SentencePieceModel, settings: dict, ids: dict[str, int | None]) -> dict[str, str]:
    """Name -> string of the special tokens that tokenizer_config.json names, and of those in `ids`."""
    strings = {name: model.string_of(i) for name, i in ids.items() if i is not None}
    # tokenizer_config.json wins
    strings |= {name: _content(settings.get(name)) for name in settings if name.endswith("_token")}
    return {name: string for name, string in sorted(strings.items()) if string is not None}


def _special_names(settings: dict) -> list[str]:
    """The tokens that tokenizer_config.json calls special, whatever the tokenizer's own file says."""
    tokens = [settings.get("bos_token"), settings.get("eos_token"), *(settings.get("additional_special_tokens") or [])]
    tokens += [token for token in settings.get("added_tokens_decoder", {}).values() if token.get("special")]
    return [name for name in map(_content, tokens) if name is not None]


def _content(token) -> str | None:
    """The string of a token in tokenizer_config.json, None if there is none.

    A token is a string, {"content": string}, null, or (LLaMA 1) an empty string.
    """
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None
