"""rm.data.cache: made once, read by all, and never stale."""

import json
import os

import pytest

from rm.data import cache
from rm.distributed import process_group as dist
from tests import made
from tests.ranks import run_ranks


def use(folder, file, name=("a",), fail=False, calls=None):
    """Examples of the file's numbers; `calls` is a file that gets a line each time they are made."""

    def make():
        with open(calls, "a") as log:
            log.write("made\n")
        if fail:
            raise ValueError("line 3 is broken")
        return made.text_examples(json.loads(file.read_text())), {"kept": 2}

    examples, remembered = cache.open_or_make(str(folder), list(name), (str(file),), make)
    return [example.replies[0].tolist() for example in examples], remembered


@pytest.fixture
def used(tmp_path):
    file, calls = tmp_path / "data.json", tmp_path / "calls"
    file.write_text("[[1, 2], [3]]")
    calls.touch()

    def run(world=1, **settings):
        results = run_ranks(world, lambda: use(tmp_path / "cache", file, calls=calls, **settings))
        return results, len(calls.read_text().splitlines())

    run.file, run.cache = file, tmp_path / "cache"
    return run


def test_the_second_start_makes_nothing(used):
    first, second = used(), used()
    assert first == second == ([([[1, 2], [3]], {"kept": 2})], 1)


def test_it_lies_where_caches_of_a_user_belong(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache.default_folder() == "/somewhere/rm"


def test_ranks_of_one_machine_make_it_once(used):
    results, calls = used(world=4)
    assert results == [([[1, 2], [3]], {"kept": 2})] * 4 and calls == 1


def test_a_changed_file_or_setting_is_noticed(used):
    used()
    used.file.write_text("[[1, 2], [4]]")
    assert used() == ([([[1, 2], [4]], {"kept": 2})], 2)
    assert used(name=("b",))[1] == 3


def test_tokens_are_mapped_not_copied(used):
    import numpy as np

    used()
    (entry,) = used.cache.iterdir()
    examples = cache.Examples.open(entry)
    base = examples.tokens
    while not isinstance(base, np.memmap):
        base = base.base
    assert base.filename == entry / "tokens.npy"


def test_a_failure_leaves_no_entry_and_is_told_once_while_the_other_ranks_stop_too(used):
    with pytest.raises(RuntimeError, match="ValueError: (line 3 is broken|stopped, since another process failed)"):
        used(world=2, fail=True)
    assert not used.cache.exists() or not list(used.cache.iterdir())


def hashed(folder, file):
    examples, _ = cache.open_or_make(str(folder), ["a"], (str(file),), lambda: 1 / 0)
    return examples.__dict__["hash"], examples[:].hash  # as remembered, as computed anew


def test_the_hash_is_remembered_with_the_examples_and_is_theirs(used):
    used()
    ((remembered, computed),) = run_ranks(1, hashed, used.cache, used.file)
    assert remembered == computed


def test_a_killed_writer_leaves_no_entry_that_counts(used):
    used.cache.mkdir()
    (used.cache / "writing-abc").mkdir()
    assert used()[1] == 1


def answers():
    found = [dist.any_rank(dist.rank() == 1), dist.any_rank(False)]
    os.environ["LOCAL_RANK"] = str(dist.rank() % 2)  # two machines of two
    done = []
    dist.once_per_node(lambda: done.append(dist.rank()))
    return found, done


def test_agreement_and_work_once_per_machine():
    assert run_ranks(4, answers) == [
        ([True, False], [0]),
        ([True, False], []),
        ([True, False], [2]),
        ([True, False], []),
    ]
