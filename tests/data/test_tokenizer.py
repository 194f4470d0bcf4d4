"""rm.data.tokenizer: ids equal to those of the original libraries, BOS and EOS by the folder's settings."""

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


def test_ids_equal_those_of_transformers(json_folder):
    transformers = pytest.importorskip("transformers")
    hf_tokenizer = transformers.AutoTokenizer.from_pretrained(json_folder)
    tokenizer = Tokenizer(json_folder)
    assert [with_bos(tokenizer, text) for text in TEXTS] == [hf_tokenizer(text).input_ids for text in TEXTS]
    assert tokenizer.eos_id == hf_tokenizer.eos_token_id


@given(text=st.text())
def test_byte_level_ids_decode_to_the_text(bytes_folder, text):
    backend = tokenizers.Tokenizer.from_file(str(bytes_folder / "tokenizer.json"))
    assert backend.decode(Tokenizer(bytes_folder).encode(text), skip_special_tokens=False) == text


@given(text=st.text(st.characters(exclude_characters="▁\x00", exclude_categories=["Cs"])))
def test_sentencepiece_ids_decode_to_the_text(piece_folder, text):
    backend = sentencepiece.SentencePieceProcessor(model_file=str(piece_folder / "tokenizer.model"))
    assert backend.decode(Tokenizer(piece_folder).encode(text)) == text


def test_encode_batch_equals_encode_of_each_text(json_folder, piece_folder):
    for folder in (json_folder, piece_folder):
        tokenizer = Tokenizer(folder)
        assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
        assert tokenizer.encode_batch([]) == []


def test_special_token_strings_in_a_text_stay_text(json_folder, piece_folder):
    for folder in (json_folder, piece_folder):
        tokenizer = Tokenizer(folder)
        for string in ("<|endoftext|>", "</s>", "<s>"):
            ids = tokenizer.encode(f"a{string}b")
            assert tokenizer.eos_id not in ids and tokenizer.bos_id not in ids and len(ids) > 3


def test_an_eos_listed_as_an_ordinary_added_token_stays_text(tmp_path):
    tokenizer = Tokenizer(byte_level(tmp_path, special=False))
    assert tokenizer.eos_id not in tokenizer.encode("a<|endoftext|>b")


def test_truncation_and_padding_of_the_file_are_disabled(tmp_path):
    byte_level(tmp_path)
    plain = Tokenizer(tmp_path).encode_batch(["a", "a b c d e f"])
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).encode_batch(["a", "a b c d e f"]) == plain


def test_bos_is_what_the_post_processor_of_a_tokenizer_json_adds(tmp_path):
    assert Tokenizer(byte_level(tmp_path / "a")).bos_id is None
    assert Tokenizer(llama_like(tmp_path / "b")).bos_id == 1


def test_add_bos_token_decides_for_a_tokenizer_model_alone(tmp_path):
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    for add_bos_token, expected in ((True, 1), (False, None), (None, None)):
        sentencepiece_model(tmp_path, config | {"add_bos_token": add_bos_token})
        assert Tokenizer(tmp_path).bos_id == expected


def test_add_bos_token_is_ignored_beside_a_tokenizer_json(tmp_path):
    for add_bos_token in (True, False):
        llama_like(tmp_path / "llama", {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": add_bos_token})
        assert Tokenizer(tmp_path / "llama").bos_id == 1
        end = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
        byte_level(tmp_path / "bytes", end | {"add_bos_token": add_bos_token})
        assert Tokenizer(tmp_path / "bytes").bos_id is None


def test_add_bos_token_without_a_bos_token_is_an_error(tmp_path):
    sentencepiece_model(tmp_path, {"add_bos_token": True}, bos_id=-1)
    with pytest.raises(ValueError, match="add_bos_token is set, but no BOS token is named"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("token", ["</s>", {"content": "</s>", "lstrip": False}])
def test_eos_is_the_token_named_in_tokenizer_config(token, tmp_path):
    llama_like(tmp_path, {"eos_token": token})
    write_json(tmp_path / "config.json", {"eos_token_id": 0})
    assert Tokenizer(tmp_path).eos_id == 2


@pytest.mark.parametrize("token", [None, ""])
@pytest.mark.parametrize("index, expected", [(7, 7), ([5, 6], 5)])
def test_eos_is_otherwise_the_first_id_in_config_json(token, index, expected, tmp_path):
    llama_like(tmp_path, {"eos_token": token})
    write_json(tmp_path / "config.json", {"eos_token_id": index})
    assert Tokenizer(tmp_path).eos_id == expected


def test_eos_is_otherwise_that_of_sentencepiece(tmp_path):
    sentencepiece_model(tmp_path, {})
    write_json(tmp_path / "config.json", {"eos_token_id": None})
    assert Tokenizer(tmp_path).eos_id == 2


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_eos_may_be_a_token_added_to_a_sentencepiece_model(file, tmp_path):
    sentencepiece_model(tmp_path)
    listed = {"added_tokens_decoder": {"400": {"content": "<|im_end|>"}}}
    config = {"eos_token": "<|im_end|>"} | (listed if file == "tokenizer_config.json" else {})
    write_json(tmp_path / "tokenizer_config.json", config)
    if file == "added_tokens.json":
        write_json(tmp_path / file, {"<|im_end|>": 400})
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (400, 401)


def test_a_folder_that_names_no_eos_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="names no EOS token; set eos_token"):
        Tokenizer(llama_like(tmp_path, {}))


def test_an_eos_that_is_not_in_the_vocabulary_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"eos_token '<\|im_end\|>' is not in the vocabulary"):
        Tokenizer(llama_like(tmp_path, {"eos_token": "<|im_end|>"}))


@pytest.mark.parametrize("index", ["2", 2.0, True, [], [None]])
def test_an_eos_token_id_that_is_no_id_is_an_error(index, tmp_path):
    llama_like(tmp_path, {})
    write_json(tmp_path / "config.json", {"eos_token_id": index})
    with pytest.raises(ValueError, match="eos_token_id|names no EOS"):
        Tokenizer(tmp_path)


def test_tokenizer_json_is_preferred_to_tokenizer_model(tmp_path):
    sentencepiece_model(tmp_path)
    llama_like(tmp_path)
    alone = Tokenizer(llama_like(tmp_path / "alone"))
    assert Tokenizer(tmp_path).encode("the cat") == alone.encode("the cat")


def test_vocab_size_covers_all_ids_that_can_occur(tmp_path):
    byte_level(tmp_path)
    before = Tokenizer(tmp_path).vocab_size
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert before == backend.get_vocab_size()  # EOS has the highest id
    backend.add_special_tokens(["<pad>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path).vocab_size == before
    backend.add_tokens(["wörd"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("wörd") == [before + 1] and tokenizer.vocab_size == before + 2


def test_the_vocabulary_is_that_of_the_original_libraries(json_folder, piece_folder):
    backend = tokenizers.Tokenizer.from_file(str(json_folder / "tokenizer.json"))
    assert Tokenizer(json_folder).vocabulary == backend.get_vocab()
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(piece_folder / "tokenizer.model"))
    vocabulary = Tokenizer(piece_folder).vocabulary
    assert vocabulary == {pieces.id_to_piece(i): i for i in range(len(pieces))} and vocabulary["</s>"] == 2


def test_an_adapter_without_a_tokenizer_is_an_error_here(tmp_path):
    base = byte_level(tmp_path / "base")
    write_json(tmp_path / "adapter_config.json", {"base_model_name_or_path": str(base)})
    with pytest.raises(ValueError, match="no tokenizer.json or tokenizer.model there"):
        Tokenizer(tmp_path)  # rm.hf.hub.tokenizer_folder finds the base's


def test_the_fingerprint_depends_on_what_determines_the_ids(tmp_path):
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    first = Tokenizer(llama_like(tmp_path, config)).fingerprint
    write_json(tmp_path / "tokenizer_config.json", config | {"chat_template": "new"})
    assert Tokenizer(tmp_path).fingerprint == first
    for change in ({"tokenizer_class": "LlamaTokenizer"}, {"eos_token": "<unk>"}):
        write_json(tmp_path / "tokenizer_config.json", config | change)
        assert Tokenizer(tmp_path).fingerprint != first
    assert Tokenizer(byte_level(tmp_path / "other")).fingerprint != first


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path):
    for folder in (tmp_path / "missing", "meta-llama/some-model"):
        with pytest.raises(ValueError, match=f"{folder}: no such folder"):
            Tokenizer(folder)
    with pytest.raises(ValueError, match=f"{tmp_path}: no tokenizer.json or tokenizer.model there; give"):
        Tokenizer(tmp_path)
    (tmp_path / "model").mkdir()  # tmp_path is the --output_dir of a run
    with pytest.raises(ValueError, match=f"did you mean {tmp_path}/model"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": {"type": "BPE"}}', "\xff"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_broken_tokenizer_file_is_an_error_that_names_it(name, content, tmp_path):
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=f"{name}: .*not readable"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_a_broken_settings_file_is_an_error_that_names_it(name, content, tmp_path):
    llama_like(tmp_path, {})
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=f"/{name} (is not JSON|holds a JSON list)"):
        Tokenizer(tmp_path)
