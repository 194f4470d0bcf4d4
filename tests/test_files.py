"""rm.files: what is written whole, read whole, or hashed."""

import hashlib
import random

import pytest

from rm.files import feed, read_json, replace, write_json


def test_replace_leaves_the_old_text_or_the_new_one(tmp_path):
    for text in ("old", "new"):
        replace(tmp_path / "file", text)
        assert (tmp_path / "file").read_text() == text
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_a_text_that_cannot_be_written_leaves_the_old_one_and_nothing_beside_it(tmp_path):
    replace(tmp_path / "file", "old")
    with pytest.raises(UnicodeEncodeError):
        replace(tmp_path / "file", "new \ud800")
    assert (tmp_path / "file").read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_json_comes_back_as_it_was_written(tmp_path):
    value = {"b": [1, 2.5, None], "a": {"é": "日本 \u2028"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value and list(read_json(tmp_path / "a.json")) == ["b", "a"]
    assert read_json(tmp_path / "none.json") == {}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "a.json is not JSON: Expecting property name"),
        (b"\xff", "a.json is not JSON: 'utf-8' codec"),
        (b"[1]", "a.json holds a JSON list, not an object"),
    ],
)
def test_what_is_no_json_object_is_named(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("size", [0, 5, 2**20, 2**21 + 3])
def test_a_file_fed_in_blocks_has_the_digest_of_the_whole(tmp_path, size):
    content = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    digest = hashlib.sha256()
    assert feed(digest, tmp_path / "file") == size
    assert digest.digest() == hashlib.sha256(content).digest()
