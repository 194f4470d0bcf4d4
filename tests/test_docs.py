"""What README, docs and recipes say exists: flags, files, links, settings."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import eval_rm
import train_rm
import train_sft
from rm import export
from rm.config import parse

ROOT = Path(__file__).parent.parent
SCRIPTS = {"train_sft.py": train_sft, "train_rm.py": train_rm, "eval_rm.py": eval_rm, "rm.export": export}
FLAGS = {name: {f.name for f in fields(script.Settings)} | {"config", "help"} for name, script in SCRIPTS.items()}
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("launch/*.md")])
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.json"))


def commands(text: str) -> list[str]:
    """The indented or fenced commands of a page, each on one line."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [
        line.strip() for line in joined.splitlines() if re.match(r"( {4}|\s*)(python|torchrun|sbatch|bash)\b", line)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_name_flags_that_their_script_has(page):
    for command in commands(page.read_text()):
        for name, flags in FLAGS.items():
            before, there, after = command.partition(name)
            if there:
                used = re.findall(r"(?<=\s--)[a-z][\w-]*", re.split(r"\s#|  +[a-z]|[|;&]", after)[0])
                unknown = [flag for flag in used if flag.replace("-", "_") not in flags]
                assert not unknown, f"{page.name}: {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_files_of_the_repository_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"
    for path in re.findall(r"(?<![\w/.])(?:rm|tests|docs|launch)/[\w/.-]+\.(?:py|md|sh|slurm|json)\b", text):
        assert "NAME" in path or (ROOT / path).exists(), f"{page.name} names {path}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.name)
def test_a_recipe_is_settings_of_its_script(recipe):
    script = {"sft": train_sft, "rm": train_rm}[recipe.name.split(".")[-2]]
    settings = parse(script.Settings, "", ["--config", str(recipe)])
    saved = json.loads(recipe.read_text())
    explained = (ROOT / "docs" / "recipes.md").read_text()
    for name in saved:
        assert getattr(settings, name) is not None and f"`{name}`" in explained


@pytest.mark.parametrize("script", ["train_sft.py", "train_rm.py", "eval_rm.py"])
def test_help_is_grouped_says_every_default_and_fits_a_page(script):
    done = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True, cwd=ROOT)
    text = done.stdout
    assert done.returncode == 0 and "Traceback" not in done.stderr
    flags = FLAGS[script] - {"config", "help"}
    assert all(f"--{name}" in text for name in flags)
    assert text.count("(default:") + text.count("(required)") == len(flags)
    for group in ("Model:", "Data:", "Precision and memory:"):
        assert f"\n{group}\n" in text


def test_the_readme_is_a_page():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200
