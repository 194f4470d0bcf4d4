"""rm.data.backend: the ids of every kind of folder are those that transformers gives."""

import json
from pathlib import Path

import pytest

from rm.data import backend, sentencepiece_file
from rm.data.chat import choose_template
from rm.data.tokenizer import Tokenizer
from rm.hf.families import FAMILIES
from tests.text_fixtures import CORPUS, byte_level, llama_like, metaspace, sentencepiece_model, write_json

transformers = pytest.importorskip("transformers")

TEXTS = [*CORPUS[:4], "", " ", "a", " the cat", "  two  spaces ", "\n\nHuman:", " \n x", "tab\tand\r\nline", "🙂🙃",
         "the <sep>cat<sep> <x>", "I'm 123 they'll 45", "▁the", "e\u0301", "ﬁ Ａ"]  # fmt: skip
LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = LLAMA_2.replace("' ' + m['content'] + ' ' + eos_token", "' ' + m['content'] + eos_token + ' '")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)
DIALOGUE = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": " sat on <sep> the mat"},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "Paris  \n"},
]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA = NAMES | {"tokenizer_class": "LlamaTokenizer"}
# options of sentencepiece's trainer
BPE = {"user_defined_symbols": ["<sep>", "<x>"], "control_symbols": ["<ctl>"]}
UNIGRAM = {"model_type": "unigram", "vocab_size": 340}
NORMALIZING = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}


def added(*tokens: str, first: int) -> dict:
    """added_tokens_decoder of tokenizer_config.json."""
    flags = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    return {str(first + i): {"content": token} | flags for i, token in enumerate(tokens)}


def assert_same_ids(folder: Path, texts: list[str] = TEXTS) -> None:
    """Ids of plain texts and of dialogues, and what is put before and behind them, are those of transformers."""
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    bos = [] if ours.bos_id is None else [ours.bos_id]
    ends = (
        [theirs.eos_token_id] if json.loads((folder / "tokenizer_config.json").read_text()).get("add_eos_token") else []
    )
    expected = [theirs(text).input_ids for text in texts]
    assert [bos + ids + ends for ids in ours.encode_batch(texts)] == expected
    for template in (LLAMA_2, MISTRAL, CHATML):
        (folder / "chat_template.jinja").write_text(template)
        parts = choose_template(None, None, ours).render(DIALOGUE).parts
        ((ids, spans),) = ours.encode_parts([parts])
        text = theirs.apply_chat_template(DIALOGUE, chat_template=template, tokenize=False)
        their_ids = theirs(text, add_special_tokens=False).input_ids
        assert ids == their_ids[: len(ids)] and not theirs.decode(their_ids[len(ids) :]).strip("▁ \n")
        assert len(spans) == len(ids)


def model_type(folder: Path, name: str | None) -> None:
    if name is not None:
        write_json(folder / "config.json", {"model_type": name, "vocab_size": 400})


@pytest.mark.parametrize("legacy", [{}, {"legacy": True}, {"legacy": False}, {"legacy": None}], ids=str)
@pytest.mark.parametrize("options", [BPE, UNIGRAM, {"add_dummy_prefix": False}, NORMALIZING], ids=str)
@pytest.mark.parametrize("settings", [LLAMA, NAMES], ids=["LlamaTokenizer", "no class"])
def test_a_tokenizer_model_alone(settings, options, legacy, tmp_path):
    sentencepiece_model(tmp_path, settings | legacy | {"add_bos_token": True}, **options)
    model_type(tmp_path, "llama")
    assert_same_ids(tmp_path)


@pytest.mark.parametrize(
    "more",
    [{"add_prefix_space": False}, {"add_prefix_space": True, "legacy": True}, {"add_bos_token": False},
     {"add_bos_token": True, "add_eos_token": True}, {}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma", "phi3", "qwen2", None])
def test_the_settings_of_a_tokenizer_model_alone(family, more, tmp_path):
    sentencepiece_model(tmp_path, LLAMA | more, **BPE)
    model_type(tmp_path, family)
    assert_same_ids(tmp_path)


@pytest.mark.parametrize("more", [{}, {"legacy": True}, {"add_prefix_space": False, "add_bos_token": False}], ids=str)
@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "GemmaTokenizer",
                                  "GPT2Tokenizer", "PreTrainedTokenizerFast", None])  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma"])
def test_the_class_of_a_tokenizer_json(family, name, more, tmp_path):
    llama_like(tmp_path, NAMES | more | ({} if name is None else {"tokenizer_class": name}))
    model_type(tmp_path, family)
    assert_same_ids(tmp_path)


@pytest.mark.parametrize("more", [{}, {"add_prefix_space": True, "add_bos_token": True}], ids=str)
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "GPTNeoXTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer",
                                  "PreTrainedTokenizerFast"])  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen2"])
def test_the_class_of_a_byte_level_tokenizer_json(family, name, more, tmp_path):
    end = "<|endoftext|>"
    byte_level(tmp_path, {"tokenizer_class": name, "bos_token": end, "eos_token": end} | more)
    model_type(tmp_path, family)
    assert_same_ids(tmp_path)


@pytest.mark.parametrize("where", ["added_tokens_decoder", "added_tokens.json", "special_tokens_map.json"])
@pytest.mark.parametrize("settings", [LLAMA | {"legacy": False}, NAMES], ids=["LlamaTokenizer", "no class"])
def test_added_tokens(settings, where, tmp_path):
    sentencepiece_model(tmp_path, settings, **BPE)
    model_type(tmp_path, "llama")
    tokens = {"<|im_start|>": 400, "<|im_end|>": 401}
    if where == "added_tokens_decoder":
        write_json(tmp_path / "tokenizer_config.json", settings | {where: added(*tokens, first=400)})
    else:
        write_json(tmp_path / "added_tokens.json", tokens)
    if where == "special_tokens_map.json":
        write_json(
            tmp_path / where, {"additional_special_tokens": list(tokens), "eos_token": {"content": "<|im_end|>"}}
        )
    assert_same_ids(tmp_path)
    assert Tokenizer(tmp_path).eos_id == (401 if where == "special_tokens_map.json" else 2)


@pytest.mark.parametrize("strips", ["lstrip", "rstrip"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_special_tokens_strip_white_space_as_added_tokens_decoder_says(family, strips, tmp_path):
    """Phi 3 lists its special tokens, which strip what is behind them, in both files."""
    tokens = added("<|im_start|>", "<|im_end|>", first=296)
    for token in tokens.values():
        token[strips] = True
    llama_like(tmp_path, LLAMA | {"added_tokens_decoder": tokens})
    model_type(tmp_path, family)
    assert_same_ids(tmp_path)


def test_an_added_token_with_an_id_that_it_cannot_have_is_an_error(tmp_path):
    sentencepiece_model(tmp_path, LLAMA | {"added_tokens_decoder": added("<|im_end|>", first=500)})
    with pytest.raises(ValueError, match=r"'<\|im_end\|>' the id 500, but it gets the next free one, 400"):
        backend.make(tmp_path)


@pytest.mark.parametrize(
    "tokens", ["x", {"a": {"content": "x"}}, {"9": "x"}, {"9": {}}, {"9": {"content": 1}}], ids=str
)
def test_added_tokens_in_an_unknown_form_are_an_error_that_names_the_file(tokens, tmp_path):
    sentencepiece_model(tmp_path, LLAMA | {"added_tokens_decoder": tokens})
    with pytest.raises(ValueError, match="tokenizer_config.json: .*added_tokens_decoder"):
        backend.make(tmp_path)


@pytest.mark.parametrize("name", ["split_special_tokens", "fix_mistral_regex"])
def test_settings_that_split_texts_in_other_ways_are_refused(name, tmp_path):
    llama_like(tmp_path, NAMES | {name: True})
    model_type(tmp_path, "mistral")
    with pytest.raises(ValueError, match=f"tokenizer_config.json: {name} True is not implemented"):
        backend.make(tmp_path)


def test_the_class_of_every_family_is_that_of_transformers():
    auto = transformers.models.auto.tokenization_auto
    for family in FAMILIES:
        theirs = auto.TOKENIZER_MAPPING_NAMES.get(family)
        general = theirs in ("TokenizersBackend", "MistralCommonBackend")
        assert (family in backend.FILES_OWN_RULES) == general, family
        assert backend.REGISTERED.get(family) == (None if general else theirs), family


def test_every_class_of_transformers_is_implemented_or_refused_or_follows_the_file(tmp_path):
    names = set(transformers.models.auto.tokenization_auto.TOKENIZER_MAPPING_NAMES.values()) - {None}
    known = backend.CLASSES.keys() | backend.OTHER_CLASSES | {"TokenizersBackend", "ParakeetTokenizer"}
    assert {name.removesuffix("Fast") for name in names} - known == set()
    llama_like(tmp_path, NAMES | {"tokenizer_class": "T5TokenizerFast"})
    model_type(tmp_path, "llama")
    with pytest.raises(ValueError, match="tokenizer_class 'T5TokenizerFast' is not implemented"):
        backend.make(tmp_path)
    model_type(tmp_path, "mistral")  # where published files name wrong classes, and transformers ignores them
    assert_same_ids(tmp_path)


def test_an_unk_token_that_is_not_in_the_vocabulary_is_an_error(tmp_path):
    metaspace(tmp_path, NAMES | {"tokenizer_class": "GemmaTokenizer", "unk_token": "<unknown>"})
    with pytest.raises(ValueError, match="tokenizer.json: Unk token `<unknown>` not found in the vocabulary; correct"):
        backend.make(tmp_path)


@pytest.mark.parametrize("options", [BPE, UNIGRAM, NORMALIZING, {"bos_id": -1}], ids=str)
def test_a_sentencepiece_file_is_read_as_sentencepiece_reads_it(options, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    file = sentencepiece_model(tmp_path, **options) / "tokenizer.model"
    ours, theirs = sentencepiece_file.read(file), sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert ours.pieces == [theirs.id_to_piece(i) for i in range(len(theirs))]
    assert ours.scores == [theirs.get_score(i) for i in range(len(theirs))]
    control = [i for i, kind in enumerate(ours.types) if kind == sentencepiece_file.CONTROL]
    assert control == [i for i in range(len(theirs)) if theirs.is_control(i)]
    assert (ours.bos_id, ours.eos_id, ours.unk_id) == (theirs.bos_id(), theirs.eos_id(), theirs.unk_id())
