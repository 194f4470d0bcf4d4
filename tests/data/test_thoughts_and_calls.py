"""rm.data.chat: thoughts, calls and tools in templates that TRL ships: ids of transformers, and masks of TRL's own.

TRL has some templates twice: as published, and with {% generation %} marks for training. The masks that are derived
here for the first kind are compared with those that transformers takes from the second.
"""

import re
from pathlib import Path

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from rm.data import chat, messages
from rm.data.messages import Seen, assistant, user
from rm.data.reply_marks import RepliesNotFound
from rm.data.tokenizer import Tokenizer
from tests.text_fixtures import byte_level, write_json

transformers = pytest.importorskip("transformers")
SHIPPED = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"


def call(name, **arguments):
    return {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}}


RAIN = {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefghi", "content": "rain"}
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "c"}}, "required": ["city"]}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "description": "w", "parameters": CITY}}]
THOUGHT = {"reasoning_content": "two and two"}
CALLS = {"tool_calls": [call("get_weather", city="Oslo", n=2), call("add")]}
DIALOGUES = {
    "text": [user("hi"), assistant("hello there"), user("2+2?"), assistant("It is 4.")],
    "a thought": [user("hi"), assistant("hello there"), user("2+2?"), assistant("It is 4.") | THOUGHT],
    "thoughts": [user("hi"), assistant("hello") | {"thinking": "greet"}, user("2+2?"), assistant("It is 4.") | THOUGHT],
    "a call": [user("weather?"), assistant("") | {"tool_calls": CALLS["tool_calls"][:1]}, RAIN, assistant("It rains.")],
    "calls": [user("weather?"), assistant("Let me see.") | CALLS, RAIN, RAIN, assistant("It rains.")],
    "a call at the end": [user("weather?"), assistant("") | CALLS],
    "all": [user("weather?"), assistant("") | CALLS | THOUGHT, RAIN, assistant("It rains.") | {"reasoning": "so"}],
}
EOS = {"qwen": "<|im_end|>", "nemotron": "<|im_end|>", "glm4moe": "<|endoftext|>"}
SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|observation|>",
    "[gMASK]",
    "<turn|>",
    "<sop>",
]
# Template -> dialogues that are refused, as the template has no place for something in them
NAMES = {
    "qwen2_5": {"a thought", "thoughts", "all"},
    "qwen3": set(),
    "qwen3_5_think": set(),
    "nemotron_3_nano": set(),
    "glm4moe": set(),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function: name of a template -> (tokenizer, template, the tokenizer of transformers), made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = byte_level(tmp_path_factory.mktemp("model"))
            backend = Backend.from_file(str(folder / "tokenizer.json"))
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
            backend.save(str(folder / "tokenizer.json"))
            eos = next((token for family, token in EOS.items() if name.startswith(family)), "<|im_end|>")
            settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": eos}
            write_json(folder / "tokenizer_config.json", settings)
            (folder / "chat_template.jinja").write_text((SHIPPED / f"{name}.jinja").read_text())
            tokenizer = Tokenizer(folder)
            theirs = transformers.AutoTokenizer.from_pretrained(folder)
            made[name] = tokenizer, chat.choose_template(None, None, tokenizer), theirs
        return made[name]

    return get


@pytest.mark.parametrize("dialogue", DIALOGUES)
@pytest.mark.parametrize("name", NAMES)
def test_ids_and_masks_are_those_of_transformers(name, dialogue, models):
    tokenizer, template, theirs = models(name)
    messages, tools = DIALOGUES[dialogue], TOOLS if RAIN in DIALOGUES[dialogue] else None
    if dialogue in NAMES[name]:
        with pytest.raises(ValueError, match="has 'reasoning(_content)?', for which .* has no place"):
            template.render(messages, tools=tools)
        return
    rendered = template.render(messages, tools=tools)
    ((ids, spans),) = tokenizer.encode_parts([rendered.parts])
    assert ids == theirs.apply_chat_template(messages, tools=tools, return_dict=True)["input_ids"]
    assert ids == tokenizer.encode_parts([template.render(messages, False, tools).parts])[0][0]

    loss = [any(start < b and end > a for a, b in rendered.spans) for start, end in spans]
    marked = models(f"{name}_training")[2].apply_chat_template(
        messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
    )
    if marked["input_ids"] != ids:  # TRL's training templates may write a thought, or an empty one, in every reply
        assert name in ("qwen3", "qwen3_5_think", "glm4moe")
        return
    # TRL also trains on what opens a reply (a line break, a tag), and on the line break behind a turn.
    opening = re.compile(r"\A\s*(<think>\s*)?(</think>\s*)?|\s+\Z")
    ours, trl = runs(ids, loss, theirs), runs(ids, marked["assistant_masks"], theirs)
    assert [opening.sub("", text) for text in trl] == [opening.sub("", text) for text in ours]


def runs(ids, mask, tokenizer):
    """The text of each run of tokens in the mask."""
    texts, before = [], False
    for token, inside in zip(ids, mask, strict=True):
        if inside and not before:
            texts.append([])
        if inside:
            texts[-1].append(token)
        before = bool(inside)
    return [tokenizer.decode(text) for text in texts]


def test_arguments_in_json_are_objects_for_a_template_that_would_quote_them(models):
    quoted = [
        user("a"),
        assistant("") | {"tool_calls": [call("f") | {"function": {"name": "f", "arguments": '{"x": 1}'}}]},
    ]
    objects = [user("a"), assistant("") | {"tool_calls": [call("f", x=1)]}]
    for name in ("qwen2_5", "qwen3"):  # the latter writes a string as it is
        _, template, theirs = models(name)
        assert template.render(quoted) == template.render(objects), name
        ids = theirs.apply_chat_template(objects, return_dict=True)["input_ids"]
        assert ids == models(name)[0].encode_parts([template.render(quoted).parts])[0][0]


@pytest.mark.parametrize(
    "name, dialogue, what",
    [
        (
            "qwen2_5",
            [{"role": "developer", "content": "Be brief."}, user("hi"), assistant("yes")],
            "message of developer",
        ),
        ("qwen3", [user("hi"), {"role": "function", "content": "Be brief."}, assistant("yes")], "message of function"),
        (
            "gemma4_v5",
            [user("hi"), assistant("so"), RAIN | {"content": "Be brief."}, assistant("yes")],
            "message of tool",
        ),
        ("llama3_1", [user("hi"), assistant("Be brief.") | {"tool_calls": [call("f")]}], "text beside a call"),
        (
            "gptoss",
            [user("hi"), assistant("") | {"tool_calls": [call("f"), call("Be brief.")]}],
            "2 calls in one message",
        ),
    ],
)
def test_a_message_that_a_template_does_not_write_is_refused(name, dialogue, what, models):
    _, template, theirs = models(name)
    assert "Be brief." not in theirs.apply_chat_template(dialogue, tokenize=False)
    with pytest.raises(ValueError, match=f"has .*{what}.*, for which the chat template .* has no place"):
        template.render(dialogue, find_replies=False)


@pytest.mark.parametrize(
    "extra, key",
    [
        ({"tool_calls": CALLS["tool_calls"]}, "tool_calls"),
        ({"function_call": {"name": "f", "arguments": "{}"}}, "function_call"),
        (THOUGHT, "reasoning_content"),
    ],
)
def test_what_a_template_has_no_place_for_is_refused_by_name(extra, key, tmp_path):
    tokenizer = Tokenizer(byte_level(tmp_path))
    for find_replies in (True, False):
        for template in (chat.choose_template(None, "hh", tokenizer), plain_template(tokenizer)):
            with pytest.raises(ValueError, match=f"has '{key}', for which .* has no place"):
                template.render([user("a"), assistant("b") | extra], find_replies)
    with pytest.raises(ValueError, match="has 'tools', for which"):
        plain_template(tokenizer).render([user("a"), assistant("b")], tools=TOOLS)


@pytest.mark.parametrize("content, advice", [("b", "with --ignore_keys tool_calls"), ("", "leave such records out")])
def test_a_call_that_is_all_of_a_reply_is_not_to_be_ignored(content, advice, tmp_path):
    reply = assistant(content) | {"tool_calls": CALLS["tool_calls"]}
    with pytest.raises(ValueError, match=advice):
        plain_template(Tokenizer(byte_level(tmp_path))).render([user("a"), reply])
    seen = Seen(ignore=frozenset(["tool_calls"]))
    with pytest.raises(ValueError, match="'m 1' is a call without content, of which --ignore_keys tool_calls leaves"):
        messages.dialogue([reply | {"content": None}], "m", seen)
    assert messages.dialogue([reply | {"content": "b"}], "m", seen) == [assistant("b")]


def test_variables_of_a_template_are_set_or_refused(tmp_path):
    tokenizer = Tokenizer(byte_level(tmp_path))
    template = plain_template(tokenizer, "{{ mood }}")
    messages = [user("a"), assistant("b")]
    assert template.render(messages, variables={"mood": "gay"}).parts == ["gay|a|b"]
    assert template.render(messages, variables={"unused": False, "empty": ""}).parts == ["|a|b"]
    for variables in ({"other": "text"}, {"messages": []}, {"tools": True}):
        with pytest.raises(ValueError, match="in 'chat_template_kwargs', for which"):
            template.render(messages, variables=variables)


def test_special_tokens_that_a_user_typed_stay_characters_everywhere(models):
    tokenizer, template, _ = models("qwen3")
    typed = "<|im_end|>"
    messages = [
        user("a"),
        assistant("") | {"reasoning_content": typed, "tool_calls": [call(typed, **{typed: [typed]})]},
    ]
    rendered = template.render(messages, tools=[{"type": "function", "function": {"name": "f", "description": typed}}])
    assert rendered.typed_special
    text = "".join(part for part in rendered.parts if isinstance(part, str))
    assert text.count(typed) == 5
    assert rendered.parts.count(tokenizer.special[typed]) == 3  # of the system message and two turns


def test_a_text_is_never_changed_where_a_call_and_the_next_reply_are_one_turn(models):
    tokenizer, *_ = models("qwen3")
    template = chat.ChatTemplate((SHIPPED / "gemma4.jinja").read_text(), "Gemma 4's", tokenizer)
    written = template.render(DIALOGUES["a call"], find_replies=False).parts
    assert sum("It rains." in part for part in written if isinstance(part, str)) == 1
    with pytest.raises(RepliesNotFound, match="Gemma 4's writes reply 1 and reply 2 as one"):
        template.render(DIALOGUES["a call"])


def test_replies_that_cannot_be_found_are_named(tmp_path):
    tokenizer = Tokenizer(byte_level(tmp_path))
    template = plain_template(tokenizer, "{% for m in messages %}{{ m.reasoning_content }}{% endfor %}")
    initials = chat.ChatTemplate("{% for m in messages %}{{ m.content[0] }}{% endfor %}", "it", tokenizer)
    with pytest.raises(RepliesNotFound, match="rewrites replies"):
        initials.render([user("a"), assistant("bc")])
    assert initials.render([user("a"), assistant("bc")], find_replies=False).parts == ["ab"]
    assert template.render([user("a"), assistant("b") | THOUGHT]).parts == ["two and two|a|b"]


def plain_template(tokenizer, before=""):
    source = before + "{% for m in messages %}|{{ m.content }}{% endfor %}"
    return chat.ChatTemplate(source, "the template", tokenizer)
