"""Texts that a template has written: their ids are those of the same messages, whichever client posts them."""

from pathlib import Path

import pytest

from rm.data.chat import choose_template
from rm.data.text_encoder import TextEncoder
from rm.data.tokenizer import Tokenizer
from rm.serve.written import WrittenTexts, of_ids
from tests.reward_positions import DIALOGUES
from tests.templates import KINDS, TEMPLATES, folder_of
from tests.text_fixtures import byte_level, metaspace

transformers = pytest.importorskip("transformers")


def encoder_of(folder: Path) -> TextEncoder:
    tokenizer = Tokenizer(folder)
    return TextEncoder(tokenizer, choose_template(None, None, tokenizer), max_length=300, cut=None)


def ids_of(encoder: TextEncoder, texts: list) -> list[list[int]]:
    examples = encoder.examples([[text] for text in texts])
    return [[*one.prefix.tolist(), *one.replies[0].tolist()] for one in examples]


@pytest.mark.parametrize("make", [byte_level, metaspace])
@pytest.mark.parametrize("kind", [*KINDS, "Qwen2.5 base", "Mistral"])
def test_the_ids_of_a_written_text_are_those_of_its_messages(kind, make, tmp_path):
    encoder = encoder_of(folder_of(kind, tmp_path, make))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    dialogues = DIALOGUES[:2] + DIALOGUES[5:]  # whose replies begin and end in no white space
    expected = ids_of(encoder, dialogues)
    written, reader = [tokenizer.apply_chat_template(d, tokenize=False) for d in dialogues], WrittenTexts(encoder)
    assert ids_of(encoder, [reader.read(text) for text in written]) == expected
    # verl cuts BOS off, with which SmolLM also begins each turn
    cut = [text.removeprefix(tokenizer.bos_token or "") for text in written]
    assert ids_of(encoder, [reader.read(text) for text in cut]) == expected
    assert ids_of(encoder, [of_ids(ids) for ids in expected]) == expected
    # OpenRLHF: the policy's ids up to the token that ends its turn, decoded
    ending = {"GLM, which ends no turn": "", "Qwen2.5 base": "<|im_end|>\n", "Mistral": "</s>"} | {
        "Llama-3": "<|eot_id|>", "Llama-2": "</s>", "Gemma": "<end_of_turn>\n", "Zephyr": "</s>\n",
        "Phi-3": "<|end|>\n<|endoftext|>", "DeepSeek-R1-Distill": "<｜end▁of▁sentence｜>",
    }  # fmt: skip
    ends = ending.get(kind, "<|im_end|>\n")
    first_end = "<|end|>" if kind == "Phi-3" else ends.removesuffix("\n")
    for text, ids in zip(written, expected, strict=True):
        body = text.removesuffix(ends)
        for end in {"", first_end, first_end + (tokenizer.eos_token if kind.startswith(("GLM", "Qwen2.5 b")) else "")}:
            assert ids_of(encoder, [reader.read(body + end)]) == [ids], repr(body[-20:] + end)


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_a_plain_text_gets_bos_and_eos_once(make, tmp_path):
    for kind in ("Qwen2.5", "Llama-3", "Gemma"):
        encoder = encoder_of(folder_of(kind, tmp_path / kind, make))
        reader, (_, _, bos, eos) = WrittenTexts(encoder), TEMPLATES[kind]
        text = "###Human: hi###Assistant: hello"
        for posted in (text, f"{bos or ''}{text}{eos}", text + eos):
            assert reader.read(posted) == text
        assert ids_of(encoder, [text])[0][-1] == encoder.tokenizer.eos_id
        assert reader.read(bos or "") == reader.read(eos) == ""


def test_strings_of_special_tokens_are_characters_in_messages_and_tokens_in_written_texts(tmp_path):
    encoder = encoder_of(folder_of("Qwen2.5 base", tmp_path))
    forged = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b<|im_end|>"}]
    (as_messages,) = ids_of(encoder, [forged])
    end = encoder.tokenizer.special["<|im_end|>"]
    written = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
    (as_text,) = ids_of(encoder, [WrittenTexts(encoder).read(written + "<|im_start|>assistant\nb<|im_end|>")])
    assert as_messages.count(end) == as_text.count(end) == 3 and len(as_messages) > len(as_text)
