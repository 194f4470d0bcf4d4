"""rm.config: settings in groups, the command line, and run.json."""

import json
import os
import re
from dataclasses import dataclass, replace

import pytest

import eval_rm
import train_rm
import train_sft
from rm import export
from rm.config import (
    REQUIRED,
    SettingsGroup,
    as_saved,
    changed_settings,
    compose,
    defaults,
    flags,
    flatten,
    parse,
    require_positive,
    setting,
    updated,
)


@dataclass(frozen=True, kw_only=True)
class Numbers(SettingsGroup):
    """Numbers"""

    how_many: int = setting(3, "a count")
    rate: float = setting(0.5, "a share, 50% of all")
    limit: int | None = setting(None, "an optional bound", may_change=True)

    def check(self):
        require_positive(how_many=self.how_many, limit=self.limit)


@dataclass(frozen=True, kw_only=True)
class Words(SettingsGroup):
    """Words"""

    kind: str = setting("a", "one of two", choices=("a", "b"))
    other_kind: str | None = setting(None, "one of two, or neither", choices=("a", "b"))
    flag: bool = setting(False, "yes or no")
    paths: tuple[str, ...] = setting(REQUIRED, "files")
    more: tuple[str, ...] = setting((), "more files")


@dataclass(frozen=True, kw_only=True)
class Settings(SettingsGroup):
    """A script"""

    numbers: Numbers = defaults(rate=0.25)
    words: Words

    def check(self):
        if self.words.flag and self.numbers.how_many > 100:
            raise ValueError("--flag goes with a --how_many of at most 100")


def read(*argv):
    return parse(Settings, "A script.", list(argv))


def help_of(settings: type, capsys) -> str:
    with pytest.raises(SystemExit):
        parse(settings, "A script.", ["--help"])
    return capsys.readouterr().out.partition("A script.")[2]


def refused(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as stop:
        read(*argv)
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_flags_take_underscores_and_dashes_lists_and_booleans():
    got = read("--paths", "x", "y", "--how-many", "7", "--flag", "true", "--limit=2")
    assert (got.words.paths, got.numbers.how_many, got.words.flag, got.numbers.limit) == (("x", "y"), 7, True, 2)


def test_a_value_keeps_its_dashes():
    assert read("--paths", "a-b", "c-d").words.paths == ("a-b", "c-d")


def test_a_boolean_flag_alone_means_true():
    assert read("--flag", "--paths", "x").words.flag and read("--paths", "x", "--flag").words.flag
    assert not read("--paths", "x", "--flag", "false").words.flag


def test_none_unsets_what_is_optional():
    got = read("--paths", "x", "--limit", "none", "--other_kind", "none", "--more", "none")
    assert got.numbers.limit is None and got.words.other_kind is None and got.words.more == ()


def test_none_does_not_unset_what_is_not_optional(capsys):
    assert "invalid int value: 'none'" in refused(capsys, "--paths", "x", "--how_many", "none")
    assert read("--paths", "none").words.paths == ("none",)


def test_a_script_changes_a_default_in_its_group(capsys):
    assert read("--paths", "x").numbers.rate == 0.25
    assert "--rate FLOAT a share, 50% of all (default: 0.25)" in " ".join(help_of(Settings, capsys).split())


def test_help_lists_required_groups_and_settings_first_and_each_flag_once(capsys):
    text = help_of(Settings, capsys)
    places = [text.index(part) for part in ("Words:", "--paths", "--kind", "Numbers:", "--how_many", "--limit")]
    assert places == sorted(places)
    assert text.count("--how_many") == 1 and "--how-many" not in text
    assert "--flag [{true,false}]" in text and "--kind {a,b}" in text


@pytest.mark.parametrize("script", [train_sft, train_rm, eval_rm, export], ids=lambda script: script.__name__)
def test_every_setting_of_the_scripts_stands_once_in_help_under_one_title(script, capsys):
    text = help_of(script.Settings, capsys)
    for name, flag in flags(script.Settings).items():
        assert len(re.findall(rf"^  --{name}\b", text, re.MULTILINE)) == 1
        assert text.count(f"\n{flag.title}:\n") == 1 and "Settings(" not in text


def test_wrong_values_are_refused_wherever_settings_are_made():
    with pytest.raises(ValueError, match="--how_many must be positive, got 0"):
        Numbers(how_many=0)
    with pytest.raises(ValueError, match="--kind must be one of a, b, got 'c'"):
        Words(paths=("x",), kind="c")
    for wrong, message in (
        (dict(how_many="7"), "--how_many must be int, got '7'"),
        (dict(how_many=True), "--how_many must be int, got True"),
        (dict(how_many=None), "--how_many must be int, got None"),
        (dict(rate=float("nan")), "--rate must be a finite number, got nan"),
        (dict(rate=float("inf")), "--rate must be a finite number, got inf"),
        (dict(paths="x"), "--paths must be a list of str, got 'x'"),
        (dict(paths=("x", "")), "--paths is an empty string"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            compose(Settings, **dict(paths=("x",)) | wrong)
    with pytest.raises(ValueError, match="--flag goes with"):
        compose(Settings, paths=("x",), flag=True, how_many=101)
    with pytest.raises(ValueError, match="--how_many must be positive"):
        updated(read("--paths", "x"), how_many=-1)
    with pytest.raises(ValueError, match="unknown settings: how_few"):
        compose(Settings, paths=("x",), how_few=1)
    with pytest.raises(ValueError, match="required: --paths"):
        compose(Settings)


def test_checks_across_the_parts_of_a_training(tmp_path):
    given = dict(model_name_or_path="m", dataset_path=("a", "b"), output_dir=str(tmp_path))
    for wrong in (
        dict(use_lora=True, use_lisa=True),
        dict(dataset_weights=(1.0,)),
        dict(torch_compile=True, gradient_checkpointing="selective"),
    ):
        for script in (train_sft, train_rm):
            compose(script.Settings, **given)
            with pytest.raises(ValueError, match="--use_lora|--dataset_weights|--torch_compile"):
                compose(script.Settings, **given | wrong)


def test_flat_names_are_unique_and_go_both_ways():
    settings = read("--paths", "x", "--limit", "4")
    assert flatten(settings) == {
        "how_many": 3, "rate": 0.25, "limit": 4,
        "kind": "a", "other_kind": None, "flag": False, "paths": ("x",), "more": (),
    }  # fmt: skip
    assert compose(Settings, **flatten(settings)) == settings
    assert updated(settings, kind="b").words == replace(settings.words, kind="b")

    @dataclass(frozen=True, kw_only=True)
    class Twice(SettingsGroup):
        """Twice"""

        numbers: Numbers
        again: Numbers

    with pytest.raises(AssertionError, match="two settings of Twice are called how_many"):
        flags(Twice)
    for script in (train_sft, train_rm, eval_rm, export):
        assert flags(script.Settings)  # which asserts that no name occurs twice


def test_a_run_may_go_on_only_with_the_settings_that_may_change():
    settings = read("--paths", "x", "--limit", "4")
    saved = json.loads(json.dumps(flatten(settings)))
    assert changed_settings(updated(settings, limit=9), saved) == {}
    assert changed_settings(updated(settings, rate=1.0, paths=("y",)), saved) == {
        "rate": (0.25, 1.0),
        "paths": (["x"], ["y"]),
    }
    del saved["how_many"]  # as an earlier version wrote it: it had the default
    assert changed_settings(settings, saved) == {}


def test_a_script_may_have_settings_of_its_own(capsys):
    @dataclass(frozen=True, kw_only=True)
    class Own(SettingsGroup):
        """A changed loop"""

        numbers: Numbers
        decay: float = setting(0.99, "of the average")
        plain: int = 3

    got = parse(Own, "", ["--plain", "4", "--decay", "0.5", "--how_many", "2"])
    assert (got.plain, got.decay, got.numbers.how_many) == (4, 0.5, 2)
    text = help_of(Own, capsys)
    assert "A changed loop:" in text and "no description (default: 3)" in text


def test_a_saved_run_is_repeated_and_flags_take_precedence(tmp_path):
    first = read("--paths", "x", "y", "--limit", "4", "--rate", "1")
    saved = tmp_path / "run.json"
    saved.write_text(json.dumps({"settings": flatten(first), "versions": {}}))
    assert read("--config", str(saved)) == first
    assert read("--config", str(saved), "--how_many", "9").numbers.how_many == 9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"paths": ["x"], "hwo_many": 3}', "unknown settings hwo_many"),
        ('{"paths": "x"}', "paths must be a list of str, got 'x'"),
        ('{"paths": ["x"], "how_many": 2.5}', "how_many must be int, got 2.5"),
        ('{"paths": ["x"], "how_many": true}', "how_many must be int, got True"),
        ('{"paths": ["x"], "kind": "c"}', "kind must be one of a, b, got 'c'"),
        ('{"paths": ["x"], "rate": 1' + 400 * "0" + "}", "rate is too large a number"),
        (100_000 * "[", "cannot be read as JSON"),
        ("[1]", "expected an object of settings, got list"),
        ("{", "cannot be read as JSON"),
    ],
)
def test_a_wrong_config_file_is_one_error_that_names_it(tmp_path, capsys, content, message):
    saved = tmp_path / "run.json"
    saved.write_text(content)
    error = refused(capsys, "--config", str(saved))
    assert str(saved) in error and message in error


def test_a_config_without_end_is_refused_and_not_read_to_its_end(tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo")
    for file in ("/dev/zero", tmp_path / "fifo", tmp_path):
        assert f"--config {file}: cannot be read as JSON: {file}" in refused(capsys, "--config", str(file))


def test_files_of_settings_hold_no_secrets_and_are_still_of_the_same_run(monkeypatch):
    password, token = "https://me:secret@host/pairs.jsonl", f"runs/hf_{34 * 'a'}"
    settings = read("--paths", password, token, "tokens-of-others")
    saved = as_saved(settings)
    assert saved["paths"] == ["https://***@host/pairs.jsonl", "runs/***", "tokens-of-others"]
    assert changed_settings(settings, saved) == changed_settings(settings, flatten(settings)) == {}
    other = read("--paths", password, token, "others")
    assert changed_settings(other, saved) == {"paths": (saved["paths"], as_saved(other)["paths"])}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        # No abbreviations: a typo must not be taken for something else.
        (
            ["--path", "x"],
            "unknown flag --path: did you mean --paths? All flags: --help; names of other trainers' flags",
        ),
        (["--paths", "x", "--zz-top=3"], "unknown flag --zz_top. All flags: --help"),
        (["--paths", "x", "--flag", "true", "again"], "unexpected argument 'again'"),
        ([], "required: --paths"),
        (["--paths", "x", "--kind", "c"], "expected one of a, b, got 'c'"),
        (["--paths", "x", "--flag", "maybe"], "expected true or false, got 'maybe'"),
        (["--paths", "x", "--how_many", "0"], "--how_many must be positive, got 0"),
        (["--paths", "x", "--how_many", "7", "--more", "a", "none"], "none stands alone"),
        (["--paths", "x", "--config", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_flags_are_one_error(capsys, argv, message):
    error = refused(capsys, *argv)
    assert message in error and "Traceback" not in error
