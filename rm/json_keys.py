"""What a JSON file from elsewhere may hold: its keys with their types and values.

Every key of such a file is read, known to be without effect, or refused by name: nothing that may change a result is
passed over. A file's keys are declared in a table:

    KEYS = {
        "r": Key(int, minimum=1, required=True),
        "bias": Key(str, only=("none",)),                # other values exist, and are not implemented
        "layers": Key(list, items=Key(int)),
        "eva_config": Key(dict, keys={"rho": Key(float)}),  # an object with keys of its own
        "peft_version": Key(),                           # of any type: known to be without effect
    }
    content = read(file, KEYS)

A key that the table lacks is refused, unless its value is null, false or empty, which switches a feature off. Files
that this package writes are read in the same way, with `others`: a disk or a person may have changed them.
"""

import math
import reprlib
from dataclasses import dataclass
from pathlib import Path

from rm.files import read_json

UNKNOWN = "is not implemented: it may change what the model computes; if it does not, remove it from the file"
_short = reprlib.Repr()
_short.maxstring = 100


@dataclass(frozen=True)
class Key:
    """What a key may hold; null is always allowed, and means that the key is absent.

    Attributes:
        type: of the value; `float` includes whole numbers. None: any.
        only: the values that are implemented; empty: all of the type.
        minimum, maximum: of a number. Numbers have to be finite, and whole ones to have 64 bits.
        required: whether the key has to be there.
        items: what each element of a list, or each value of an object whose keys are names, may be. None: anything.
        keys: of an object: the keys that it may hold. None: any.
        others: whether that object may also hold keys that are not among these.
    """

    type: type | tuple[type, ...] | None = None
    only: tuple = ()
    minimum: float | None = None
    maximum: float | None = None
    required: bool = False
    items: "Key | None" = None
    keys: "dict[str, Key] | None" = None
    others: bool = False

    def problem(self, name: str, value) -> str | None:
        """What is wrong with a value, in words that begin with `name`; None if nothing is."""
        if problem := self._own_problem(value):
            return f"{name} {_short.repr(value)} {problem}"
        if self.items is not None and isinstance(value, (list, dict)):
            for index, item in enumerate(value) if isinstance(value, list) else value.items():
                if problem := self.items.problem(f"{name}[{index!r}]", item):
                    return problem
        if self.keys is not None and isinstance(value, dict):
            return _problem(value, self.keys, f"{name}.", self.others)
        return None

    def _own_problem(self, value) -> str | None:
        if self.only:
            # 1 == True in Python, but not in JSON.
            if any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in self.only):
                return None
            return f"is not implemented, only {' or '.join(map(repr, self.only))}"
        if self.type is not None and not self._has_type(value):
            types = self.type if isinstance(self.type, tuple) else (self.type,)
            return f"has to be of type {' or '.join(_JSON_NAMES[t] for t in types)}"
        if isinstance(value, float) and not math.isfinite(value):
            return "has to be a finite number"
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return "has to be a number of 64 bits"
        if self.minimum is not None and isinstance(value, (int, float)) and value < self.minimum:
            return f"has to be at least {self.minimum:g}"
        if self.maximum is not None and isinstance(value, (int, float)) and value > self.maximum:
            return f"has to be at most {self.maximum:,}"
        return None

    def _has_type(self, value) -> bool:
        types = self.type if isinstance(self.type, tuple) else (self.type,)
        if isinstance(value, bool):  # which Python counts as an int
            return bool in types
        return isinstance(value, types) or (float in types and isinstance(value, int))


_JSON_NAMES = {str: "string", int: "whole number", float: "number", bool: "true or false", dict: "object", list: "list"}


def read(file: Path, keys: dict[str, Key], others: bool = False) -> dict:
    """The JSON object in `file`, {} where there is none; ValueError if it is not what the table says (`check_keys`)."""
    content = read_json(file)
    if content or file.is_file():
        check_keys(file, content, keys, others)
    return content


def check_keys(file: Path, content: dict, keys: dict[str, Key], others: bool = False) -> None:
    """Raise ValueError for the first key of a file that is unknown or missing or has a value that is not allowed.

    Args:
        others: whether the file may hold keys that the table lacks: settings of other software, without effect here.
    """
    if problem := _problem(content, keys, "", others):
        raise ValueError(f"{file}: {problem}")


def _problem(content: dict, keys: dict[str, Key], path: str, others: bool) -> str | None:
    """What is wrong with an object, None if nothing is. `path` stands before the names of its keys."""
    for name, value in content.items():
        if value is None or (others and name not in keys):
            continue
        if name not in keys and (value is False or value in ("", [], {})):
            continue
        if name not in keys:
            return f"{path}{name} {_short.repr(value)} {UNKNOWN}"
        if problem := keys[name].problem(f"{path}{name}", value):
            return problem
    for name, key in keys.items():
        if key.required and content.get(name) is None:
            return f"the setting '{path}{name}' is missing"
    return None
