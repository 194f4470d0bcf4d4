"""Settings: dataclasses in the code, flat flags on the command line.

A setting is declared once, next to the code that reads it, in a group of settings:

    @dataclass(frozen=True, kw_only=True)
    class OptimSettings(SettingsGroup):
        \"""Optimizer\"""

        learning_rate: float = setting(1e-5, "peak learning rate")

        def check(self) -> None:
            require_positive(learning_rate=self.learning_rate)

A script composes groups, and may change a default:

    @dataclass(frozen=True, kw_only=True)
    class Settings(SettingsGroup):
        model: ModelSettings
        optim: OptimSettings = defaults(learning_rate=2e-5)

        average_decay: float = setting(0.99, "a setting of the script itself")

    settings = parse(Settings, __doc__)          # --learning_rate 3e-5
    settings.optim.learning_rate                 # 3e-5

Names are unique over all groups of a script, so that the command line, run.json and checkpoints are flat. `--config
run.json` starts from a saved run; flags take precedence.
"""

import argparse
import dataclasses
import difflib
import json
import math
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path

from rm.files import read_whole, unique_keys
from rm.terminal import printable, without_secrets_in

REQUIRED = dataclasses.MISSING


def setting(default, help: str, choices: tuple = (), may_change: bool = False, hub: str | None = None):
    """Declare one setting: a dataclass field with its help text.

    Args:
        choices: the allowed values; empty: any value of the type.
        may_change: whether a run may resume from a checkpoint with another value, since the result stays the same.
        hub: "model", "data", "template" or "checkpoint" where the value may be a name on the hub, which `rm.hf.hub`
            replaces by a local path.
    """
    metadata = {"help": help, "choices": choices, "may_change": may_change, "hub": hub}
    return dataclasses.field(default=default, metadata=metadata)


def defaults(**changed):
    """A group of settings in a script, with other defaults for some of its settings."""
    return dataclasses.field(metadata={"defaults": changed})


class SettingsGroup:
    """Base class of all settings: values are checked whenever an object is made, from flags or in code.

    The first line of a subclass's docstring is its title in `--help`.
    """

    def __post_init__(self):
        for flag in flags(type(self)).values():
            if flag.group is None:  # the groups within have checked their own
                _check_value(flag, vars(self)[flag.name])
        self.check()

    def check(self) -> None:
        """Raise ValueError for values that make no sense."""


Settings = typing.TypeVar("Settings", bound=SettingsGroup)


def _check_value(flag: "Flag", value) -> None:
    """Raise ValueError for a value of another type, an empty string, a number that is not finite, or no choice."""
    if value is None and flag.optional:
        return
    if flag.many != isinstance(value, tuple):
        raise ValueError(f"--{flag.name} must be {flag.type_name}, got {value!r}")
    for item in value if flag.many else (value,):
        if not _has_type(item, flag.type):
            raise ValueError(f"--{flag.name} must be {flag.type_name}, got {item!r}")
        if item == "":
            raise ValueError(f"--{flag.name} is an empty string: give a value, or leave the flag out")
        if flag.type is float and not math.isfinite(item):
            raise ValueError(f"--{flag.name} must be a finite number, got {item}")
        if flag.choices and item not in flag.choices:
            raise ValueError(f"--{flag.name} must be {_one_of(flag.choices)}, got {item!r}")


def require_positive(**values: float | None) -> None:
    """Raise ValueError for a setting that is not above zero. None is an optional setting that is not set."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ValueError(f"--{name} must be positive, got {value}")


def require_not_negative(**values: float | None) -> None:
    """Raise ValueError for a setting below zero. None is an optional setting that is not set."""
    for name, value in values.items():
        if value is not None and not value >= 0:
            raise ValueError(f"--{name} must not be negative, got {value}")


@dataclass(frozen=True)
class Flag:
    """One setting as the command line knows it."""

    name: str
    group: str | None  # the attribute of the script's settings that holds it; None: the settings object itself
    title: str  # of its group in --help
    type: type  # of one value
    many: bool  # the value is a tuple
    optional: bool  # the value may be None
    default: object
    help: str
    choices: tuple
    may_change: bool
    hub: str | None

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    @property
    def type_name(self) -> str:
        return f"a list of {self.type.__name__}" if self.many else self.type.__name__

    @property
    def can_be_unset(self) -> bool:
        """Whether `none` on the command line stands for no value."""
        return self.optional or (self.many and self.default == ())


def flags(cls: type[SettingsGroup]) -> dict[str, Flag]:
    """Every setting of a script's (or a single group's) class, by its name."""
    found: dict[str, Flag] = {}
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            members = _members(hints[field.name], field.name, field.metadata.get("defaults", {}))
        else:
            members = [_flag(field, hints[field.name], None, _title(cls), field.default)]
        for flag in members:
            assert flag.name not in found, f"two settings of {cls.__name__} are called {flag.name}"
            found[flag.name] = flag
    return found


def _members(group: type[SettingsGroup], attribute: str, changed: dict) -> list[Flag]:
    hints, fields = typing.get_type_hints(group), dataclasses.fields(group)
    assert changed.keys() <= hints.keys(), f"{group.__name__} has no setting {changed.keys() - hints.keys()}"
    return [_flag(f, hints[f.name], attribute, _title(group), changed.get(f.name, f.default)) for f in fields]


def _flag(field: dataclasses.Field, hint, group: str | None, title: str, default) -> Flag:
    optional = isinstance(hint, types.UnionType)
    if optional:
        hint = next(arm for arm in typing.get_args(hint) if arm is not type(None))
    many = typing.get_origin(hint) is tuple
    item = typing.get_args(hint)[0] if many else hint
    declared = {"help": "no description", "choices": (), "may_change": False, "hub": None} | field.metadata
    return Flag(field.name, group, title, item, many, optional, default, **declared)


def _title(group: type[SettingsGroup]) -> str:
    first_line = group.__doc__.strip().splitlines()[0]
    assert not first_line.startswith(f"{group.__name__}("), f"{group.__name__} needs a docstring: its title in --help"
    return first_line.rstrip(".")


def compose(cls: type[Settings], **values) -> Settings:
    """A settings object from flat values; the others have their defaults.

    Raises:
        ValueError: a required setting is missing, or a check fails.
    """
    known = flags(cls)
    if unknown := sorted(values.keys() - known.keys()):
        raise ValueError(f"unknown settings: {', '.join(unknown)}")
    if missing := [f"--{name}" for name, flag in known.items() if flag.required and name not in values]:
        raise ValueError(f"required: {', '.join(missing)}")
    values = {name: values.get(name, flag.default) for name, flag in known.items()}
    own = {name: values[name] for name, flag in known.items() if flag.group is None}
    hints = typing.get_type_hints(cls)
    for group in dict.fromkeys(flag.group for flag in known.values() if flag.group):
        own[group] = hints[group](**{name: values[name] for name, flag in known.items() if flag.group == group})
    return cls(**own)


def flatten(settings: SettingsGroup) -> dict:
    """The flat form of a settings object: what `compose` makes it of."""
    flat = {}
    for name, value in dataclasses.asdict(settings).items():
        flat |= value if isinstance(value, dict) else {name: value}
    return flat


def as_saved(settings: SettingsGroup) -> dict:
    """The flat settings as files have them, and as `--config` reads them: lists for tuples, *** for secrets."""
    return _as_saved(flatten(settings))


def _as_saved(values: dict) -> dict:
    return without_secrets_in(json.loads(json.dumps(values)))


def updated(settings: Settings, **changes) -> Settings:
    """A copy of a settings object with some values changed, by their flat names."""
    return compose(type(settings), **flatten(settings) | changes)


def fixed_settings(settings: SettingsGroup) -> dict:
    """The settings that may not change while a training lasts, `as_saved`."""
    may_change = {name for name, flag in flags(type(settings)).items() if flag.may_change}
    return {name: value for name, value in as_saved(settings).items() if name not in may_change}


def changed_settings(settings: SettingsGroup, before: dict) -> dict[str, tuple]:
    """The settings that differ from those of another run, as its run.json has them: name -> (before, now).

    Only settings that may not change are compared. One that `before` does not know had its default then.
    """
    known = {name: flag.default for name, flag in flags(type(settings)).items() if not flag.required}
    before = _as_saved(known | before)
    return {name: (before.get(name), now) for name, now in fixed_settings(settings).items() if before.get(name) != now}


def parse(cls: type[Settings], doc: str, argv: list[str] | None = None, positional: str | None = None) -> Settings:
    """Read settings from the command line (and `--config`). A user's mistake prints one line and exits with 2.

    Args:
        cls: a script's settings, composed of groups.
        doc: the script's docstring: the text above the flags in `--help`.
        argv: the command line without the program's name; None reads sys.argv.
        positional: the setting, a list of files, whose values may also stand without its flag.
    """
    known = flags(cls)
    parser = _parser(known, doc)
    if positional:
        parser.usage = "%(prog)s FILE ... --name value ..."
    given, unknown = parser.parse_known_args(_with_underscores(argv))
    given = vars(given)
    try:
        if positional and unknown and not any(word.startswith("--") for word in unknown):
            given[positional], unknown = (*given.get(positional, ()), *unknown), []
        if unknown:
            flag = next((word for word in unknown if word.startswith("--")), unknown[0])
            raise ValueError(_unknown(flag, known))
        values = _read_file(given.pop("config", None), known) | given
        return compose(cls, **values)
    except ValueError as error:
        parser.error(printable(str(error)))


def _with_underscores(argv: list[str] | None) -> list[str]:
    """Flags may be written with dashes: --max-length is --max_length."""
    words = []
    for word in sys.argv[1:] if argv is None else argv:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            word = f"--{name[2:].replace('-', '_')}{equals}{value}"
        words.append(word)
    return words


def _unknown(word: str, known: dict[str, Flag]) -> str:
    if not word.startswith("--"):
        return f"unexpected argument {word!r}: every setting is written as --name value; see --help"
    name = word.partition("=")[0]
    nearest = difflib.get_close_matches(name, [f"--{flag}" for flag in known], n=1, cutoff=0.75)
    suggestion = f": did you mean {nearest[0]}?" if nearest else "."
    return f"unknown flag {name}{suggestion} All flags: --help; names of other trainers' flags: docs/moving.md"


def _parser(known: dict[str, Flag], doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s --name value ...",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="RUN.JSON", help="start from a saved run's settings; flags take precedence")
    by_title: dict[str, list[Flag]] = {}
    for flag in known.values():
        by_title.setdefault(flag.title, []).append(flag)
    # What has to be given comes first: groups with a required setting, and required settings within a group.
    in_order = sorted(by_title.items(), key=lambda item: not any(flag.required for flag in item[1]))
    for title, members in in_order:
        group = parser.add_argument_group(title)
        for flag in sorted(members, key=lambda flag: not flag.required):
            _add(group, flag)
    return parser


def _add(group, flag: Flag) -> None:
    default = "required" if flag.required else f"default: {_as_text(flag.default)}"
    extra = {}
    if flag.many:
        extra = {"nargs": "+", "action": _StoreTuple, "can_be_unset": flag.can_be_unset}
    elif flag.type is bool:
        extra = {"nargs": "?", "const": True}  # the flag alone means true
    if flag.choices:
        metavar = "{" + ",".join(map(str, flag.choices)) + "}"
    else:
        metavar = "{true,false}" if flag.type is bool else flag.type.__name__.upper()
    help = f"{flag.help} ({default})".replace("%", "%%")
    group.add_argument(f"--{flag.name}", dest=flag.name, type=_reader(flag), metavar=metavar, help=help, **extra)


def _reader(flag: Flag):
    """The function that reads one value of a flag from its text."""

    def read(text: str):
        if flag.optional and text.lower() == "none":
            return None
        if flag.many and flag.can_be_unset and text.lower() == "none":
            return None  # _StoreTuple makes it an empty tuple
        value = _boolean(text) if flag.type is bool else flag.type(text)
        if flag.choices and value not in flag.choices:
            raise argparse.ArgumentTypeError(f"expected {_one_of(flag.choices)}, got {text!r}")
        return value

    read.__name__ = flag.type.__name__  # argparse's own message: invalid int value: 'a'
    return read


class _StoreTuple(argparse.Action):
    """A list on the command line is a tuple in the (frozen, hashable) settings; `none` alone is an empty one."""

    def __init__(self, *args, can_be_unset: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.can_be_unset = can_be_unset

    def __call__(self, parser, namespace, values, option_string=None):
        if values == [None]:
            values = []
        elif None in values:
            parser.error(f"{option_string}: none stands alone, for no value")
        setattr(namespace, self.dest, tuple(values))


def _boolean(text: str) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return words[text.lower()]


def _one_of(choices: tuple) -> str:
    return f"one of {', '.join(map(str, choices))}" if len(choices) > 1 else str(choices[0])


def _as_text(value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _read_file(path: str | None, known: dict[str, Flag]) -> dict:
    """The settings saved in a run.json (its `settings` entry), or in a flat JSON object of settings."""
    if path is None:
        return {}
    try:
        saved = json.loads(read_whole(Path(path)), object_pairs_hook=unique_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--config {path}: cannot be read as JSON: {error}") from None
    if isinstance(saved, dict):
        saved = saved.get("settings", saved)
    if not isinstance(saved, dict):
        raise ValueError(f"--config {path}: expected an object of settings, got {type(saved).__name__}")
    if unknown := sorted(saved.keys() - known.keys()):
        raise ValueError(f"--config {path}: unknown settings {', '.join(unknown)}; see --help")
    return {name: _from_json(path, known[name], value) for name, value in saved.items()}


def _from_json(path: str, flag: Flag, value):
    """A JSON value as the setting's own type (lists become tuples, 1 becomes 1.0), or a ValueError that names it."""
    if value is None and flag.optional:
        return None
    values = value if flag.many and isinstance(value, list) else [value]
    if flag.many != isinstance(value, list) or not all(_has_type(v, flag.type) for v in values):
        raise ValueError(f"--config {path}: {flag.name} must be {flag.type_name}, got {value!r}")
    if flag.choices and not all(v in flag.choices for v in values):
        raise ValueError(f"--config {path}: {flag.name} must be {_one_of(flag.choices)}, got {value!r}")
    try:
        return tuple(map(flag.type, values)) if flag.many else flag.type(value)
    except OverflowError:
        raise ValueError(f"--config {path}: {flag.name} is too large a number") from None


def _has_type(value, expected: type) -> bool:
    if isinstance(value, bool):  # which Python counts as an int
        return expected is bool
    return isinstance(value, (int, float) if expected is float else expected)
