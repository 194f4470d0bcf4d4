"""rm.distributed.torch_private: a private name that torch renames breaks what needs it, with a message, and no more."""

import datetime
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rm.distributed import torch_private
from tests import text_fixtures, tiny

ROOT = Path(__file__).parents[2]
in_every_name = pytest.mark.parametrize("name", torch_private._WHERE)


@in_every_name
def test_every_private_name_exists_in_the_installed_torch(name):
    module, _ = torch_private._WHERE[name]
    value = getattr(torch_private, name)
    assert callable(value) and value is getattr(sys.modules[module], name)


@in_every_name
@pytest.mark.parametrize("missing", ["name", "module"])
def test_a_missing_name_is_an_error_that_says_what_needs_it(name, missing, monkeypatch):
    module, feature = torch_private._WHERE[name]
    if missing == "name":
        getattr(torch_private, name)  # imports the module
        monkeypatch.delattr(sys.modules[module], name)
    else:
        monkeypatch.setitem(sys.modules, module, None)  # its import raises ImportError
    with pytest.raises(ValueError) as caught:
        getattr(torch_private, name)
    assert str(caught.value) == (
        f"torch {torch.__version__} has no {module}.{name}, which {feature} needs; "
        "use a torch release that setup.py allows"
    )


def test_a_missing_method_of_fsdp_is_an_error_that_says_what_needs_it():
    with pytest.raises(ValueError) as caught:
        torch_private.reset_mixed_precision_dtypes(torch.nn.Linear(1, 1))  # not an FSDP2 unit
    for part in (f"torch {torch.__version__} has no ", "FSDPModule._get_fsdp_state", "--use_lisa true on a sharded"):
        assert part in str(caught.value)


def test_a_missing_method_of_a_process_group_is_an_error_that_says_what_needs_it(monkeypatch):
    monkeypatch.setattr(torch.distributed, "group", SimpleNamespace(WORLD=object()))
    with pytest.raises(ValueError, match="ProcessGroup._get_backend or .*, which a run of several processes needs"):
        torch_private.set_gloo_timeout(datetime.timedelta(hours=1))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="torch_private has no attribute FakeStor$"):
        torch_private.FakeStor  # noqa: B018


# Every name is missing where the table points to modules that do not exist, and so is the private API of FSDP2.
WITHOUT_PRIVATE_NAMES = """
import json, sys
from rm.distributed import torch_private
for name, (_, feature) in torch_private._WHERE.items():
    torch_private._WHERE[name] = ("torch._renamed", feature)
del torch_private.FSDPModule._get_fsdp_state
import train_sft, train_rm, eval_rm
import rm.export, rm.scoring
from rm import cli
from rm.config import parse
from rm.distributed import process_group as dist
for name, *words in json.loads(sys.argv[1]):
    with cli.one_line_errors():
        script = {"train_sft": train_sft, "train_rm": train_rm, "eval_rm": eval_rm}[name]
        settings = parse(script.Settings, "", words)
        with dist.session(0):
            script.main(settings)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model in `model`, texts.jsonl and pairs.jsonl."""
    folder = tmp_path_factory.mktemp("private")
    text_fixtures.byte_level(folder / "model")
    tiny.llama(vocab_size=400).save_pretrained(folder / "model")
    (folder / "texts.jsonl").write_text('{"text": "yes, it is"}\n')
    (folder / "pairs.jsonl").write_text('{"positive": "yes, it is", "negative": "no"}\n')
    return folder


def command(script: str, model: Path, data: Path, out: Path, *flags) -> list[str]:
    files = ("--model_name_or_path", model, "--dataset_path", data, "--output_dir", out, "--cache_dir", data.parent)
    return list(map(str, (script, *files, "--dtype", "float32", *flags)))


def run(*commands: list[str]) -> subprocess.CompletedProcess:
    """Run scripts, one after the other, in a process in which all private names of torch are missing."""
    program = [sys.executable, "-c", WITHOUT_PRIVATE_NAMES, json.dumps(commands)]
    return subprocess.run(program, capture_output=True, text=True, cwd=ROOT, timeout=240)


def test_one_process_trains_and_evaluates_without_any_private_name(folder, tmp_path):
    pairs = folder / "pairs.jsonl"
    done = run(
        command("train_sft", folder / "model", folder / "texts.jsonl", tmp_path / "sft", "--use_lisa", "true"),
        command("train_rm", folder / "model", pairs, tmp_path / "rm", "--use_lora", "true"),
        command("train_rm", tmp_path / "sft" / "model", pairs, tmp_path / "on_sft"),
        command("eval_rm", tmp_path / "rm" / "adapter", pairs, tmp_path / "eval"),
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "on_sft" / "model" / "scoring.json").is_file() and (tmp_path / "eval" / "report.json").is_file()


def test_a_plan_without_a_private_name_ends_with_one_line_that_names_it(folder, tmp_path):
    done = run(command("train_rm", folder / "model", folder / "pairs.jsonl", tmp_path / "out", "--plan", "true"))
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"torch {torch.__version__} has no torch._renamed." in line and "which --plan true needs" in line
