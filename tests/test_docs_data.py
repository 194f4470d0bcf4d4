"""Every record in docs/data.md is read as the page says."""

import json
import re
from pathlib import Path

import pytest

from rm.data import chat, dataset, formats
from rm.data.encode import Task
from rm.data.tokenizer import Tokenizer
from tests.templates import folder_of

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+).*?\n(.*?)(?=^## |\Z)", PAGE, flags=re.M | re.S))


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


def test_the_page_shows_every_format():
    shown = {formats.demonstration(record).format for record in records("Demonstrations")}
    shown |= {formats.preference(record).format for record in records("Preferences")}
    assert shown == formats.DEMONSTRATIONS.keys() | formats.PREFERENCES.keys() - {"prompt/responses"}
