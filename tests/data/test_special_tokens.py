"""rm.data.special_tokens: which strings of a template count as special tokens, and that they are added."""

import pytest
import transformers

from rm.data.chat import DIALOGUE_FORMATS, ChatTemplate
from rm.data.dataset import TextSettings
from rm.data.special_tokens import TokenizerSettings, split_tokens, tokenizer_for
from rm.data.tokenizer import Tokenizer
from tests.templates import TEMPLATES
from tests.text_fixtures import byte_level, llama_like, sentencepiece_model, write_json

EXPECTED = {
    "Qwen2.5": ["<|im_start|>", "<|im_end|>"],
    "Llama-3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "Gemma": ["<start_of_turn>", "<end_of_turn>"],
    "Phi-3": ["<|system|>", "<|end|>", "<|user|>", "<|assistant|>"],
    "Zephyr": ["<|system|>", "<|user|>", "<|assistant|>"],
    "Llama-2": [],  # [INST] and <<SYS>> are text
    "Mistral": [],
}
DEEPSEEK = "{% for m in messages %}{{ '<｜' + m.role + '｜>' + m.content }}{% endfor %}"
THINK = "{% for m in messages %}<|im_start|>{{ '<think>\n\n</think>' + m.content }}</s>{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return byte_level(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("name", EXPECTED)
def test_the_tokens_of_a_template_that_a_base_model_lacks(name, folder):
    tokenizer = Tokenizer(folder)
    assert set(split_tokens(ChatTemplate(TEMPLATES[name][0], name, tokenizer), tokenizer)) >= set(EXPECTED[name])
    extra = set(split_tokens(ChatTemplate(TEMPLATES[name][0], name, tokenizer), tokenizer)) - set(EXPECTED[name])
    assert extra <= {"<|begin_of_text|>"}


@pytest.mark.parametrize("source, expected", [
    (DEEPSEEK, ["<｜system｜>", "<｜user｜>", "<｜assistant｜>"]), (THINK, ["<|im_start|>", "</s>"]),
    (DIALOGUE_FORMATS["hh"], []), ("{{ 1 / 0 }}", []), ("{{ messages[0].content }}<|endoftext|>", []),
])  # fmt: skip
def test_markup_and_tokens_that_the_tokenizer_has_are_none(source, expected, folder):
    tokenizer = Tokenizer(folder)
    assert split_tokens(ChatTemplate(source, "it", tokenizer), tokenizer) == expected


@pytest.mark.parametrize("make", [byte_level, llama_like, sentencepiece_model])
def test_added_tokens_get_the_next_ids_and_are_parsed_from_templates_alone(make, tmp_path):
    make(tmp_path)
    before = Tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path, ["<|im_start|>", "<|im_end|>", "</s>"])
    first = max(before.vocabulary.values()) + 1
    new = 2 if "</s>" in before.vocabulary else 3
    assert tokenizer.new_ids == [*range(first, first + new)] and tokenizer.vocab_size == first + new
    assert tokenizer.special["<|im_end|>"] == first + 1 and tokenizer.fingerprint != before.fingerprint
    assert tokenizer.encode("the <|im_end|>") == before.encode("the <|im_end|>")
    assert tokenizer.encode_parts([["the", first + 1]])[0][0][-1] == first + 1


def test_a_piece_of_the_vocabulary_becomes_special_and_gets_no_new_row(tmp_path):
    for make in (llama_like, sentencepiece_model):
        folder = make(tmp_path / make.__name__, {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"})
        write_json(folder / "config.json", {"model_type": "llama", "vocab_size": 400})
        tokenizer = Tokenizer(folder, ["▁the"])
        assert tokenizer.new_ids == [] and tokenizer.special["▁the"] == Tokenizer(folder).vocabulary["▁the"]
        tokenizer.write_new_tokens(folder)
        assert Tokenizer(folder).special == tokenizer.special


def test_named_tokens_and_those_of_the_template_are_added(folder, tmp_path, capsys):
    (tmp_path / "chatml.jinja").write_text(TEMPLATES["Qwen2.5"][0])
    text = TextSettings(chat_template=str(tmp_path / "chatml.jinja"))
    tokenizer = tokenizer_for(folder, TokenizerSettings(add_special_tokens=("<tool>", "auto", "<tool>")), text)
    assert {"<tool>", "<|im_start|>", "<|im_end|>"} <= tokenizer.special.keys() and len(tokenizer.new_ids) == 3
    assert "warning" not in capsys.readouterr().out
    tokenizer = tokenizer_for(folder, TokenizerSettings(add_special_tokens=("<|im_end|>",)), text)
    assert len(tokenizer.new_ids) == 1
    assert "writes <|im_start|>, which the tokenizer splits" in capsys.readouterr().out


def test_auto_without_a_template_is_an_error(folder):
    with pytest.raises(ValueError, match="--add_special_tokens auto: .* has no chat template"):
        tokenizer_for(folder, TokenizerSettings(add_special_tokens=("auto",)), TextSettings())


def test_a_token_with_white_space_around_it_is_an_error():
    with pytest.raises(ValueError, match="begins or ends with white space"):
        TokenizerSettings(add_special_tokens=(" <|x|>",))


LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
DECODER = {"added_tokens_decoder": {"2": {"content": "</s>", "special": True, "normalized": False}}}


@pytest.mark.parametrize("make", [llama_like, sentencepiece_model])
@pytest.mark.parametrize("config", [LLAMA, LLAMA | DECODER, {"tokenizer_class": "LlamaTokenizer"}], ids=str)
def test_written_tokens_are_read_by_transformers_as_here(config, make, tmp_path):
    make(tmp_path, config)
    write_json(tmp_path / "config.json", {"model_type": "llama", "vocab_size": 400})
    if "bos_token" not in config:  # the form of transformers before added_tokens_decoder
        write_json(tmp_path / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"}})
    tokenizer = Tokenizer(tmp_path, ["<|im_start|>", "<|im_end|>"])
    tokenizer.write_new_tokens(tmp_path)
    theirs, again = transformers.AutoTokenizer.from_pretrained(tmp_path), Tokenizer(tmp_path)
    start, end = tokenizer.new_ids
    assert theirs.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [start, end]
    text = "<|im_start|>user\n the cat<|im_end|>\n"
    parts = [start, "user\n the cat", end, "\n"]
    expected = theirs(text, add_special_tokens=False).input_ids
    assert tokenizer.encode_parts([parts])[0][0] == again.encode_parts([parts])[0][0] == expected
    assert theirs.decode(expected, skip_special_tokens=True).count("<|") == 0
    assert again.special == tokenizer.special and again.new_ids == []
