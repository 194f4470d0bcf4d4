"""Makes the `tokenizers` object of a model's folder by the rules of transformers 5, so that the ids are the same.

A tokenizer.json is a complete tokenizer. A tokenizer.model (sentencepiece) has a vocabulary and a few settings. Which
of them counts is decided by the *class* that tokenizer_config.json names: some classes of transformers take only the
vocabulary from either file and split texts by rules of their own, which `legacy` and `add_prefix_space` change.
`CLASSES` has those that the supported families use; `OTHER_CLASSES` are refused; every other name follows the file.

Source: transformers 5.24, models/auto/tokenization_auto.py (which class), tokenization_utils_tokenizers.py,
convert_slow_tokenizer.py and models/*/tokenization_*.py.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from rm.data import sentencepiece_file, tokenizer_config
from rm.data.sentencepiece_file import CONTROL, NORMAL, USER_DEFINED, SentencePieceModel

SPACE = "\u2581"  # stands for a space in the pieces of sentencepiece
FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Backend:
    """The tokenizer of a folder, as the `tokenizers` library has it.

    Attributes:
        file: the tokenizer.json or tokenizer.model.
        model: its post-processor is not used.
        settings: of tokenizer_config.json, with the defaults of its class.
        class_name: a key of CLASSES; None: the file's own rules.
        adds_bos: whether transformers puts BOS before every text.
        bos: that token; None if no token is named.
    """

    file: Path
    model: Tokenizer
    settings: dict
    class_name: str | None
    adds_bos: bool
    bos: str | None


def make(folder: Path) -> Backend:
    """The backend of a folder.

    Raises:
        ValueError: a file is missing or broken, or gives an added token an id that it cannot have.
    """
    if (folder / "tokenizer.json").is_file():
        return _from_json_file(folder, folder / "tokenizer.json")
    if (folder / "tokenizer.model").is_file():
        return _from_model_file(folder, folder / "tokenizer.model")
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the folder of a model, or a hub id such as org/name")
    trained = folder / "model"  # in the --output_dir of a run
    advice = f"did you mean {trained}?" if trained.is_dir() else "give the folder of a model with one"
    raise ValueError(f"{folder}: no tokenizer.json or tokenizer.model there; {advice}")


def _from_json_file(folder: Path, file: Path) -> Backend:
    settings, tokenizer = read_settings(folder), _read_json(file)
    is_byte_level = "ByteLevel" in repr(tokenizer.pre_tokenizer) or "ByteLevel" in repr(tokenizer.decoder)
    name = _class_name(folder, settings, is_byte_level)
    if not isinstance(tokenizer.model, models.BPE):
        name = None
    settings = _defaults(name, tokenizer) | settings
    if name is not None:
        CLASSES[name](tokenizer, settings)
    _add_tokens(tokenizer, folder, settings)
    _check_unknown(tokenizer, file)
    # The file's post-processor decides about BOS: add_bos_token is ignored, as in transformers.
    bos = _first_of_post_processor(tokenizer)
    if name in OWN_BOS:
        bos = content(settings.get("bos_token")) if OWN_BOS[name] else None
    return Backend(file, tokenizer, settings, name, bos is not None, bos)


def _from_model_file(folder: Path, file: Path) -> Backend:
    settings, model = read_settings(folder), sentencepiece_file.read(file)
    name = _class_name(folder, settings, is_byte_level=False)
    if name is None:
        tokenizer = _from_sentencepiece(model, folder, settings)
    else:
        vocabulary = {piece: i for i, piece in enumerate(model.pieces)}
        tokenizer = Tokenizer(models.BPE(vocabulary, _merges_by_id(vocabulary)))
    own = {"bos_token": model.piece(model.bos_id), "eos_token": model.piece(model.eos_id)}
    settings = own | {"unk_token": model.piece(model.unk_id)} | _defaults(name, tokenizer) | settings
    if name is not None:
        CLASSES[name](tokenizer, settings)
    # `_from_sentencepiece` has seen to user-defined pieces.
    special_types = (CONTROL,) if name is None else (CONTROL, USER_DEFINED)
    if {"extra_special_tokens", "additional_special_tokens"} & tokenizer_config.read(folder).keys():
        special_types = ()  # the settings list them all
    pieces = [
        AddedToken(piece, normalized=False, special=kind == CONTROL)
        for piece, kind in zip(model.pieces, model.types, strict=True)
        if kind in special_types
    ]
    before_normalization = name is None and model.add_dummy_prefix
    _add_tokens(tokenizer, folder, settings, pieces, before_normalization)
    _check_unknown(tokenizer, file)
    bos = content(settings.get("bos_token"))
    return Backend(file, tokenizer, settings, name, bool(settings.get("add_bos_token")), bos)


def content(token) -> str | None:
    """The string of a token in tokenizer_config.json, None if there is none.

    A token is a string, {"content": string}, null, or (LLaMA 1) an empty string.
    """
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def read_settings(folder: Path) -> dict:
    """tokenizer_config.json, with special_tokens_map.json where it is of a time before `added_tokens_decoder`.

    Raises:
        ValueError: a setting splits texts in a way that is not implemented.
    """
    file, config = folder / "tokenizer_config.json", tokenizer_config.read_model_config(folder)
    settings, refused = tokenizer_config.read(folder), ["split_special_tokens"]
    if config.get("model_type") in ("ministral", "mistral", "mistral3") and not str(
        config.get("transformers_version", "")
    ).startswith("5"):
        refused.append("fix_mistral_regex")  # without effect elsewhere
    for name in refused:
        if settings.get(name):
            raise ValueError(f"{file}: {name} {settings[name]!r} is not implemented: it splits texts in another way")
    if settings.get("added_tokens_decoder") is None:
        settings.pop("added_tokens_decoder", None)
        settings |= tokenizer_config.read_special_tokens_map(folder)
    # LLaMA 1 has empty strings for tokens that are not named.
    return {name: value for name, value in settings.items() if name not in NAMES or content(value) is not None}


def _class_name(folder: Path, settings: dict, is_byte_level: bool) -> str | None:
    """The class that transformers chooses, if it is in CLASSES; None: the file's own rules."""
    config = tokenizer_config.read_model_config(folder)
    model_type = config.get("model_type")
    declared = settings.get("tokenizer_class") or config.get("tokenizer_class")
    name = declared.removesuffix("Fast") if isinstance(declared, str) else None
    if model_type in FILES_OWN_RULES:  # published files name wrong classes
        name = None
    elif model_type == "qwen2" or name is None:
        name = REGISTERED.get(model_type)
    elif name == "LlamaTokenizer" and is_byte_level:  # Llama 3 calls itself so
        name = None
    elif name in OTHER_CLASSES:
        raise ValueError(
            f"{folder}: tokenizer_class {declared!r} is not implemented: in transformers it splits texts by rules of "
            f"its own. If the model was trained with those of its tokenizer.json, set it to PreTrainedTokenizerFast"
        )
    return name if name in CLASSES else None


# The families whose class in transformers is the general one, whatever a file declares.
FILES_OWN_RULES = set(
    "glm4 granite granitemoehybrid internlm2 ministral ministral3 mistral mistral3 olmo2 olmo3 phi3 stablelm".split()
)
REGISTERED = {  # model_type -> class
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "gpt2": "GPT2Tokenizer",
    "gpt_neo": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "starcoder2": "GPT2Tokenizer",
}


def _llama(tokenizer: Tokenizer, settings: dict) -> None:
    prefix = "always" if settings.get("legacy") else "first"
    if settings.get("add_prefix_space") not in (None, True):
        prefix = "never"
    _set_model(tokenizer, byte_fallback=True, fuse_unk=True)
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=prefix, split=False)


def _code_llama(tokenizer: Tokenizer, settings: dict) -> None:
    _llama(tokenizer, settings | {"legacy": False})
    tokenizer.model.unk_token = content(settings.get("unk_token")) or "<unk>"


def _gemma(tokenizer: Tokenizer, settings: dict) -> None:
    _set_model(tokenizer, byte_fallback=True, fuse_unk=True, unk_token=content(settings.get("unk_token")) or "<unk>")
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")


def _gpt2(tokenizer: Tokenizer, settings: dict) -> None:
    _set_model(tokenizer)
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space")))


def _gpt_neox(tokenizer: Tokenizer, settings: dict) -> None:
    _gpt2(tokenizer, settings)
    tokenizer.normalizer = normalizers.NFC()


def _qwen2(tokenizer: Tokenizer, settings: dict) -> None:
    _set_model(tokenizer)
    tokenizer.normalizer = normalizers.NFC()
    bytes_only = pre_tokenizers.ByteLevel(bool(settings.get("add_prefix_space")), use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"), bytes_only])


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _set_model(tokenizer: Tokenizer, **options) -> None:
    """Set the options of a BPE; those that are not given are off."""
    off = {"byte_fallback": False, "fuse_unk": False, "unk_token": None, "ignore_merges": False, "dropout": None}
    for option, value in (off | options).items():
        setattr(tokenizer.model, option, value)


# A class changes how a tokenizer's BPE splits texts.
CLASSES: dict[str, Callable[[Tokenizer, dict], None]] = {
    "CodeLlamaTokenizer": _code_llama,
    "GemmaTokenizer": _gemma,
    "GPT2Tokenizer": _gpt2,
    "GPTNeoXTokenizer": _gpt_neox,
    "LlamaTokenizer": _llama,
    "Qwen2Tokenizer": _qwen2,
}
# The other classes of transformers with rules of their own. A name that it does not know follows the file there, too.
OTHER_CLASSES = {
    f"{name}Tokenizer"
    for name in """
        Albert Bart Barthez Bartpho Bert BertGeneration BertJapanese Bertweet BigBird BioGpt Blenderbot BlenderbotSmall
        ByT5 CLIP CTRL Camembert Canine Clvp Cohere Cpm CpmAnt DPRQuestionEncoder Deberta DebertaV2 Dia Esm Esmc FNet
        FSMT Flaubert Funnel GPTNeoXJapanese GPTSw3 Herbert LED Lasr LayoutLMv2 LayoutLMv3 LayoutXLM Luke Lxmert M2M100
        MBart MBart50 MLuke MPNet Marian MarkupLM Mgpstr MobileBert Mvp MyT5 Nllb Nougat OpenAIGPT PLBart Pegasus
        Perceiver Phobert ProphetNet Qwen3_5 Rag Reformer RemBert RoCBert RoFormer Roberta SeamlessM4T Siglip Siglip2
        Speech2Text SpeechT5 Splinter T5 Tapas Tipsv2 Udop VideoPrism Vits Wav2Vec2CTC Wav2Vec2PhonemeCTC Whisper XGLM
        XLM XLMRoberta XLNet""".split()
}
# Classes that replace the post-processor of a tokenizer.json -> whether theirs adds BOS.
OWN_BOS = {"CodeLlamaTokenizer": True, "GPTNeoXTokenizer": False}
_END = "<|endoftext|>"
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
DEFAULTS = {  # of tokenizer_config.json
    "CodeLlamaTokenizer": _LLAMA | {"add_bos_token": True},
    "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "GPT2Tokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END},
    "GPTNeoXTokenizer": {"bos_token": _END, "eos_token": _END, "unk_token": _END, "pad_token": "<|padding|>"},
    "LlamaTokenizer": _LLAMA,
    "Qwen2Tokenizer": {"eos_token": _END, "unk_token": _END, "pad_token": _END},
}


def _defaults(name: str | None, tokenizer: Tokenizer) -> dict:
    """The defaults of a class, without tokens that the tokenizer does not have."""
    defaults = DEFAULTS.get(name, {})
    return {
        key: value for key, value in defaults.items() if key not in NAMES or tokenizer.token_to_id(value) is not None
    }


def _read_json(file: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # `tokenizers` raises nothing more precise
        raise ValueError(f"{file}: not readable ({error}); copy it again or upgrade tokenizers") from None
    # A file may enable truncation and padding, which would happen silently; rm.data.encode limits lengths.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_unknown(tokenizer: Tokenizer, file: Path) -> None:
    """Raise ValueError if text outside the vocabulary is an error, as where unk_token is not in it."""
    try:
        tokenizer.encode("\U0010fffd", add_special_tokens=False)  # a character of private use: no vocabulary has it
    except Exception as error:  # `tokenizers` raises nothing more specific
        raise ValueError(f"{file}: {error}; correct unk_token there or in tokenizer_config.json") from None


def _first_of_post_processor(tokenizer: Tokenizer) -> str | None:
    """The token that the post-processor of a tokenizer.json puts before a text."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    processed = tokenizer.encode("a", add_special_tokens=True).ids
    has_bos = processed != plain and processed[1 : 1 + len(plain)] == plain
    return tokenizer.id_to_token(processed[0]) if has_bos else None


def _from_sentencepiece(model: SentencePieceModel, folder: Path, settings: dict) -> Tokenizer:
    """A tokenizer that follows a tokenizer.model's own settings, as sentencepiece itself does."""
    legacy = bool(settings.get("legacy", True))  # a text behind a special token begins as a text does
    user_defined = [piece for piece, kind in zip(model.pieces, model.types, strict=True) if kind == USER_DEFINED]
    if model.is_unigram:
        pieces = list(zip(model.pieces, model.scores, strict=True))
        tokenizer = Tokenizer(models.Unigram(pieces, model.unk_id, model.byte_fallback))
    else:
        vocabulary = _renamed(model.pieces, folder, settings)
        bpe = models.BPE(
            vocabulary,
            _merges_by_score(model, vocabulary),
            unk_token=model.piece(model.unk_id),
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
            ignore_merges=bool(user_defined),
        )
        tokenizer = Tokenizer(bpe)

    normalize, split = [], []
    if model.charsmap:
        normalize.append(normalizers.Precompiled(model.charsmap))
    if model.remove_extra_whitespaces:
        normalize.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        normalize.append(normalizers.Replace(Regex(" {2,}"), " "))
    if model.escape_whitespaces:
        normalize.append(normalizers.Replace(" ", SPACE))
    if model.add_dummy_prefix:
        if legacy:  # Metaspace adds no prefix where there is one
            normalize.append(normalizers.Replace(Regex(rf"\A{SPACE}"), SPACE * 2))
        scheme = "always" if legacy else "first"
        split.append(pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False))
    if user_defined:
        pattern = "|".join(re.escape(piece) for piece in sorted(user_defined, key=len, reverse=True))
        split.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
    tokenizer.normalizer = normalizers.Sequence(normalize)
    if split:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    return tokenizer


def _renamed(pieces: list[str], folder: Path, settings: dict) -> dict[str, int]:
    """Piece -> id, where tokenizer_config.json may give pieces, such as placeholders, other names."""
    names = {i: token.content for i, token in _listed_tokens(folder, settings, {}).items()}
    kept = {piece for i, piece in enumerate(pieces) if i not in names}
    return {names[i] if i in names and names[i] not in kept else piece: i for i, piece in enumerate(pieces)}


def _merges_by_score(model: SentencePieceModel, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The merges of a BPE from the scores of its normal pieces, the best first."""
    normal = {piece: (-model.scores[i], i) for piece, i in vocabulary.items() if model.types[i] == NORMAL}
    ranked = [
        (*rank, piece[:cut], piece[cut:])
        for piece, rank in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return [(left, right) for _, _, left, right in sorted(ranked)]


def _merges_by_id(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """The merges of a BPE whose pieces are in the order of their scores."""
    return [
        (piece[:cut], piece[cut:])
        for piece in vocabulary
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]


def _add_tokens(
    tokenizer: Tokenizer,
    folder: Path,
    settings: dict,
    pieces: Sequence[AddedToken] = (),
    before_normalization: bool = False,
) -> None:
    """Add the tokens that the settings files list, in the order in which transformers adds them.

    Args:
        pieces: special ones of the vocabulary.
        before_normalization: match tokens in the text as it is, whatever they say themselves.
    """
    special = special_names(settings)
    listed = _listed_tokens(folder, settings, {"normalized": False} if before_normalization else {})
    tokenizer.add_tokens([token for _, token in sorted(listed.items())])
    mark_special(tokenizer, special)
    tokenizer.add_tokens(list(pieces))
    for i, token in listed.items():
        actual = tokenizer.token_to_id(token.content)
        if actual != i:
            raise ValueError(
                f"{folder}: the settings give the added token {token.content!r} the id {i}, but it gets the next free "
                f"one, {actual}, here and in transformers 5; correct it in tokenizer_config.json or added_tokens.json"
            )


def mark_special(tokenizer: Tokenizer, names: Sequence[str]) -> None:
    """Make those of the named tokens special that the vocabulary has. Added tokens keep their other flags."""
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    tokens = []
    for name in names:
        if tokenizer.token_to_id(name) is not None:
            token = added.get(name, AddedToken(name, normalized=False))  # it may strip the white space beside it
            token.special = True
            tokens.append(token)
    tokenizer.add_special_tokens(tokens)


def _listed_tokens(folder: Path, settings: dict, changed: dict) -> dict[int, AddedToken]:
    """Id -> token, from the file that lists them, with some flags changed."""
    special = special_names(settings)
    if "added_tokens_decoder" in settings:
        tokens = settings["added_tokens_decoder"]
    else:
        tokens = {}
        for token, i in tokenizer_config.read_added_tokens(folder).items():
            tokens[i] = {"content": token, "special": token in special, "normalized": token not in special}
    flags = {
        int(i): {name: token[name] for name in FLAGS if token.get(name) is not None} for i, token in tokens.items()
    }
    return {i: AddedToken(token.pop("content"), **token | changed) for i, token in flags.items()}


def special_names(settings: dict) -> list[str]:
    """The tokens that tokenizer_config.json calls special, whatever the tokenizer's own file says."""
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    more = list(more.values()) if isinstance(more, dict) else more
    tokens = [settings.get(name) for name in NAMES] + list(more)
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        tokens += [token for token in decoder.values() if isinstance(token, dict) and token.get("special")]
    return list(dict.fromkeys(name for name in map(content, tokens) if name is not None))
