"""Converts text to token ids, with the ids that transformers gives.

A model's folder decides three things: how a text is split into tokens, whether a document begins with BOS, and which
token ends it (`rm.data.backend`). Special tokens are never parsed from text: "</s>" typed by a user is four characters,
not the end of a document. `rm.data.encode` puts BOS and EOS around the ids.

A chat template writes special tokens of its own. It passes its text in parts, strings and ids, so that these become
the ids that it means, and the same characters in a user's message remain text.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

import tokenizers

from rm.data import backend, tokenizer_config
from rm.data.backend import Backend, content
from rm.files import read_json, read_whole, write_json

Parts = Sequence[str | int]  # a text whose special tokens are given as ids

# For each token the (start, end) of its text in characters; a special token given as an id counts as one character.
# If one character is several tokens, each has the span of that character.
Spans = list[tuple[int, int]]

# Unicode noncharacters that stand for special tokens in the text given to `tokenizers`: one for each combination of
# stripping white space on the left and on the right.
PLACEHOLDERS = "\ufdd0\ufdd1\ufdd2\ufdd3"


class Tokenizer:
    """The tokenizer of the model in a folder.

    Args:
        folder: holds a tokenizer.json or a tokenizer.model; if it holds both, tokenizer.json is used.
        new_tokens: special tokens to add to it.

    Attributes:
        bos_id: the id that begins every document, or None if the model's settings say that there is none.
        eos_id: the id that ends every document.
        vocab_size: the highest id that can occur, plus one: an embedding needs at least this many rows.
        special: special-token strings, which only a template may write, and their ids.
        named: "bos_token", "eos_token" and so on -> the token's string; templates use these names.
        new_ids: of those of `new_tokens` that were not in the vocabulary, for which a model has no trained embedding.
        class_name: of the class in transformers by whose rules it works; None: by those of its file.
        folder: the folder it was read from.
        fingerprint: sha256 of everything that determines the ids; it identifies the tokenizer in caches and contracts.

    Raises:
        ValueError: a file is missing or broken, or no EOS token is named.
    """

    def __init__(self, folder: str | Path, new_tokens: Sequence[str] = ()):
        self.folder = folder = Path(folder)
        self._model = made = backend.make(folder)
        model = made.model
        self.new_ids = self._add(new_tokens)
        self.eos_id = _eos_id(made, folder)
        if self.eos_id is None:
            raise ValueError(f"{folder}: names no EOS token; set eos_token in its tokenizer_config.json")
        self.bos_id = _bos_id(made, folder)
        # Some files list BOS or EOS as ordinary tokens: they are not to be parsed from text either.
        backend.mark_special(model, backend.special_names(made.settings))
        model.encode_special_tokens = True  # as ordinary text: "</s>" is not parsed as the token </s>
        added = model.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}
        # A model may lack embedding rows for special tokens that never occur.
        ordinary = set(model.get_vocab().values()) - set(self.special.values())
        self.vocab_size = 1 + max(max(ordinary, default=0), self.eos_id, self.bos_id or 0, *self.new_ids)
        self.class_name = made.class_name
        self.named = _named(made, {"bos_token": self.bos_id, "eos_token": self.eos_id})
        # The settings files as a whole are left out: they also hold what changes no id, such as the chat template.
        rules = [made.class_name, made.settings.get("legacy"), made.settings.get("add_prefix_space")]
        flags = [(i, repr(token)) for i, token in sorted(added.items())]
        tokens = [self.bos_id, self.eos_id, *flags]
        digest = hashlib.sha256(read_whole(made.file))
        digest.update(json.dumps([*rules, *tokens]).encode())
        self.fingerprint = digest.hexdigest()

    def _add(self, new_tokens: Sequence[str]) -> list[int]:
        """Add special tokens; the ids of those that the vocabulary did not have."""
        model = self._model.model
        known = model.get_vocab()
        special = {token.content for token in model.get_added_tokens_decoder().values() if token.special}
        self._new_tokens = [token for token in new_tokens if token not in special]
        model.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in self._new_tokens])
        return [model.token_to_id(token) for token in self._new_tokens if token not in known]

    def write_new_tokens(self, folder: Path) -> None:
        """Add the new tokens to the files in `folder`, which are copies of those that this tokenizer was read from."""
        if not self._new_tokens:
            return
        file = folder / self._model.file.name
        added = {i: _flags(token) for i, token in sorted(self._model.model.get_added_tokens_decoder().items())}
        settings = read_json(folder / "tokenizer_config.json")
        if file.suffix == ".json":
            definition = read_json(file)
            listed = {token["id"]: token for token in definition.get("added_tokens", [])}
            listed |= {i: {"id": i} | token for i, token in added.items() if token["content"] in self._new_tokens}
            definition["added_tokens"] = [listed[i] for i in sorted(listed)]
            file.write_text(json.dumps(definition, ensure_ascii=False), encoding="utf-8")
            if "added_tokens_decoder" not in settings:
                return
        # Where there is an added_tokens_decoder, nothing else is read: it is complete, and tokens are named by strings.
        settings = {name: _string_of(value) for name, value in backend.read_settings(folder).items()}
        settings["added_tokens_decoder"] = {str(i): token for i, token in added.items()}
        write_json(folder / "tokenizer_config.json", settings)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token string -> id, added tokens included."""
        return self._model.model.get_vocab()

    def string_of(self, index: int) -> str | None:
        """The token with an id, as the vocabulary spells it; None if there is none."""
        return self._model.model.id_to_token(index)

    def encode(self, text: str) -> list[int]:
        """The ids of plain text: without BOS and EOS, and special-token strings are text, too."""
        return self.encode_batch([text])[0]

    def split_special(self, text: str) -> list[str | int]:
        """A text whose special-token strings are these tokens, as `encode_parts` takes it."""
        pieces = [piece for piece in self.special_pattern.split(text) if piece]
        return [self.special.get(piece, piece) for piece in pieces]

    @cached_property
    def special_pattern(self) -> re.Pattern:
        """The string of any special token, as a group."""
        # The longest first: an alternation takes the first alternative that matches.
        strings = sorted(self.special, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, strings)) or '(?!)'})")  # "(?!)" matches nothing

    def decode(self, ids: Sequence[int]) -> list[tuple[str, bool]]:
        """The text of some tokens, to be shown: (string, whether it is one special token) in their order.

        Where the ids begin or end within a character of several tokens, that is U+FFFD.
        """
        if self._model.model.decoder is None:  # as of a tokenizer.model
            steps = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback()]
            self._model.model.decoder = tokenizers.decoders.Sequence([*steps, tokenizers.decoders.Fuse()])
        specials, found = set(self.special.values()), []
        decode = partial(self._model.model.decode, skip_special_tokens=False)
        # Decoders treat the first token in another way, such as to strip a blank: it is to be none of these.
        before = self.encode("a")
        for is_special, run in itertools.groupby(ids, specials.__contains__):
            if is_special:
                found += [(self.string_of(index), True) for index in run]
            else:
                found.append((decode([*before, *run])[len(decode(before)) :], False))
        return found

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of many plain texts (see `encode`), in parallel."""
        return [encoding.ids for encoding in self._model.model.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_parts(self, texts: Sequence[Parts]) -> list[tuple[list[int], Spans]]:
        """(ids, spans) of texts with special tokens in them, with the ids that transformers gives the whole string."""
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
        model = tokenizers.Tokenizer.from_str(self._model.model.to_str())
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
        for i, token in self._model.model.get_added_tokens_decoder().items():
            placeholders[i] = PLACEHOLDERS[token.lstrip + 2 * token.rstrip]
        return placeholders, self._with_placeholders.token_to_id(PLACEHOLDERS[0])


def _string_of(value):
    """A setting, with the string of every token that is an object."""
    if isinstance(value, list):
        return [_string_of(item) for item in value]
    return content(value) if isinstance(value, dict) and "content" in value else value


def _flags(token: tokenizers.AddedToken) -> dict:
    return {name: getattr(token, name) for name in backend.FLAGS}


def _eos_id(made: Backend, folder: Path) -> int | None:
    """The id that ends a document: by the tokenizer's settings, otherwise by config.json."""
    token = content(made.settings.get("eos_token"))
    if token is not None:
        return _id_of("eos_token", token, made, folder)
    index = tokenizer_config.read_model_config(folder).get("eos_token_id")
    if isinstance(index, list):
        return index[0] if index else None  # the first ends a document; the others may end a turn
    return index


def _bos_id(made: Backend, folder: Path) -> int | None:
    """The id that begins a document, if one does."""
    if made.adds_bos and made.bos is None:
        raise ValueError(
            f"{folder}: add_bos_token is set, but no BOS token is named; set bos_token in tokenizer_config.json"
        )
    return _id_of("bos_token", made.bos, made, folder) if made.adds_bos else None


def _id_of(name: str, token: str, made: Backend, folder: Path) -> int:
    index = made.model.token_to_id(token)
    if index is None:
        raise ValueError(f"{folder}: {name} {token!r} is not in the vocabulary; correct it")
    return index


def _named(made: Backend, ids: dict[str, int | None]) -> dict[str, str]:
    """Name -> string of the special tokens that the settings name, and of those in `ids`."""
    strings = {name: made.model.id_to_token(i) for name, i in ids.items() if i is not None}
    # the settings win
    strings |= {name: content(made.settings.get(name)) for name in made.settings if name.endswith("_token")}
    return {name: string for name, string in sorted(strings.items()) if string is not None}
