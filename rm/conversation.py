"""Which dialogues belong together: a dialogue is known by hashes of its beginnings, so that no text need be kept.

The records of one conversation (its turns rated one after the other, or one turn rated several times) begin with the
same human turn. They belong on one side of a split, since what one of them ends with another one may quote.

Hashes are 64-bit BLAKE2b, the same in every process and on every machine; among a million of them the chance of any
two meeting is 3e-8.
"""

import hashlib

from rm.formats import TURNS, Message, Text, split_turns


def turns(text: Text) -> list[Message]:
    """The messages of a text. A plain one is split at its marks (`rm.formats.TURNS`); without any it is one reply."""
    if not isinstance(text, str):
        return text
    marked = any(style.match(text) for style in TURNS)
    return split_turns(text) if marked else [{"role": "assistant", "content": text}]


def beginnings(dialogue: list[Message]) -> list[int]:
    """For each message, an int64 hash of the dialogue up to its end; white space around a message does not count."""
    digest, found = hashlib.blake2b(digest_size=8), []
    for message in dialogue:
        content = message["content"].strip().encode()
        digest.update(b"%s %d %s" % (message["role"].encode(), len(content), content))
        found.append(int.from_bytes(digest.copy().digest(), "little", signed=True))
    return found


def key(text: Text) -> int:
    """An int64 that two texts share if their first human turns are the same (without one: if the texts are)."""
    dialogue = turns(text)
    human = next(([message] for message in dialogue if message["role"] == "user"), dialogue)
    return beginnings(human)[-1]
