"""Bytes that a disk changes or loses: a damaged file is refused by name, passed over or made again; never used.

    python -m tests.test_bit_rot 200        so many random places in each file (here: its beginning, middle and end)

What a damaged folder gives has to be what the whole one gives, or ValueError has to name the folder.
"""

import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path

from rm.data import cache
from rm.distributed import checkpoint
from rm.scoring.scorer import Scorer
from tests import made, runs
from tests.ranks import run_ranks


def damages(content: bytes, places: Iterable[int]) -> Iterator[tuple[str, bytes]]:
    """(what happens to a file, its content then) for each place in it"""
    for at in places:
        yield f"bit flipped at {at}", content[:at] + bytes([content[at] ^ 1 << at % 7]) + content[at + 1 :]
    yield f"cut off at {at}", content[:at]
    yield f"zeros from {at}", content[:at] + bytes(len(content) - at)


def scores(folder: Path) -> list[float]:
    return Scorer(folder).score(runs.TEXTS[:2])


def state(folder: Path) -> dict:
    """What a training goes on from; ValueError: it would look for an older checkpoint."""
    found = checkpoint.read(folder)
    checkpoint.verify(folder, found)
    return found


def examples(folder: Path) -> list:
    """What a training reads of the cache, whose entry is made again where it is damaged."""
    read, stored = cache.open_or_make(
        str(folder.parent), ["a"], (), lambda: (made.pair_examples(made.token_pairs(5)), {"kept": 5})
    )
    return [stored, read.hash, *(getattr(read, field.name).tolist() for field in fields(read))]


def folders(top: Path) -> list[tuple[Callable, Path]]:
    """(what is read of a folder, the folder)"""
    run_ranks(1, runs.main, runs.settings(top / "run", num_train_epochs=1, use_lora=True, lora_r=2))
    examples(top / "cache/any")
    (entry,) = (top / "cache").iterdir()
    newest = top / "run/checkpoints/step_2"
    return [
        (scores, top / "run/model"), (scores, top / "run/adapter"), (scores, newest), (state, newest),
        (examples, entry),
    ]  # fmt: skip


def used(read: Callable, folder: Path, places_of: Callable[[int], Iterable[int]], tried: Counter) -> Iterator[str]:
    """The damages that are used: what is read is neither refused by name nor as it was."""
    whole = read(folder)
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        for what, damaged in damages(content, places_of(len(content))):
            if damaged == content:
                continue
            file.write_bytes(damaged)
            tried[f"{read.__name__} of {folder.name[:8]}"] += 1
            try:
                if read(folder) != whole:
                    yield f"{file}: {what}: used"
            except ValueError as error:
                if str(folder) not in str(error):
                    yield f"{file}: {what}: {error}"
            file.write_bytes(content)


def sweep(top: Path, places_of: Callable[[int], Iterable[int]]) -> tuple[list[str], Counter]:
    tried: Counter = Counter()
    bad = [line for read, folder in folders(top) for line in used(read, folder, places_of, tried)]
    return bad, tried


def test_damaged_files_are_never_used(tmp_path):
    bad, tried = sweep(tmp_path, lambda size: [0, size - 1, size // 2])
    assert not bad, "\n".join(bad)
    assert len(tried) == 5 and min(tried.values()) >= 30


def main(places: int) -> None:
    draw = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="bit-rot-") as top:
        bad, tried = sweep(Path(top), lambda size: [draw.randrange(size) for _ in range(places)])
    print("\n".join(bad + [f"{name}: {count:,}" for name, count in tried.items()]))
    print(f"{tried.total():,} damages tried, used: {len(bad)}")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main(int(sys.argv[1]))
