"""rm.data.cache: built once per machine, shared by all ranks, never stale."""

import json
import os
import time
import zlib

import pytest

from rm.data import cache
from rm.distributed import process_group as dist
from rm.json_keys import Key
from tests import made
from tests.ranks import run_ranks


def read(folder, file, name=("a",), fail=False, calls=None):
    """(replies, stored JSON object) of the token ids in a file; `calls` is a file that gets a line for each build."""

    def make():
        with open(calls, "a") as log:
            log.write("made\n")
        if fail:
            raise ValueError("line 3 is broken")
        return made.text_examples(json.loads(file.read_text())), {"kept": 2}

    examples, stored = cache.open_or_make(str(folder), list(name), (str(file),), make)
    return [example.replies[0].tolist() for example in examples], stored


@pytest.fixture
def read_cached(tmp_path):
    file, calls = tmp_path / "data.json", tmp_path / "calls"
    file.write_text("[[1, 2], [3]]")
    calls.touch()

    def run(world=1, **settings):
        results = run_ranks(world, lambda: read(tmp_path / "cache", file, calls=calls, **settings))
        return results, len(calls.read_text().splitlines())

    run.file, run.cache = file, tmp_path / "cache"
    return run


def test_the_second_start_builds_nothing(read_cached):
    first, second = read_cached(), read_cached()
    assert first == second == ([([[1, 2], [3]], {"kept": 2})], 1)


def test_the_default_folder_follows_the_xdg_specification(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.default_folder() == "/somewhere/rm"


def test_ranks_of_one_machine_build_the_entry_once(read_cached):
    results, calls = read_cached(world=4)
    assert results == [([[1, 2], [3]], {"kept": 2})] * 4 and calls == 1


def test_a_changed_file_or_setting_makes_a_new_entry(read_cached):
    read_cached()
    read_cached.file.write_text("[[1, 2], [4]]")
    assert read_cached() == ([([[1, 2], [4]], {"kept": 2})], 2)
    assert read_cached(name=("b",))[1] == 3


def test_tokens_are_memory_mapped(read_cached):
    import numpy as np

    read_cached()
    (entry,) = read_cached.cache.iterdir()
    examples = cache.Examples.open(entry)
    base = examples.tokens
    while not isinstance(base, np.memmap):
        base = base.base
    assert base.filename == entry / "tokens.npy"


def test_a_failed_build_stops_all_ranks_and_leaves_no_entry(read_cached):
    with pytest.raises(RuntimeError, match="ValueError: (line 3 is broken|stopped, since another process failed)"):
        read_cached(world=2, fail=True)
    assert not read_cached.cache.exists() or not list(read_cached.cache.iterdir())


def zeroed_tail(file):
    content = file.read_bytes()
    file.write_bytes(content[:-4] + bytes(4))


def without_its_end(file):
    file.write_bytes(file.read_bytes()[:-3])


DAMAGE = {
    "a zeroed tail": ("tokens.npy", zeroed_tail),
    "a zeroed tail of a small array": ("label.npy", zeroed_tail),
    "cut off": ("starts.npy", without_its_end),
    "empty": ("grade.npy", lambda file: file.write_bytes(b"")),
    "gone": ("loss.npy", lambda file: file.unlink()),
    "another hash": ("made.json", lambda file: file.write_text(file.read_text().replace('"hash": "', '"hash": "0'))),
    "no checksums": ("checksums.json", without_its_end),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_made_again_by_one_process(name, damage, read_cached, capfd):
    first, _ = read_cached()
    (entry,) = read_cached.cache.iterdir()
    before = {file.name: file.read_bytes() for file in entry.iterdir()}
    damage(entry / name)
    results, calls = read_cached(world=2)
    assert results == first * 2 and calls == 2
    assert f"{entry / name} " in capfd.readouterr().err
    assert {file.name: file.read_bytes() for file in entry.iterdir()} == before
    assert list(read_cached.cache.iterdir()) == [entry] and read_cached() == (first, 2)


def test_an_entry_whose_report_has_other_keys_is_made_again(read_cached):
    """Although its checksums agree: another version, or a person, wrote it."""
    read_cached()
    (entry,) = read_cached.cache.iterdir()
    made_of = made.text_examples([[1, 2], [3]])

    def read_with_keys():
        keys = {"kept": Key(int, minimum=0, required=True), "files": Key(list)}
        return cache.open_or_make(
            str(read_cached.cache), ["a"], (str(read_cached.file),), lambda: (made_of, {"kept": 2}), keys
        )[1]

    for report in ({"kept": "2"}, {}, {"kept": 2, "unknown": 1}):
        content = json.loads((entry / "made.json").read_text()) | {"made": report}
        (entry / "made.json").write_text(json.dumps(content))
        sums = json.loads((entry / "checksums.json").read_text())
        sums["made.json"] = zlib.crc32((entry / "made.json").read_bytes())
        (entry / "checksums.json").write_text(json.dumps(sums))
        assert run_ranks(1, read_with_keys) == [{"kept": 2}]


def test_an_entry_may_be_read_by_whoever_may_read_the_cache(read_cached):
    read_cached()
    (entry,) = read_cached.cache.iterdir()
    assert entry.stat().st_mode == read_cached.cache.stat().st_mode


def hashes(folder, file):
    """(stored hash, computed hash)"""
    examples, _ = cache.open_or_make(str(folder), ["a"], (str(file),), lambda: 1 / 0)
    return examples.__dict__["hash"], examples[:].hash


def test_the_stored_hash_is_that_of_the_examples(read_cached):
    read_cached()
    ((stored, computed),) = run_ranks(1, hashes, read_cached.cache, read_cached.file)
    assert stored == computed


def test_what_a_killed_process_left_is_not_read(read_cached):
    read_cached.cache.mkdir()
    (read_cached.cache / "writing-abc").mkdir()
    assert read_cached()[1] == 1


def agree_and_work():
    """(results of any_rank, ranks that worked in this process)"""
    agreed = [dist.any_rank(dist.rank() == 1), dist.any_rank(False)]
    os.environ["LOCAL_RANK"] = str(dist.rank() % 2)  # two machines of two processes each
    worked = []
    dist.once_per_node(lambda: worked.append(dist.rank()))
    return agreed, worked


def test_any_rank_agrees_and_once_per_node_works_once_per_machine():
    assert run_ranks(4, agree_and_work) == [
        ([True, False], [0]),
        ([True, False], []),
        ([True, False], [2]),
        ([True, False], []),
    ]


def test_what_a_killed_process_left_is_removed_a_day_later(read_cached):
    for name, age in (("writing-old", 2 * cache.A_DAY), ("writing-new", 0)):
        (read_cached.cache / name / "new").mkdir(parents=True)
        then = time.time() - age
        os.utime(read_cached.cache / name, (then, then))
    read_cached()
    assert [folder.name for folder in read_cached.cache.glob("writing-*")] == ["writing-new"]
