"""launch/: the scripts parse, explain themselves, and refuse what they cannot run."""

import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"


def bash(*args, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", *map(str, args)], capture_output=True, text=True, timeout=60, **kwargs)


@pytest.mark.parametrize("script", sorted(LAUNCH.glob("*.sh")), ids=lambda s: s.name)
def test_every_script_parses(script):
    assert bash("-n", script).returncode == 0


@pytest.mark.parametrize("script", ["quickstart.sh", "hh_rlhf.sh"])
def test_help_says_how_to_use_a_real_model_and_runs_nothing(script, tmp_path):
    done = bash(LAUNCH / script, "--help", cwd=tmp_path)
    assert done.returncode == 0 and "pairs.json" in done.stdout and "set -euo" not in done.stdout
    assert not list(tmp_path.iterdir())


def test_quickstart_leaves_an_earlier_one_alone(tmp_path):
    done = bash(LAUNCH / "quickstart.sh", tmp_path)
    assert done.returncode == 2 and f"error: {tmp_path} exists already" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--model", "m", "--sft", "s"], "--rm is missing"), (["--modle", "m"], "unknown option --modle")],
)
def test_the_recipe_names_what_is_wrong_with_its_flags(flags, message):
    done = bash(LAUNCH / "hh_rlhf.sh", *flags)
    assert done.returncode == 2 and message in done.stderr
