"""rm.data: records that are near to a known schema, but not quite: what they say is used, or refused by name."""

import json

import pytest

from rm.data import dataset, records
from rm.data.encode import Task
from rm.data.key_names import carries_text, is_another, meaning
from rm.data.messages import assistant, user
from rm.data.schemas import PREFERENCE, SFT, Reader, demonstration, preference
from rm.data.tokenizer import Tokenizer
from tests import text_fixtures

VOTE = {"prompt": "Name two cities.", "response_a": "Rome and Oslo", "response_b": "no", "winner": "a"}
PAIR = {"prompt": "What is 2+2?", "chosen": "4, of course", "rejected": "5"}
QA = [user("What is 2+2?"), assistant("4")]


@pytest.mark.parametrize(
    "key, expected",
    [
        ("system prompt", "text"), ("SystemPrompt", "text"), ("sytem", "like text"), ("promt", "like text"),
        ("wieght", "fact"), ("Weight", "fact"), ("deepseek_reasoning", "like text"), ("prompt_id", "metadata"),
        ("chosen_model", "metadata"), ("source", "metadata"), ("instruction_type", "metadata"), ("labeler", None),
        ("prompt_1", "text"), ("system_a", "text"), ("model_b", "metadata"), ("turn_1", None), ("score_a", "fact"),
    ],
)  # fmt: skip
def test_a_key_is_known_in_any_spelling(key, expected):
    assert meaning(key) == expected


def test_a_key_is_one_more_of_those_that_were_read():
    assert is_another("response_c", {"response_a"}) and is_another("prompt2", {"prompt"})
    assert not is_another("score_a", {"response_a"}) and not is_another("turn", {"prompt"})


def test_texts_have_three_words_or_a_writing_without_blanks():
    assert carries_text("who is she") and carries_text({"a": ["二加二等于多少"]})
    assert not carries_text("open qa") and not carries_text([1, None, "gpt-4"])


LOST = {  # name -> (record, parts of the error)
    "a prompt that has the short reply in it": (
        {"user_prompt": "Which is it? A) Paris B) Rome", "chosen": "A", "rejected": "B"}, "'user_prompt'"),
    "a passage that has the reply in it": (
        {"passage": "Is it Yes or No?", "chosen": "Yes", "rejected": "No"}, "'passage'"),
    "a prompt in a writing without blanks": (
        {"问题": "二加二等于多少", "chosen": "四", "rejected": "五"}, "prompt=问题"),
    "a prompt of one word": ({"promt": "Hello", "chosen": "hi", "rejected": "no"}, "'promt'"),
    "turns": ({"turns": ["2+2?", "and 3+3?"], "chosen": "4", "rejected": "5"}, "prompt=turns"),
    "a prompt in an object": ({"query_info": {"text": "2+2?"}, "chosen": "4", "rejected": "5"}, "prompt=query_info"),
    "a prompt that is counted": ({"prompt_1": "2+2?", "chosen": "4", "rejected": "5"}, "'prompt_1'"),
    "a system message that is counted": (PAIR | {"system_1": "Be brief"}, "'system_1'"),
    "a prompt under the name of metadata": (
        {"source": "What is 2+2 here?", "chosen": "4", "rejected": "5"}, "prompt=source"),
    "a prompt that resembles one": ({"promt": 5, "chosen": "4", "rejected": "5"}, "prompt=promt"),
    "a verdict under another name": (
        {"prompt": "q", "response_a": "a", "response_b": "b", "better": "a"}, "winner=better"),
    "a verdict under chosen": ({"prompt": "q", "response_a": "a", "response_b": "b", "chosen": "a"}, "winner=chosen"),
    "a vote that is part of a word": (PAIR | {"winner": "course"}, "'winner'"),
    "two votes": (VOTE | {"preference": "b"}, "'preference'"),
    "a margin as a string": (VOTE | {"prompt": "2+2", "margin": "2"}, "'margin'"),
    "a third reply": (VOTE | {"response_c": "no"}, "'response_c'"),
    "a misspelled key": (PAIR | {"sytem": "Be brief"}, "'sytem'"),
    "an unknown key with text": (PAIR | {"background": "They are in class"}, "'background'"),
    "several": (PAIR | {"background": "They are in class", "wieght": 2}, "--ignore_keys background wieght"),
    "replies that are names of keys": (
        {"prompt": "A fruit", "response_a": "an apple", "response_b": "I will not", "chosen": "response_a",
         "rejected": "response_b"}, "another key"),
    "a dialogue that is not of the prompt": (
        PAIR | {"chosen": "\n\nHuman: Why?\n\nAssistant: 4"}, "lacks what 'prompt'"),
    "a word that begins as a tie": (VOTE | {"winner": "tier_b"}, "'winner' is 'tier_b'"),
    "no winner of three": (
        {"prompt": '["q"]', "response_a": '["a"]', "response_b": '["b"]', "winner_model_a": 0, "winner_model_b": 0,
         "winner_tie": 0}, "expected one 1"),
    "a turn that is not there": (
        {"conversation_a": QA, "conversation_b": QA, "winner": "model_a", "turn": 0}, "'turn' is 0"),
    "labels of SHP": ({"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 7}, "'labels' is 7"),
    "a thought in an answer": (
        {"prompt": "q", "answers": [{"answer": "a", "rank": 1, "reasoning_content": "I think"},
                                     {"answer": "b", "rank": 2}]},
        "'answers 1' has 'reasoning_content'"),
    "a pair of turns with a weight": (
        PAIR | {"prompt": [{"input": "2+2?", "output": "4", "weight": 0}, user("why?")]}, "'weight'"),
    "another role under from": (
        PAIR | {"chosen": [user("a") | {"from": "gpt"}, assistant("4")], "rejected": [assistant("5")]},
        "is a message of user, but has 'from' 'gpt'"),
    "a reply in the prompt's messages": (
        {"prompt": QA, "chosen": [assistant("4")], "rejected": [assistant("5")]}, "ends with the reply of 'chosen'"),
    "a reply in the prompt's text": (
        {"prompt": "\n\nHuman: 2+2?\n\nAssistant: 4", "chosen": " 4", "rejected": " 5"},
        "ends with the reply of 'chosen'"),
    "true as a label": (PAIR | {"label": True}, "write 1 for true"),
    "an index as a vote": (VOTE | {"winner": 1}, "may mean either"),
    "good and bad": ({"prompt": "q", "good": "a", "bad": "b"}, "--data_keys chosen=good rejected=bad"),
    "counted replies": (
        {"q": "a", "reply_0": "a", "reply_1": "b"}, "--data_keys prompt=KEY response_a=reply_0 response_b=reply_1"),
    "several thoughts": (
        PAIR | {"chosen": [assistant("4") | {"reasoning_content": "one", "thinking": "two"}],
                "rejected": [assistant("5")]}, "several thoughts"),
    "a value beside another content": (
        PAIR | {"chosen": [assistant("4") | {"value": "5"}], "rejected": [assistant("5")]}, "has 'value'"),
    "a misspelled key of a message": (
        PAIR | {"chosen": [assistant("4") | {"reasoningContent": "so"}], "rejected": [assistant("5")]},
        "has 'reasoningContent'"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOST)
def test_what_a_preference_would_lose_is_refused_by_name(name):
    record, part = LOST[name]
    with pytest.raises(ValueError) as error:
        preference(record)
    assert part in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "record, part",
    [
        ({"instruction": "Add", "output": "4", "context_messages": "Add 4 to each, always in base 3"}, "context_mess"),
        ({"instruction": "What is 2+2?", "output": "It is 0", "weight": "0"}, "'weight'"),
        ({"messages": QA, "conversations": [user("What is 2+2?"), assistant("another reply")]}, "'conversations'"),
        ({"messages": QA, "chosen": "It is 4, I think", "rejected": "no"}, "'chosen'"),
        ({"messages": [QA[0], {"from": "function_call", "value": '{"name": "f"}', "refusal": "no"}]}, "'refusal'"),
        ({"messages": [user([{"type": "text", "text": "a", "content": "b"}]), QA[1]]}, "'content'"),
        ({"prompt": "q", "completion": "a", "label": False}, "unpaired"),
    ],
)
def test_what_a_demonstration_would_lose_is_refused_by_name(record, part):
    with pytest.raises(ValueError) as error:
        demonstration(record)
    assert part in str(error.value)


def test_the_text_of_alpaca_says_what_the_record_says():
    record = {"instruction": "Add the numbers.", "input": "2\n2", "output": "4"}
    text = "Below is a task.\n\n### Instruction:\nAdd the numbers.\n\n### Input:\n2\n2\n\n### Response:\n4"
    assert demonstration(record | {"text": text}).texts == demonstration(record).texts
    with pytest.raises(ValueError, match="'text'"):
        demonstration(record | {"text": text.replace("4", "5")})


def test_a_prompt_that_is_all_of_the_record_is_passed_over():
    record = {"instruction": "Add the numbers.", "input": "2\n2", "output": "4"}
    whole = "Below is a task.\n\n### Instruction:\nAdd the numbers.\n\n### Input:\n2\n2\n\n### Output:\n4"
    assert demonstration(record | {"prompt": whole}).texts == demonstration(record).texts  # iamtarun/python_code_18k
    with pytest.raises(ValueError, match="'prompt'"):
        demonstration(record | {"prompt": "Say this of another task.\n4"})


def test_a_reply_of_json_is_what_was_said():
    """A string with one message in it is a message only where the prompt and the other reply are messages, too."""
    reply = json.dumps(assistant("hi"))
    assert demonstration({"prompt": "Say hi, as a message.", "response": reply}).texts[0].reply == reply
    pair = {"prompt": [user("Say hi, as a message.")], "chosen": reply, "rejected": "no"}
    assert preference(pair).texts[0][-1] == assistant(reply)
    assert preference(pair | {"rejected": json.dumps(assistant("no"))}).texts[0][-1] == assistant("hi")


def test_prompts_in_the_form_of_nemo_are_dialogues():
    prompt = "<extra_id_0>System\nBe brief.\n<extra_id_1>User\n2+2?\n<extra_id_1>Assistant\n"
    (text, _) = preference({"prompt": prompt, "chosen": "4", "rejected": "5"}).texts
    assert text == [{"role": "system", "content": "Be brief."}, user("2+2?"), assistant("4")]
    with pytest.raises(ValueError, match="a turn of 'Tool'"):
        preference({"prompt": prompt.replace("User", "Tool"), "chosen": "4", "rejected": "5"})


@pytest.mark.parametrize("name, count", [("data.jsonl", 1), ("data.json", 2)])
def test_lists_alone_in_a_file_of_json_lines_are_one_record(name, count, tmp_path):
    (tmp_path / name).write_text('{"chosen": ["\\n\\nHuman: a\\n\\nAssistant: b", "c"], "rejected": ["d", "e"]}')
    assert len(list(records.read_records(tmp_path / name))) == count


def test_a_table_may_be_separated_by_semicolons(tmp_path):
    (tmp_path / "data.csv").write_text('prompt;chosen;rejected\n2, or 3?;"2; yes";no\n')
    expected = {"prompt": "2, or 3?", "chosen": "2; yes", "rejected": "no"}
    assert [record for _, record in records.read_records(tmp_path / "data.csv")] == [expected]


def test_messages_of_a_completion_may_lack_loss():
    completion = [assistant("first") | {"weight": 0}, user("and?"), assistant("second")]
    assert demonstration({"prompt": [user("q")], "completion": completion}).without_loss == {1}


def test_history_stands_before_messages():
    sample = demonstration({"messages": QA, "history": [["hi", "hello"]]})
    assert sample.texts == [[user("hi"), assistant("hello"), *QA]]


def test_a_null_in_a_message_is_an_absent_key():
    parquet = [{"role": None, "from": "human", "content": None, "value": "What is 2+2?"}, assistant("4")]
    assert demonstration({"messages": parquet}).texts == [QA]


def test_the_grades_of_one_record_have_one_scale():
    entries = [
        {"response": "good", "fine-grained_score": 4.75, "overall_score": 9.0},
        {"response": "poor", "fine-grained_score": None, "overall_score": 6.0},
    ]
    assert preference({"instruction": "q", "completions": entries}).grade == [9.0, 6.0]


@pytest.mark.parametrize("prompt", ["", None])
def test_a_prompt_that_is_there_and_empty_is_known(prompt):
    assert preference(PAIR | {"prompt": prompt}).lacks_prompt
    assert not preference(PAIR).lacks_prompt
    of_texts = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    assert not preference(of_texts | {"prompt": prompt}).lacks_prompt


def test_metadata_are_passed_over_and_listed():
    reader = Reader(PREFERENCE)
    reader.sample(PAIR | {"source": "a page of the web", "rationale": "the second is wrong", "field": "physics"})
    assert reader.passed_over == {"source", "rationale", "field"}
    with pytest.raises(ValueError):
        Reader(SFT).sample({"prompt": "a", "completion": "b", "paragraph": "a text of some words"})


@pytest.mark.parametrize(
    "text, part",
    [
        ('{"prompt": "2+2?", "prompt": "3+3?", "chosen": "6", "rejected": "4"}', "a key twice"),
        ('{"system": "Be brief.", "data": [{"text": "a"}]}', "has 'system' beside 'data'"),
        ('{"type": "text_only", "tools": ["f"], "instances": [{"text": "a"}]}', "has 'tools' beside 'instances'"),
    ],
)
def test_what_a_file_would_lose_is_refused(text, part, tmp_path):
    file = tmp_path / "data.json"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        list(records.read_records(file))
    assert part in str(error.value) and str(file) in str(error.value)
    file.write_text(json.dumps({"type": "text_only", "description": "of two words", "instances": [{"text": "a"}]}))
    assert [record for _, record in records.read_records(file)] == [{"text": "a"}]


@pytest.fixture
def read(tmp_path):
    """A function that reads records as pairs, for a model without a chat template."""
    text_fixtures.metaspace(tmp_path / "model")
    tokenizer = Tokenizer(tmp_path / "model")

    def read(*given: dict):
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in given))
        return dataset.read(Task.PREFERENCE, [tmp_path / "data.jsonl"], tokenizer, 512)

    return read


def test_a_pair_with_an_empty_prompt_is_dropped_and_counted(read):
    examples, report = read(PAIR, PAIR | {"prompt": None}, PAIR | {"prompt": ""})
    assert len(examples) == 1 and report.dropped == {"with an empty prompt": 2}


def test_tools_of_plain_texts_are_refused(read):
    with pytest.raises(ValueError, match="line 1: has tools, or variables for a chat template"):
        read(PAIR | {"tools": [{"name": "f", "parameters": {}}]})


def test_the_remedy_for_data_of_which_nothing_is_left_is_of_its_kind(read):
    with pytest.raises(ValueError, match="no example is left: give other records"):
        read({"response_a": "4", "response_b": "5", "prompt": "2+2?"})
