"""Hashes of dialogue prefixes: which records belong to one conversation, without keeping any text.

The records of one conversation (its turns rated one after the other, or one turn rated several times) begin with the
same user turn. They belong on the same side of a split, because a prompt often quotes what another record's response
was.

Hashes are 64-bit BLAKE2b, the same in every process and on every machine. Among a million of them, the chance that any
two collide is 3e-8.
"""

import hashlib

from rm.data.formats import TURN_MARKERS, Message, Text, preference_dialogues, split_turns


def turns(text: Text) -> list[Message]:
    """The messages of a text.

    A plain text is split at its markers (`rm.data.formats.TURN_MARKERS`); without any it is one assistant message.
    """
    if not isinstance(text, str):
        return text
    if any(marker.match(text) for marker in TURN_MARKERS):
        return split_turns(text)
    return [{"role": "assistant", "content": text}]


def beginnings(dialogue: list[Message]) -> list[int]:
    """A rolling hash: for each message, an int64 hash of the dialogue up to and including it.

    White space around a message's content does not count.
    """
    digest, hashes = hashlib.blake2b(digest_size=8), []
    for message in dialogue:
        content = message["content"].strip().encode()
        # The length makes it unambiguous where a message ends.
        digest.update(b"%s %d %s" % (message["role"].encode(), len(content), content))
        hashes.append(int.from_bytes(digest.copy().digest(), "little", signed=True))
    return hashes


def key(text: Text) -> int:
    """An int64 hash of the first user message, the same for all records of a conversation.

    Of a dialogue without a user message it is the hash of the whole dialogue.
    """
    dialogue = turns(text)
    for message in dialogue:
        if message["role"] == "user":
            return beginnings([message])[-1]
    return beginnings(dialogue)[-1]


def best_and_worst(record: dict) -> tuple[Text, Text]:
    """The best and the worst text of a preference record; of equally good ones the first and the last."""
    sample = preference_dialogues(record)
    if sample.grade is None:
        raise ValueError("has responses without 'ranks' or 'scores', so nothing says which of them is better")
    # `sorted` is stable: ties stay in the record's order.
    order = sorted(range(len(sample.texts)), key=lambda i: -sample.grade[i])
    return sample.texts[order[0]], sample.texts[order[-1]]
