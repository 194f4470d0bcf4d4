"""Weights in and out: Hugging Face folders, safetensors only (a pickle can run code, safetensors cannot).

`load` gives every rank its own rows: no rank ever holds a whole model. `save` gathers one tensor at a time.
Every tensor is accounted for, both ways, by the key table of the model's family (`rm.families`).
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor

from rm import dist, families, lora
from rm.families import Family
from rm.model import ModelConfig
from rm.parallel import local_slices, whole
from rm.tokenizer import Tokenizer

FLOATS = ("F64", "F32", "F16", "BF16")  # what a checkpoint may hold, as safetensors spells it
SCORE = "score.weight"  # the one tensor that may be absent: a reward model starts from a language model
TOKENIZER_FILES = """tokenizer.json tokenizer.model tokenizer_config.json special_tokens_map.json
    added_tokens.json vocab.json merges.txt chat_template.jinja""".split()


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, as its header describes it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def read_config(folder: str | Path) -> tuple[ModelConfig, Family, dict]:
    """The model that a folder's config.json describes, its family, and the file's content."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        wrong = "has no config.json" if Path(folder).is_dir() else "is not a folder"
        raise ValueError(f"{folder} {wrong}: a model is a folder with config.json and *.safetensors")
    hf = _read_json(file)
    try:
        if hf.get("quantization_config"):
            raise ValueError("quantization_config: quantized weights are not implemented")
        family = families.find(hf)
        return family.config(hf), family, hf
    except KeyError as error:
        raise ValueError(f"{file}: the setting {error} is missing") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def load(model: nn.Module, folder: str | Path) -> set[str]:
    """Fill a model, sharded or not, from a folder, in the dtype that its parameters have.

    Returns:
        The parameters that the folder lacks and the caller has to initialise: {"score.weight"} or nothing.
    """
    parameters = dict(model.named_parameters())
    stored = _match({name: tuple(p.shape) for name, p in parameters.items()}, Path(folder))
    for file in sorted({tensor.file for tensor in stored.values()}):
        with _open(file) as tensors, torch.no_grad():
            for name, tensor in stored.items():
                parameter = parameters[name]
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                if tensor.file == file and local.numel():  # with more ranks than rows, some have none
                    local.copy_(tensors.get_slice(tensor.name)[local_slices(parameter)])
    return parameters.keys() - stored.keys()


def _match(shapes: dict[str, tuple[int, ...]], folder: Path) -> dict[str, Stored]:
    """Where each of our parameters is stored, in a folder that holds all of them and nothing else."""
    _, family, _ = read_config(folder)
    found, unknown = {}, []
    for tensor in _stored(folder):
        ours = family.ours(tensor.name)
        if ours in shapes:
            found[ours] = tensor
        elif ours == SCORE:
            raise ValueError(f"{folder} holds a reward model ({tensor.name}), not a language model")
        # A language model's head may lie unneeded: below a reward model, or beside a tied embedding.
        elif ours != "lm_head.weight" and not family.ignores(tensor.name):
            unknown.append(tensor.name)

    absent = [family.theirs(name) for name in shapes if not (name in found or name == SCORE or lora.is_adapter(name))]
    unlike = [(tensor, shapes[name]) for name, tensor in found.items() if tensor.shape != shapes[name]]
    problems = {
        "missing": absent,
        "unknown": unknown,
        "of another shape": [f"{tensor.name} {tensor.shape} instead of {shape}" for tensor, shape in unlike],
        "of another kind": [f"{t.name} {t.dtype}" for t in found.values() if t.dtype not in FLOATS],
    }
    listed = [f"{len(names)} {problem}: {_some(names)}" for problem, names in problems.items() if names]
    if listed:
        raise ValueError(f"{folder}: the tensors are not those of its config.json; {'; '.join(listed)}")
    return found


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _stored(folder: Path) -> list[Stored]:
    """Every tensor of a folder, from the headers of its files."""
    tensors = []
    for file in _files(folder):
        with _open(file) as header:
            for name in header.keys():
                piece = header.get_slice(name)
                tensors.append(Stored(file, name, tuple(piece.get_shape()), piece.get_dtype()))
    return tensors


def _files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        files = sorted({folder / name for name in _read_json(index).get("weight_map", {}).values()})
        absent = [file.name for file in files if not file.is_file()]
        if absent or not files:
            raise ValueError(f"{index} names {_some(absent) or 'no files'}, not there: copy the folder again")
        return files
    if not list(folder.glob("*.bin")):
        raise ValueError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
    convert = f"M.from_pretrained({str(folder)!r}).save_pretrained({str(folder) + '-safetensors'!r})"
    raise ValueError(
        f"{folder} holds pickled weights (*.bin). Those can run code and are not read here; to convert them: "
        f'python -c "from transformers import AutoModelForCausalLM as M; {convert}"'
    )


@contextlib.contextmanager
def _open(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a whole safetensors file ({error}): download it again") from error


def save(
    model: nn.Module,
    out: str | Path,
    source: str | Path,
    dtype: torch.dtype,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a Hugging Face folder, whole or not at all, in place of the one that is there. All ranks call it.

    Adapters are merged into their layers, in fp32. Rank 0 holds as much as one file will, the others one tensor.

    Args:
        source: the folder that the model came from: its config.json and its tokenizer go along.
        dtype: of the weights in the files, except the score head, which is fp32 everywhere.
    """
    _, family, hf = read_config(source)
    parameters = {name: p for name, p in model.named_parameters() if not lora.is_adapter(name)}
    adapted = {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, lora.LoRALinear)}
    head = "reward" if SCORE in parameters else "lm"
    dtypes = {name: torch.float32 if name == SCORE else dtype for name in parameters}
    sizes = {name: p.numel() * dtypes[name].itemsize for name, p in parameters.items()}
    shards = _plan(sizes, max_shard_bytes)

    with _published(Path(out)) as folder:
        for file, names in shards.items():
            held = {}
            for name in names:
                tensor = whole(parameters[name])
                if name in adapted:
                    layer = adapted[name]
                    tensor = tensor.float() + layer.scale * (whole(layer.lora_B).float() @ whole(layer.lora_A).float())
                if dist.is_main():
                    held[family.theirs(name)] = tensor.to("cpu", dtypes[name]).contiguous()
            if dist.is_main():
                save_file(held, folder / file, metadata={"format": "pt"})
        if dist.is_main():
            if len(shards) > 1:
                weight_map = {family.theirs(name): file for file, names in shards.items() for name in names}
                index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
                _write_json(folder / "model.safetensors.index.json", index)
            _describe(folder, Path(source), family, hf, head, dtype)


def _plan(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """File -> its tensors, in order; a new file begins where the next tensor would exceed `limit` bytes."""
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": names for i, names in enumerate(shards, 1)}


@contextlib.contextmanager
def _published(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into: it becomes `out` if the block ends well, and vanishes if not."""
    if out.exists() and not (out / "config.json").is_file() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not a model: it is not replaced, choose another or remove it")
    writing, old = out.with_name(f".{out.name}.writing"), out.with_name(f".{out.name}.old")
    try:
        if dist.is_main():
            shutil.rmtree(writing, ignore_errors=True)  # of a run that was killed
            writing.mkdir(parents=True)
        yield writing
        if dist.is_main():
            if out.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(out, old)
            os.replace(writing, out)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        if dist.is_main():
            shutil.rmtree(writing, ignore_errors=True)
    dist.barrier()


def _describe(folder: Path, source: Path, family: Family, hf: dict, head: str, dtype: torch.dtype) -> None:
    """config.json and the tokenizer's files, changed where transformers has to know of the reward head."""
    for name in TOKENIZER_FILES + ["generation_config.json"] * (head == "lm"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)

    config = hf | {"architectures": [family.classes[head]]}
    for spelling in hf.keys() & {"torch_dtype", "dtype"} or {"dtype"}:  # transformers 4, transformers 5
        config[spelling] = str(dtype).removeprefix("torch.")
    if head == "reward":
        token, config["pad_token_id"] = _padding(source, hf)
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}  # one label, that is
        if token is not None:
            file, legacy = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
            # On the right: on the left it would shift learned positions.
            _write_json(file, _read_json(file) | {"pad_token": token, "padding_side": "right"})
            if legacy.is_file():
                _write_json(legacy, _read_json(legacy) | {"pad_token": token})
    _write_json(folder / "config.json", config)
    for file in folder.glob("*.safetensors"):  # the library lets nobody but the owner read what it writes
        shutil.copymode(folder / "config.json", file)


def _padding(source: Path, hf: dict) -> tuple[str | None, int]:
    """The token that pads a reward model's batches, and its id.

    transformers scores a row's last token that is not padding, and our texts end in EOS: any other will do.
    Best is one that the tokenizer treats as special already. GPT-2's has nothing special but EOS: there it is
    the longest entry that begins with the mark of a space, a string that no text holds. Declaring one like
    "!" special would change how "!!" is cut.
    """
    if (source / "tokenizer.json").is_file():
        ids = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json")).get_vocab()
    elif (source / "tokenizer.model").is_file():
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
        ids = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    else:
        return None, int(hf.get("eos_token_id") == 0)

    eos = Tokenizer(source).eos_id
    ids = {token: i for token, i in ids.items() if i != eos and i < hf["vocab_size"]}  # some have no row
    settings = _read_json(source / "special_tokens_map.json") | _read_json(source / "tokenizer_config.json")
    named = settings.get("pad_token"), settings.get("unk_token"), "<unk>", settings.get("bos_token")
    named = [token["content"] if isinstance(token, dict) else token for token in named]
    unspelled = max(ids, key=lambda token: (token.startswith(("\u0120", "\u2581")), len(token), token))
    token = next(token for token in (*named, unspelled) if token in ids)
    return token, ids[token]


def _read_json(file: Path) -> dict:
    """A JSON object, {} where there is no such file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a JSON {type(value).__name__}, not an object")
    return value


def _write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
