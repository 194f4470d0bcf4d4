"""Makes tiny tokenizers: a byte-level BPE like GPT-2's, a LLaMA-like BPE, a sentencepiece model."""

import io
import json
from pathlib import Path

import sentencepiece
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "Human: how do I boil an egg?\n\nAssistant: put it in boiling water for seven minutes.",
    "Human: what is the capital of France?\n\nAssistant: the capital of France is Paris.",
    "the cat sat on the mat, and the other cat sat on the other mat; 0123456789",
    "naïve café, größer, 你好, emoji 🙂",
] * 5


def write_json(file: Path, value) -> None:
    file.write_text(json.dumps(value), encoding="utf-8")


def byte_level(folder: Path, config: dict | None = None, special: bool = True) -> Path:
    """Make a folder like GPT-2's: byte-level BPE, no BOS, one special token that ends a document.

    Args:
        config: of tokenizer_config.json.
        special: whether tokenizer.json lists the end token as special.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    end = AddedToken("<|endoftext|>", special=special, normalized=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(CORPUS, trainer)
    model.add_tokens([end])
    model.save(str(folder / "tokenizer.json"))
    default = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", default if config is None else config)
    return folder


def llama_like(folder: Path, config: dict | None = None) -> Path:
    """Make a folder like LLaMA's: BPE with byte fallback over ▁ pieces, and a post-processor that prepends <s>."""
    folder.mkdir(parents=True, exist_ok=True)
    special = ["<unk>", "<s>", "</s>"]
    pieces = special + [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *"abcdefghijklmnopqrstuvwxyz.,:<>/"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("a", "t")]
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    model = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model.add_special_tokens(special)
    model.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    model.save(str(folder / "tokenizer.json"))
    default = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    write_json(folder / "tokenizer_config.json", default if config is None else config)
    return folder


def metaspace(folder: Path, config: dict | None = None) -> Path:
    """Make a folder like Mistral's or Gemma's: BPE over ▁ pieces; a character that it does not know becomes <unk>."""
    folder.mkdir(parents=True, exist_ok=True)
    model = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    model.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>", "<|endoftext|>"]
    model.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    model.save(str(folder / "tokenizer.json"))
    default = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    write_json(folder / "tokenizer_config.json", default if config is None else config)
    return folder


def sentencepiece_model(folder: Path, config: dict | None = None, **options) -> Path:
    """Make a folder like LLaMA 1's: a sentencepiece BPE with byte fallback; <unk> 0, <s> 1, </s> 2."""
    folder.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    default = dict(
        vocab_size=400,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, **default | options)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    if config is not None:
        write_json(folder / "tokenizer_config.json", config)
    return folder
