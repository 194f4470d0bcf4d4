"""What is imported before it is needed: torch._dynamo and sympy, which take a second or more."""

import os
import subprocess
import sys
from pathlib import Path

from tests import text_fixtures, tiny

ROOT = Path(__file__).parent.parent
# These come with torch.compile's decorators, DTensor, FSDP2 and torch's memory tracker.
SLOW = ("torch._dynamo", "sympy", "torch.distributed.fsdp", "torch.distributed.tensor")


def slow_modules_after(code: str, *arguments) -> str:
    """Which of SLOW a program has imported at its end; the program has run without an error."""
    program = f"{code}\nimport sys\nprint([name for name in {SLOW} if name in sys.modules])"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_help_imports_nothing_slow():
    code = """
import train_sft, train_rm, eval_rm, rm.export, rm.preview, rm.serve.__main__
from rm.config import parse
for script in (train_sft, train_rm, eval_rm, rm.export, rm.preview, rm.serve.__main__):
    try:
        parse(script.Settings, script.__doc__, ["--help"])
    except SystemExit as done:
        assert done.code == 0
    else:
        raise AssertionError"""
    assert slow_modules_after(code) == "[]"


def test_a_scorer_loads_and_scores_without_anything_slow(tmp_path):
    text_fixtures.byte_level(tmp_path)
    tiny.reward_model("llama", vocab_size=400).save_pretrained(tmp_path)
    code = "import sys\nfrom rm.scoring import Scorer\nassert len(Scorer(sys.argv[1]).score(['hello'])) == 1"
    assert slow_modules_after(code, tmp_path) == "[]"
