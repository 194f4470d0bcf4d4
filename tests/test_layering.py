"""Ratchets on the shape of the package: who imports whom, how long files and functions are."""

import ast
import difflib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"files"},
    {
        "config",
        "dist",
        "attention",
        "tokenizer",
        "examples",
        "records",
        "formats",
        "lean",
        "journal",
        "stats",
        "figures",
        "page",
    },
    {"metrics", "track", "chat", "model", "parallel", "cache", "lora", "losses", "conversation", "split", "stop"},
    {"log", "encode", "rewardbench", "families", "folder", "evidence"},
    {"data", "adapter", "checkpoint", "findings", "hub"},
    {"batch", "optim", "lisa", "weights", "reward_set", "saving"},
    {"heads", "resume", "memory"},
    {"step", "evaluation", "report", "audit", "plan", "demo", "prepare_hh"},
    {"report_eval", "contract"},
    {"scoring", "export"},
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
SCRIPTS = ["train_sft.py", "train_rm.py", "eval_rm.py"]
FRAMEWORKS = {"transformers", "peft", "trl", "accelerate", "lightning", "deepspeed"}
PACKAGE = sorted((ROOT / "rm").rglob("*.py"))


def module_of(path: Path) -> str:
    return path.relative_to(ROOT / "rm").parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Dotted names of everything a file imports, wherever in the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_strictly_down(path):
    here = module_of(path)
    if here == "__init__":
        return
    for name in imports(path):
        if name.startswith("rm."):
            there = name.split(".")[1]
            assert there == here or LEVEL[there] < LEVEL[here], f"rm.{there} does not lie below rm.{here}"


@pytest.mark.parametrize("path", [*PACKAGE, *(ROOT / s for s in SCRIPTS)], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_framework_and_no_pickle(path):
    assert not {name.split(".")[0] for name in imports(path)} & (FRAMEWORKS | {"pickle"})
    assert not re.search(r"torch\.(load|save)\(|allow_pickle=True", path.read_text())


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 40, f"{path.name}:{node.lineno} {node.name}"


@pytest.mark.parametrize("path", [*PACKAGE, *(ROOT / s for s in SCRIPTS)], ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_the_two_loops_differ_only_in_what_reward_modelling_is():
    sft, rm = ((ROOT / s).read_text().partition("def main")[2].splitlines() for s in ("train_sft.py", "train_rm.py"))
    differ = [line for line in difflib.ndiff(sft, rm) if line.startswith(("-", "+"))]
    assert len(differ) <= 2 * 6 + 1, differ  # and the line that writes the scoring contract
