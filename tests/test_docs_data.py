"""Every record in docs/data.md is read as the page says."""

import json
import re
from pathlib import Path

import pytest

from rm.data import chat, dataset, formats
from rm.data.tokenizer import Tokenizer
from tests.templates import folder_of

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+).*?\n(.*?)(?=^## |\Z)", PAGE, flags=re.M | re.S))


def records(section):
    blocks = re.findall(r"```json\n(.*?)```", SECTIONS[section], flags=re.S)
    return [json.loads(line) for block in blocks for line in block.splitlines()]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(folder_of("Qwen2.5", tmp_path_factory.mktemp("qwen")))


@pytest.mark.parametrize("form", [None, "hh"])
@pytest.mark.parametrize("section, read", [("Demonstrations", dataset.texts), ("Preferences", dataset.pairs)])
def test_every_record_on_the_page_becomes_an_example(section, read, form, tokenizer, tmp_path):
    found = [r for r in records(section) if form is None or "system" not in json.dumps(r)]  # hh has no place for it
    path = tmp_path / "file"
    path.write_text("\n".join(map(json.dumps, found)))
    examples, report = read([path], tokenizer, 512, chat.choose(None, form, tokenizer))
    assert len(examples) == len(found) >= 4 and not report.dropped


def test_the_page_shows_every_format():
    shown = {formats.demonstration(record).format for record in records("Demonstrations")}
    shown |= {formats.preference(record).format for record in records("Preferences")}
    assert shown == formats.DEMONSTRATIONS.keys() | formats.PREFERENCES.keys() - {"prompt/responses"}
