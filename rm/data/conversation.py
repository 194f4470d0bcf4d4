"""Hashes of dialogue prefixes: which records belong to one conversation, without keeping any text.

The records of one conversation (its turns rated one after the other, or one turn rated several times) begin with the
same user turn. They belong on the same side of a split, because a prompt often quotes what another record's response
was.

Hashes are 64-bit BLAKE2b, the same in every process and on every machine. Among a million of them, the chance that any
two collide is 3e-8.
"""

import hashlib
import json

from rm.data.messages import MESSAGE_KEYS, Message
from rm.data.sample import Bare, Sample, turns


def beginnings(dialogue: list[Message]) -> list[int]:
    """A rolling hash: for each message, an int64 hash of the dialogue up to and including it.

    White space around a message's content does not count.
    """
    digest, hashes = hashlib.blake2b(digest_size=8), []
    for message in dialogue:
        content = message["content"].strip().encode()
        # The length makes it unambiguous where a message ends.
        digest.update(b"%s %d %s" % (message["role"].encode(), len(content), content))
        if len(message) > 2:  # a thought, a call
            more = {key: message[key] for key in MESSAGE_KEYS if key in message}
            digest.update(json.dumps(more, sort_keys=True).encode())
        hashes.append(int.from_bytes(digest.copy().digest(), "little", signed=True))
    return hashes


def key(dialogue: list[Message]) -> int:
    """An int64 hash of the first user message, the same for all records of a conversation.

    Of a dialogue without a user message it is the hash of the whole dialogue.
    """
    for message in dialogue:
        if message["role"] == "user":
            return beginnings([message])[-1]
    return beginnings(dialogue)[-1]


def key_of(sample: Sample) -> int:
    """The key of a sample's conversation; 0 where it has no text, as UltraFeedback's prompts without completions."""
    if not sample.texts:
        return 0
    text = sample.texts[0]
    return key(text.dialogue() if isinstance(text, Bare) else turns(text))


def prompt_key_of(sample: Sample) -> int | None:
    """An int64 hash of a sample's prompt: the turns that all of its texts begin with, and the tools.

    None where nothing is known to be a prompt, as in plain texts without marked turns.
    """
    texts = [beginnings(dialogue)[:-1] for dialogue in sample.dialogues()]
    shared = [hashes[0] for hashes in zip(*texts, strict=False) if len(set(hashes)) == 1]
    if not shared:
        return None
    said_beside = json.dumps([shared[-1], sample.tools, sample.template_kwargs], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(said_beside.encode(), digest_size=8).digest(), "little", signed=True)
