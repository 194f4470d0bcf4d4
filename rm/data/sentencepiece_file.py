"""Reads a tokenizer.model of sentencepiece: its pieces, and what its trainer wrote about normalization.

The sentencepiece library checks the file. It does not give all of the settings, so these and the pieces are read here:
the file is a protobuf message, of which few fields matter.
https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rm.files import read_whole

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # types of pieces
UNIGRAM = 1  # model_type


@dataclass(frozen=True)
class SentencePieceModel:
    """What a tokenizer.model says. The id of a piece is its place in the list."""

    pieces: list[str]
    scores: list[float]
    types: list[int]
    is_unigram: bool
    byte_fallback: bool
    charsmap: bytes  # of the normalization of characters; empty for none
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    unk_id: int
    bos_id: int  # -1 for none, as eos_id
    eos_id: int

    def piece(self, index: int) -> str | None:
        return self.pieces[index] if 0 <= index < len(self.pieces) else None


def read(file: Path) -> SentencePieceModel:
    """Read a tokenizer.model.

    Raises:
        ValueError: the file is not of sentencepiece.
    """
    from sentencepiece import SentencePieceProcessor  # only here: few models have this file alone

    content = read_whole(file)
    pieces, scores, types = [], [], []
    trainer, normalizer = {}, {}
    try:
        SentencePieceProcessor(model_proto=content)
        for number, value in _fields(content):
            if number == 1:
                piece = dict(_fields(value))
                pieces.append(piece[1].decode())
                scores.append(struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0)
                types.append(piece.get(3, NORMAL))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
        if not pieces:
            raise ValueError("it has no pieces")
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"{file}: not readable as a model of sentencepiece ({error}); copy it again") from None
    return SentencePieceModel(
        pieces,
        scores,
        types,
        is_unigram=trainer.get(3, UNIGRAM) == UNIGRAM,
        byte_fallback=bool(trainer.get(35, 0)),
        charsmap=normalizer.get(2, b""),
        add_dummy_prefix=bool(normalizer.get(3, 1)),
        remove_extra_whitespaces=bool(normalizer.get(4, 1)),
        escape_whitespaces=bool(normalizer.get(5, 1)),
        unk_id=_signed(trainer.get(40, 0)),
        bos_id=_signed(trainer.get(41, 1)),
        eos_id=_signed(trainer.get(42, 2)),
    )


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a protobuf message: whole numbers as int, everything else as bytes."""
    position, end = 0, len(message)
    while position < end:
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == 0:
            value, position = _varint(message, position)
        elif kind in (1, 2, 5):
            if kind == 2:
                size, position = _varint(message, position)
            else:
                size = 8 if kind == 1 else 4
            value = message[position : position + size]
            position += size
            if position > end:
                raise ValueError("it ends in the middle of a field")
        else:
            raise ValueError("it is no protobuf message")
        yield tag >> 3, value


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """A whole number of seven bits per byte, the lowest first, and the position behind it."""
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7


def _signed(value: int) -> int:
    """A negative number is written as its 64 bits in two's complement."""
    return value - 2**64 if value >= 2**63 else value
