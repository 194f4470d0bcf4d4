"""rm.data.schemas: the same pair in every schema gives the same dialogues, and errors say what does not fit."""

import pytest

from rm.data.messages import split_turns
from rm.data.sample import Bare, Sample
from rm.data.schemas import demonstration, preference


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "be brief"}
A, B, C = ([user("hi"), assistant("hello"), user("2+2?"), assistant(answer)] for answer in ("4", "5", "six"))
HEAD = A[:3]
ANTHROPIC = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: 2+2?\n\nAssistant:"
LMFLOW = ANTHROPIC.replace("\n\n", "###")

SAME_PAIR = {
    "positive/negative": {"positive": LMFLOW + " 4", "negative": LMFLOW + " 5"},
    "chosen/rejected": {"chosen": ANTHROPIC + " 4", "rejected": ANTHROPIC + " 5"},
    "chosen/rejected of messages": {"chosen": A, "rejected": B},
    "chosen/rejected of content parts": {
        "chosen": [*HEAD, {"role": "assistant", "content": [{"type": "text", "text": "4"}]}],
        "rejected": B,
    },
    "LMFlow's paired_conversation": {
        "chosen": {"conversation_id": 0, "system": "", "tools": [], "messages": A},
        "rejected": {"messages": B},
    },
    "prompt/chosen/rejected": {"prompt": ANTHROPIC, "chosen": " 4", "rejected": " 5", "response": " 4"},
    "prompt of messages, answers of strings": {"prompt": HEAD, "chosen": "4", "rejected": "5"},
    "prompt and answers of messages": {"prompt": HEAD, "chosen": [assistant("4")], "rejected": assistant("5")},
    "answers that hold the prompt": {"prompt": HEAD, "chosen": A, "rejected": B},
    "answers that hold the prompt, a string": {"prompt": "hi", "chosen": A, "rejected": B},
    "two responses with ranks": {"prompt": LMFLOW, "responses": [" 4", " 5"], "ranks": [1, 2]},
}


@pytest.mark.parametrize("case", SAME_PAIR)
def test_a_pair_is_the_same_two_dialogues_in_every_format(case):
    sample = preference(SAME_PAIR[case])
    assert sample.written(bare_as_dialogue=True, as_messages=True) == [A, B]
    assert sample.grade[0] > sample.grade[1] and (sample.label, sample.margin) == (1, 0)


@pytest.mark.parametrize("case", SAME_PAIR)
def test_strings_stay_strings_without_as_messages(case):
    record = SAME_PAIR[case]
    texts = preference(record).written()
    if all(isinstance(value, str) for value in record.values()) or "ranks" in record:
        opening = LMFLOW if texts[0].startswith("###") else ANTHROPIC
        assert texts == [opening + " 4", opening + " 5"]
    else:
        assert texts == [A, B]


def test_a_bare_prompt_is_a_user_message_or_is_joined_with_the_response():
    record = {"prompt": "2+2?", "chosen": " 4", "rejected": "5"}
    assert preference(record).written() == ["2+2? 4", "2+2?5"]
    dialogues = [[user("2+2?"), assistant(" 4")], [user("2+2?"), assistant("5")]]
    assert preference(record).written(bare_as_dialogue=True) == preference(record).dialogues() == dialogues


@pytest.mark.parametrize("responses", [["4", "5", "six"], [[assistant("4")], B, assistant("six")]])
def test_a_ranking_keeps_its_order_and_its_grades_are_higher_for_better(responses):
    record = {"prompt": HEAD, "responses": responses}
    assert preference(record).dialogues() == [A, B, C] and preference(record).grade is None
    assert preference(record | {"ranks": [1, 2, 2]}).grade == [-1, -2, -2]
    assert preference(record | {"scores": [0.5, -1, 7]}).grade == [0.5, -1, 7]
    assert preference(record | {"scores": [0.5, -1, 7]}).schema == "prompt/responses/scores"


def test_label_and_margin_are_read_and_null_means_absent():
    pair = SAME_PAIR["chosen/rejected"]
    assert preference(pair | {"label": 0.25, "margin": -2}) == Sample(
        "chosen/rejected", [pair["chosen"], pair["rejected"]], [1.0, 0.0], label=0.25, margin=-2.0
    )
    assert preference(pair | {"label": None, "margin": None}) == preference(pair)


def test_demonstrations_are_read_in_every_schema():
    assert demonstration({"text": "a", "id": 3}) == Sample("text_only", ["a"], id=3)
    assert demonstration({"text": "###Human: a"}).written() == ["###Human: a"]
    pair = {"input": "2+2?", "output": "4"}
    assert demonstration(pair) == Sample("text2text", [Bare("2+2?", "4")], joined_by_default=True)
    assert demonstration(pair).written(bare_as_dialogue=True) == [[user("2+2?"), assistant("4")]]
    openai = {"messages": [SYSTEM, *A]}
    lmflow = {"conversation_id": "x", "system": "be brief", "tools": [], "messages": A}
    assert demonstration(openai) == demonstration(lmflow) == Sample("conversation", [[SYSTEM, *A]])


def test_responses_may_add_a_system_message_to_a_string_prompt():
    record = {"prompt": "hi", "chosen": [SYSTEM, *A], "rejected": [SYSTEM, *B]}
    assert preference(record).texts == [[SYSTEM, *A], [SYSTEM, *B]]
    with pytest.raises(ValueError, match="other system messages on its two sides"):
        preference(record | {"rejected": B})


@pytest.mark.parametrize(
    "text, turns",
    [
        ("\n\nHuman: a\n\nAssistant:", [user("a"), assistant("")]),
        ("\n\nHuman:a\n\nAssistant:  b ", [user("a"), assistant(" b ")]),
        ("Human: ###Human: a\n\nHumans: b", [user("###Human: a\n\nHumans: b")]),
        ("###Human: a\n\nHuman: b###Assistant: c", [user("a\n\nHuman: b"), assistant("c")]),
        ("###Assistant: a###Human: b", [assistant("a"), user("b")]),
    ],
)
def test_turns_are_split_at_the_markers_that_a_text_begins_with(text, turns):
    assert split_turns(text) == turns


BAD_PREFERENCES = {
    "a text": ({"text": "a"}, ["has the keys 'text': it is a record of text_only, for train_sft.py"]),
    "no keys": ({}, ["has the keys none with a value, which are no known schema"]),
    "one side": (
        {"chosen": "a", "prompt": "b"},
        [
            "has the keys 'chosen', 'prompt', which are no known schema",
            "--data_keys prompt=KEY chosen=KEY rejected=KEY",
        ],
    ),
    "many keys": ({str(i): i for i in range(99)}, ["'11' and 87 more"]),
    "two formats": (
        {"chosen": "a", "rejected": "b", "positive": "a", "negative": "c"},
        ["has 'negative' beside chosen/rejected, which does not use it", "--ignore_keys negative"],
    ),
    "ranks and scores": (
        {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2], "scores": [2, 1]},
        ["has 'scores' beside prompt/responses/ranks"],
    ),
    "a number": ({"chosen": "a", "rejected": 0}, ["'rejected' is 0; expected a string or a list"]),
    "no messages": ({"chosen": "a", "rejected": []}, ["'rejected' is []; expected a list of messages"]),
    "surrogate": ({"chosen": "a", "rejected": "\udc00"}, ["'rejected' has half of a surrogate pair"]),
    "surrogate in a message": (
        {"chosen": [user("\ud83d")], "rejected": "b"},
        ["'chosen 1' has half of a surrogate pair"],
    ),
    "another prompt": (
        {"prompt": "oh", "chosen": A, "rejected": B},
        ["'chosen' is a whole dialogue, but lacks what 'prompt' says; if it is complete: --ignore_keys prompt"],
    ),
    "ranks that do not match": (
        {"prompt": "a", "responses": ["b", "c"], "ranks": [1]},
        ["'ranks' is [1]; expected one number for each of 2 responses"],
    ),
    "a rank that is no number": (
        {"prompt": "a", "responses": ["b", "c"], "ranks": [1, True]},
        ["'ranks' is true; expected a number"],
    ),
    "an infinite score": (
        {"prompt": "a", "responses": ["b", "c"], "scores": [1, float("nan")]},
        ["'scores' has nan"],
    ),
    "responses of nothing": ({"prompt": "a", "responses": [], "ranks": []}, ["'responses' is []; expected a list"]),
    "a label beyond 1": ({"chosen": "a", "rejected": "b", "label": 1.5}, ["'label' is 1.5; expected the probability"]),
    "a label that is a word": ({"chosen": "a", "rejected": "b", "label": "x"}, ["'label' has 'x'; expected finite"]),
    "a huge margin": ({"chosen": "a", "rejected": "b", "margin": 10**400}, ["'margin' has 10000"]),
    "a label of a ranking": (
        {"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2], "label": 1},
        ["has 'label' beside prompt/responses/ranks"],
    ),
}


@pytest.mark.parametrize("case", BAD_PREFERENCES)
def test_a_record_that_is_no_preference_is_an_error_with_its_reason(case):
    record, parts = BAD_PREFERENCES[case]
    assert_one_line_error(lambda: preference(record), parts)


BAD_DEMONSTRATIONS = {
    "a pair": (SAME_PAIR["positive/negative"], ["a record of positive/negative, for train_rm.py"]),
    "two schemas": ({"text": "a", "messages": A}, ["has 'text' beside conversation, which does not use it"]),
    "null": ({"text": None}, ["has the keys none with a value"]),
    "messages of strings": ({"messages": ["hi"]}, ["'messages 1' is 'hi'; expected an object with 'role'"]),
    "an unknown role": ({"messages": [{"from": "Bob", "value": "hi"}]}, ["'messages 1' has the role 'Bob'; expected"]),
    "no content": ({"messages": [{"role": "user", "content": None}]}, ["'messages 1' is None; expected a string"]),
    "an image": ({"messages": [user([{"type": "image_url"}])]}, ["'messages 1' has a part of type 'image_url'"]),
    "tools": ({"messages": A, "tools": "x"}, ["'tools' is 'x'; expected a list of tools"]),
    "tool calls": ({"messages": [assistant("") | {"tool_calls": [{}]}]}, ["'messages 1' has the tool call {}"]),
    "two systems": ({"messages": [SYSTEM, *A], "system": "b"}, ["has a system message, but 'messages' begins with"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_DEMONSTRATIONS)
def test_a_record_that_is_no_demonstration_is_an_error_with_its_reason(case):
    record, parts = BAD_DEMONSTRATIONS[case]
    assert_one_line_error(lambda: demonstration(record), parts)


def test_a_text_without_turn_markers_cannot_be_split():
    record = {"chosen": "a" * 999, "rejected": "b"}
    assert_one_line_error(
        lambda: preference(record).written(as_messages=True), ["is no dialogue; for a chat template a text"]
    )
    assert_one_line_error(lambda: split_turns("so: \n\nHuman: a"), ["is no dialogue"])


def assert_one_line_error(run, parts):
    with pytest.raises(ValueError) as error:
        run()
    message = str(error.value)
    assert all(part in message for part in parts) and "\n" not in message and len(message) < 500, message
