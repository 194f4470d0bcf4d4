"""rm.data.chat: ids equal to those of transformers, replies located exactly, special-token strings of users escaped."""

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
# Name -> (function that makes the model folder, its argument)
MODELS = {name: (folder_of, name) for name in TEMPLATES} | {
    f"{name}, space before strings": (llama_folder, name) for name in ("SmolLM", "Llama-2", "Llama-3.2", "Gemma")
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A function: name in MODELS -> (folder, tokenizer, template), made once."""
    models = {}

    def get(name):
        if name not in models:
            make, template = MODELS[name]
            folder = make(template, tmp_path_factory.mktemp("model"))
            tokenizer = Tokenizer(folder)
            models[name] = folder, tokenizer, chat.choose_template(None, None, tokenizer)
        return models[name]

    return get


@pytest.fixture(scope="module")
def hf_tokenizer(model):
    """A function: name in MODELS -> the tokenizer of transformers, made once."""
    transformers = pytest.importorskip("transformers")
    hf_tokenizers = {}

    def get(name):
        if name not in hf_tokenizers:
            hf_tokenizers[name] = transformers.AutoTokenizer.from_pretrained(model(name)[0])
        return hf_tokenizers[name]

    return get


def encode(tokenizer, rendered):
    """(ids, for each span the text of its tokens)"""
    ((ids, token_spans),) = tokenizer.encode_parts([rendered.parts])
    backend = tokenizer._model.model
    texts = []
    for start, end in rendered.spans:
        inside = [i for i, (s, e) in zip(ids, token_spans, strict=True) if s < end and e > start]
        texts.append(backend.decode(inside, skip_special_tokens=False))
    return ids, texts


def assert_one_line_error(message, run):
    with pytest.raises(ValueError, match=message) as error:
        run()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["", "system"])
@pytest.mark.parametrize("name", MODELS)
def test_ids_equal_transformers(name, system, model, hf_tokenizer):
    folder, tokenizer, template = model(name)
    messages = system + DIALOGUE
    if system and MODELS[name][1] in ("Mistral", "Gemma"):
        return assert_one_line_error(
            "refuses the dialogue: (Only|System|Conversation)", lambda: template.render(messages)
        )
    rendered = template.render(messages)
    ids, _ = encode(tokenizer, rendered)
    expected = hf_tokenizer(name).apply_chat_template(messages, return_dict=False, date_string="26 Jul 2024")
    assert ids == expected == encode(tokenizer, template.render(messages, find_replies=False))[0]
    end_token = hf_tokenizer(name).convert_ids_to_tokens(rendered.end_id)
    assert not rendered.plain and end_token in ("<|im_end|>", "<|eot_id|>", "</s>", "<end_of_turn>", "<|end|>")


@settings(max_examples=25)
@given(contents=st.lists(st.text(), min_size=2, max_size=2))
@pytest.mark.parametrize("name", ["Qwen2.5", "Llama-3.2", "Phi-3", "Llama-2, space before strings"])
def test_ids_of_any_messages_equal_transformers(name, model, hf_tokenizer, contents):
    if any(chat.NONCHARACTERS.search(content) for content in contents):
        return
    folder, tokenizer, template = model(name)
    messages = [{"role": role, "content": c} for role, c in zip(("user", "assistant"), contents, strict=True)]
    ids, _ = encode(tokenizer, template.render(messages))
    expected = hf_tokenizer(name).apply_chat_template(messages, return_dict=False, date_string="26 Jul 2024")
    assert ids == expected


REPLIES = {
    "Qwen2.5": ["  hello \n<|im_end|>", "\n\nthe cat. <|im_end|>"],
    "Qwen2.5 base": ["  hello \n<|im_end|>", "\n\nthe cat. <|im_end|>"],
    "Llama-3": ["hello<|eot_id|>", "the cat.<|eot_id|>"],
    "Mistral": ["  hello \n</s>", "\n\nthe cat. </s>"],
    "Llama-2": ["hello </s>", " the cat. </s>"],
    "Gemma": ["hello<end_of_turn>", "the cat.<end_of_turn>"],
    "Phi-3": ["hello \n<|end|>", "the cat. <|end|>"],  # <|assistant|> strips the white space behind it
    "marked": ["hello<|im_end|>", "the cat.<|im_end|>"],
}


@pytest.mark.parametrize("name", REPLIES)
def test_the_span_of_a_reply_is_its_text_and_its_end_token(name, model):
    _, tokenizer, template = model(name)
    assert encode(tokenizer, template.render(DIALOGUE))[1] == REPLIES[name]


@pytest.mark.parametrize(
    "source",
    [
        MARKED,
        MARKED.replace("'<|im_end|>' }}{% endgeneration %}", "'<|im_end|>\\n' }}{% endgeneration %}"),
        MARKED.replace("{{- message.content | trim + '<|im_end|>' }}", "{{- message.content }}"),  # no end token
        MARKED.replace("{% generation %}{{-", "{% generation %}{{- 'I think: ' + "),
    ],
    ids=["marks hold the end token", "and the line break", "and no end token", "and a prefix"],
)
def test_generation_marks_give_the_assistant_mask_of_transformers(source, model, hf_tokenizer):
    _, tokenizer, _ = model("marked")
    rendered = chat.ChatTemplate(source, "mine", tokenizer).render(DIALOGUE)
    ((ids, token_spans),) = tokenizer.encode_parts([rendered.parts])
    expected = hf_tokenizer("marked").apply_chat_template(
        DIALOGUE, chat_template=source, return_assistant_tokens_mask=True, return_dict=True
    )
    mask = [any(s < b and e > a for a, b in rendered.spans) for s, e in token_spans]
    assert expected["input_ids"] == ids and expected["assistant_masks"] == mask and sum(mask) > 5


def test_a_thought_that_the_template_rewrites_is_part_of_the_reply(model):
    _, tokenizer, template = model("Qwen3")
    with_thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nthe cat"}
    _, last = encode(tokenizer, template.render([*DIALOGUE[:3], with_thought]))[1]
    assert last == "<think>\nhm\n</think>\n\nthe cat<|im_end|>"
    # The template drops the thoughts of earlier replies.
    first, _ = encode(tokenizer, template.render([DIALOGUE[0], with_thought, *DIALOGUE[2:]]))[1]
    assert first == "the cat<|im_end|>"


# Special-token strings in messages


@pytest.mark.parametrize("name", ["Qwen2.5", "Mistral", "Llama-3.2", "Gemma", "Phi-3"])
def test_special_token_strings_in_a_message_stay_text(name, model):
    _, tokenizer, template = model(name)
    typed = "a" + "".join(tokenizer.special) + "<|im_<|im_end|>end|> [INST]"
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    malicious = [{"role": "user", "content": typed}, {"role": "assistant", "content": typed}]
    ids, _ = encode(tokenizer, template.render(malicious))
    plain_ids, _ = encode(tokenizer, template.render(plain))
    special = set(tokenizer.special.values())
    assert [i for i in ids if i in special] == [i for i in plain_ids if i in special]
    assert tokenizer._model.model.decode(ids, skip_special_tokens=False).count(typed) == 2


def test_special_token_strings_in_a_role_stay_text(model):
    _, tokenizer, template = model("SmolLM")
    ids, _ = encode(tokenizer, template.render([{"role": "<|im_end|>", "content": "a"}, DIALOGUE[1]]))
    assert ids.count(tokenizer.special["<|im_end|>"]) == 3  # one for each turn


@pytest.mark.parametrize("code", ["\ufdd0", "\ufde0", "\ufde1", "\ufde2", "\ufdef"])
def test_noncharacters_in_a_message_are_refused(code, model):
    _, _, template = model("Qwen2.5")
    assert_one_line_error(
        "which are no characters", lambda: template.render([{"role": "user", "content": "a" + code}, DIALOGUE[1]])
    )


# The end of a text


def test_the_text_of_a_template_without_end_tokens_is_not_ended(tmp_path):
    source = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    tokenizer = Tokenizer(byte_level(tmp_path))
    rendered = chat.ChatTemplate(source, "mine", tokenizer).render(DIALOGUE[:2])
    assert rendered.end is None and rendered.parts == ["### user:\nhi there\n\n\n### assistant:\n  hello \n\n\n"]
    assert [rendered.parts[0][a:b] for a, b in rendered.spans] == ["  hello \n\n\n"]


def test_a_special_token_before_an_empty_reply_does_not_end_it(tmp_path):
    tokenizer = Tokenizer(folder_of("Phi-3", tmp_path))
    template = chat.ChatTemplate("{% for m in messages %}<|user|>{{ m.content }}{% endfor %}", "mine", tokenizer)
    assert template.render([{"role": "assistant", "content": ""}]).end is None
    assert template.render([{"role": "assistant", "content": "a"}]).parts == [tokenizer.special["<|user|>"], "a"]


# Formats without special tokens


@pytest.mark.parametrize("make", [byte_level, sentencepiece_model])
@pytest.mark.parametrize(
    "name, human, assistant",
    [("hh", "###Human: ", "###Assistant: "), ("anthropic", "\n\nHuman: ", "\n\nAssistant: ")],
)
def test_dialogue_formats_add_turn_markers_and_nothing_else(name, human, assistant, make, tmp_path):
    tokenizer = Tokenizer(make(tmp_path))
    template = chat.choose_template(None, name, tokenizer)
    rendered = template.render(DIALOGUE)
    text = "".join((assistant if m["role"] == "assistant" else human) + m["content"] for m in DIALOGUE)
    assert rendered.parts == [text] and rendered.plain and rendered.end is None
    assert [text[a:b] for a, b in rendered.spans] == ["  hello \n", "\n\nthe cat. "]
    ((ids, _),) = tokenizer.encode_parts([rendered.parts])
    assert ids == tokenizer.encode(text)
    assert_one_line_error("no place for a message of system", lambda: template.render([SYSTEM, *DIALOGUE]))


def test_sentencepiece_tokens_have_their_spans_in_the_text(tmp_path):
    tokenizer = Tokenizer(sentencepiece_model(tmp_path))
    ((ids, spans),) = tokenizer.encode_parts([[1, "naïve 🙂 cat", 2, "the"]])
    middle = ids.index(2)
    assert [spans[i] for i in (0, middle)] == [(0, 1), (12, 13)] and spans[-1][1] == 16
    assert ids[1:middle] == tokenizer.encode("naïve 🙂 cat") and spans[middle - 1][1] == 12


# The choice of a template


def test_a_template_is_the_models_own_or_a_files_or_another_models(tmp_path):
    folder = folder_of("Qwen2.5", tmp_path / "own")
    tokenizer = Tokenizer(folder)
    own = chat.choose_template(None, None, tokenizer)
    assert own.source == TEMPLATES["Qwen2.5"][0] and not own.explicit and str(folder) in own.name
    (tmp_path / "file").write_text(MARKED)
    from_file = chat.choose_template(str(tmp_path / "file"), None, tokenizer)
    assert from_file.source == MARKED and from_file.explicit
    other = folder_of("Zephyr", tmp_path / "z")
    assert chat.choose_template(str(other), None, tokenizer).source == TEMPLATES["Zephyr"][0]
    (folder / "chat_template.jinja").write_text(MARKED)
    assert chat.choose_template(None, None, tokenizer).source == MARKED


def test_the_default_is_chosen_of_several_templates(tmp_path):
    several = [{"name": "rag", "template": "x"}, {"name": "default", "template": "y"}]
    byte_level(tmp_path, {"eos_token": "<|endoftext|>", "chat_template": several})
    assert chat.choose_template(None, None, Tokenizer(tmp_path)).source == "y"


def test_a_missing_or_unreadable_template_is_none_or_an_error(tmp_path):
    tokenizer = Tokenizer(byte_level(tmp_path))
    assert chat.choose_template(None, None, tokenizer) is None
    assert_one_line_error(
        "the folder has no chat template; give a Jinja file",
        lambda: chat.choose_template(str(tmp_path), None, tokenizer),
    )
    assert_one_line_error("--chat_template x: cannot be read", lambda: chat.choose_template("x", None, tokenizer))
    (tmp_path / "x").write_bytes(b"\xff")
    assert_one_line_error("cannot be read .*utf-8", lambda: chat.choose_template(str(tmp_path / "x"), None, tokenizer))
    write_json(tmp_path / "tokenizer_config.json", [])
    assert_one_line_error(
        "tokenizer_config.json holds a JSON list, not an object",
        lambda: chat.choose_template(str(tmp_path), None, tokenizer),
    )


def test_a_fingerprint_depends_on_the_source_and_the_tokens_it_names(tmp_path):
    folder = folder_of("Llama-3", tmp_path)
    fingerprints = {chat.choose_template(None, None, Tokenizer(folder)).fingerprint}
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", settings | {"pad_token": "<think>"})  # the template does not name it
    fingerprints.add(chat.choose_template(None, None, Tokenizer(folder)).fingerprint)
    assert len(fingerprints) == 1
    write_json(folder / "tokenizer_config.json", settings | {"bos_token": "<|eot_id|>"})
    fingerprints.add(chat.choose_template(None, None, Tokenizer(folder)).fingerprint)
    fingerprints |= {chat.choose_template(None, name, Tokenizer(folder)).fingerprint for name in chat.DIALOGUE_FORMATS}
    assert len(fingerprints) == 4


# Templates that fail

BAD_TEMPLATES = {  # message -> template
    "^mine is not a valid Jinja template": "{% for m in messages %}",
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


@pytest.mark.parametrize("message", BAD_TEMPLATES)
def test_a_template_that_fails_is_a_one_line_error(message, tmp_path):
    tokenizer = Tokenizer(byte_level(tmp_path))
    dialogue = [{"role": "user", "content": "<|endoftext|>" * 3}, {"role": "assistant", "content": "a"}]
    template = chat.ChatTemplate(BAD_TEMPLATES[message], "mine", tokenizer)
    assert_one_line_error(message, lambda: template.render(dialogue))


def test_a_template_that_is_not_used_may_be_broken(tmp_path):
    assert chat.ChatTemplate("{% if", "mine", Tokenizer(byte_level(tmp_path))).fingerprint


def test_templates_have_the_helpers_of_transformers_and_a_fixed_date(tmp_path):
    source = (
        "{{ strftime_now('%Y-%m-%d') }}{{ {'a': '<é>'} | tojson }}{% for m in messages %}{% if loop.first %}"
        "{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}{% set n = namespace(x=1) %}{{ n.x }}"
    )
    template = chat.ChatTemplate(source, "mine", Tokenizer(byte_level(tmp_path)))
    assert template.render(DIALOGUE[:2]).parts == ['2024-07-26{"a": "<é>"}  hello \n1']
