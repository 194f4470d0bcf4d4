"""Which dialogues belong together: a dialogue is known by hashes of its beginnings, so that no text need be kept.

The records of one conversation (its turns rated one after the other, or one turn rated several times) begin with the
same human turn. They belong on one side of a split, since what one of them ends with another one may quote.

Hashes are 64-bit BLAKE2b, the same in every process and on every machine; among a million of them the chance of any
two meeting is 3e-8.
"""

import hashlib

from rm.data.formats import TURNS, Message, Text, preference, split_turns


def turns(text: Text) -> list[Message]:
    """The messages of a text. A plain one is split at its marks (`rm.data.formats.TURNS`); without any it is one
    reply.
    """
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


def best_and_worst(record: dict) -> tuple[Text, Text]:
    """The two texts of a preference record that are compared here; of equally good ones the first and the last."""
    sample = preference(record, as_messages="prompt" in record)  # a prompt without marks is a human turn
    if sample.grade is None:
        raise ValueError("has responses without 'ranks' or 'scores': there is no preference in it")
    order = sorted(range(len(sample.texts)), key=lambda i: -sample.grade[i])
    return sample.texts[order[0]], sample.texts[order[-1]]
