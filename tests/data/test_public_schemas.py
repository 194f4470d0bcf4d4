"""rm.data.schemas: the records of public data sets say what their data sets mean, or are refused by name."""

import json

import pytest

from rm.data.key_names import FACTS, TEXTS
from rm.data.messages import assistant
from rm.data.reader import KeySettings, SampleReader
from rm.data.schemas import PREFERENCE, SCHEMAS, SFT, Reader, demonstration, preference
from tests.data.public_records import DEMONSTRATIONS, MORE_KEYS, PAIR, PREFERENCES, QA, TOOL, A, B, C, Q, dialogue


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_public_preference_says_what_its_data_set_means(name):
    record, schema, dialogues, grade = PREFERENCES[name]
    sample = preference(record)
    assert (sample.schema, sample.dialogues()) == (schema, dialogues)
    assert sample.signed_grade.tolist() == grade


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_a_public_demonstration_says_what_its_data_set_means(name):
    record, schema, text, without_loss = DEMONSTRATIONS[name]
    sample = demonstration(record)
    assert (sample.schema, sample.written(bare_as_dialogue=True)) == (schema, [text])
    assert sample.without_loss == set(without_loss)


@pytest.mark.parametrize("name", MORE_KEYS)
def test_what_else_a_data_set_has_is_no_error(name):
    record, *_ = PREFERENCES.get(name) or DEMONSTRATIONS[name]
    read = preference if name in PREFERENCES else demonstration
    assert read(record | MORE_KEYS[name]) == read(record)


def test_every_schema_is_tried():
    tried = {preference(record).schema for record, *_ in PREFERENCES.values()}
    tried |= {demonstration(record).schema for record, *_ in DEMONSTRATIONS.values()}
    for row in SCHEMAS:
        generic = row.name == "/".join(row.keys)  # one of many spellings of the same schema
        assert generic or row.name in tried, row.name


@pytest.mark.parametrize("name", [*PREFERENCES, *DEMONSTRATIONS])
def test_a_null_is_as_good_as_an_absent_key(name):
    record, *_ = PREFERENCES.get(name) or DEMONSTRATIONS[name]
    read = preference if name in PREFERENCES else demonstration
    nulls = dict.fromkeys((TEXTS | FACTS) - record.keys())
    assert read(nulls | record) == read(record)


@pytest.mark.parametrize("key", sorted(TEXTS | FACTS))
@pytest.mark.parametrize("name", ["TRL", "RewardBench 2", "HelpSteer3", "Arena 140k", "ranks"])
def test_a_key_with_meaning_is_used_or_refused_by_name(name, key):
    record, *_ = PREFERENCES[name]
    if key in record:
        return
    marked = "never said"
    try:
        sample = preference(record | {key: marked})
    except ValueError as error:
        # "context" where the other key has taken the place of HelpSteer3's prompt
        assert (key in str(error) or "'context'" in str(error)) and "\n" not in str(error)
    else:
        assert any(marked in message["content"] for text in sample.dialogues() for message in text)


def test_tools_and_variables_of_the_template_are_kept():
    record = {"prompt": Q, "chosen": A, "rejected": B, "tools": json.dumps([TOOL["function"]])}
    sample = preference(record | {"chat_template_kwargs": {"enable_thinking": False}})
    assert sample.tools == [TOOL] and sample.template_kwargs == {"enable_thinking": False}
    assert demonstration({"messages": QA, "functions": [TOOL["function"]]}).tools == [TOOL]
    assert demonstration({"messages": QA, "enable_thinking": False}).template_kwargs == {"enable_thinking": False}


def test_sides_with_other_tools_are_refused():
    sides = {"chosen": {"messages": QA, "tools": [TOOL]}, "rejected": {"messages": dialogue(Q, B)}}
    with pytest.raises(ValueError, match="has other tools on its two sides"):
        preference(sides)


def test_consecutive_replies_of_one_prompt_are_one_sample(tmp_path):
    def row(prompt, response, grade):
        return {"prompt": prompt, "response": response, "helpfulness": grade, "verbosity": 1}

    rows = [row(Q, A, 4), row(Q, B, 1), row("hi", "yo", 2), row("hi", "hm", 2), row("hi", "ho", 3), row(Q, C, 0)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, PREFERENCES["TRL"][0]]))
    reader = SampleReader(PREFERENCE)
    found = list(reader.read([file, file]))
    assert [(f.number, f.file, f.where.split()[-1]) for f in found[:5]] == [
        (0, 0, "1"), (2, 0, "3"), (5, 0, "6"), (6, 0, "7"), (7, 1, "1"),
    ]  # fmt: skip
    assert [len(f.sample.texts) for f in found] == [2, 3, 1, 2] * 2
    assert [f.sample.grade for f in found[:3]] == [[4, 1], [2, 2, 3], [0]]
    assert reader.schemas == {"HelpSteer2": 6, "prompt/chosen/rejected": 2} and reader.passed_over == []
    assert [f.number for f in SampleReader(PREFERENCE).read([file], {2, 6})] == [2, 6]
    (pair,) = SampleReader(PREFERENCE).read([file], {2})
    assert pair.sample == found[1].sample


def test_keys_are_renamed_and_passed_over():
    record = {"text_of_user": Q, "good": A, "bad": B, "label": 0.0, "history": [["a", "b"]], "n": 1}
    keys = KeySettings(
        data_keys=("prompt=text_of_user", "chosen=good", "rejected=bad"), ignore_keys=("label", "history")
    )
    reader = Reader(PREFERENCE, keys.renamed, frozenset(keys.ignore_keys))
    sample = reader.sample(record)
    assert (sample.dialogues(), sample.label, reader.passed_over) == (PAIR, 1.0, {"n"})
    # two keys change places; a key makes way for another one
    swap = Reader(PREFERENCE, {"chosen": "rejected", "rejected": "chosen", "prompt": "q", "margin": "x"})
    sample = swap.sample({"prompt": C, "q": Q, "chosen": B, "rejected": A})
    assert (sample.dialogues(), swap.passed_over, swap.found) == (PAIR, {"prompt"}, {"chosen", "rejected", "prompt"})
    # a key of a message
    thought = {"messages": [*dialogue(Q), {"role": "assistant", "content": A, "thinking": "hm"}]}
    assert Reader(SFT, ignore_keys=frozenset({"thinking"})).sample(thought).texts == [QA]


@pytest.mark.parametrize("keys", [("prompt",), ("prompt=",), ("=a",), ("a=b", "a=c")])
def test_renamed_keys_are_checked(keys):
    with pytest.raises(ValueError, match="--data_keys must be NAME=KEY, each name once"):
        KeySettings(data_keys=keys)


UNPAIRED = "single replies"
REFUSED = {
    "unpaired": (preference, {"prompt": Q, "completion": A, "label": True}, UNPAIRED),
    "unpaired, for SFT": (demonstration, {"prompt": Q, "completion": A, "label": True}, "has 'label' beside pro"),
    "BeaverTails": (preference, {"prompt": Q, "response": A, "category": {}, "is_safe": True}, UNPAIRED),
    "process rewards": (preference, {"prompt": Q, "completions": [A], "labels": [True]}, "grades steps"),
    "a tree": (preference, {"message_tree_id": "t", "prompt": {"text": Q, "replies": []}}, "a tree of messages"),
    "a message of a tree": (demonstration, {"message_id": "m", "parent_id": "p", "text": A}, "one message of a tree"),
    "segments": (demonstration, {"segments": [{"label": False, "text": Q}, {"label": True, "text": A}]}, "its parts"),
    "token ids": (preference, {"query": [1], "sample0": [2], "sample1": [3], "best": 0}, "token ids of GPT-2"),
    "Feedback-Collection": (
        preference, {"orig_instruction": Q, "orig_response": A, "orig_score": "4", "orig_criteria": "c"}, UNPAIRED,
    ),
    "reinforcement learning": (
        demonstration, {"prompt": dialogue(Q), "data_source": "d", "reward_model": {"ground_truth": "4"}},
        "a prompt without a reply",
    ),
    "a demonstration": (preference, {"instruction": Q, "output": A}, "a record of instruction/output, for tr"),
    "a preference's prompt": (demonstration, PREFERENCES["MultiPref"][0], "a record of MultiPref, for train_rm.py"),
    "another judgement": (
        preference, {"prompt": Q, "response_a": A, "response_b": B, "winner": "0"},
        "'winner' is '0'; expected response_a or a, response_b or b, or tie",
    ),
    "an image": (
        demonstration, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "has a part of type 'image'",
    ),
    "a loss of one half": (
        demonstration, {"messages": [{"role": "assistant", "content": A, "weight": 0.5}]}, "has 'weight' 0.5; exp",
    ),
    "a part without loss": (
        demonstration, {"messages": [assistant([{"type": "text", "text": A, "train": False}])]}, "a part' has 'train'",
    ),
    "messages without commas": (
        preference, {"prompt": Q, "chosen": str(QA).replace("},", "}\n"), "rejected": B}, "looks like messages, but",
    ),
    "a question under an unknown name": (
        preference, {"Frage": "What is 2+2?", "chosen": A, "rejected": B}, "but the key 'Frage': if it is the",
    ),
    "a key in capitals": (preference, {"Question": Q, "chosen": A, "rejected": B}, "has 'Question' beside chosen/rej"),
    "replies of two forms": (preference, {"chosen": QA, "rejected": B}, "others that lack the turns of these"),
    "a context of another length": (
        preference, {"prompt": Q, "chosen": dialogue("hi", "hello", Q, A), "rejected": B}, "that lack the turns of",
    ),
    "a context that has its reply": (preference, {"messages": QA, "chosen": A, "rejected": B}, "end with a reply"),
    "a key of an inner object": (
        preference, {"input": {"messages": dialogue(Q), "system": "s"}, "preferred_output": [assistant(A)],
                     "non_preferred_output": [assistant(B)]}, "'input' has 'system', which is not used",
    ),
    "a negative weight": (preference, {"prompt": Q, "chosen": A, "rejected": B, "weight": -1}, "'weight' is -1; expec"),
    "a weight of one of the replies that are joined": (
        preference, {"prompt": Q, "response": A, "helpfulness": 4, "weight": 2}, "has 'weight' beside HelpSteer2",
    ),
    "HelpSteer3, no valid preference": (
        preference, {"context": Q, "response1": A, "response2": B, "overall_preference": -100}, "is -100; expected -3",
    ),
    "Arena 55k, a reply is missing": (
        preference, {"prompt": '["a", "b"]', "response_a": '["c"]', "response_b": '["d", "e"]', "winner_model_a": 1,
                     "winner_model_b": 0}, "has 2 turns of 'prompt' and 1 replies",
    ),
    "KTO": (preference, {"messages": QA, "label": True}, UNPAIRED),
    "KTO, for SFT": (demonstration, {"messages": QA, "kto_tag": False}, "has 'kto_tag' beside conversation"),
    "other values": (preference, {"info": 5, "summaries": [], "choice": 1}, "is not as records of summarize_from"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_implemented_is_refused_by_name(name):
    read, record, part = REFUSED[name]
    with pytest.raises(ValueError) as error:
        read(record)
    assert part in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_misspelt_key_is_pointed_out():
    with pytest.raises(ValueError, match="did you mean 'rejected' by 'rejcted'"):
        preference({"prompt": Q, "chosen": A, "rejcted": B})


@pytest.mark.parametrize("word, label", [("both bad", 0.5), ("Tie (bothbad)", 0.5), ("Model A", 1.0)])
def test_a_vote_may_be_spelt_with_blanks(word, label):
    assert preference({"prompt": Q, "response_a": A, "response_b": B, "winner": word}).label == label
