"""The wheel: it holds every package, and works where this checkout is not on the path."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def start(*words, cwd: Path) -> subprocess.CompletedProcess:
    """Run a command in an environment without PYTHONPATH, which may name this checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(list(map(str, words)), cwd=cwd, capture_output=True, text=True, env=environment)


def run(*words, cwd: Path) -> str:
    """What a command prints; it must succeed."""
    done = start(*words, cwd=cwd)
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The python of an environment that has this package's wheel, and its dependencies but not this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, since setuptools writes build/ and *.egg-info next to setup.py.
    sources = [ROOT / name for name in ("rm", "setup.py", "pyproject.toml", "README.md", "LICENSE")]
    run("cp", "-r", *sources, *ROOT.glob("*_*.py"), folder, cwd=ROOT)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run(*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "dist", cwd=folder)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    python = folder / "env" / "bin" / "python"
    (wheel,) = (folder / "dist").glob("*.whl")
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    site_packages = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # The dependencies are those of this environment; its own .pth files, such as an editable install's, are not read.
    (Path(site_packages) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python


def test_the_scripts_and_packages_come_from_the_wheel(python, tmp_path):
    code = "import rm, train_sft, train_rm, eval_rm, rm.scoring as s; print(*(m.__file__ for m in "
    files = run(python, "-c", code + "(rm, train_sft, train_rm, eval_rm, s)))", cwd=tmp_path).split()
    assert len(files) == 5 and all(file.startswith(str(python.parents[1])) for file in files), files


# `python -m MODULE --help` for each, in one process: most of the time of each would be for importing torch.
HELP = """
import runpy, sys
for module in sys.argv[1:]:
    sys.argv = [module, "--help"]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as done:
        print(done.code or "")
"""


def test_commands_run_from_the_wheel(python, tmp_path):
    modules = ["rm.audit", "rm.report", "rm.export", "rm.serve", "rm.prepare_hh", "rm.demo"]
    done = start(python, "-c", HELP, *modules, cwd=tmp_path)
    assert "Traceback" not in done.stderr
    for module in modules:
        assert f"python -m {module}" in done.stdout


def test_the_wheel_holds_every_file_of_the_package(python, tmp_path):
    package = Path(run(python, "-c", "import rm; print(rm.__file__)", cwd=tmp_path).strip()).parent
    installed, here = (
        {file.relative_to(folder) for file in folder.rglob("*") if file.suffix in (".py", ".html")}
        for folder in (package, ROOT / "rm")
    )
    assert installed == here and Path("serve/page.html") in installed
