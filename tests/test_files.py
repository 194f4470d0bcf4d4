"""rm.files: atomic writes, JSON, and digests of files."""

import hashlib
import os
import random
import resource

import pytest

from rm import files
from rm.files import read_json, sha256, update_digest, write_atomically, write_json, write_together


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
        (b'{"a": [{"b": 1, "b": 2}]}', r"a.json is not JSON: an object has a key twice: \['b', 'b'\]"),
        (b"{", "a.json is not JSON: Expecting property name"),
        (b"\xff", "a.json is not JSON: 'utf-8' codec"),
        (b"[1]", "a.json holds a JSON list, not an object"),
    ],
)
def test_read_json_names_a_file_that_is_not_a_json_object(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "a.json")


def test_what_is_held_in_memory_is_a_file_of_a_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST", 2**20)
    (tmp_path / "sparse.json").touch()
    os.truncate(tmp_path / "sparse.json", 2**20 + 1)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zeros.json").symlink_to("/dev/zero")
    for name, message in {
        "sparse.json": "has 1,048,577 bytes, and at most 1,048,576 are read",
        "fifo": "is neither a file nor a folder",
        "zeros.json": "is neither a file nor a folder",
        "": "is a folder",
    }.items():
        with pytest.raises(ValueError, match=message):
            read_json(tmp_path / name)
    with pytest.raises(ValueError, match="is neither a file nor a folder"):
        sha256(tmp_path / "zeros.json")


@pytest.mark.parametrize("size", [0, 5, 2**20, 2**21 + 3])
def test_update_digest_in_blocks_equals_the_digest_of_the_whole_file(tmp_path, size):
    content = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    digest = hashlib.sha256()
    assert update_digest(digest, tmp_path / "file") == size
    assert digest.digest() == hashlib.sha256(content).digest()


def test_files_that_belong_together_get_their_names_once_all_are_on_the_disk(tmp_path, monkeypatch):
    events, paths = [], [tmp_path / "a", tmp_path / "b"]
    fsync, replace = os.fsync, os.replace

    def recording_fsync(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append(f"-> {new.name}"), replace(old, new)))
    write_together({paths[0]: ["x", "y"], paths[1]: ["z"]})
    assert events == [".a.writing", ".b.writing", "-> a", tmp_path.name, "-> b", tmp_path.name]
    assert [path.read_text() for path in paths] == ["xy", "z"]


def test_on_a_full_disk_none_of_them_changes_and_the_error_names_the_file(tmp_path):
    write_together({tmp_path / "a": ["old"]})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a write beyond it fails, as on a full disk
    try:
        with pytest.raises(OSError, match=f"{tmp_path / 'b'}"):
            write_together({tmp_path / "a": ["new"], tmp_path / "b": ["x" * 2000]})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a": "old"}


@pytest.mark.parametrize(("failing", "left"), [(1, {"a": "old"}), (2, {"a": "new", ".b.writing": "x"})])
def test_a_failure_between_two_names_leaves_the_rest_whole(failing, left, tmp_path, monkeypatch):
    write_together({tmp_path / "a": ["old"]})
    replace, calls = os.replace, []

    def failing_replace(*names):
        calls.append(names)
        if len(calls) == failing:
            raise OSError(28, "No space left on device")
        replace(*names)

    monkeypatch.setattr(os, "replace", failing_replace)
    files = {tmp_path / "a": ["new"], tmp_path / "b": ["x"]}
    with pytest.raises(OSError, match="No space left"):
        write_together(files)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == left
    write_together(files)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a": "new", "b": "x"}
