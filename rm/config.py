"""Settings: dataclasses in, a flat argparse command line out.

A setting is declared once, beside the code that reads it:

    @dataclass(frozen=True, kw_only=True)
    class OptimSettings:
        learning_rate: float = setting(1e-5, "peak learning rate")

and a script's settings are the sum of such groups, by inheritance, so that names stay flat on the command line and in
the code:

    class Settings(ModelSettings, DataSettings, OptimSettings): ...
    settings = parse(Settings, __doc__)

Every base class is a group of `--help`; its `check(self)`, if it has one, raises ValueError for values that make no
sense. `--config run.json` starts from a saved run; flags win over it.
"""

import argparse
import dataclasses
import json
import types
import typing
from pathlib import Path

REQUIRED = dataclasses.MISSING


def setting(default, help: str, choices: tuple | None = None, may_change: bool = False):
    """One setting: a dataclass field with its help line and, where only some values make sense, those values.

    Args:
        may_change: whether a run may go on from a checkpoint with another value, since the mathematics stays the same.
    """
    metadata = {"help": help, "choices": choices, "may_change": may_change}
    return dataclasses.field(default=default, metadata=metadata)


def require_positive(settings, name: str) -> None:
    """For a group's `check`: this setting must be above zero."""
    if not getattr(settings, name) > 0:
        raise ValueError(f"--{name} must be positive, got {getattr(settings, name)}")


def as_dict(settings) -> dict:
    """The flat, JSON-ready form of a run's settings, which `--config` reads back."""
    return dataclasses.asdict(settings)


def fixed(settings) -> dict:
    """The settings, JSON-ready, that make a training what it is: those that may not change while it lasts."""
    names = [f.name for f in dataclasses.fields(settings) if not f.metadata["may_change"]]
    return json.loads(json.dumps({name: getattr(settings, name) for name in names}))  # tuples become lists


def changed(settings, before: dict) -> dict[str, tuple]:
    """Which settings make this another training than that of `before` (as in run.json): name -> (there, here).

    A setting that `before` does not know had its default.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(settings) if f.default is not REQUIRED}
    before = json.loads(json.dumps(defaults)) | before
    here = fixed(settings)
    return {name: (before.get(name), value) for name, value in here.items() if before.get(name) != value}


def parse(cls: type, doc: str, argv: list[str] | None = None):
    """Read `cls` from the command line (and `--config`). A user's mistake prints one line and exits with 2.

    Args:
        cls: a frozen dataclass; its bases are the groups of `--help`.
        doc: the script's docstring: the text above the flags.
        argv: the command line without the program's name; None reads sys.argv.
    """
    parser = _parser(cls, doc)
    given = vars(parser.parse_args(argv))
    fields = {f.name: f for f in dataclasses.fields(cls)}
    try:
        values = _read_file(given.pop("config", None), fields, typing.get_type_hints(cls)) | given
        missing = [f"--{name}" for name, f in fields.items() if f.default is REQUIRED and name not in values]
        if missing:
            raise ValueError(f"required: {', '.join(missing)}")
        settings = cls(**values)
        for group in cls.__mro__:
            group.__dict__.get("check", lambda settings: None)(settings)
        return settings
    except ValueError as error:
        parser.error(str(error))


def _parser(cls: type, doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s --name value ...",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="RUN.JSON", help="start from a saved run's settings; flags win over it")
    hints = typing.get_type_hints(cls)
    for base in cls.__mro__[-2::-1]:  # object itself is last; the script's own settings come at the end
        own = [f for f in dataclasses.fields(cls) if f.name in base.__dict__.get("__annotations__", {})]
        own = [f for f in own if _home(cls, f.name) is base]
        if own:
            group = parser.add_argument_group((base.__doc__ or base.__name__).strip().splitlines()[0])
            for field in own:
                _add(group, field, hints[field.name])
    return parser


def _home(cls: type, name: str) -> type:
    """The class that first declared a setting: a script that only changes a default does not move it."""
    return [base for base in cls.__mro__ if name in base.__dict__.get("__annotations__", {})][-1]


def _add(group, field: dataclasses.Field, hint) -> None:
    item, many = _item_type(hint)
    default = "required" if field.default is REQUIRED else f"default: {_shown(field.default)}"
    choices = field.metadata["choices"]
    flags = [f"--{field.name}"]
    if "_" in field.name:
        flags.append(f"--{field.name.replace('_', '-')}")
    group.add_argument(
        *flags,
        dest=field.name,
        type=_boolean if item is bool else item,
        nargs="+" if many else None,
        action=_Tuple if many else None,
        choices=choices,
        metavar=None if choices else ("{true,false}" if item is bool else item.__name__.upper()),
        help=f"{field.metadata['help']} ({default})".replace("%", "%%"),
    )


class _Tuple(argparse.Action):
    """A list on the command line is a tuple in the (frozen, hashable) settings."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))


def _item_type(hint) -> tuple[type, bool]:
    """(type of one value, may there be several): `tuple[str, ...]` -> (str, True), `int | None` -> (int, False)."""
    if isinstance(hint, types.UnionType):
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def _boolean(text: str) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return words[text.lower()]


def _shown(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _read_file(path: str | None, fields: dict, hints: dict) -> dict:
    """The settings saved in a run.json (its `settings` entry), or in a flat JSON object of settings."""
    if path is None:
        return {}
    try:
        saved = json.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"--config {path}: cannot be read as JSON: {error}") from None
    saved = saved.get("settings", saved) if isinstance(saved, dict) else saved
    if not isinstance(saved, dict):
        raise ValueError(f"--config {path}: expected an object of settings, got {type(saved).__name__}")
    if unknown := sorted(saved.keys() - fields.keys()):
        raise ValueError(f"--config {path}: unknown settings {', '.join(unknown)}; see --help")
    return {name: _checked(path, name, value, hints[name], fields[name]) for name, value in saved.items()}


def _checked(path: str, name: str, value, hint, field: dataclasses.Field):
    """A JSON value as the setting's own type (lists become tuples, 1 becomes 1.0), or a ValueError that names it."""
    item, many = _item_type(hint)
    optional = isinstance(hint, types.UnionType)
    allowed = (int, float) if item is float else item
    values = value if many and isinstance(value, list) else [value]
    wrong = many != isinstance(value, list) or any(
        not isinstance(v, allowed) or (isinstance(v, bool) and item is not bool) for v in values
    )
    if value is None and optional:
        return None
    if wrong:
        expected = f"a list of {item.__name__}" if many else item.__name__
        raise ValueError(f"--config {path}: {name} must be {expected}, got {value!r}")
    if field.metadata["choices"] and value not in field.metadata["choices"]:
        raise ValueError(f"--config {path}: {name} must be one of {field.metadata['choices']}, got {value!r}")
    return tuple(map(item, values)) if many else item(value)
