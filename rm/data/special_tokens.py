"""Special tokens that a chat template writes and the tokenizer does not have: found, reported, and added.

A base model that is to learn a template such as ChatML has no token `<|im_start|>`: its tokenizer splits the string
into pieces. The model can learn that, too, but texts become longer, and users can type the string.

What looks like a special token in the text that a template writes for a few short dialogues:

- `<|name|>`, with any name without white space;
- `<name>`, unless the template has `</name>` as well: then it is markup, such as `<think>` and `</think>`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rm.config import SettingsGroup, setting
from rm.data.chat import ChatTemplate, choose_template
from rm.data.dataset import TextSettings
from rm.data.tokenizer import Tokenizer
from rm.distributed import process_group as dist

AUTO = "auto"
# DeepSeek's templates have full-width bars. "<<SYS>>" of Llama 2 is text.
LOOKS_SPECIAL = re.compile(r"<[|｜][^<>\s]+?[|｜]>|(?<!<)</?[^<>\s/|]+>(?!>)")
_SYSTEM = {"role": "system", "content": "a"}
_TURN = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings(SettingsGroup):
    """Tokenizer"""

    add_special_tokens: tuple[str, ...] = setting(
        (),
        "special tokens to add to the tokenizer and the model; auto: those that the chat template writes and the "
        "tokenizer splits",
    )

    def check(self) -> None:
        for token in self.add_special_tokens:
            if token != token.strip():
                raise ValueError(f"--add_special_tokens {token!r}: begins or ends with white space; leave it out")


def tokenizer_for(folder: str | Path, settings: TokenizerSettings, text: TextSettings) -> Tokenizer:
    """The tokenizer of a training, with the special tokens that are to be added.

    Prints what is added, or a warning where the template's tokens are split and are not to be added.
    """
    tokenizer = Tokenizer(folder)
    template = choose_template(text.chat_template, text.dialogue_format, tokenizer)
    split = [] if template is None else split_tokens(template, tokenizer)
    wanted = settings.add_special_tokens
    if AUTO in wanted and template is None:
        raise ValueError(
            f"--add_special_tokens {AUTO}: {folder} has no chat template to look for tokens in; give --chat_template, "
            f"or name the tokens"
        )
    tokens = list(dict.fromkeys(t for token in wanted for t in (split if token == AUTO else [token])))
    if left := [token for token in split if token not in tokens]:
        dist.say(
            f"warning: {template.name} writes {_listed(left)}, which the tokenizer splits into pieces; "
            f"--add_special_tokens {AUTO} adds such strings to the tokenizer and to the model's embedding"
        )
    if not tokens:
        return tokenizer
    tokenizer = Tokenizer(folder, tokens)
    dist.say(f"special tokens added: {_listed(tokens)}, {len(tokenizer.new_ids)} of them new to the vocabulary")
    return tokenizer


def split_tokens(template: ChatTemplate, tokenizer: Tokenizer) -> list[str]:
    """The strings in a template's texts that look like special tokens and are none of the tokenizer's."""
    vocabulary, found = tokenizer.vocabulary, {}
    for messages in ([_SYSTEM, *_TURN, *_TURN], [*_TURN, *_TURN], _TURN):
        try:
            parts = template.render(messages, find_replies=False).parts
        except ValueError:  # the template does not accept such a dialogue, or is broken: the data will show it
            continue
        for part in parts:
            if isinstance(part, str):  # special tokens that the tokenizer has are ids
                found |= dict.fromkeys(LOOKS_SPECIAL.findall(part))
    return [token for token in found if token not in vocabulary and not _is_markup(token, template.source)]


def _is_markup(token: str, source: str) -> bool:
    if token[1] in "|｜":
        return False
    name = token.strip("</>")
    return f"<{name}>" in source and f"</{name}>" in source


def _listed(tokens: Sequence[str]) -> str:
    return ", ".join(tokens)
