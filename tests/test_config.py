"""rm.config: the command line and run.json."""

import json
from dataclasses import dataclass

import pytest

from rm.config import REQUIRED, as_dict, parse, require_positive, setting


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Numbers"""

    how_many: int = setting(3, "a count")
    rate: float = setting(0.5, "a share, 50% of all")
    limit: int | None = setting(None, "an optional bound")

    def check(self):
        require_positive(self, "how_many")


@dataclass(frozen=True, kw_only=True)
class Words:
    """Words"""

    paths: tuple[str, ...] = setting(REQUIRED, "files")
    kind: str = setting("a", "one of two", choices=("a", "b"))
    flag: bool = setting(False, "yes or no")


@dataclass(frozen=True, kw_only=True)
class Settings(Numbers, Words):
    rate: float = setting(0.25, "a share, with this script's default")


def read(*argv):
    return parse(Settings, "A script.", list(argv))


def refused(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stop:
        read(*argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_flags_take_underscores_and_dashes_lists_and_booleans():
    got = read("--paths", "x", "y", "--how-many", "7", "--flag", "true", "--limit", "2")
    assert (got.paths, got.how_many, got.flag, got.limit) == (("x", "y"), 7, True, 2)


def test_a_script_changes_a_default_and_leaves_the_setting_in_its_group(capsys):
    assert read("--paths", "x").rate == 0.25
    with pytest.raises(SystemExit):
        read("--help")
    text = capsys.readouterr().out.partition("A script.")[2]
    assert text.index("Numbers:") < text.index("--rate") < text.index("--limit") and "(default: 0.25)" in text


def test_a_saved_run_is_repeated_and_flags_win(tmp_path):
    first = read("--paths", "x", "y", "--limit", "4", "--rate", "1")
    saved = tmp_path / "run.json"
    saved.write_text(json.dumps({"settings": as_dict(first), "versions": {}}))
    assert read("--config", str(saved)) == first
    assert read("--config", str(saved), "--how_many", "9").how_many == 9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"paths": ["x"], "hwo_many": 3}', "unknown settings hwo_many"),
        ('{"paths": "x"}', "paths must be a list of str, got 'x'"),
        ('{"paths": ["x"], "how_many": 2.5}', "how_many must be int, got 2.5"),
        ('{"paths": ["x"], "how_many": true}', "how_many must be int, got True"),
        ('{"paths": ["x"], "kind": "c"}', "kind must be one of"),
        ("[1]", "expected an object of settings, got list"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_a_wrong_config_file_is_one_error_that_names_it(tmp_path, capsys, content, message):
    saved = tmp_path / "run.json"
    saved.write_text(content)
    error = refused(capsys, "--config", str(saved))
    assert str(saved) in error and message in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--path", "x"],
            "unrecognized arguments: --path",
        ),  # no abbreviations: a typo must not be taken for something
        ([], "required: --paths"),
        (["--paths", "x", "--kind", "c"], "invalid choice: 'c'"),
        (["--paths", "x", "--flag", "maybe"], "expected true or false, got 'maybe'"),
        (["--paths", "x", "--how_many", "0"], "--how_many must be positive, got 0"),
        (["--paths", "x", "--config", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_flags_are_one_error(capsys, argv, message):
    error = refused(capsys, *argv)
    assert message in " ".join(error.split()) and "Traceback" not in error
