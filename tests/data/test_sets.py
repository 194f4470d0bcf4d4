"""rm.data.sets: which files are one set, and the names of sets."""

import pytest

from rm.data.sets import UNNAMED, held_out_sets, named_sets


def test_named_sets_are_named_after_their_files_if_unambiguous(tmp_path):
    assert named_sets(["x/test.jsonl.gz", "online=y/b.json"]) == {"test": ["x/test.jsonl.gz"], "online": ["y/b.json"]}
    assert named_sets(["x/test.jsonl", "y/test.jsonl"]) == {
        "x/test.jsonl": ["x/test.jsonl"],
        "y/test.jsonl": ["y/test.jsonl"],
    }
    assert named_sets(["all=a.jsonl", "all=b.jsonl"]) == {"all": ["a.jsonl", "b.jsonl"]}
    file_with_equals_sign = tmp_path / "lr=3.jsonl"
    file_with_equals_sign.write_text("")
    assert named_sets([str(file_with_equals_sign)]) == {"lr=3": [str(file_with_equals_sign)]}


def test_a_folder_is_a_set_of_all_data_files_in_it(tmp_path):
    for name in ("a/z.json", "a/b/x.jsonl.gz", "a/b/read me.md", "a/.hidden.json", "empty/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files = [str(tmp_path / "a/b/x.jsonl.gz"), str(tmp_path / "a/z.json")]
    assert named_sets([f"RMB={tmp_path}/a"]) == {"RMB": files} and named_sets([f"{tmp_path}/a"]) == {"a": files}
    with pytest.raises(ValueError, match="empty: is a folder without data files"):
        named_sets([f"{tmp_path}/empty"])


def test_held_out_files_are_one_set_or_all_have_names(tmp_path):
    assert held_out_sets([]) == {}
    assert held_out_sets(["a.jsonl", "b.jsonl"]) == {UNNAMED: ["a.jsonl", "b.jsonl"]}
    assert held_out_sets(["x=a.jsonl", "y=b", "x=c"]) == {"x": ["a.jsonl", "c"], "y": ["b"]}
    file_with_equals_sign = tmp_path / "lr=3.jsonl"
    file_with_equals_sign.write_text("")
    assert held_out_sets([str(file_with_equals_sign)]) == {UNNAMED: [str(file_with_equals_sign)]}
    with pytest.raises(ValueError, match="b.jsonl has no name, and others have: write NAME=b.jsonl"):
        held_out_sets(["x=a.jsonl", "b.jsonl"])
    with pytest.raises(ValueError, match="there is no such file, and the name of a set may only have"):
        held_out_sets(["runs/lr=3/test.jsonl"])
    for name in ("a/b", "a b", "<b>", "ä", "..\n", ""):
        with pytest.raises(ValueError, match="the name of a set may only have"):
            held_out_sets([f"{name}=a.jsonl"])
    with pytest.raises(ValueError, match="all=a.jsonl: that is the name of all sets together"):
        held_out_sets(["all=a.jsonl"])
