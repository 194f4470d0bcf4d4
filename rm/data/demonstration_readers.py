"""Reads demonstrations: functions from the values of a record to a sample of one text for SFT."""

from dataclasses import replace

from rm.data import messages
from rm.data.fields import Fields, as_messages, join, with_system
from rm.data.key_names import DIALOGUES, PROMPTS, REPLIES
from rm.data.messages import strings_in, user
from rm.data.sample import Bare, Sample


def conversation(fields: Fields) -> Sample:
    key = fields.first_of(DIALOGUES)
    if key is None:
        raise ValueError(f"{' and '.join(map(repr, fields.record.keys() & set(DIALOGUES)))}: is empty")
    dialogue = messages.dialogue(fields.get(key), key, fields.seen)
    without_loss = frozenset(fields.seen.without_loss)
    chosen = fields.record.get("chosen")
    if chosen is not None and set(strings_in(chosen)) <= set(strings_in(dialogue)):
        fields.used.add("rejected")  # UltraFeedback has the chosen dialogue for SFT, beside its pairs
    length, system = len(dialogue), fields.system()
    dialogue = [*fields.history(), *dialogue]
    if system is not None:
        dialogue = with_system(system, dialogue, key)
    without_loss = frozenset(i + len(dialogue) - length for i in without_loss)
    return Sample(
        "", [dialogue], tools=fields.tools(), template_kwargs=fields.template_kwargs(), without_loss=without_loss
    )


def text_only(fields: Fields) -> Sample:
    return Sample("", [fields.string("text")])


def prompt_and_reply(fields: Fields) -> Sample:
    """A prompt under any name, with a system message and a history, and its reply. The loss is on the reply alone."""
    key = fields.first_of(REPLIES) or next(key for key in REPLIES if key in fields.record)
    _leave_out_rendering(fields, key)
    prompt = fields.prompt()
    if prompt is None:  # it has one, but that is empty
        prompt = fields.string(next(name for name in PROMPTS if name in fields.record))
    reply = messages.text(fields.get(key), key, fields.seen, objects=not isinstance(prompt, str))
    masked = frozenset(fields.seen.without_loss) if isinstance(reply, list) else frozenset()
    text = join(prompt, reply, key)
    without_loss = frozenset(i + len(text) - len(reply) for i in masked)
    if isinstance(text, list) and not fields.record.get("history"):  # earlier replies are part of the prompt
        of_prompt = (i for i, turn in enumerate(as_messages(prompt)) if turn["role"] == "assistant")
        without_loss = without_loss.union(of_prompt)
    return Sample("", [text], tools=fields.tools(), template_kwargs=fields.template_kwargs(), without_loss=without_loss)


def _leave_out_rendering(fields: Fields, key: str) -> None:
    """Pass over a `prompt` that has all of the record in it, also its reply, beside an instruction."""
    prompt, reply = fields.record.get(PROMPTS[0]), fields.record[key]
    if isinstance(prompt, str) and isinstance(reply, str) and fields.first_of(PROMPTS[1:]) is not None:
        if reply.strip() and prompt.rstrip().endswith(reply.rstrip()):
            fields.record = {name: value for name, value in fields.record.items() if name != PROMPTS[0]}


def text2text(fields: Fields) -> Sample:
    return replace(prompt_and_reply(fields), joined_by_default=True)


def inputs_and_targets(fields: Fields) -> Sample:
    return Sample("", [Bare(fields.string("inputs"), fields.string("targets"))])


def tool_answers(fields: Fields) -> Sample:
    """xlam: the reply is a list of calls."""
    call = {"from": "function_call", "value": fields.get("answers")}
    dialogue = [user(fields.string("query")), *messages.dialogue([call], "answers", fields.seen)]
    return Sample("", [dialogue], tools=fields.tools())
