"""rm.data.encode: BOS and EOS, which tokens carry loss, the same tokens for a pair in every format, truncation."""

import json

import numpy as np
import pytest

from rm.data import chat, dataset
from rm.data.conversation import prompt_key_of
from rm.data.encode import Task, common_prefix
from rm.data.schemas import preference
from rm.data.split import SplitSettings
from rm.data.tokenizer import Tokenizer
from rm.distributed import process_group as dist
from tests.templates import folder_of
from tests.text_fixtures import byte_level, llama_like, sentencepiece_model

MAKERS = {"byte-level": byte_level, "llama-like": llama_like, "sentencepiece": sentencepiece_model}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


HEAD = [user("hi"), assistant("hello"), user("what eats the cat?")]
CHOSEN, REJECTED = [*HEAD, assistant("the dog")], [*HEAD, assistant("the mat")]


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request, tmp_path_factory):
    return Tokenizer(MAKERS[request.param](tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Tokenizer(byte_level(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return Tokenizer(folder_of("Qwen2.5", tmp_path_factory.mktemp("qwen")))


@pytest.fixture
def encode(tmp_path):
    """A function: task, tokenizer, records -> (examples, report).

    Its template is the one of `dialogue_format`, or else the model's own, if any.
    """

    def run(task, tokenizer, records, max_length=512, dialogue_format=None, cut=None, bare_text="auto"):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        template = chat.choose_template(None, dialogue_format, tokenizer)
        with_prompts = task is Task.PREFERENCE
        return dataset.read(task, [path], tokenizer, max_length, template, cut, bare_text, with_prompts=with_prompts)

    return run


def with_ends(tokenizer, text):
    """[BOS] tokens EOS"""
    return [*([] if tokenizer.bos_id is None else [tokenizer.bos_id]), *tokenizer.encode(text), tokenizer.eos_id]


def full_texts(example):
    """The tokens of each full text."""
    return [[*example.prefix.tolist(), *reply.tolist()] for reply in example.replies]


def loss_tokens(example):
    """The tokens of an SFT text that carry loss."""
    return example.replies[0][example.loss[0]].tolist()


# Preferences

HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: what eats the cat?\n\nAssistant:"


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": HH + " the dog", "rejected": HH + " the mat"},
        {"prompt": HH, "chosen": " the dog", "rejected": " the mat"},
        {"chosen": CHOSEN, "rejected": REJECTED},
        {"prompt": HEAD, "chosen": "the dog", "rejected": "the mat"},
        {"prompt": HEAD, "responses": ["the dog", "the mat"], "scores": [1, 0]},
    ],
)
def test_a_pair_has_the_same_tokens_in_every_format(record, tokenizer, encode):
    (pair,), _ = encode(Task.PREFERENCE, tokenizer, [record], dialogue_format="hh")
    start = "###Human: hi###Assistant: hello###Human: what eats the cat?###Assistant: the "
    assert full_texts(pair) == [with_ends(tokenizer, start + word) for word in ("dog", "mat")]
    assert pair.grade.tolist() == [1, 0] and pair.replies[0][0] != pair.replies[1][0]


def test_a_models_default_template_does_not_change_plain_texts(qwen, encode):
    (pair,), _ = encode(Task.PREFERENCE, qwen, [{"chosen": HH + " b", "rejected": HH + " c"}])
    assert full_texts(pair) == [with_ends(qwen, HH + " b"), with_ends(qwen, HH + " c")]


BARE = {"prompt": "hi", "chosen": "the dog", "rejected": "the mat"}
AS_MESSAGES = {"prompt": [user("hi")], "chosen": [assistant("the dog")], "rejected": [assistant("the mat")]}


@pytest.mark.parametrize(
    "bare",
    [
        BARE,
        {"prompt": "hi", "responses": ["the dog", "the mat"], "scores": [1, 0]},
        {"prompt": "hi", "chosen": ["the dog"], "rejected": ["the mat"]},
        {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " the dog", "rejected": " the mat"},
    ],
    ids=["pair", "ranking", "lists", "turns in the prompt"],
)
def test_a_bare_prompt_and_reply_are_a_dialogue_or_joined(bare, qwen, plain, encode):
    (as_messages,), _ = encode(Task.PREFERENCE, qwen, [AS_MESSAGES])
    for bare_text in ("auto", "dialogue"):
        (pair,), report = encode(Task.PREFERENCE, qwen, [bare], bare_text=bare_text)
        assert full_texts(pair) == full_texts(as_messages)
        assert ", bare prompts and replies as dialogues:" in str(report)
    joined = [with_ends(qwen, bare["prompt"] + reply) for reply in replies_of(bare)]
    (pair,), report = encode(Task.PREFERENCE, qwen, [bare], bare_text="plain")
    assert full_texts(pair) == joined and ", bare prompts and replies joined:" in str(report)
    (pair,), _ = encode(Task.PREFERENCE, plain, [bare])  # which has no template
    assert full_texts(pair) == [with_ends(plain, bare["prompt"] + reply) for reply in replies_of(bare)]
    with pytest.raises(ValueError, match="--bare_text dialogue: the model has no chat template; give --chat_template"):
        encode(Task.PREFERENCE, plain, [bare], bare_text="dialogue")


def replies_of(record):
    replies = record.get("responses") or [record["chosen"], record["rejected"]]
    return [reply if isinstance(reply, str) else reply[0] for reply in replies]


def test_messages_are_written_by_the_models_own_template(qwen, encode):
    (pair,), report = encode(Task.PREFERENCE, qwen, [{"chosen": CHOSEN, "rejected": REJECTED}])
    for tokens in full_texts(pair):
        # Of a system message and four turns; the reward is read at the line break behind the last one.
        assert tokens.count(qwen.eos_id) == 5 and tokens[-2:] == [qwen.eos_id, *qwen.encode("\n")]
    assert str(report) == "1 records of chosen/rejected: all kept"


def test_a_ranking_keeps_its_order_and_grades_and_shares_a_prefix(plain, encode):
    responses = ["the dog", "the mat", "the dogs", "no", "the dog"]
    (one,), _ = encode(Task.PREFERENCE, plain, [{"prompt": "a ", "responses": responses, "ranks": [2, 1, 3, 3, 2]}])
    assert full_texts(one) == [with_ends(plain, "a " + response) for response in responses]
    assert one.grade.tolist() == [-2, -1, -3, -3, -2] and one.prefix.tolist() == plain.encode("a")


def test_label_margin_weight_and_strength_of_a_record_are_kept(plain, encode):
    records = [
        {"chosen": "a", "rejected": "b", "label": 0.5, "margin": 2, "weight": "0.25"},
        {"chosen": "a", "rejected": "b"},
        {"prompt": "a", "responses": ["a", "b", "cat"], "ranks": [1, 2, 3], "weight": 3},
        {"prompt": "a", "response_1": "a", "response_2": "b", "preference_strength": -2},
    ]
    examples, _ = encode(Task.PREFERENCE, plain, records)
    labels = [(e.label, e.margin, e.weight, e.strength) for e in examples]
    assert labels == [(0.5, 2, 0.25, 1), (1, 0, 1, 1), (1, 0, 3, 1), (1, 0, 1, 2)]


def test_records_of_one_prompt_have_one_key_in_all_forms(plain, encode):
    question, other = ({"role": "user", "content": content} for content in ("the cat", "the mat"))
    replies = [{"role": "assistant", "content": content} for content in ("yes", "no", "yes and no")]
    tools = [{"type": "function", "function": {"name": "f"}}]
    records = [
        {"prompt": [question], "chosen": "yes", "rejected": "no"},
        {"chosen": [question, replies[2]], "rejected": [question, replies[1]]},
        {"prompt": [question], "responses": ["yes", "no", "yes and no"], "scores": [3, 2, 1]},
        {"prompt": [other], "chosen": "yes", "rejected": "no"},
        {"chosen": [question, replies[0], other, replies[1]], "rejected": [question, replies[0], other, replies[2]]},
    ]
    examples, _ = encode(Task.PREFERENCE, plain, records, dialogue_format="anthropic")
    assert len(set(examples.prompt[:3])) == 1 and len(set(examples.prompt)) == 3
    assert prompt_key_of(preference({"chosen": "the cat", "rejected": "the mat"})) is None  # no prompt is known
    with_tools = preference(records[0] | {"tools": tools})
    assert prompt_key_of(with_tools) != prompt_key_of(preference(records[0]))


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"chosen": "same", "rejected": "same"}, "with equal texts that are graded differently"),
        (
            {"prompt": "a", "responses": ["b", "b", "c"], "ranks": [1, 2, 3]},
            "with equal texts that are graded differently",
        ),
        ({"chosen": HEAD, "rejected": CHOSEN}, "not ending with an assistant message"),
        ({"chosen": "the cat " * 600, "rejected": "a"}, "longer than --max_length 512"),
    ],
)
def test_a_preference_without_information_is_dropped_with_a_reason(record, reason, qwen, encode):
    good = {"chosen": "a", "rejected": "b"}
    examples, report = encode(Task.PREFERENCE, qwen, [good, record, good])
    assert examples.record.tolist() == [0, 2] and report.dropped == {reason: 1}


def test_equal_responses_with_equal_grades_are_kept(plain, encode):
    (one,), _ = encode(Task.PREFERENCE, plain, [{"prompt": "a", "responses": ["b", "b", "c"], "scores": [1, 1, 0]}])
    assert len(one.replies) == 3


# Demonstrations


def test_loss_of_text2text_is_on_its_output_and_eos(tokenizer, encode):
    (one,), _ = encode(Task.SFT, tokenizer, [{"input": "what eats the cat? ", "output": "naïve 🙂 dogs"}])
    assert full_texts(one) == [with_ends(tokenizer, "what eats the cat? naïve 🙂 dogs")]
    whole, prompt = full_texts(one)[0], [*with_ends(tokenizer, "what eats the cat? "), -1]
    prompt_length = common_prefix([np.array(whole), np.array(prompt)])
    assert loss_tokens(one) == whole[prompt_length:] and whole[-1] == tokenizer.eos_id


@pytest.mark.parametrize("dialogue_format", [None, "hh"])
def test_loss_of_a_dialogue_is_on_every_reply_and_its_end(dialogue_format, qwen, encode):
    messages = [*CHOSEN, user("thanks")]  # messages after the last reply are left out
    (one,), _ = encode(Task.SFT, qwen, [{"messages": messages}], dialogue_format=dialogue_format)
    text = qwen._model.model.decode(loss_tokens(one), skip_special_tokens=False)
    assert text == ("hello<|im_end|>the dog<|im_end|>" if dialogue_format is None else "hello the dog<|im_end|>")
    assert "thanks" not in qwen._model.model.decode(full_texts(one)[0])


OPEN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"  # ends no turn


def test_eos_is_appended_to_a_dialogue_for_sft_only_and_only_where_the_template_ends_no_turn(qwen, tmp_path, capsys):
    line_break, template = qwen.encode("\n"), tmp_path / "open.jinja"
    template.write_text(OPEN)
    (tmp_path / "sft.jsonl").write_text(json.dumps({"messages": CHOSEN}))
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"chosen": CHOSEN, "rejected": REJECTED}))

    def load(task, file, **text):
        data = dataset.DataSettings(dataset_path=(str(tmp_path / file),), cache_dir=str(tmp_path / "cache"))
        others = dataset.MixtureSettings(), SplitSettings(validation_split_percentage=0)
        with dist.session(0):
            loaded = dataset.load(task, data, dataset.TextSettings(**text), *others, qwen, seed=0)
        return loaded.train[0], capsys.readouterr().out

    for task, file in ((Task.SFT, "sft.jsonl"), (Task.PREFERENCE, "pairs.jsonl")):
        example, said = load(task, file)
        assert full_texts(example)[0][-2:] == [qwen.eos_id, *line_break] and "warning" not in said
        example, said = load(task, file, chat_template=str(template))
        ending = [*line_break, qwen.eos_id] if task is Task.SFT else line_break
        assert full_texts(example)[0][-len(ending) :] == ending
        assert said.count("warning: data: the chat template ends no turn with a special token in 1 records") == 1
    # What the template writes behind a reply, and EOS, are what ends it: they carry loss.
    example, _ = load(Task.SFT, "sft.jsonl", chat_template=str(template))
    assert loss_tokens(example)[-2:] == [*line_break, qwen.eos_id]
    template.write_text(OPEN.replace("}}\n{% endfor", "}}\n###\n{% endfor"))  # turns end in ordinary text
    example, _ = load(Task.SFT, "sft.jsonl", chat_template=str(template))
    ending = [*qwen.encode("\n###\n"), qwen.eos_id]
    assert full_texts(example)[0][-len(ending) :] == loss_tokens(example)[-len(ending) :] == ending
    # The line break behind <|im_end|> is in the text and carries none.
    example, _ = load(Task.SFT, "sft.jsonl")
    assert loss_tokens(example)[-1] == qwen.eos_id


def test_demonstrations_to_score_are_written_as_preferences_are(qwen, tmp_path):
    (tmp_path / "sft.jsonl").write_text(json.dumps({"messages": CHOSEN}))
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"chosen": CHOSEN, "rejected": REJECTED}))
    template = chat.ChatTemplate(OPEN, "mine", qwen)
    (one,), _ = dataset.read(Task.SCORED_DEMONSTRATIONS, [tmp_path / "sft.jsonl"], qwen, 512, template)
    (pair,), _ = dataset.read(Task.PREFERENCE, [tmp_path / "pairs.jsonl"], qwen, 512, template)
    assert full_texts(one)[0] == full_texts(pair)[0]


def test_a_preference_is_not_refused_for_want_of_a_loss_mask(qwen, tmp_path):
    # It drops the thought of a reply, so that markers around the reply do not show where it begins. What the template
    # writes before a reply without a thought does, unless that differs, too.
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    template = chat.ChatTemplate(source, "mine", qwen)
    pair = {"prompt": "hi", "chosen": "<think>a</think>the dog", "rejected": "<think>b</think>the mat"}
    (tmp_path / "pairs").write_text(json.dumps(pair))
    (tmp_path / "sft").write_text(json.dumps({"messages": [user("hi"), assistant(pair["chosen"])]}))
    (one,), _ = dataset.read(Task.PREFERENCE, [tmp_path / "pairs"], qwen, 512, template)
    text = qwen._model.model.decode(full_texts(one)[0], skip_special_tokens=False)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nthe dog<|im_end|>\n"
    (one,), _ = dataset.read(Task.SFT, [tmp_path / "sft"], qwen, 512, template)
    trained = one.replies[0][one.loss[0]]
    assert qwen._model.model.decode(trained, skip_special_tokens=False) == "the dog<|im_end|>"

    differs = source.replace("assistant\n<think>", "robot\n").replace(
        "{{ m.role }}\n", "{{ m.role ~ (m.content | length) }}\n"
    )
    template = chat.ChatTemplate(differs, "mine", qwen)
    assert len(dataset.read(Task.PREFERENCE, [tmp_path / "pairs"], qwen, 512, template)[0]) == 1
    with (tmp_path / "sft").open("a") as sft:
        sft.write("\n" + json.dumps({"text": "good"}))
    examples, report = dataset.read(Task.SFT, [tmp_path / "sft"], qwen, 512, template)
    assert len(examples) == 1
    assert report.dropped == {"whose replies cannot be found in what the chat template writes": 1}
    (tmp_path / "sft").write_text(json.dumps({"messages": [user("hi"), assistant(pair["chosen"])]}))
    with pytest.raises(ValueError, match=r"sft line 1: mine rewrites .*; no example is left"):
        dataset.read(Task.SFT, [tmp_path / "sft"], qwen, 512, template)


def test_an_explicit_template_makes_text2text_a_dialogue(plain, encode):
    (one,), _ = encode(Task.SFT, plain, [{"input": "hi", "output": "hello"}], dialogue_format="anthropic")
    assert full_texts(one) == [with_ends(plain, "\n\nHuman: hi\n\nAssistant: hello")]


@pytest.mark.parametrize(
    "record, reason",
    [
        ({"input": "a", "output": ""}, "with empty text"),
        ({"messages": [user("a"), assistant("")]}, "with empty text"),
        ({"messages": [user("a")]}, "not ending with an assistant message"),
    ],
)
def test_an_sft_record_without_content_is_dropped_with_a_reason(record, reason, qwen, encode):
    examples, report = encode(Task.SFT, qwen, [{"text": "a"}, record])
    assert len(examples) == 1 and report.dropped == {reason: 1}
    assert list(report.formats) == ["text_only", "conversation" if "messages" in record else "text2text"]


def test_messages_without_a_chat_template_are_an_error(plain, encode):
    with pytest.raises(ValueError, match="line 1: has messages, but .* has no chat template; give --chat_template or"):
        encode(Task.SFT, plain, [{"messages": CHOSEN}])


def test_a_dialogue_that_the_template_refuses_is_named_by_its_record(plain, encode):
    with pytest.raises(ValueError, match="line 2: --dialogue_format hh refuses the dialogue: it has no place"):
        encode(
            Task.SFT,
            plain,
            [{"text": "a"}, {"messages": [{"role": "tool", "content": ""}, *CHOSEN]}],
            dialogue_format="hh",
        )


# Truncation


def test_truncation_on_the_left_shortens_only_the_shared_prefix(tokenizer, encode):
    record = {"prompt": "one two three four five six seven ", "chosen": "the dog sat", "rejected": "a cat"}
    whole, _ = encode(Task.PREFERENCE, tokenizer, [record])
    longest = int(whole.lengths[0] - min(map(len, whole[0].replies)))
    for max_length in range(longest, max(map(len, whole[0].replies)), -1):
        (pair,), report = encode(Task.PREFERENCE, tokenizer, [record], max_length, cut="left")
        n_removed = longest - max_length
        bos = 0 if tokenizer.bos_id is None else 1
        assert full_texts(pair) == [[*text[:bos], *text[bos + n_removed :]] for text in full_texts(whole[0])]
        assert [r.tolist() for r in pair.replies] == [r.tolist() for r in whole[0].replies]
        assert report.shortened == (n_removed > 0)


def test_truncation_on_the_left_drops_replies_that_do_not_fit(plain, encode):
    pairs = [{"prompt": "a", "chosen": "the dog sat on it", "rejected": "b"}, {"chosen": "a", "rejected": "b"}]
    examples, report = encode(Task.PREFERENCE, plain, pairs, 4, cut="left")
    assert examples.record.tolist() == [1]
    assert str(report) == (
        "2 records of prompt/chosen/rejected (1) and chosen/rejected (1), bare prompts and replies joined: 1 kept; "
        "dropped 1 whose replies alone are longer than --max_length 4"
    )


def test_truncation_on_the_right_drops_pairs_whose_difference_is_lost(plain, encode):
    same = "the cat sat on the mat and "
    late, early = ({"chosen": a + same, "rejected": b + same} for a, b in ((same, same + "x"), ("a ", "b ")))
    examples, report = encode(Task.PREFERENCE, plain, [early, late], 5, cut="right")
    assert examples.record.tolist() == [0] and report.shortened == 1
    assert full_texts(examples[0]) == [
        [*with_ends(plain, early[key])[:4], plain.eos_id] for key in ("chosen", "rejected")
    ]


@pytest.mark.parametrize("cut", ["left", "right"])
def test_a_text_truncated_on_the_right_has_no_loss_on_its_end_token(cut, plain, encode):
    record = {"text": "the cat sat on the mat and on the other mat"}
    whole = with_ends(plain, record["text"])
    (one,), _ = encode(Task.SFT, plain, [record], 6, cut=cut)
    assert full_texts(one) == ([whole[-6:]] if cut == "left" else [[*whole[:5], plain.eos_id]])
    assert one.loss[0].tolist() == [True] * 5 + [cut == "left"]


def test_a_text_whose_output_is_cut_off_is_dropped(plain, encode):
    records = [{"input": "the cat sat on the mat", "output": "b"}, {"text": "a"}]
    _, report = encode(Task.SFT, plain, records, 4, cut="right")
    assert report.dropped == {"with nothing to learn from after truncation to --max_length 4": 1}


def test_no_text_is_longer_than_max_length(tokenizer, encode):
    rng = np.random.default_rng(0)

    def words() -> str:
        return " ".join(rng.choice(["the", "cat", "🙂", "mat"], rng.integers(1, 30)))

    records = [{"prompt": words(), "chosen": words(), "rejected": words()} for _ in range(200)]
    middle = int(np.median([max(map(len, full_texts(e))) for e in encode(Task.PREFERENCE, tokenizer, records)[0]]))
    for cut in (None, "left", "right"):
        examples, report = encode(Task.PREFERENCE, tokenizer, records, middle, cut=cut)
        assert max(len(text) for e in examples for text in full_texts(e)) == middle
        assert all(reply[-1] == tokenizer.eos_id for e in examples for reply in e.replies)
        assert report.kept + sum(report.dropped.values()) == 200 and (report.shortened > 0) == (cut is not None)
