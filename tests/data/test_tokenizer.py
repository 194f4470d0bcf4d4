"""The tokenizer: ids of the model's own library, BOS and EOS as its folder says, text that stays text."""

import json

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from rm.data.tokenizer import Tokenizer
from tests.text_fixtures import CORPUS, byte_level, llama_like, sentencepiece_model, write_json

TEXTS = [
    *CORPUS[:4],
    "",
    " ",
    "a",
    "  two  spaces ",
    "\n\nHuman:",
    "tab\tand\r\nline",
    "the" * 9,
    "\x00",
    "🙂🙃",
]


@pytest.fixture(scope="module", params=[byte_level, llama_like], ids=["byte-level", "llama-like"])
def json_folder(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("json"))


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory):
    return byte_level(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def piece_folder(tmp_path_factory):
    return sentencepiece_model(tmp_path_factory.mktemp("pieces"))


def with_bos(tokenizer, text):
    return ([] if tokenizer.bos_id is None else [tokenizer.bos_id]) + tokenizer.encode(text)


def test_ids_are_those_of_transformers(json_folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(json_folder)
    ours = Tokenizer(json_folder)
    assert [with_bos(ours, text) for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]
    assert ours.eos_id == theirs.eos_token_id


@pytest.mark.parametrize("asks", [True, False])
def test_add_bos_token_agrees_with_transformers_where_the_files_agree(asks, tmp_path):
    transformers = pytest.importorskip("transformers")
    make = llama_like if asks else byte_level
    config = json.loads((make(tmp_path) / "tokenizer_config.json").read_text()) | {"add_bos_token": asks}
    write_json(tmp_path / "tokenizer_config.json", config)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer(tmp_path)
    assert (ours.bos_id is not None) == asks
    assert [with_bos(ours, text) for text in TEXTS] == [theirs(text).input_ids for text in TEXTS]


@given(text=st.text())
def test_any_text_comes_back_from_its_bytes(bytes_folder, text):
    backend = tokenizers.Tokenizer.from_file(str(bytes_folder / "tokenizer.json"))
    assert backend.decode(Tokenizer(bytes_folder).encode(text), skip_special_tokens=False) == text


@given(text=st.text(st.characters(exclude_characters="▁\x00", exclude_categories=["Cs"])))
def test_any_text_comes_back_from_sentencepiece(piece_folder, text):
    backend = sentencepiece.SentencePieceProcessor(model_file=str(piece_folder / "tokenizer.model"))
    assert backend.decode(Tokenizer(piece_folder).encode(text)) == text


def test_a_batch_is_the_texts_one_by_one(json_folder, piece_folder):
    for folder in (json_folder, piece_folder):
        tokenizer = Tokenizer(folder)
        assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
        assert tokenizer.encode_batch([]) == []


def test_special_strings_in_a_text_stay_text(json_folder, piece_folder):
    for folder in (json_folder, piece_folder):
        tokenizer = Tokenizer(folder)
        for string in ("<|endoftext|>", "</s>", "<s>"):
            ids = tokenizer.encode(f"a{string}b")
            assert tokenizer.eos_id not in ids and tokenizer.bos_id not in ids and len(ids) > 3


def test_an_eos_listed_as_an_ordinary_added_token_stays_text(tmp_path):
    tokenizer = Tokenizer(byte_level(tmp_path, special=False))
    assert tokenizer.eos_id not in tokenizer.encode("a<|endoftext|>b")


def test_truncation_and_padding_stored_in_the_file_are_off(tmp_path):
    byte_level(tmp_path)
    plain = Tokenizer(tmp_path).encode_batch(["a", "a b c d e f"])
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).encode_batch(["a", "a b c d e f"]) == plain


def test_bos_follows_the_post_processor_of_a_tokenizer_json(tmp_path):
    assert Tokenizer(byte_level(tmp_path / "a")).bos_id is None
    assert Tokenizer(llama_like(tmp_path / "b")).bos_id == 1


@pytest.mark.parametrize("make", [llama_like, sentencepiece_model])
def test_add_bos_token_wins_over_the_model_file(make, tmp_path):
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": False}
    assert Tokenizer(make(tmp_path, config)).bos_id is None
    write_json(tmp_path / "tokenizer_config.json", config | {"add_bos_token": True})
    assert Tokenizer(tmp_path).bos_id == 1
    write_json(tmp_path / "tokenizer_config.json", config | {"add_bos_token": None})
    assert Tokenizer(tmp_path).bos_id == 1


def test_add_bos_token_gives_a_bos_to_a_model_file_without_one(tmp_path):
    config = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "add_bos_token": True}
    tokenizer = Tokenizer(byte_level(tmp_path, config))
    assert tokenizer.bos_id == tokenizer.eos_id


def test_asking_for_bos_without_naming_one_is_an_error(tmp_path):
    byte_level(tmp_path, {"bos_token": None, "eos_token": "<|endoftext|>", "add_bos_token": True})
    with pytest.raises(ValueError, match="asks for BOS but names none"):
        Tokenizer(tmp_path)


def test_a_sentencepiece_model_opens_and_ends_documents_by_its_own_ids(piece_folder):
    tokenizer = Tokenizer(piece_folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)


def test_a_sentencepiece_model_without_bos_has_none(tmp_path):
    assert Tokenizer(sentencepiece_model(tmp_path, bos_id=-1)).bos_id is None


@pytest.mark.parametrize("token", ["</s>", {"content": "</s>", "lstrip": False}])
def test_eos_is_named_by_the_tokenizer_config(token, tmp_path):
    llama_like(tmp_path, {"eos_token": token})
    write_json(tmp_path / "config.json", {"eos_token_id": 0})
    assert Tokenizer(tmp_path).eos_id == 2


@pytest.mark.parametrize("token", [None, ""])
@pytest.mark.parametrize("index, expected", [(7, 7), ([5, 6], 5)])
def test_eos_is_otherwise_the_id_or_the_first_id_of_config_json(token, index, expected, tmp_path):
    llama_like(tmp_path, {"eos_token": token})
    write_json(tmp_path / "config.json", {"eos_token_id": index})
    assert Tokenizer(tmp_path).eos_id == expected


def test_a_null_eos_in_config_json_leaves_it_to_sentencepiece(tmp_path):
    sentencepiece_model(tmp_path, {})
    write_json(tmp_path / "config.json", {"eos_token_id": None})
    assert Tokenizer(tmp_path).eos_id == 2


@pytest.mark.parametrize("place", ["added_tokens.json", "tokenizer_config.json"])
def test_eos_may_be_a_token_added_beside_a_sentencepiece_model(place, tmp_path):
    sentencepiece_model(tmp_path)
    listed = {"added_tokens_decoder": {"500": {"content": "<|im_end|>"}}}
    config = {"eos_token": "<|im_end|>"} | (listed if place == "tokenizer_config.json" else {})
    write_json(tmp_path / "tokenizer_config.json", config)
    if place == "added_tokens.json":
        write_json(tmp_path / place, {"<|im_end|>": 500})
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (500, 501)


def test_a_folder_that_names_no_eos_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="names no EOS token; set eos_token"):
        Tokenizer(llama_like(tmp_path, {}))


def test_an_eos_that_is_not_in_the_vocabulary_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"eos_token '<\|im_end\|>' is not in the vocabulary"):
        Tokenizer(llama_like(tmp_path, {"eos_token": "<|im_end|>"}))


@pytest.mark.parametrize("index", ["2", 2.0, True, [], [None]])
def test_an_eos_id_that_is_no_id_is_an_error(index, tmp_path):
    llama_like(tmp_path, {})
    write_json(tmp_path / "config.json", {"eos_token_id": index})
    with pytest.raises(ValueError, match="eos_token_id|names no EOS"):
        Tokenizer(tmp_path)


def test_tokenizer_json_is_preferred(tmp_path):
    sentencepiece_model(tmp_path)
    llama_like(tmp_path)
    alone = Tokenizer(llama_like(tmp_path / "alone"))
    assert Tokenizer(tmp_path).encode("the cat") == alone.encode("the cat")


def test_vocab_size_covers_what_can_occur_and_not_unused_special_tokens(tmp_path):
    byte_level(tmp_path)
    before = Tokenizer(tmp_path).vocab_size
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert before == backend.get_vocab_size()  # the end of a document has the last id
    backend.add_special_tokens(["<pad>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).vocab_size == before
    backend.add_tokens(["wörd"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("wörd") == [before + 1] and tokenizer.vocab_size == before + 2


def test_the_fingerprint_changes_with_the_ids_and_with_nothing_else(tmp_path):
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    first = Tokenizer(llama_like(tmp_path, config)).fingerprint
    write_json(tmp_path / "tokenizer_config.json", config | {"chat_template": "new"})
    assert Tokenizer(tmp_path).fingerprint == first
    for change in ({"add_bos_token": False}, {"eos_token": "<unk>"}):
        write_json(tmp_path / "tokenizer_config.json", config | change)
        assert Tokenizer(tmp_path).fingerprint != first
    assert Tokenizer(byte_level(tmp_path / "other")).fingerprint != first


def test_a_folder_without_a_tokenizer_names_the_files_looked_for(tmp_path):
    for folder in (tmp_path, tmp_path / "missing", "meta-llama/some-model"):
        with pytest.raises(ValueError, match=f"{folder}: no tokenizer.json or tokenizer.model there"):
            Tokenizer(folder)


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": {"type": "BPE"}}', "\xff"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_broken_tokenizer_file_is_named(name, content, tmp_path):
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=f"{name}: .*not readable"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_a_broken_settings_file_is_named(name, content, tmp_path):
    llama_like(tmp_path, {})
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=f"/{name} (is not JSON|holds a JSON list)"):
        Tokenizer(tmp_path)
