"""rm.terminal: nothing that others wrote is obeyed by a terminal, a browser or a spreadsheet."""

import json
import re
import sys

import pytest

from rm import cli, terminal
from rm.data import show
from rm.distributed import process_group as dist
from rm.report import html, model_card
from rm.training import run_log, trackers
from rm.training.run_log import RunSettings

NASTY = "a\x1b[31m\x9b\r\nfinished: well\u202egnp.\ud800"


def test_what_is_printed_is_one_line_of_visible_characters(capsys):
    text = "naïve 日本 👩\u200d🔬 \u202e"
    assert terminal.printable(text) == "naïve 日本 👩\u200d🔬 \\u202e"
    dist.say(NASTY)
    terminal.warn(NASTY)
    with pytest.raises(SystemExit), cli.one_line_errors():
        raise ValueError(NASTY)
    said = capsys.readouterr()
    shown = r"a\x1b[31m\x9b\r\nfinished: well\u202egnp.\ud800"
    assert said.out == f"{shown}\n" and said.err == f"{shown}\nerror: {shown}\n"


def test_examples_and_lines_escape_the_same_characters():
    for code in range(0x20000):
        character = chr(code)
        if 0xD800 <= code < 0xE000 or character in show.VISIBLE.values():
            continue
        assert (show.escaped(character) == character) == (terminal.printable(character) == character), hex(code)


def test_pages_keep_the_breaks_of_texts_and_escape_the_rest():
    assert "a\n\tb\\u202e&lt;" in html.turn("user", "a\n\tb\u202e<")
    assert "\x1b" not in html.page(NASTY, [html.heading(NASTY), html.table([NASTY], [[NASTY]])])
    assert html.text_table(["set"], [["a\nb"]]) == ["set ", "a\\nb"]


def test_a_name_of_a_file_does_not_end_its_code_in_a_model_card():
    card = model_card.of_mean(["m/`<script>", "n/b\nc"], {}, [], "sets")
    assert "`m/'<script>`" in card and "`n/b\\nc`" in card


def test_metrics_csv_holds_no_formulas(tmp_path):
    line = {"step": 1, "=1+1": 2.0, "+a": -1, "@b": 3, "loss": -0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    trackers.write_csv(tmp_path / "metrics.jsonl")
    assert (tmp_path / "metrics.csv").read_text().splitlines() == ["step,'=1+1,'+a,'@b,loss", "1,2.0,-1,3,-0.5"]


def test_every_file_of_the_package_prints_through_these_functions():
    """A new print() of a text with others' words in it would pass them on."""
    from tests.test_layering import PACKAGE, ROOT

    allowed = {"rm/terminal.py", "rm/preview.py", "rm/demo.py", "rm/training/signals.py"}  # escaped, or our own words
    found = {str(path.relative_to(ROOT)) for path in PACKAGE if re.search(r"(?<![\w.])print\(", path.read_text())}
    assert found == allowed


def test_tokens_and_passwords_are_not_printed(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("WANDB_API_KEY", "a")  # no token, and part of any word
    text = "hf_abcdefgh https://me:pass@host/a@b http://host/x a"
    assert terminal.printable(text) == "*** https://***@host/a@b http://host/x a"
    assert terminal.printable("https://me:p@ss@host/a@b https:/me@host") == "https://***@host/a@b https:/***@host"
    assert run_log.provenance(RunSettings(output_dir="x"))["command"] == [terminal.without_secrets(w) for w in sys.argv]
    saved = run_log.provenance(RunSettings(output_dir="https://me:pass@host/hf_abcdefgh"))["settings"]
    assert saved["output_dir"] == "https://***@host/***"
