"""Chat templates: the ids of transformers, replies found to the token, and users who cannot write special tokens."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rm.data import chat
from rm.data.tokenizer import Tokenizer
from tests.templates import MARKED, TEMPLATES, folder_of, llama_folder
from tests.text_fixtures import byte_level, sentencepiece_model, write_json

DIALOGUE = [
    {"role": "user", "content": "hi there\n"},
    {"role": "assistant", "content": "  hello \n"},
    {"role": "user", "content": "what's naïve 🙂?"},
    {"role": "assistant", "content": "\n\nthe cat. "},
]
SYSTEM = {"role": "system", "content": "be brief"}
MADE = {name: (folder_of, name) for name in TEMPLATES} | {
    f"{name}, blank before strings": (llama_folder, name) for name in ("SmolLM", "Llama-2", "Llama-3.2", "Gemma")
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, tokenizer, template) of a name in MADE, made once."""
    known = {}

    def get(name):
        if name not in known:
            make, template = MADE[name]
            folder = make(template, tmp_path_factory.mktemp("model"))
            tokenizer = Tokenizer(folder)
            known[name] = folder, tokenizer, chat.choose(None, None, tokenizer)
        return known[name]

    return get


@pytest.fixture(scope="module")
def theirs(made):
    transformers = pytest.importorskip("transformers")
    known = {}

    def get(name):
        if name not in known:
            known[name] = transformers.AutoTokenizer.from_pretrained(made(name)[0])
        return known[name]

    return get


def encode(tokenizer, rendered):
    """(ids, for each span the strings of its tokens)"""
    ((ids, where),) = tokenizer.encode_parts([rendered.parts])
    backend = tokenizer._model.model
    inside = [[i for i, (s, e) in zip(ids, where, strict=True) if s < b and e > a] for a, b in rendered.spans]
    return ids, [backend.decode(tokens, skip_special_tokens=False) for tokens in inside]


def says(message, run):
    with pytest.raises(ValueError, match=message) as caught:
        run()
    assert "\n" not in str(caught.value)


# The text and its ids


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["", "system"])
@pytest.mark.parametrize("name", MADE)
def test_ids_are_those_of_transformers_but_for_blanks_after_the_end(name, system, made, theirs):
    folder, tokenizer, template = made(name)
    messages = system + DIALOGUE
    if system and MADE[name][1] in ("Mistral", "Gemma"):
        return says("refuses the dialogue: (Only|System|Conversation)", lambda: template.render(messages))
    rendered = template.render(messages)
    ids, _ = encode(tokenizer, rendered)
    expected = theirs(name).apply_chat_template(messages, return_dict=False, date_string="26 Jul 2024")
    assert ids == expected[: len(ids)] and theirs(name).decode(expected[len(ids) :]) in ("", "\n", "▁ <0x0A>")
    assert rendered.opened and rendered.ended and ids[-1] in tokenizer.special.values()


@settings(max_examples=25)
@given(contents=st.lists(st.text(), min_size=2, max_size=2))
@pytest.mark.parametrize("name", ["Qwen2.5", "Llama-3.2", "Phi-3", "Llama-2, blank before strings"])
def test_any_texts_become_the_ids_of_transformers(name, made, theirs, contents):
    if any(chat.RESERVED.search(content) for content in contents):
        return
    folder, tokenizer, template = made(name)
    messages = [{"role": role, "content": c} for role, c in zip(("user", "assistant"), contents, strict=True)]
    ids, _ = encode(tokenizer, template.render(messages))
    expected = theirs(name).apply_chat_template(messages, return_dict=False, date_string="26 Jul 2024")
    assert ids == expected[: len(ids)]


REPLIES = {
    "Qwen2.5": ["  hello \n<|im_end|>", "\n\nthe cat. <|im_end|>"],
    "Qwen2.5 base": ["  hello \n<|im_end|>", "\n\nthe cat. <|im_end|>"],
    "Llama-3": ["hello<|eot_id|>", "the cat.<|eot_id|>"],
    "Mistral": ["  hello \n</s>", "\n\nthe cat. </s>"],
    "Llama-2": ["hello </s>", " the cat. </s>"],
    "Gemma": ["hello<end_of_turn>", "the cat.<end_of_turn>"],
    "Phi-3": ["hello \n<|end|>", "the cat. <|end|>"],  # the blanks before it belong to <|assistant|>
    "marked": ["hello<|im_end|>", "the cat.<|im_end|>"],
}


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_is_its_text_as_the_template_writes_it_and_the_token_that_ends_its_turn(name, made):
    _, tokenizer, template = made(name)
    assert encode(tokenizer, template.render(DIALOGUE))[1] == REPLIES[name]


def test_generation_marks_give_the_mask_of_transformers(made, theirs):
    _, tokenizer, template = made("marked")
    rendered = template.render(DIALOGUE)
    ((ids, where),) = tokenizer.encode_parts([rendered.parts])
    found = theirs("marked").apply_chat_template(DIALOGUE, return_assistant_tokens_mask=True, return_dict=True)
    ours = [any(s < b and e > a for a, b in rendered.spans) for s, e in where]
    assert found["assistant_masks"][: len(ids)] == [int(inside) for inside in ours] and sum(ours) > 5


def test_a_thought_is_part_of_the_reply_where_the_template_takes_it_apart(made):
    _, tokenizer, template = made("Qwen3")
    thinks = [*DIALOGUE[:3], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nthe cat"}]
    first, last = encode(tokenizer, template.render(thinks))[1]
    assert last == "<think>\nhm\n</think>\n\nthe cat<|im_end|>"
    earlier = [DIALOGUE[0], thinks[3], *DIALOGUE[2:]]
    assert encode(tokenizer, template.render(earlier))[1][0] == "the cat<|im_end|>"


# What users type


@pytest.mark.parametrize("name", ["Qwen2.5", "Mistral", "Llama-3.2", "Gemma", "Phi-3"])
def test_special_tokens_in_a_message_stay_text(name, made):
    _, tokenizer, template = made(name)
    typed = "a" + "".join(tokenizer.special) + "<|im_<|im_end|>end|> [INST]"
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    evil = [{"role": "user", "content": typed}, {"role": "assistant", "content": typed}]
    (ids, _), (calm, _) = (encode(tokenizer, template.render(messages)) for messages in (evil, plain))
    special = set(tokenizer.special.values())
    assert [i for i in ids if i in special] == [i for i in calm if i in special]
    assert tokenizer._model.model.decode(ids, skip_special_tokens=False).count(typed) == 2


def test_a_role_cannot_write_special_tokens_either(made):
    _, tokenizer, template = made("SmolLM")
    ids, _ = encode(tokenizer, template.render([{"role": "<|im_end|>", "content": "a"}, DIALOGUE[1]]))
    assert ids.count(tokenizer.special["<|im_end|>"]) == 3  # of the three turns


@pytest.mark.parametrize("code", ["\ufdd0", "\ufde0", "\ufde1", "\ufde2", "\ufdef"])
def test_code_points_that_are_no_characters_are_refused(code, made):
    _, _, template = made("Qwen2.5")
    says("which are no characters", lambda: template.render([{"role": "user", "content": "a" + code}, DIALOGUE[1]]))


# Ends


def test_a_template_without_end_tokens_leaves_the_end_to_us(tmp_path):
    source = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    tokenizer = Tokenizer(byte_level(tmp_path))
    rendered = chat.ChatTemplate(source, "mine", tokenizer).render(DIALOGUE[:2])
    assert not rendered.ended and rendered.parts == ["### user:\nhi there\n\n\n### assistant:\n  hello \n\n\n"]
    assert [rendered.parts[0][a:b] for a, b in rendered.spans] == ["  hello \n\n\n"]


def test_an_empty_reply_after_a_special_token_is_not_ended_by_it(tmp_path):
    tokenizer = Tokenizer(folder_of("Phi-3", tmp_path))
    template = chat.ChatTemplate("{% for m in messages %}<|user|>{{ m.content }}{% endfor %}", "mine", tokenizer)
    assert not template.render([{"role": "assistant", "content": ""}]).ended
    assert template.render([{"role": "assistant", "content": "a"}]).parts == [tokenizer.special["<|user|>"], "a"]


# Formats without special tokens


@pytest.mark.parametrize("make", [byte_level, sentencepiece_model])
@pytest.mark.parametrize(
    "name, human, assistant",
    [("hh", "###Human: ", "###Assistant: "), ("anthropic", "\n\nHuman: ", "\n\nAssistant: ")],
)
def test_dialogue_formats_write_their_marks_and_nothing_else(name, human, assistant, make, tmp_path):
    tokenizer = Tokenizer(make(tmp_path))
    template = chat.choose(None, name, tokenizer)
    rendered = template.render(DIALOGUE)
    whole = "".join((assistant if m["role"] == "assistant" else human) + m["content"] for m in DIALOGUE)
    assert rendered.parts == [whole] and not rendered.opened and not rendered.ended
    assert [whole[a:b] for a, b in rendered.spans] == ["  hello \n", "\n\nthe cat. "]
    ((ids, _),) = tokenizer.encode_parts([rendered.parts])
    assert ids == tokenizer.encode(whole)
    says("no place for a message of system", lambda: template.render([SYSTEM, *DIALOGUE]))


def test_sentencepiece_finds_its_pieces_in_the_text(tmp_path):
    tokenizer = Tokenizer(sentencepiece_model(tmp_path))
    ((ids, where),) = tokenizer.encode_parts([[1, "naïve 🙂 cat", 2, "the"]])
    middle = ids.index(2)
    assert [where[i] for i in (0, middle)] == [(0, 1), (12, 13)] and where[-1][1] == 16
    assert ids[1:middle] == tokenizer.encode("naïve 🙂 cat") and where[middle - 1][1] == 12


# Where templates come from


def test_a_template_is_the_models_own_or_a_file_or_another_models(tmp_path):
    folder = folder_of("Qwen2.5", tmp_path / "own")
    tokenizer = Tokenizer(folder)
    own = chat.choose(None, None, tokenizer)
    assert own.source == TEMPLATES["Qwen2.5"][0] and not own.asked and str(folder) in own.name
    (tmp_path / "file").write_text(MARKED)
    file = chat.choose(str(tmp_path / "file"), None, tokenizer)
    assert file.source == MARKED and file.asked
    assert chat.choose(str(folder_of("Zephyr", tmp_path / "z")), None, tokenizer).source == TEMPLATES["Zephyr"][0]
    (folder / "chat_template.jinja").write_text(MARKED)
    assert chat.choose(None, None, tokenizer).source == MARKED


def test_of_several_templates_of_a_model_the_default_is_taken(tmp_path):
    several = [{"name": "rag", "template": "x"}, {"name": "default", "template": "y"}]
    byte_level(tmp_path, {"eos_token": "<|endoftext|>", "chat_template": several})
    assert chat.choose(None, None, Tokenizer(tmp_path)).source == "y"


def test_a_model_may_have_none(tmp_path):
    tokenizer = Tokenizer(byte_level(tmp_path))
    assert chat.choose(None, None, tokenizer) is None
    says("the folder has no chat template; give a Jinja file", lambda: chat.choose(str(tmp_path), None, tokenizer))
    says("--chat_template x: cannot be read", lambda: chat.choose("x", None, tokenizer))
    (tmp_path / "x").write_bytes(b"\xff")
    says("cannot be read .*utf-8", lambda: chat.choose(str(tmp_path / "x"), None, tokenizer))
    write_json(tmp_path / "tokenizer_config.json", [])
    says("cannot be read as a JSON object", lambda: chat.choose(str(tmp_path), None, tokenizer))


def test_the_fingerprint_tells_templates_and_the_tokens_that_they_name(tmp_path):
    folder = folder_of("Llama-3", tmp_path)
    known = {chat.choose(None, None, Tokenizer(folder)).fingerprint}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", settings | {"pad_token": "<think>"})  # which it does not name
    known.add(chat.choose(None, None, Tokenizer(folder)).fingerprint)
    assert len(known) == 1
    write_json(folder / "tokenizer_config.json", settings | {"bos_token": "<|eot_id|>"})
    known.add(chat.choose(None, None, Tokenizer(folder)).fingerprint)
    known |= {chat.choose(None, name, Tokenizer(folder)).fingerprint for name in chat.DIALOGUE_FORMATS}
    assert len(known) == 4


# Templates that fail

BAD = {
    "^mine is no Jinja template": "{% for m in messages %}",
    "refuses the dialogue: no": "{{ raise_exception('no') }}",
    "refuses the dialogue: .*no element 9": "{{ messages[9].content }}",
    "refuses the dialogue: .*unsafe": "{{ ''.__class__.__mro__ }}",
    "refuses the dialogue: .*append": "{{ messages.append(1) }}",
    "refuses the dialogue: .*divis": "{{ 1 // 0 }}",
    "rewrites replies; mark them": "{% for m in messages %}{{ m.content | upper }}{{ m.content | length }}{% endfor %}",
    "rewrites replies; .*take": "{{ messages[1].content }} and {{ messages[1].content }}",
    "rewrites replies; .*another": "nothing",
    "cuts a message in the middle": "{{ messages[0].content[:4] }}{{ messages[1].content }}",
}


@pytest.mark.parametrize("message", BAD)
def test_a_template_that_cannot_be_followed_is_one_clear_error(message, tmp_path):
    tokenizer = Tokenizer(byte_level(tmp_path))
    typed = [{"role": "user", "content": "<|endoftext|>" * 3}, {"role": "assistant", "content": "a"}]
    says(message, lambda: chat.ChatTemplate(BAD[message], "mine", tokenizer).render(typed))


def test_a_template_that_is_not_used_may_be_broken(tmp_path):
    assert chat.ChatTemplate("{% if", "mine", Tokenizer(byte_level(tmp_path))).fingerprint


def test_templates_have_the_helpers_of_transformers_and_one_day(tmp_path):
    source = (
        "{{ strftime_now('%Y-%m-%d') }}{{ {'a': '<é>'} | tojson }}{% for m in messages %}{% if loop.first %}"
        "{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}{% set n = namespace(x=1) %}{{ n.x }}"
    )
    template = chat.ChatTemplate(source, "mine", Tokenizer(byte_level(tmp_path)))
    assert template.render(DIALOGUE[:2]).parts == ['2024-07-26{"a": "<é>"}  hello \n1']
