"""Texts that a chat template has written already, as RL trainers post them, and the tokens that they stand for.

A trainer that generates from token ids posts a decoded string, with the strings of special tokens in it:
"<|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\nhello<|im_end|>". Here these strings are the tokens. In
messages they would be characters: who posts messages cannot forge a turn, and who posts written texts can.

Both ends of a dialogue are completed, so that its ids are those of the same messages. OpenRLHF's texts end where the
policy ended, and a template may write more behind that: Qwen's writes a line break, where the reward is read. verl cuts
BOS off.
"""

import re

from rm.data.chat import Rendered
from rm.data.messages import Text
from rm.data.text_encoder import TextEncoder

# What a template writes around messages is seen from samples.
_DIALOGUE = [{"role": "user", "content": "\ufffc"}, {"role": "assistant", "content": "a"}]
_SAMPLES = (_DIALOGUE, [{"role": "system", "content": "\ufffc"}, *_DIALOGUE])


class WrittenTexts:
    """Reads texts that the template of a reward model has written, or the same template of a policy."""

    def __init__(self, encoder: TextEncoder):
        tokenizer, template = encoder.tokenizer, encoder.template
        self.special = tokenizer.special
        # The longest first: an alternation takes the first alternative that matches.
        strings = [re.escape(string) for string in sorted(self.special, key=len, reverse=True)]
        self._special_pattern = re.compile(f"({'|'.join(strings) or '(?!)'})")  # "(?!)" matches nothing
        self._bos = tokenizer.named.get("bos_token") or ""
        self._eos, self._eos_id = tokenizer.string_of(tokenizer.eos_id), tokenizer.eos_id
        self._writes_bos = False  # at the beginning of a dialogue
        self._marks: set[int] = set()  # the special tokens that the template writes
        self._openings: list[str] = []  # what it writes before the first message
        self._ending: list[str | int] = []  # what it writes from the token that ends the last turn on
        if template is None or template.plain:
            return
        for messages in _SAMPLES:
            try:
                text = template.render(messages, find_replies=False)
            except ValueError:  # it has no place for a system message, or does not take this dialogue
                continue
            written = "".join(part if isinstance(part, str) else tokenizer.string_of(part) for part in text.parts)
            self._writes_bos = bool(self._bos) and written.startswith(self._bos)
            self._marks |= {part for part in text.parts if isinstance(part, int)}
            self._openings.append(written.removeprefix(self._bos).partition("\ufffc")[0])
            self._ending = _from_end(text)

    def read(self, text: str) -> Text | Rendered:
        """The text as an encoder takes it: a dialogue with its special tokens, or a plain string.

        A plain string gets BOS and EOS from the encoder, so those that it has are removed.
        """
        inner = text.removeprefix(self._bos).removesuffix(self._eos)
        begins_so = any(inner.startswith(opening) for opening in self._openings)
        if not inner or not (begins_so or self._marks.intersection(self._split(inner))):
            return inner
        parts = self._split(self._bos + text.removeprefix(self._bos) if self._writes_bos else text)
        if parts[-1] == self._eos_id and self._eos_id not in self._ending:
            parts.pop()  # which ended the policy's text, and not the turn
        parts = _completed(parts, self._ending)
        end = sum(map(_length, parts)) - sum(map(_length, self._ending))
        return Rendered(parts, [], plain=False, end=end if self._ending else None)

    def _split(self, text: str) -> list[str | int]:
        """The text cut at the strings of special tokens, which become ids."""
        return [self.special.get(piece, piece) for piece in self._special_pattern.split(text) if piece]


def of_ids(ids: list[int]) -> Rendered:
    """Token ids as they are: nothing is completed."""
    return Rendered(ids, [], plain=False)


def _from_end(text: Rendered) -> list[str | int]:
    """The parts of a text from the special token that ends its last turn on; none where no token ends it."""
    position = 0
    for i, part in enumerate(text.parts):
        if position == text.end:
            return list(text.parts[i:])
        position += _length(part)
    return []


def _completed(parts: list[str | int], ending: list[str | int]) -> list[str | int]:
    """The parts with what they lack of the ending."""
    for present in range(len(ending), 0, -1):
        if parts[-present:] == ending[:present]:
            return parts + ending[present:]
    return parts + ending


def _length(part: str | int) -> int:
    """Characters of a part as `Rendered` counts them: a special token is one."""
    return len(part) if isinstance(part, str) else 1
