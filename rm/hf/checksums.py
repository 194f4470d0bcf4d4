"""SHA256SUMS: what the files of a model's folder were when they were written, as sha256sum writes and checks it.

A disk may change a byte of a file without a word. Weights, config.json, the tokenizer's files and scoring.json all
decide what a model computes, and a changed digit in any of them gives other numbers and no error. So the sums are
compared whenever weights are loaded; a folder from elsewhere has none.
"""

import re
from pathlib import Path

from rm.files import read_whole, sha256, write_atomically
from rm.hf.safetensors_file import open_safetensors

FILE = "SHA256SUMS"
FOR_PEOPLE = "README.md"  # the model card, to be edited
_LINE = re.compile("(?P<digest>[0-9a-fA-F]{64}) [ *](?P<name>.+)")


def write(folder: Path, known: dict[str, str] | None = None) -> None:
    """Write the sums of all files of a folder.

    Args:
        known: file name -> its sum, of large files, and of those that are written next.
    """
    names = {file.name for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")}
    sums = {name: sha256(folder / name) for name in names - {FILE, FOR_PEOPLE} - (known or {}).keys()} | (known or {})
    write_atomically(folder / FILE, "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)))


def write_again(folder: Path, **coming: str) -> None:
    """Write the sums again once small files were changed; those of the weights are kept."""
    kept = {name: digest for name, digest in read(folder).items() if name.endswith(".safetensors")}
    write(folder, kept | coming)


def read(folder: Path) -> dict[str, str]:
    """File name -> its sum, {} for a folder from elsewhere. Raises ValueError for a file that holds something else."""
    file = folder / FILE
    if not file.exists():
        return {}
    lines = read_whole(file).decode(errors="replace").splitlines()
    found = [_LINE.fullmatch(line) for line in lines]
    if not all(found) or not found:  # of an empty one no file would be compared
        raise ValueError(f"{file} is damaged: copy it again, or delete it to use the files as they are")
    return {match["name"]: match["digest"].lower() for match in found}


def check(folder: Path, rank: int = 0, world_size: int = 1) -> None:
    """Compare a rank's share of the files that are there. Raises ValueError for one that has changed."""
    sums = read(folder)
    for name in sorted(sums)[rank::world_size]:
        file = folder / name
        if file.suffix == ".safetensors" and file.is_file():
            with open_safetensors(file):  # of another size than its header says, it may be too long to be read
                pass
        if Path(name).name != name or (file.is_file() and sha256(file) != sums[name]):
            raise ValueError(
                f"{file} has changed since it was written, as {FILE} says: copy it again or, if the change is meant, "
                f"remove its line in {folder / FILE}"
            )
