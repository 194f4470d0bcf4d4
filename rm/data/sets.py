"""Named sets of files: NAME=FILE on the command line, of an evaluation by itself and of one while training."""

import re
from collections.abc import Sequence
from pathlib import Path

DATA_FILE = re.compile(r"[^._].*\.(parquet|(jsonl?|ndjson|csv|tsv)(\.gz)?)")
UNNAMED = ""  # the one set of held-out data that has no name
ALL = "all"  # its name in run.json


def named_sets(paths: Sequence[str]) -> dict[str, list[str]]:
    """Group files into named sets.

    Args:
        paths: "NAME=FILE" or "FILE" each. A file without a name forms a set that has the file's name up to its first
            dot, or its whole path if several files have that name. A folder stands for all data files in it.

    Returns:
        {name: files}

    Raises:
        ValueError: a folder has no data files.
    """
    stems = [Path(path).name.split(".")[0] for path in paths]
    sets: dict[str, list[str]] = {}
    for path, stem in zip(paths, stems, strict=True):
        name, sign, file = path.partition("=")
        # An existing file may have "=" in its own name.
        if not sign or Path(path).exists():
            name = stem if stems.count(stem) == 1 else path
            file = path
        sets.setdefault(name, []).extend(_files(file))
    return sets


def _files(path: str) -> list[str]:
    """The data files in a folder and in those within it, in the order of their names; of a file, itself."""
    if not Path(path).is_dir():
        return [path]
    files = sorted(str(file) for file in Path(path).rglob("*") if DATA_FILE.fullmatch(file.name) and file.is_file())
    if not files:
        raise ValueError(f"{path}: is a folder without data files (.parquet, .json, .jsonl, .csv, .tsv)")
    return files


def held_out_sets(paths: Sequence[str]) -> dict[str, list[str]]:
    """Group the files of --eval_dataset_path into sets: those with NAME= by their names, those without into one.

    Returns:
        {name: files}, or {UNNAMED: files}.

    Raises:
        ValueError: some have a name and others have none, or a name is `ALL` or cannot be part of a metric's name.
    """
    unnamed = [path for path in paths if "=" not in path or Path(path).exists()]
    if len(unnamed) == len(paths):
        return {UNNAMED: list(paths)} if paths else {}
    if unnamed:
        raise ValueError(
            f"--eval_dataset_path {unnamed[0]} has no name, and others have: write NAME={unnamed[0]}, or give no names"
        )
    sets = named_sets(paths)
    for name in sets:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
            raise ValueError(
                f"--eval_dataset_path {name}={sets[name][0]}: there is no such file, and the name of a set may only "
                f"have letters, digits, '_', '-' and '.'"
            )
        if name == ALL:
            raise ValueError(
                f"--eval_dataset_path {name}={sets[name][0]}: that is the name of all sets together: choose another"
            )
    return sets
