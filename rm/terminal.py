"""Printing text that others wrote: names of files and tensors, keys and values of records, templates.

A terminal obeys control characters, a browser those that turn the writing round, and a line break forges a line of the
log. So what leaves this package as a line goes through `printable`, and shows them as Python writes them: \\x1b, \\n.
"""

import os
import re
import sys

# Control and format characters, which move the cursor, turn the writing round or are invisible, but not the joiners
# (U+200C, U+200D) that are part of words and emoji; noncharacters.
CONTROL = (
    "\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufdd0-\ufdef"
    "\U000e0000-\U000e007f"
)
# https://user:password@host, where a password may have an @ of its own; a path of it has lost one slash.
_PASSWORD = re.compile(r"(?<=[a-z]:/)(/?)[^/\s]+(?=@)", re.IGNORECASE)
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")  # of the hub
# Variables of the environment.
_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN", "WANDB_API_KEY", "RM_SERVE_TOKEN")
_UNPRINTABLE = re.compile(f"[{CONTROL}\ud800-\udfff]")  # halves of surrogate pairs cannot be encoded


def printable(text: str, keep: str = "") -> str:
    """A text without secrets in which every character is one that is shown, on one line.

    Args:
        keep: characters that stay as they are, such as line breaks.
    """
    return _UNPRINTABLE.sub(lambda m: m[0] if m[0] in keep else _escaped(m[0]), without_secrets(text))


def without_secrets(text: str) -> str:
    """A text in which tokens, of the hub or of the environment, and what stands before the host of a URL, are ***."""
    if ":/" in text:
        text = _PASSWORD.sub(r"\1***", text)
    if "hf_" in text:
        text = _TOKEN.sub("***", text)
    for name in _SECRETS:
        if len(os.environ.get(name, "")) >= 8:  # what is shorter is no token, and may be part of any word
            text = text.replace(os.environ[name], "***")
    return text


def without_secrets_in(value):
    """A JSON value whose texts are `without_secrets`."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {name: without_secrets_in(of) for name, of in value.items()}
    return [without_secrets_in(item) for item in value] if isinstance(value, list | tuple) else value


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def warn(text: str) -> None:
    """Print a line to stderr, from whichever process calls it."""
    print(printable(text), file=sys.stderr, flush=True)
