"""What the keys of a record that its schema does not read mean for the sample: nothing, or something would be lost."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from rm.data import key_names, messages
from rm.data.fields import is_empty
from rm.data.key_names import DIALOGUES, PROMPTS
from rm.data.messages import strings_in
from rm.data.sample import Sample

SPECIAL_AT_END = re.compile(r"(<[^<>\s]*>|\[/?[A-Z]+\])\Z")  # "<|im_end|>", "</s>", "[/INST]"
VERDICT = re.compile("better|best|prefer|winner|chosen|choice|select|vote|verdict|rating|rank|score|overall")


class UnreadKeys(NamedTuple):
    """The keys of a record that its schema does not read."""

    passed_over: set[str]
    lost: list[str]  # they carry something that the sample lacks
    perhaps_prompts: list[str]  # keys with a text, of a record that seems to have no prompt
    perhaps_verdicts: list[str]  # unknown keys that may say which reply is better, where nothing else does


def sort_out(record: dict, unread: set[str], used: Iterable[str], sample: Sample, is_preference: bool) -> UnreadKeys:
    """Tell the unread keys of a record that may be passed over from those that may not.

    Args:
        used: the keys that were read.
    """
    has_question = not is_preference or any(map(_has_question, sample.texts))
    is_unjudged = is_preference and sample.grade is None
    passed_over, lost, perhaps_prompts, perhaps_verdicts = set(), [], [], []
    for key in sorted(unread):
        value, means = record[key], key_names.meaning(key)
        if means in ("text", "fact", "like text") and is_empty(value):
            continue
        if means == "fact" or key_names.is_another(key, used):
            lost.append(key)
        elif means == "metadata" and (has_question or not key_names.carries_text(value)):
            passed_over.add(key)
        elif is_unjudged and VERDICT.search(key.lower()) and not key_names.carries_text(value):
            perhaps_verdicts.append(key)
        elif _is_said(key, value, sample):
            passed_over.add(key)
        elif means == "text":
            lost.append(key)
        elif not has_question and (means == "like text" or strings_in(value)):
            perhaps_prompts.append(key)
        elif key_names.is_lost(key, value):
            lost.append(key)
        else:
            passed_over.add(key)
    if lost and (known := key_names.of_data_set(record)):
        passed_over |= known & set(lost)
        lost = [key for key in lost if key not in known]
    return UnreadKeys(passed_over, lost, perhaps_prompts, perhaps_verdicts)


def lacks_prompt(record: dict, sample: Sample) -> bool:
    """Whether a record has the key of a prompt, as others of its file do, but nothing there."""
    prompts = [record[key] for key in PROMPTS if key in record]
    return (
        bool(prompts)
        and all(value is None or is_empty(value) for value in prompts)
        and not any(map(_has_question, sample.texts))
    )


def _is_said(key: str, value, sample: Sample) -> bool:
    """Whether a value adds nothing to a sample's texts: it is part of one of them, or a rendering of one of them.

    Beside whole dialogues that are compared, another dialogue (such as the one that the replies were generated for) has
    to have no other prompt than they.
    """
    if isinstance(value, str):
        value = messages.messages_in(value) or value
    if key in DIALOGUES and isinstance(value, list) and not sample.is_bare and len(sample.texts) > 1:
        value = [turn for turn in value if isinstance(turn, dict) and not _is_reply(turn)]
    strings = strings_in(value)
    said = [strings_in(text) for text in sample.written(bare_as_dialogue=True)]
    if not strings:
        return False
    if all(any(s in part for text in said for part in text) for s in strings):
        return True
    return len(strings) == 1 and any(_renders(strings[0], *text) for text in said)


def _renders(rendering: str, *text: str) -> bool:
    """Whether a string is what some template makes of a prompt and a reply: their lines in order, the reply last.

    The reply has to begin behind a mark of some kind, so that "4" is not found in "What is 4".
    """
    *prompt, reply = text
    rendering = rendering.rstrip()
    for _ in range(3):  # special tokens behind the reply
        if found := SPECIAL_AT_END.search(rendering[-40:]):
            rendering = rendering[: -len(found[0])].rstrip()
    before = rendering.removesuffix(reply)
    if not prompt or before == rendering or not re.search(r"[\n>\]]\Z|: ?\Z", before):
        return False
    end = 0
    for line in (line.strip() for part in prompt for line in part.splitlines()):
        if (start := before.find(line, end)) < 0:
            return False
        end = start + len(line)
    return True


def _has_question(text) -> bool:
    """Whether a text is more than a reply."""
    if isinstance(text, str):
        return messages.turn_marker(text) is not None
    return not isinstance(text, list) or any(message["role"] == "user" for message in text)


def _is_reply(turn: dict) -> bool:
    role = messages.role_of(turn)
    return role is not None and messages.ROLES.get(role.lower()) == "assistant"
