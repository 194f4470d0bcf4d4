"""Models and data by name: `org/name`, `org/name@revision` and `hub:org/name/file` become files on this machine.

What exists here always wins. Else `huggingface_hub` fetches it, once on each machine, into its own cache: HF_HOME,
HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they always do. Only config, tokenizer and safetensors are fetched. A
broken connection is taken up where it broke, whole files are kept whatever happens to the rest, and what arrived is
held against the hash that the hub names, which huggingface_hub leaves to its users.

    o/n            the model, or the only data file, of a repository's main revision
    o/n@v1.0       of a tag, branch or commit
    hub:o/n/a.jsonl@v1.0    one file of a dataset; NAME=hub:... where sets have names
"""

import hashlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rm.distributed import process_group as dist
from rm.files import feed, read_json
from rm.hf.folder import TOKENIZER_FILES

ADAPTER = "adapter_config.json"
MODEL_FILES = ["config.json", "generation_config.json", ADAPTER, "scoring.json", *TOKENIZER_FILES]
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
DATA = ("*.jsonl", "*.json", "*.jsonl.gz", "*.json.gz", "*.parquet")


@dataclass(frozen=True)
class Name:
    """What a setting names on the hub."""

    repo: str
    file: str | None
    revision: str

    @classmethod
    def read(cls, text: str) -> "Name | None":
        """None where it can only be a path."""
        explicit = text.startswith("hub:")
        found = re.fullmatch(
            r"(?:hub:)?([A-Za-z0-9][\w.-]*/[\w.-]+)(?:/([^@]+))?(?:@([\w./-]+))?", text, flags=re.ASCII
        )
        if explicit and not found:
            raise ValueError(f"{text}: expected hub:org/name, hub:org/name/file or either with @revision")
        if not found or (not explicit and (found[2] or Path(text).suffix in (".json", ".jsonl", ".gz", ".parquet"))):
            return None
        return cls(found[1], found[2], found[3] or "main")


def fetched(settings):
    """The settings with local paths in place of the hub's names. All ranks call it.

    The path of what was fetched holds the commit, so a run.json says exactly what it was, and repeats it offline.
    """
    weights = not getattr(settings, "plan", False)  # a plan needs none
    changes = {}
    for setting in ("model_name_or_path", "baseline_model_name_or_path"):
        if name := getattr(settings, setting, None):
            changes[setting] = model(name, weights)
    for setting in ("dataset_path", "eval_dataset_path"):
        if hasattr(settings, setting):
            changes[setting] = tuple(map(data, getattr(settings, setting)))
    return replace(settings, **changes)


def model(text: str, weights: bool = True) -> str:
    """The folder of a model: `text` itself if it exists or can only be a path. An adapter's base is fetched with it."""
    name, folder = None if Path(text).exists() else Name.read(text), Path(text)
    if name:
        if name.file:
            raise ValueError(f"{text}: a model is a whole repository, hub:{name.repo}")
        folder = _snapshot(name, "model", [*MODEL_FILES, *(WEIGHTS if weights else [])])
        if weights and not any(folder.glob("*.safetensors")):
            raise ValueError(f"{text}: the repository holds no safetensors, and pickled weights are not read here")
    if base := _base_named_by(folder):
        model(base, weights)
    return str(folder) if name else text


def base_of(folder: str | Path) -> Path | None:
    """The folder of the base model, where `folder` holds an adapter; None where it holds a model of its own."""
    base = _base_named_by(Path(folder))
    if base is None:
        return None
    name = None if Path(base).is_dir() else Name.read(base)
    found = _kept(name) if name else Path(base)
    if not base or found is None or not found.is_dir():
        raise ValueError(
            f"{folder} is an adapter without its base: {ADAPTER} names {base!r} as base_model_name_or_path, which is "
            "no folder here; put the base there, or correct the entry"
        )
    return found


def _base_named_by(folder: Path) -> str | None:
    """What the adapter in a folder calls its base, "" if nothing; None where there is no adapter, or a whole model."""
    if not (folder / ADAPTER).is_file() or any(folder.glob("model*.safetensors")):
        return None
    config = read_json(folder / ADAPTER)
    base, revision = config.get("base_model_name_or_path") or "", config.get("revision")
    return f"{base}@{revision}" if revision and not Path(base).exists() else base


def _kept(name: Name) -> Path | None:
    """The folder of a model that was fetched before."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return _download(name, "model", MODEL_FILES, local_files_only=True)
    except LocalEntryNotFoundError:
        return None


def data(text: str) -> str:
    """The path of a data file: `text` itself, with the NAME= before it, if it exists or can only be a path."""
    prefix, equals, path = text.partition("=") if "=hub:" in text else ("", "", text)
    name = None if Path(path).exists() else Name.read(path)
    if name is None:
        return text
    folder = _snapshot(name, "dataset", [name.file] if name.file else list(DATA))
    files = [folder / name.file] if name.file else sorted(f for kind in DATA for f in folder.rglob(kind))
    if len(files) != 1:
        there = ", ".join(str(f.relative_to(folder)) for f in files)
        raise ValueError(f"{path}: name one file as hub:{name.repo}/FILE; there: {there}")
    return f"{prefix}{equals}{files[0]}"


def _snapshot(name: Name, kind: str, patterns: list[str]) -> Path:
    """The folder of a repository's revision, with these files in it; fetched by one process of each machine."""
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    download = partial(_download, name, kind, patterns)
    dist.once_per_node(lambda: _checked(name, kind, patterns, download))
    return download(local_files_only=True)


def _download(name: Name, kind: str, patterns: list[str], **how) -> Path:
    from huggingface_hub import snapshot_download  # here and not above: it takes a third of a second

    nested = None if kind == "dataset" else ["*/*", "consolidated*"]  # the same weights in other forms
    return Path(snapshot_download(name.repo, repo_type=kind, revision=name.revision, allow_patterns=patterns,
                                  ignore_patterns=nested, **how))  # fmt: skip


def _checked(name: Name, kind: str, patterns: list[str], download: Callable[[], Path]) -> None:
    """Download, and hold every new file against its hash."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    blobs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name.repo, repo_type=kind) / "blobs"
    before = {blob.name for blob in blobs.glob("*")}
    try:
        folder = download()
    except Exception as error:  # of several libraries and versions; each says that nothing came
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        flags = f" --repo-type dataset --include '{name.file or '*.json*'}'" if kind == "dataset" else ""
        raise ValueError(
            f"{name.repo}: is not on this machine and could not be fetched ({why}). Where there is a network: "
            f"hf download {name.repo} --revision {name.revision}{flags}; then give its folder, or the same HF_HOME"
        ) from error
    if not folder.is_dir():
        raise ValueError(f"{name.repo}: has no {' or '.join(patterns)} at {name.revision}")
    for file in (path for path in folder.rglob("*") if path.is_file()):
        blob = file.resolve()
        if blob.parent == blobs.resolve() and blob.name not in before and not _is_itself(blob):
            blob.unlink()
            file.unlink()
            raise ValueError(f"{name.repo}: {file.name} arrived damaged and was deleted: start again to fetch it anew")


def _is_itself(blob: Path) -> bool:
    """Whether a file has the hash that it is named by: SHA-256, or git's SHA-1 of small files."""
    digest = hashlib.sha256() if len(blob.name) == 64 else hashlib.sha1(b"blob %d\0" % blob.stat().st_size)
    feed(digest, blob)
    return digest.hexdigest() == blob.name
