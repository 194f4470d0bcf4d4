"""What a JSON file from elsewhere may hold: its keys with their types and values.

Every key of such a file is read, known to be without effect, or refused by name: nothing that may change a result is
passed over. A file's keys are declared in a table:

    KEYS = {
        "r": Key(int, minimum=1),
        "bias": Key(str, only=("none",)),       # other values exist, and are not implemented
        "peft_version": Key(),                  # of any type: known to be without effect
    }
    check_keys(file, read_json(file), KEYS)

A key that the table lacks is refused, unless its value is null, false or empty, which switches a feature off.
"""

import math
import reprlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Key:
    """What a key may hold; null is always allowed, and means that the key is absent.

    Attributes:
        type: of the value; `float` includes whole numbers. None: any.
        only: the values that are implemented; empty: all of the type.
        minimum: of a number. Numbers have to be finite.
    """

    type: type | tuple[type, ...] | None = None
    only: tuple = ()
    minimum: float | None = None

    def problem(self, value) -> str | None:
        """What is wrong with a value, None if nothing is."""
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
        if self.minimum is not None and value < self.minimum:
            return f"has to be at least {self.minimum:g}"
        return None

    def _has_type(self, value) -> bool:
        types = self.type if isinstance(self.type, tuple) else (self.type,)
        if isinstance(value, bool):  # which Python counts as an int
            return bool in types
        return isinstance(value, types) or (float in types and isinstance(value, int))


_JSON_NAMES = {str: "string", int: "whole number", float: "number", bool: "true or false", dict: "object", list: "list"}


def check_keys(file: Path, content: dict, keys: dict[str, Key]) -> None:
    """Raise ValueError for the first key of a file that is unknown or has a value that is not allowed."""
    for name, value in content.items():
        if name in keys:
            problem = None if value is None else keys[name].problem(value)
        else:
            is_off = value is None or value is False or value in ("", [], {})
            problem = None if is_off else "is not implemented: it may change what the model computes"
        if problem:
            raise ValueError(f"{file}: {name} {reprlib.repr(value)} {problem}")
