"""rm.files: atomic writes, JSON, and digests of files."""

import hashlib
import random

import pytest

from rm.files import read_json, update_digest, write_atomically, write_json


def test_write_atomically_replaces_the_content(tmp_path):
    for text in ("old", "new"):
        write_atomically(tmp_path / "file", text)
        assert (tmp_path / "file").read_text() == text
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_keeps_the_old_content_and_leaves_no_temporary_file(tmp_path):
    write_atomically(tmp_path / "file", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "file", "new \ud800")
    assert (tmp_path / "file").read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_read_json_returns_what_write_json_wrote(tmp_path):
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
def test_read_json_names_a_file_that_is_not_a_json_object(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("size", [0, 5, 2**20, 2**21 + 3])
def test_update_digest_in_blocks_equals_the_digest_of_the_whole_file(tmp_path, size):
    content = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    digest = hashlib.sha256()
    assert update_digest(digest, tmp_path / "file") == size
    assert digest.digest() == hashlib.sha256(content).digest()
