"""rm.report.recipe_table: the table and the figure of the HH-RLHF recipe."""

import json

import pytest

from rm.report import figures, recipe_table
from tests import commands


@pytest.fixture
def folder(tmp_path):
    """The evaluations of three of four cells."""
    for name, accuracy in (("sft_0_lora_16", 0.7164), ("sft_2_lora_16", 0.8455), ("sft_2_lora_128", 0.84)):
        low, high = accuracy - 0.01, accuracy + 0.02
        report = {"n": 12500, "accuracy": accuracy, "accuracy_ci95": [0, 1], "accuracy_ci95_clustered": [low, high]}
        (tmp_path / name / "eval").mkdir(parents=True)
        (tmp_path / name / "eval" / "report.json").write_text(json.dumps(report))
    (tmp_path / "sft_2").mkdir()
    return tmp_path


def test_the_table_has_rows_of_epochs_and_columns_of_ranks(folder):
    assert recipe_table.as_markdown(recipe_table.read_cells(folder)).splitlines() == [
        "| epochs of SFT | LoRA, rank 16 | LoRA, rank 128 |",
        "| --- | ---: | ---: |",
        "| 0 | 0.7164 (0.7064 to 0.7364) | – |",
        "| 2 | 0.8455 (0.8355 to 0.8655) | 0.8400 (0.8300 to 0.8600) |",
        "",
        'Accuracy on 12,500 test pairs, with its 95 % interval over conversations. "–": not evaluated yet.',
    ]


def test_the_command_writes_table_and_figure(folder):
    pytest.importorskip("matplotlib")
    done = commands.run("rm.report.recipe_table", folder)
    assert done.returncode == 0 and "0.8455" in done.stdout and "0.8455" in (folder / "table.md").read_text()
    svg = (folder / "table.svg").read_text()
    assert svg.startswith("<svg") and "xmlns=" in svg and ">rank 16<" in svg and ">rank 128<" in svg
    assert svg == figures.by_epochs_of_sft(recipe_table.read_cells(folder))


def test_a_folder_without_evaluations_is_an_error(tmp_path):
    done = commands.run("rm.report.recipe_table", tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error") and "launch/hh_table.sh" in done.stderr
