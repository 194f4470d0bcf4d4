"""docs/data.md: every record is read as the page says, and its tables are those of the code."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from rm.data import chat, dataset
from rm.data.encode import Task
from rm.data.messages import LOSS_KEYS, MESSAGE_KEYS
from rm.data.reader import SampleReader
from rm.data.schemas import DEMONSTRATIONS, PREFERENCE, PREFERENCES, SFT
from rm.data.tokenizer import Tokenizer
from tests.templates import folder_of

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
SECTIONS = dict(re.findall(r"^## ([^(\n]*\w)[^\n]*\n(.*?)(?=^## |\Z)", PAGE, flags=re.M | re.S))


def records(section: str) -> list[dict]:
    """The JSON values in the code blocks of a section; a record may take several lines."""
    decoder, found = json.JSONDecoder(), []
    for block in re.findall(r"```json\n(.*?)```", SECTIONS[section], flags=re.S):
        rest = block.strip()
        while rest:
            record, end = decoder.raw_decode(rest)
            found.append(record)
            rest = rest[end:].lstrip()
    return found


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(folder_of("Qwen2.5", tmp_path_factory.mktemp("qwen")))


@pytest.mark.parametrize("form", [None, "hh"])
@pytest.mark.parametrize("section, task", [("Demonstrations", Task.SFT), ("Preferences", Task.PREFERENCE)])
def test_every_record_on_the_page_becomes_an_example(section, task, form, tokenizer, tmp_path):
    # The dialogue format hh has no place for a system message.
    suitable = [record for record in records(section) if form is None or "system" not in json.dumps(record)]
    path = tmp_path / "file"
    path.write_text("\n".join(map(json.dumps, suitable)))
    template = chat.choose_template(None, form, tokenizer)
    examples, report = dataset.read(task, [path], tokenizer, 512, template)
    assert len(examples) == len(suitable) >= 4 and not report.dropped


def test_the_records_with_numbers_become_examples(tokenizer, tmp_path):
    found = records("Replies with numbers")
    (tmp_path / "file").write_text("\n".join(map(json.dumps, found)))
    template = chat.choose_template(None, None, tokenizer)
    names = ("helpfulness", "verbosity")
    examples, report = dataset.read(Task.REGRESSION, [tmp_path / "file"], tokenizer, 512, template, attributes=names)
    np.testing.assert_array_equal(examples.attributes, [[4, 1], [0.5, 2], [np.nan, 1]])
    assert examples.weight.tolist() == [1, 2, 1] and report.passed_over == ("correctness",)


def test_the_record_of_messages_becomes_an_example(tokenizer, tmp_path):
    (record,) = records("Messages")
    (tmp_path / "file").write_text(json.dumps(record))
    template = chat.choose_template(None, None, tokenizer)
    (_,), _ = dataset.read(Task.SFT, [tmp_path / "file"], tokenizer, 512, template)
    assert all(f"`{key}`" in SECTIONS["Messages"] for key in (*MESSAGE_KEYS, *LOSS_KEYS))


@pytest.mark.parametrize("schemas, section", [(PREFERENCES, "Preferences"), (DEMONSTRATIONS, "Demonstrations")])
def test_the_table_names_every_schema_with_the_source_it_is_known_from(schemas, section):
    table = [line for line in SECTIONS[section].splitlines() if line.startswith("|")]
    for row in schemas:
        known = [line for line in table if line.endswith(f"| {row.source} |")]
        assert known, f"no line of the table ends in {row.source}"
        is_named = any(row.name in line for line in known)
        # Spellings of one schema share a line, which names their keys.
        assert is_named or row.name == "/".join(row.keys) or all(f"`{key}`" in known[0] for key in row.keys), row.name


def test_the_programs_for_own_data_write_what_training_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open("votes.csv", "w") as out:
        csv.writer(out).writerows(
            [
                ["question", "answer_1", "answer_2", "votes_1", "votes_2"],
                ["2+2?", "4", "5", 3, 1],
                ["3+3?", "7", 'six, "6"', 0, 2],
            ]
        )
    for program in re.findall(r"```python\n(.*?)```", SECTIONS["Your own data"], flags=re.S):
        exec(program, {})
    pairs = [located.sample for located in SampleReader(PREFERENCE).read(["pairs.jsonl"])]
    assert [(pair.label, pair.best_and_worst()[0][-1]["content"]) for pair in pairs] == [(0.75, "4"), (0, 'six, "6"')]
    demonstrations = [located.sample.dialogues()[0][-1]["content"] for located in SampleReader(SFT).read(["sft.jsonl"])]
    assert demonstrations == ["4", 'six, "6"']
