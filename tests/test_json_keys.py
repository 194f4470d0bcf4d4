"""rm.json_keys: every key of a file is declared, off, or refused by name."""

from pathlib import Path

import pytest

from rm.json_keys import Key, check_keys

FILE = Path("some/config.json")
KEYS = {
    "count": Key(int, minimum=1),
    "share": Key(float, minimum=0),
    "name": Key(str, only=("a", "b")),
    "small": Key(int, maximum=1000),
    "names": Key(list, items=Key(str)),
    "values": Key(dict, items=Key(float)),
    "nested": Key(dict, keys={"x": Key(int, required=True), "y": Key(str)}),
    "switch": Key(only=(True, "auto")),
    "either": Key((str, list)),
    "anything": Key(),
}


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"count": 1, "share": 2, "name": "b", "switch": True, "either": [1], "anything": {"x": [None]}},
        {"share": 0.0, "switch": "auto", "either": "x"},
        dict.fromkeys(KEYS),
        {"unknown": None, "other": False, "more": "", "list": [], "object": {}},
    ],
)
def test_declared_values_nulls_and_what_is_off_are_allowed(content):
    check_keys(FILE, content, KEYS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"count": 0}, "count 0 has to be at least 1"),
        ({"count": 2.0}, "count 2.0 has to be of type whole number"),
        ({"count": True}, "count True has to be of type whole number"),
        ({"share": "1"}, "share '1' has to be of type number"),
        ({"share": float("nan")}, "share nan has to be a finite number"),
        ({"share": float("inf")}, "share inf has to be a finite number"),
        ({"name": "c"}, "name 'c' is not implemented, only 'a' or 'b'"),
        ({"name": ["a"]}, "name ['a'] is not implemented"),
        ({"switch": 1}, "switch 1 is not implemented, only True or 'auto'"),
        ({"switch": False}, "switch False is not implemented"),
        ({"either": {}}, "either {} has to be of type string or list"),
        ({"small": 1001}, "small 1001 has to be at most 1,000"),
        ({"names": ["a", 1]}, "names[1] 1 has to be of type string"),
        ({"values": {"a": 1, "b": "c"}}, "values['b'] 'c' has to be of type number"),
        ({"nested": {"x": 1, "y": 2}}, "nested.y 2 has to be of type string"),
        ({"nested": {"x": 1, "z": 2}}, "nested.z 2 is not implemented"),
        ({"nested": {"y": "a"}}, "the setting 'nested.x' is missing"),
        ({"unknown": 0}, "unknown 0 is not implemented: it may change what the model computes"),
        ({"unknown": True}, "unknown True is not implemented"),
        ({"unknown": {"a": 1}}, "unknown {'a': 1} is not implemented"),
    ],
)
def test_anything_else_is_one_error_that_names_file_key_and_value(content, message):
    with pytest.raises(ValueError) as caught:
        check_keys(FILE, content, KEYS)
    assert str(caught.value).startswith(f"{FILE}: {message}")


def test_keys_of_other_software_may_be_allowed():
    check_keys(FILE, {"unknown": 3, "small": 3}, KEYS, others=True)
    with pytest.raises(ValueError, match="small 3000 has to be"):
        check_keys(FILE, {"unknown": 3, "small": 3000}, KEYS, others=True)
    with pytest.raises(ValueError, match="some/config.json: the setting 'a' is missing"):
        check_keys(FILE, {"b": 3}, {"a": Key(required=True)}, others=True)
