"""Models and data by name: `org/name`, `org/name@revision` and `hub:org/name/file` become files on this machine.

A local path takes precedence. Otherwise `huggingface_hub` downloads, once on each machine, into its own cache: HF_HOME,
HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE have their usual meaning. Only config, tokenizer and safetensors files are
downloaded. Interrupted downloads are resumed, and every new file is checked against the hash that the hub states, which
huggingface_hub leaves to its users.

    o/n            the model, or the dataset's files of the split --dataset_split, of a repository's main revision
    o/n@v1.0       of a tag, branch or commit
    hub:o/n:test@v1.0       the files of another split; NAME=hub:... where sets have names
    hub:o/n/base:test       of the configuration or folder `base`
    hub:o/n/a.jsonl@v1.0    one file of a dataset
    hub:o/n/b.jinja         a chat template in a model's repository

Which files are a split is the rule of Hugging Face `datasets`: see `rm.hf.data_files`.
"""

import hashlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rm.config import Settings, flags, flatten, updated
from rm.distributed import checkpoint as checkpoint_files
from rm.distributed import process_group as dist
from rm.files import read_json, update_digest
from rm.hf import data_files
from rm.hf.folder import TOKENIZER_FILES, check_files
from rm.json_keys import Key, check_keys
from rm.run_files import read_exit

ADAPTER = "adapter_config.json"
MODEL_FILES = ["config.json", "generation_config.json", ADAPTER, "scoring.json", *TOKENIZER_FILES]
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
TEMPLATES = (".jinja", ".jinja2", ".j2", ".txt")
CARD = "README.md"


@dataclass(frozen=True)
class Name:
    """A repository, or a file in it, on the hub; of a dataset also a configuration, a folder or a split."""

    repo: str
    file: str | None
    split: str | None
    revision: str

    @classmethod
    def read(cls, text: str) -> "Name | None":
        """Parse a setting; None where it can only be a path."""
        explicit = text.startswith("hub:")
        match = re.fullmatch(
            r"(?:hub:)?([A-Za-z0-9][\w.-]*/[\w.-]+)(?:/([^@]+?))?(?::([\w.]+))?(?:@([\w./-]+))?", text, flags=re.ASCII
        )
        if explicit and not match:
            raise ValueError(f"{text}: expected hub:org/name, hub:org/name/file, hub:org/name:split or with @revision")
        if not match:
            return None
        repo, file, split, revision = match.groups()
        if explicit and file and ".." in file.split("/"):
            raise ValueError(f"{text}: the name of a file in a repository has no '..'")
        is_file = data_files.READ_HERE.fullmatch(text) or Path(text).suffix in (".gz", *TEMPLATES)
        if not explicit and (file or is_file):  # a/b/c and a/b.jsonl are paths
            return None
        return cls(repo, file, split, revision or "main")


def fetched(settings: Settings, weights: bool = True, named: bool = False) -> Settings:
    """Download what a script's settings name on the hub, and return them with local paths. All ranks call it.

    A downloaded path contains the commit, so that run.json identifies it, and repeats the run offline.

    Args:
        weights: whether models are needed with their weights; a plan needs none.
        named: whether data files may be written as NAME=FILE: those of one split then get the same name.
    """
    changes, values = {}, flatten(settings)
    for name, flag in flags(type(settings)).items():
        if flag.hub is None or not values[name]:
            continue
        if flag.hub == "model" and flag.many:
            changes[name] = tuple(model(one, weights) for one in values[name])
        elif flag.hub == "model":
            changes[name] = model(values[name], weights)
        elif flag.hub == "data":
            split = values.get("dataset_split", "train")  # a script may have no such setting
            files = [data(value, split, named) for value in values[name]]
            changes[name] = tuple(file for several in files for file in several)
            if name == "dataset_path" and (weight := values.get("dataset_weights")):  # of a split: that of each file
                changes["dataset_weights"] = tuple(w for w, several in zip(weight, files, strict=True) for _ in several)
        elif flag.hub == "template":
            changes[name] = template(values[name])
        else:
            changes[name] = checkpoint(values[name])
    return updated(settings, **changes)


def names(given: Settings, fetched: Settings) -> dict:
    """The settings that `fetched` has paths for, as they were given: by these a finished run is known offline."""
    paths = flatten(fetched)
    return {name: value for name, value in flatten(given).items() if value != paths[name]}


def model(text: str, weights: bool = True, above: tuple[Path, ...] = ()) -> str:
    """The folder of a model: what a path or a name on the hub stands for. All that takes a model asks here.

    A path is a folder with a model, an adapter, or a checkpoint of a training, which is a model as it is; or a run,
    which stands for its model. An adapter's base is downloaded, too.

    Args:
        above: adapters that name this model as their base, or the base of their base.

    Raises:
        ValueError: a folder holds something of a run that is no model, or files that are none.
    """
    name = None if Path(text).exists() else Name.read(text)
    text = text if name else _model_of_run(text)
    folder = Path(text)
    if name:
        if name.file or name.split:
            raise ValueError(f"{text}: a model is a repository, not a file: give hub:{name.repo}")
        folder = _snapshot(name, "model", [*MODEL_FILES, *(WEIGHTS if weights else [])])
        if weights and not any(folder.glob("*.safetensors")):
            raise ValueError(f"{text}: the repository has no safetensors files, and pickled weights are not read here")
    _check_no_ring(folder, above)
    check_files(folder)
    if base := _declared_base(folder):
        model(base, weights, (*above, folder.resolve()))
    return str(folder) if name else text


def _model_of_run(text: str) -> str:
    """The model of a run's folder; any other path is returned as it is."""
    folder = Path(text)
    if any((folder / name).is_file() for name in ("config.json", ADAPTER)):
        return text
    if checkpoint_files.is_checkpoint(folder):
        raise ValueError(
            f"{folder} is a checkpoint that an earlier version wrote, without the files of a model: run its training's "
            f"command again, and name one that is written then"
        )
    checkpoints = checkpoint_files.list_checkpoints(folder) or checkpoint_files.list_checkpoints(folder / "checkpoints")
    newest = f"; its newest checkpoint is {checkpoints[-1]}" if checkpoints else ""
    if (folder / "run.json").is_file():
        if read_exit(folder).get("status") != "finished":
            raise ValueError(f"{folder} is a run that has not finished{newest}: name a checkpoint")
        dist.say(f"{folder} is a run: its model is {folder / 'model'}")
        return str(folder / "model")
    if checkpoints:
        raise ValueError(f"{folder} holds checkpoints: name one of them, such as {checkpoints[-1]}")
    return text


def template(text: str) -> str:
    """The path of a Jinja file, or of the folder of a model with a chat template."""
    name = None if Path(text).exists() else Name.read(text)
    if name is None:
        return text
    if name.file is None:
        return model(text, weights=False)
    file = _snapshot(name, "model", [name.file]) / name.file
    if not file.is_file():
        raise ValueError(f"{text}: has no {name.file} at {name.revision}")
    return str(file)


def checkpoint(text: str) -> str:
    """The folder of a training's checkpoint: `text` itself, unless it begins with hub:, as words stand there too."""
    if not text.startswith("hub:"):
        return text
    name = Name.read(text)
    if name.file or name.split:
        raise ValueError(f"{text}: a checkpoint is a repository, not a file: give hub:{name.repo}")
    return str(_snapshot(name, "model", ["*"]))


def base_of(folder: str | Path) -> Path | None:
    """The folder of the base model, where `folder` holds an adapter; None where it holds a model of its own."""
    chain = [Path(folder)]
    while (base := _direct_base(chain[-1])) is not None:
        _check_no_ring(base, tuple(path.resolve() for path in chain))
        chain.append(base)
    return chain[1] if len(chain) > 1 else None


def _check_no_ring(folder: Path, above: tuple[Path, ...]) -> None:
    if folder.resolve() in above:
        raise ValueError(
            f"{folder} is an adapter whose base is, in the end, itself: correct base_model_name_or_path in "
            f"{above[-1] / ADAPTER}"
        )


def _direct_base(folder: Path) -> Path | None:
    base = _declared_base(folder)
    if base is None:
        return None
    name = None if Path(base).is_dir() else Name.read(base)
    base_folder = _cached(name) if name else Path(base)
    if not base or base_folder is None or not base_folder.is_dir():
        raise ValueError(
            f"{folder} is an adapter without its base: {ADAPTER} names {base!r} as base_model_name_or_path, which is "
            "not a folder on this machine; put the base there, or correct the entry"
        )
    return base_folder


def tokenizer_folder(folder: str | Path) -> Path:
    """The folder that holds a model's tokenizer: `folder` itself, or, for an adapter stored without one, its base's.

    A folder without a tokenizer that is no adapter is returned as it is: `Tokenizer` raises the error for it.

    Raises:
        ValueError: for an adapter whose base is not on this machine.
    """
    folder = Path(folder)
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return folder
    base = base_of(folder)
    return folder if base is None else tokenizer_folder(base)


def _declared_base(folder: Path) -> str | None:
    """The base that the adapter in a folder names, "" if none; None for a folder without adapter, or a full model."""
    if not (folder / ADAPTER).is_file() or any(folder.glob("model*.safetensors")):
        return None
    config = read_json(folder / ADAPTER)
    check_keys(folder / ADAPTER, config, {"base_model_name_or_path": Key(str), "revision": Key(str)}, others=True)
    base, revision = config.get("base_model_name_or_path") or "", config.get("revision")
    return f"{base}@{revision}" if revision and not Path(base).exists() else base


def _cached(name: Name) -> Path | None:
    """The folder of a model that was downloaded before."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return _download(name, "model", MODEL_FILES, local_files_only=True)
    except LocalEntryNotFoundError:
        return None


def data(text: str, split: str = "train", named: bool = False) -> list[str]:
    """The paths of data files: `text` itself, with the NAME= before it, if it exists or can only be a path.

    Args:
        split: the one that is meant where `text` names a repository, and neither a file nor a split.
        named: give the files of a repository a NAME= where they have none.
    """
    prefix, equals, path = text.partition("=") if "=hub:" in text else ("", "", text)
    name = None if Path(path).exists() else Name.read(path)
    if name is None:
        return [text]
    is_file = name.file and data_files.READ_HERE.fullmatch(name.file)
    files = [name.file] if is_file else _files_of_split(path, name, name.split or split)
    if name.file in files and name.split:
        raise ValueError(f"{path}: a file has no splits: leave out :{name.split}")
    folder = _snapshot(name, "dataset", files)
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ValueError(f"{path}: has no {missing[0]} at {name.revision}")
    if named and not equals and name.file not in files:
        prefix, equals = path.removeprefix("hub:"), "="
    return [f"{prefix}{equals}{folder / file}" for file in files]


def _files_of_split(text: str, name: Name, split: str) -> list[str]:
    """The paths, in its repository, of the files that a name means. Prints them. All ranks call it."""
    import yaml  # of huggingface_hub, and imported late as it is
    from huggingface_hub import get_cached_repo_tree, metadata_load
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    # A download keeps the list of all files of its commit, so that it is the same without a network.
    download = partial(_download, name, "dataset", [CARD])
    dist.once_per_node(lambda: _checked(name, "dataset", [CARD], download))
    try:
        paths = [file.path for file in get_cached_repo_tree(name.repo, repo_type="dataset", revision=name.revision)]
    except CachedRepoTreeNotFoundError:  # older versions of huggingface_hub kept none: what there is counts
        folder = download(local_files_only=True)
        paths = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    paths = [path for path in paths if ".." not in path.split("/") and not path.startswith("/")]
    if name.file in paths:
        return [name.file]
    try:
        card = metadata_load(_snapshot(name, "dataset", [CARD]) / CARD) if CARD in paths else None
        files = data_files.files_of_split(paths, data_files.check_configurations(card), split, name.file)
    except yaml.YAMLError as error:
        raise ValueError(f"{text}: the front matter of its {CARD} is not YAML: {error}") from None
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from None
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    dist.say(f"{text}: split {split}: {', '.join(files[:3])}{more}")
    return files


def _snapshot(name: Name, kind: str, patterns: list[str]) -> Path:
    """The folder of a repository's revision with these files, downloaded by one process of each machine.

    All ranks call it. Where there is no process group, huggingface_hub's locks on files keep processes apart.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    download = partial(_download, name, kind, patterns)
    dist.once_per_node(lambda: _checked(name, kind, patterns, download))
    try:
        return download(local_files_only=True)
    except LocalEntryNotFoundError:  # there is nothing to download
        raise ValueError(f"{name.repo}: has no {' or '.join(patterns)} at {name.revision}") from None


def _download(name: Name, kind: str, patterns: list[str], **how) -> Path:
    from huggingface_hub import snapshot_download  # imported late: it takes a third of a second

    # The same weights in other forms.
    nested = None if kind == "dataset" or patterns == [name.file] else ["*/*", "consolidated*"]
    return Path(snapshot_download(name.repo, repo_type=kind, revision=name.revision, allow_patterns=patterns,
                                  ignore_patterns=nested, **how))  # fmt: skip


def _checked(name: Name, kind: str, patterns: list[str], download: Callable[[], Path]) -> None:
    """Download, and check every new file against its hash."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name.repo, repo_type=kind) / "blobs"
    before = {blob.name for blob in blobs.glob("*")}
    try:
        folder = download()
    except Exception as error:  # of any kind: it depends on library, version and network
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        include = f" --include '{name.file}'" if patterns == [name.file] else ""
        flags = f" --repo-type dataset{include}" if kind == "dataset" else include
        what = "files" if kind == "dataset" else "folder"
        raise ValueError(
            f"{name.repo}: is not on this machine and could not be downloaded ({reason}). Where there is a network: "
            f"hf download {name.repo} --revision {name.revision}{flags}; then give its {what}, or the same HF_HOME"
        ) from error
    for file in (path for path in folder.rglob("*") if path.is_file()):
        blob = file.resolve()
        is_new = blob.parent == blobs.resolve() and blob.name not in before
        if is_new and not _has_its_hash(blob):
            blob.unlink()
            file.unlink()
            raise ValueError(
                f"{name.repo}: {file.name} was damaged on the way and is deleted: start again to download it"
            )


def _has_its_hash(blob: Path) -> bool:
    """Whether a file has the hash that is its name: SHA-256, or git's SHA-1 for small files."""
    digest = hashlib.sha256() if len(blob.name) == 64 else hashlib.sha1(b"blob %d\0" % blob.stat().st_size)
    update_digest(digest, blob)
    return digest.hexdigest() == blob.name
