"""Loading the weights of Hugging Face folders (`rm.hf.saving` writes them).

Only safetensors files are read: unpickling can run code, safetensors cannot. `load` reads only this rank's rows of
every tensor, so that no rank ever holds a full model. A folder with an adapter is loaded as its base model with the
adapter merged (`rm.hf.adapter`). The name table of the model's family (`rm.hf.families`) must account for every tensor,
in both directions.

Names: see `rm.hf.families.rules`; `hf_name` is a tensor's name in a checkpoint, `name` that of our parameter.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rm.distributed import checkpoint
from rm.distributed import process_group as dist
from rm.distributed.sharding import local, local_slices
from rm.files import read_json, read_whole
from rm.hf import adapter, checkpoint_folder, checksums, families, hub, outputs
from rm.hf.adapter import SCORE, is_score
from rm.hf.families.keys import HEADS
from rm.hf.families.layout import Layout
from rm.hf.families.rules import Family
from rm.hf.outputs import Output
from rm.hf.safetensors_file import open_safetensors
from rm.json_keys import Key, check_keys
from rm.model import lora
from rm.model.nf4 import quantized_layers
from rm.model.transformer import ModelConfig

BIAS = "score.bias"  # of a linear reward head: it is left out
HEADS_OF_OTHERS = tuple(f"{name}." for name in HEADS)
OF_VOCABULARY = ("embed.weight", "lm_head.weight")  # parameters with a row for each token
FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes that a checkpoint may have, as safetensors spells them


@dataclass(frozen=True)
class Stored:
    """A tensor in a checkpoint file, as the file's header describes it."""

    file: Path
    hf_name: str
    shape: tuple[int, ...]
    dtype: str


def read_config(folder: str | Path) -> tuple[ModelConfig, Family, dict]:
    """Read a folder's config.json; for an adapter's folder, that of its base model.

    Returns:
        The config of our model, the family of the folder, and the content of the file, as the family has it that is
        written (`Family.text`).

    Raises:
        ValueError: there is no such file, or it describes a model that is not implemented.
    """
    folder = base_folder(folder)
    file = Path(folder) / "config.json"
    if not file.is_file():
        problem = "has no config.json" if Path(folder).is_dir() else "is not a folder"
        raise ValueError(f"{folder} {problem}: a model is a folder with config.json and *.safetensors")
    hf = read_json(file)
    family = families.find(hf, file)
    config = family.read(hf, file)
    return config, family, hf if family.text is None else family.text(hf)


def base_folder(folder: str | Path) -> Path:
    """The folder of the full model: `folder` itself, or, if it holds an adapter, that of the base model below it.

    The base of an adapter may be an adapter again.
    """
    base = hub.base_of(folder)
    return Path(folder) if base is None else base_folder(base)


def fingerprint(folder: str | Path) -> str:
    """A hash that identifies a model: of config.json, and of the size and samples of every weights file.

    It hashes samples, since reading a large model takes minutes. Training changes nearly every value, so that samples
    of two different models are practically never equal. A checkpoint has one already.
    """
    folder = Path(folder)
    if checkpoint.is_checkpoint(folder):
        return read_whole(folder / checkpoint.COMPLETE).decode().strip()
    base = hub.base_of(folder)
    if base is not None:
        digest = hashlib.sha256(fingerprint(base).encode())
        files = [folder / adapter.CONFIG, folder / adapter.TENSORS]
    else:
        digest = hashlib.sha256(read_whole(folder / "config.json"))
        files = _weights_files(folder)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{size} ".encode())
        with open(file, "rb") as content:
            for offset in range(0, size, max(1, size // 64)):
                content.seek(offset)
                digest.update(content.read(4096))
    return digest.hexdigest()


def load(model: nn.Module, folder: str | Path, new_ids: Sequence[int] = ()) -> set[str]:
    """Fill a model, sharded or not, from a folder; values are cast to the dtypes of the model's parameters.

    Args:
        new_ids: token ids that the folder's tokenizer lacks. Their rows of embedding and head, for which the model may
            have more than the folder, become the mean of the others.

    Returns:
        Names of the parameters that the folder lacks and the caller has to initialize: a reward model's score head if
        the folder holds a language model, and adapters that are to be trained.

    Raises:
        ValueError: the folder's tensors are not those of the model; except for adapters, this is checked before any
            parameter is changed. Or a file of the folder has changed since it was written (`rm.hf.checksums`).
    """
    checksums.check(Path(folder), dist.rank(), dist.world_size())
    parameters, in_4bit, chosen = dict(model.named_parameters()), quantized_layers(model), model.reward_output
    base = hub.base_of(folder)
    if in_4bit and (base is not None or checkpoint.is_checkpoint(folder)):
        raise ValueError(
            f"{folder} is {'a checkpoint' if base is None else 'an adapter'}, and --load_in_4bit needs the folder of a "
            f"full model: write it first, by python -m rm.export"
        )
    if base is not None:
        missing = load(model, base, new_ids)
        config, family, _ = read_config(base)
        head_is_embedding = model.predicts_tokens and config.tie_embeddings
        replaced = adapter.add(parameters, Path(folder), family, config.n_kv_heads, head_is_embedding, chosen)
        return missing - replaced
    if checkpoint.is_checkpoint(folder):
        state = checkpoint_folder.read(Path(folder), model.head)
        missing = parameters.keys()
        if state["adapter"]:
            missing = load(model, *_base_of_checkpoint(model, Path(folder), state))
        return missing - checkpoint_folder.load(parameters, Path(folder), state, chosen)
    config, family, _ = read_config(folder)
    shapes = _stored_shapes(model, config, new_ids)
    tensors = _stored_tensors(Path(folder))
    if model.predicts_tokens and config.tie_embeddings:
        _check_tied_head(tensors, family)
    if left := [tensor.hf_name for tensor in tensors if tensor.hf_name.startswith(family.not_read)]:
        parts = [prefix for prefix in family.not_read if any(name.startswith(prefix) for name in left)]
        dist.say(f"{folder}: only the text model is read; {len(left)} tensors are left: {', '.join(parts)}")
    matched = _match(shapes, tensors, Path(folder), family, chosen)
    _say_bias(tensors, family, shapes, chosen)
    by_file = sorted(matched, key=lambda tensor: tensor.file)
    for tensor in dist.progress(by_file, f"loading {folder}", "tensors"):
        names = matched[tensor]
        # Of what is kept in 4 bits, one tensor at a time is there as a whole, and only until it is full.
        whole = {name: in_4bit[name].empty() for name in names if name in in_4bit}
        parts = [whole[name] if name in whole else parameters[name] for name in names]
        # Opened for one tensor: what has been read of an open file stays in the memory of the process.
        with open_safetensors(tensor.file) as opened, torch.no_grad():
            stored = opened.get_slice(tensor.hf_name)
            if names == [SCORE] and tensor.shape[0] > shapes[SCORE][0]:
                stored = outputs.one_of(stored[:], chosen)
            if is_score(names[0]):
                adapter.check_finite(tensor.file, tensor.hf_name, stored[:])
            _copy(stored, family.layout(tensor.hf_name), parts, [shapes[name] for name in names], config)
            if new_ids and names[0] in OF_VOCABULARY:
                _start_new_rows(parts[0], stored, new_ids)
            for name, values in whole.items():
                in_4bit[name].fill(values)
    loaded = {name for names in matched.values() for name in names}
    return parameters.keys() - loaded


def check(model: nn.Module, folder: str | Path, new_ids: Sequence[int] = ()) -> None:
    """Raise ValueError where a folder's tensors are not those of the model, before memory is allocated for them."""
    if checkpoint.is_checkpoint(folder):
        if new_ids:
            raise ValueError(
                f"--add_special_tokens: {folder} is a checkpoint; write its model first, by python -m rm.export"
            )
        state = checkpoint_folder.read(Path(folder), model.head)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        checkpoint_folder.check(shapes, Path(folder), state, model.reward_output)
        if state["adapter"]:
            check(model, *_base_of_checkpoint(model, Path(folder), state))
        return
    base = base_folder(folder)
    config, family, _ = read_config(base)
    _match(_stored_shapes(model, config, new_ids), _stored_tensors(base), base, family, model.reward_output)


def _base_of_checkpoint(model: nn.Module, folder: Path, state: dict) -> tuple[str, Sequence[int]]:
    """The folder of the base below a checkpoint's adapters, and the ids of the checkpoint's tokens that it lacks."""
    base = state["adapter"]["base"]
    if fingerprint(base) != state["identity"]["model"]:
        raise ValueError(f"{folder} holds adapters on {base}, which has changed since: put the model back that it was")
    return base, range(read_config(base)[0].vocab_size, model.config.vocab_size)


def _stored_shapes(model: nn.Module, config: ModelConfig, new_ids: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Parameter name -> its shape in the checkpoint, without the rows of new tokens."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    shapes |= {name: (layer.out_features, layer.in_features) for name, layer in quantized_layers(model).items()}
    if new_ids:
        shapes |= {name: (config.vocab_size, shapes[name][1]) for name in OF_VOCABULARY if name in shapes}
    return shapes


def _copy(stored, layout: Layout, parts: list[Tensor], shapes: list[tuple[int, ...]], config: ModelConfig) -> None:
    """Fill this rank's shard of the parameters that a checkpoint tensor holds.

    Args:
        stored: a safetensors slice of the checkpoint tensor; no more of it is read than the shards.
        shapes: of the parameters in the checkpoint; a parameter may have more rows.
    """
    for i, parameter in enumerate(parts):
        rows, *others = local_slices(parameter)
        block = slice(rows.start, min(rows.stop, shapes[i][0])), *others
        # A rank's shard is empty if there are more ranks than rows.
        if block[0].start < block[0].stop:
            for rows, values in layout.read(stored, i, block, shapes, config.n_kv_heads):
                local(parameter)[rows].copy_(values)


def _start_new_rows(parameter: Tensor, stored, new_ids: Sequence[int]) -> None:
    """Set the rows of new tokens, and those that the checkpoint lacks, to the mean of the other rows."""
    rows, width = stored.get_shape()
    old = torch.ones(rows, dtype=torch.bool)
    old[[i for i in new_ids if i < rows]] = False
    total = torch.zeros(width)
    for start in range(0, rows, 4096):  # a vocabulary may have a million rows
        block = slice(start, min(start + 4096, rows))
        total += stored[block][old[block]].float().sum(0)
    own = local_slices(parameter)[0]
    new = {*new_ids, *range(rows, len(parameter))}
    for i in sorted(new.intersection(range(own.start, own.stop))):
        local(parameter)[i - own.start].copy_(total / old.sum())


def _check_tied_head(tensors: list[Stored], family: Family) -> None:
    """Raise ValueError for an LM head that differs from the embedding that config.json ties it to.

    Merged adapters leave such checkpoints. transformers unties the two then; to drop the head would change the model.
    """
    by_name = {tuple(family.parameter_names(tensor.hf_name)): tensor for tensor in tensors}
    head, embedding = by_name.get(("lm_head.weight",)), by_name.get(("embed.weight",))
    if head is None or embedding is None:
        return
    with open_safetensors(head.file) as head_file, open_safetensors(embedding.file) as embedding_file:
        head_rows, embedding_rows = head_file.get_slice(head.hf_name), embedding_file.get_slice(embedding.hf_name)
        equal = head.shape == embedding.shape
        for start in range(0, head.shape[0] if equal else 0, 4096):  # a vocabulary may have a million rows
            rows = slice(start, start + 4096)
            equal = equal and torch.equal(head_rows[rows], embedding_rows[rows])
    if not equal:
        raise ValueError(
            f"{head.file}: {head.hf_name} differs from {embedding.hf_name}, although config.json ties them: set "
            f"tie_word_embeddings to false there, or remove the tensor"
        )


def _say_bias(tensors: list[Stored], family: Family, shapes: dict, chosen: Output) -> None:
    """Say which bias of a reward head is left out: the head of transformers has none."""
    for tensor in tensors:
        if family.parameter_names(tensor.hf_name) == [BIAS] and SCORE in shapes:
            with open_safetensors(tensor.file) as opened:
                bias = outputs.one_of(opened.get_tensor(tensor.hf_name).flatten(), chosen or 0).item()
            dist.say(
                f"{tensor.file}: {tensor.hf_name} is left out, as the head of transformers has none: rewards are lower "
                f"by {bias:.6g}, all of them"
            )


def _match(
    shapes: dict[str, tuple[int, ...]], tensors: list[Stored], folder: Path, family: Family, chosen: Output = None
) -> dict[Stored, list[str]]:
    """Match the tensors of a folder with the parameters of a model.

    Args:
        shapes: parameter name -> shape.
        chosen: which output of a reward head that has several is read.

    Returns:
        Checkpoint tensor -> names of the parameters that it holds, in order.

    Raises:
        ValueError: tensors are missing, unknown, or have another shape or dtype than the model needs.
    """
    matched, unknown, twice, wrong_shapes = {}, [], [], []
    holder = {}  # parameter -> the tensor that holds it
    for tensor in tensors:
        names = family.parameter_names(tensor.hf_name)
        if names and shapes.keys() >= set(names):
            if names[0] in holder:
                twice.append(f"{holder[names[0]]} and {tensor.hf_name}")
            holder |= dict.fromkeys(names, tensor.hf_name)
            matched[tensor] = names
        elif names == [BIAS] and SCORE in shapes:
            pass  # `load` says so
        elif names and is_score(names[0]) and not any(map(is_score, shapes)):
            raise ValueError(f"{folder} holds a reward model ({tensor.hf_name}), not a language model")
        # A language model's head is skipped if the model has none: a reward model, or one with tied embeddings.
        elif names == ["lm_head.weight"]:
            if tensor.shape != shapes["embed.weight"]:  # a reward head by that name?
                wrong_shapes.append(f"{tensor.hf_name} {tensor.shape} instead of {shapes['embed.weight']}")
        elif not family.is_ignored(tensor.hf_name) and not tensor.hf_name.startswith(family.not_read):
            unknown.append(tensor.hf_name)

    missing = []
    for name in shapes:
        # A score head or an adapter may be new: `load` returns their names.
        if name not in holder and name != SCORE and not lora.is_adapter(name):
            missing.append(family.checkpoint_name(name))

    wrong_dtypes = []
    for tensor, names in matched.items():
        expected = family.layout(tensor.hf_name).shape([shapes[name] for name in names])
        if names == [SCORE] and tensor.shape[1:] == expected[1:] and expected[0] == 1:
            outputs.check(folder, tensor.hf_name, tensor.shape[0], chosen)
        elif tensor.shape != expected:
            wrong_shapes.append(f"{tensor.hf_name} {tensor.shape} instead of {expected}")
        if tensor.dtype not in FLOATS:
            wrong_dtypes.append(f"{tensor.hf_name} {tensor.dtype}")

    problems = {
        # Parameters of one fused checkpoint tensor have the same checkpoint name: count it once.
        "missing": list(dict.fromkeys(missing)),
        "unknown": unknown,
        "stored twice": twice,
        "of another shape": wrong_shapes,
        "not of a floating-point dtype": wrong_dtypes,
    }
    messages = [f"{len(names)} {problem}: {_first_few(names)}" for problem, names in problems.items() if names]
    if any(SCORE in shapes and name.startswith(HEADS_OF_OTHERS) for name in unknown):
        messages.append(
            "only a reward head of one linear layer is implemented, or of two where the class in architectures is known"
        )
    if messages:
        raise ValueError(f"{folder}: the tensors are not those of its config.json; {'; '.join(messages)}")
    return matched


def _first_few(names: list[str]) -> str:
    """The first five of `names`, and how many more there are."""
    text = ", ".join(names[:5])
    return text if len(names) <= 5 else f"{text} and {len(names) - 5} more"


def _stored_tensors(folder: Path) -> list[Stored]:
    """All tensors of a folder, from the headers of its files."""
    tensors = []
    for file in _weights_files(folder):
        with open_safetensors(file) as opened:
            for hf_name in opened.keys():
                header = opened.get_slice(hf_name)
                tensors.append(Stored(file, hf_name, tuple(header.get_shape()), header.get_dtype()))
    return tensors


def _weights_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: model.safetensors, or those that its index names."""
    single_file, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single_file.is_file():
        return [single_file]
    if index.is_file():
        content = read_json(index)
        check_keys(index, content, {"weight_map": Key(dict, items=Key(str))}, others=True)
        names = set((content.get("weight_map") or {}).values())
        if elsewhere := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{index} names {elsewhere[0]!r}: only files of the same folder are read")
        files = sorted(folder / name for name in names)
        if not files:
            raise ValueError(f"{index} names no files: copy the folder again")
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{index} names {_first_few(missing)}, which the folder lacks: copy the folder again")
        return files
    if not list(folder.glob("*.bin")):
        raise ValueError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
    convert = f"M.from_pretrained({str(folder)!r}).save_pretrained({str(folder) + '-safetensors'!r})"
    raise ValueError(
        f"{folder} holds pickled weights (*.bin). Loading those can run code, so they are not read here; to convert "
        f'them: python -c "from transformers import AutoModelForCausalLM as M; {convert}"'
    )


def check_whole(folder: Path) -> None:
    """Raise ValueError where weights, or those of an adapter, are missing or cut off, or a file has changed."""
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist")
    of_adapter = (folder / adapter.CONFIG).is_file()
    for file in [folder / adapter.TENSORS] if of_adapter else _weights_files(folder):
        with open_safetensors(file):
            pass
    if gone := [name for name in checksums.read(folder) if not (folder / name).is_file()]:
        raise ValueError(f"{folder / gone[0]} is missing")
    checksums.check(folder)
