"""Who may import whom, and what no file of the package may use."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOUNDATION = (
    "terminal",
    "files",
    "config",
    "json_keys",
    "run_files",
    "distributed",
    "cli",
)  # in this order: each may import those before it
MAY_IMPORT = {  # besides FOUNDATION and the folder's own files
    "data": (),
    "model": ("data",),
    "hf": ("data", "model"),
    "evaluation": ("data",),
    "scoring": ("data", "model", "hf"),
    "training": ("data", "model", "hf", "scoring", "evaluation"),
    "plan": ("data", "model", "hf", "scoring", "evaluation", "training"),
    "report": ("evaluation",),
    "audit": ("data", "hf"),
    "prepare_hh": ("data", "hf"),
    "preview": ("data", "hf"),
    "demo": ("data", "hf"),
    "export": ("data", "model", "hf", "scoring", "evaluation", "report"),
    "serve": ("data", "model", "hf", "scoring", "evaluation"),
}
SCRIPTS = ["train_sft.py", "train_rm.py", "eval_rm.py"]
FRAMEWORKS = {"transformers", "peft", "trl", "accelerate", "lightning", "deepspeed"}
PACKAGE = sorted((ROOT / "rm").rglob("*.py"))


def part_of(path: Path) -> str:
    """The folder of rm/ that a file lies in, or the name of a file directly in rm/."""
    return path.relative_to(ROOT / "rm").parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Dotted names of everything that a file imports, at its top or inside a function."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_what_its_folder_may(path):
    here = part_of(path)
    if here in FOUNDATION:
        allowed = FOUNDATION[: FOUNDATION.index(here)]
    else:
        allowed = (*FOUNDATION, *MAY_IMPORT.get(here, ()))  # rm/__init__.py imports nothing of the package
    for name in imports(path):
        if name.startswith("rm."):
            there = name.split(".")[1]
            assert there == here or there in allowed, f"rm.{here} may not import rm.{there}"


@pytest.mark.parametrize("path", [*PACKAGE, *(ROOT / s for s in SCRIPTS)], ids=lambda p: str(p.relative_to(ROOT)))
def test_no_framework_and_no_pickle(path):
    assert not {name.split(".")[0] for name in imports(path)} & (FRAMEWORKS | {"pickle"})
    assert not re.search(r"torch\.(load|save)\(|allow_pickle=True", path.read_text())
