"""What the README and the documentation name exists: flags, commands, links and files; and --help is complete."""

import argparse
import json
import re
import shlex
from pathlib import Path
from unittest import mock

import pytest

import train_rm
import train_sft
from rm import demo, export, prepare_hh
from rm.audit import __main__ as audit
from rm.config import flags, flatten, parse
from rm.serve import __main__ as serve
from tests.docs_pages import (
    DATED_PAGES,
    INDEXES,
    LAUNCHERS,
    PAGES,
    ROOT,
    SCRIPTS,
    commands,
    flags_in,
    flags_of_test_commands,
    headings,
    known_flags,
    table_cells,
    without_remark,
)

TOOLS = {"rm.demo": demo.main, "rm.prepare_hh": prepare_hh.main, "rm.audit": audit.main}
PLACEHOLDER = {"rm.audit": ["FILE"], "rm.prepare_hh": ["FILE", "--output_dir", "OUT"]}  # what `...` stands for
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.json"))


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


# Flags


@pytest.mark.parametrize("page", [*PAGES, *INDEXES, *LAUNCHERS], ids=relative)
def test_every_flag_that_a_page_names_exists(page):
    text, known = page.read_text(), known_flags()
    if page.name == "moving.md":  # its tables have the flags of other trainers, and ours in the last column
        cells = table_cells(text)
        text = re.sub(r"^\|.*$", "", text, flags=re.M)
        text += "\n".join(cell.text for cell in cells if cell.column == cell.columns - 1)
        for cell in cells:
            known |= flags_in(cell.text) if cell.column < cell.columns - 1 else set()
    if "python -m tests." in text:
        known |= flags_of_test_commands()
    assert not flags_in(text) - known


# Commands


def required(words: list[str], script) -> list[str]:
    """A value for each required setting that a command with `...` leaves out."""
    missing = [flag.name for flag in flags(script.Settings).values() if flag.required and f"--{flag.name}" not in words]
    if script is export and "--average" not in words and "--model_name_or_path" not in words:
        missing.append("model_name_or_path")  # one of the two
    return [word for name in missing for word in (f"--{name}", "x")]


class Parsed(Exception):
    """A command line was parsed."""


def parse_only(main, words: list[str]) -> None:
    """Run a tool's `main` until it has parsed its command line."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser, argv):
        parse_args(parser, argv)
        raise Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop), pytest.raises(Parsed):
        main(words)


def check_command(words: list[str]) -> None:
    """Parse the command line of what a command starts, by the parser that would read it."""
    if words[:2] == ["python", "-m"]:
        words = words[2:]
    name = next((word for word in words if word in SCRIPTS or word in TOOLS), None)
    launcher = next((word for word in words if word.startswith(("launch/", "tests/"))), None)
    if launcher:
        assert (ROOT / launcher).is_file()
    if launcher and words[0] == "bash":
        own_words = words[words.index(launcher) : words.index(name) if name else None]
        known = (ROOT / launcher).read_text()
        own_flags = [word for word in own_words if word.startswith("--") and word != "--help"]
        assert all(f"{flag})" in known for flag in own_flags) or launcher.startswith("tests/")
    if name is None:
        return
    words = words[words.index(name) + 1 :]
    omits = "..." in words
    words = [word for word in words if word != "..."]
    if name == "rm.serve":
        words = serve.arguments(words)
    if name in TOOLS:
        parse_only(TOOLS[name], words + PLACEHOLDER.get(name, []) * omits)
    else:
        words += required(words, SCRIPTS[name]) if omits else []
        parse(SCRIPTS[name].Settings, "", words, getattr(SCRIPTS[name], "POSITIONAL", None))


@pytest.mark.parametrize("page", [*PAGES, *LAUNCHERS], ids=relative)
def test_every_command_on_a_page_parses(page, monkeypatch):
    monkeypatch.chdir(ROOT)  # commands name files of the repository
    for command in commands(page.read_text()):
        try:
            words = shlex.split(without_remark(command), comments=True)
            if "tests" in (word.partition(".")[0] for word in words):
                check_test_command(words)
            elif "--help" not in words:
                check_command(words)
        except SystemExit:
            pytest.fail(command)


def check_test_command(words: list[str]) -> None:
    """A benchmark or a test that is a command: its file exists and its parser has these flags."""
    module = next(word for word in words if word.startswith("tests."))
    file = ROOT / f"{module.replace('.', '/')}.py"
    shared = {"benchmarks": "common.py", "cluster": "lab.py"}[file.parent.name]
    source = file.read_text() + (file.parent / shared).read_text()
    unknown = [word for word in words if word.startswith("--") and f'"{word}"' not in source]
    assert not unknown, f"{module} has no {' '.join(unknown)}"


def test_commands_are_found_on_the_pages_that_users_start_from():
    found = {relative(page): len(commands(page.read_text())) for page in (*PAGES, *LAUNCHERS)}
    assert found["README.md"] >= 3 and found["docs/data.md"] >= 2 and found["launch/quickstart.sh"] >= 3


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_has_settings_of_its_script_that_the_page_explains(recipe):
    script = {"sft": train_sft, "rm": train_rm}[recipe.name.split(".")[-2]]
    settings = flatten(parse(script.Settings, "", ["--config", str(recipe)]))
    explanations = (ROOT / "docs" / "recipes.md").read_text()
    for name in json.loads(recipe.read_text()):
        assert settings[name] is not None and f"`{name}`" in explanations


# Links and files


@pytest.mark.parametrize("page", [*PAGES, *INDEXES, *DATED_PAGES], ids=relative)
def test_every_link_leads_to_a_file_and_to_a_heading_in_it(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
        linked = page.parent / target if target else page
        assert linked.exists(), f"no file {target}"
        assert not anchor or anchor in headings(linked.read_text()), f"no heading #{anchor} in {linked.name}"


@pytest.mark.parametrize("page", [*PAGES, *INDEXES, *LAUNCHERS], ids=relative)
def test_every_file_of_the_repository_that_a_page_names_exists(page):
    pattern = r"(?<![\w/.])(?:rm|tests|docs|launch)/[\w/.-]+\.(?:py|md|sh|slurm|json|png)\b"
    for path in re.findall(pattern, page.read_text()):
        is_pattern = "NAME" in path
        is_output = path == "rm/rm.json" or path.startswith("rm/model")  # of a run in runs/rm
        assert is_pattern or is_output or (ROOT / path).exists(), f"no file {path}"


# Help


def help_of(script, capsys, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", "1000")  # no line is wrapped
    with pytest.raises(SystemExit):
        parse(script.Settings, script.__doc__, ["--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_every_setting_with_its_default(name, capsys, monkeypatch):
    script = SCRIPTS[name]
    entries = re.split(r"\n  (?=--)", help_of(script, capsys, monkeypatch))
    by_name = {entry.split()[0].removeprefix("--"): entry.split("\n\n")[0].strip() for entry in entries[1:]}
    for setting, flag in flags(script.Settings).items():
        if flag.required:
            assert by_name[setting].endswith("(required)")
            continue
        default = re.search(r"\(default: ([^()]*)\)$", by_name[setting])[1]
        # What is shown as the default can be given as a value, and is the default.
        others = required([], script)
        if script is export and setting != "average":  # which stands in place of model_name_or_path
            others = ["--average", "x", "y", "--output_dir", "x"]
        given = parse(script.Settings, "", [*others, f"--{setting}", *default.split()])
        assert flatten(given)[setting] == flag.default


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_grouped_and_has_required_groups_first(name, capsys, monkeypatch):
    text = help_of(SCRIPTS[name], capsys, monkeypatch)
    known = flags(SCRIPTS[name].Settings).values()
    position = {flag.title: text.index(f"\n{flag.title}:\n") for flag in known}
    with_required = {flag.title for flag in known if flag.required}
    others = position.keys() - with_required
    assert max(position[title] for title in with_required) < min((position[title] for title in others), default=10**9)


# What the README promises its readers


def test_the_readme_has_under_120_lines_of_at_most_120_characters():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 120
    assert not [line for line in lines if len(line) > 120]


def test_no_cell_of_a_table_in_the_readme_has_over_20_words():
    cells = table_cells((ROOT / "README.md").read_text())
    assert not [cell.text for cell in cells if len(cell.text.split()) > 20]
