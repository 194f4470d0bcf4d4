"""Numbers that records give to single replies, as --loss regression reads them."""

import json
import math

import numpy as np
import pytest

from rm.data import dataset
from rm.data.encode import Task
from rm.data.examples import Examples
from rm.data.messages import assistant, user
from rm.data.schemas import SFT, Reader
from rm.data.tokenizer import Tokenizer
from tests import text_fixtures

NAMES = ("helpfulness", "verbosity")
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
HELPSTEER = {"prompt": "q", "response": "r", "helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 1}


@pytest.mark.parametrize(
    "record, expected",
    [
        (HELPSTEER | {"verbosity": 2}, (3, 2)),
        (HELPSTEER | {"verbosity": None}, (3, math.nan)),
        ({"messages": TURNS, "attributes": {"verbosity": 0.5, "toxicity": 1}}, (math.nan, 0.5)),
        ({"messages": TURNS, "helpfulness": 1, "attributes": {"verbosity": 0.5}}, (1, 0.5)),
        ({"question": "q", "answer": "r", "helpfulness": "1.5", "verbosity": ""}, (1.5, math.nan)),  # of CSV
        ({"question": "q", "answer": "r", "attributes": '{"helpfulness": 2}'}, (2, math.nan)),
        ({"text": "qr"}, (math.nan, math.nan)),
    ],
)
def test_numbers_are_read_from_the_record_and_its_attributes(record, expected):
    reader = Reader(SFT, attributes=NAMES)
    np.testing.assert_equal(reader.sample(record).attributes, expected)
    assert ("attributes.toxicity" in reader.passed_over) == ("toxicity" in str(record))


@pytest.mark.parametrize(
    "record, message",
    [
        ({"text": "a", "helpfulness": "good"}, "'helpfulness' has 'good'; expected finite numbers"),
        ({"text": "a", "helpfulness": True}, "'helpfulness' is true; expected a number"),
        ({"text": "a", "attributes": [1, 2]}, "'attributes' is .1, 2.; expected an object"),
        ({"text": "a", "helpfulness": 1, "attributes": {"helpfulness": 1}}, "has 'helpfulness' twice"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "--attributes reads single replies and their numbers"),
        ({"text": "a", "helpfulness": 1, "score": 3}, "has 'score' beside text_only"),
    ],
)
def test_what_is_no_number_of_a_single_reply_is_refused(record, message):
    with pytest.raises(ValueError, match=message):
        Reader(SFT, attributes=NAMES).sample(record)


def test_the_turns_of_helpsteer2_are_turns():
    prompt = "a\n<extra_id_1>Assistant\nb\n<extra_id_1>User\nc"
    sample = Reader(SFT, attributes=NAMES).sample(HELPSTEER | {"prompt": prompt})
    assert sample.texts == [[user("a"), assistant("b"), user("c"), assistant("r")]]


def test_examples_keep_their_numbers_when_selected_joined_and_stored(tmp_path):
    tokenizer = Tokenizer(text_fixtures.byte_level(tmp_path / "tokenizer"))
    records = [{"text": f"text {n}", "helpfulness": n, "verbosity": None, "weight": n} for n in range(4)]
    records[1] = {"text": "nothing known"}
    (tmp_path / "file.jsonl").write_text("\n".join(map(json.dumps, records)))
    examples, report = dataset.read(
        Task.REGRESSION, [tmp_path / "file.jsonl"], tokenizer, 64, attributes=("helpfulness", "verbosity")
    )
    assert report.dropped == {"without any of the numbers of --attributes": 1}
    np.testing.assert_equal(examples.attributes[:, 0], [0, 2, 3])
    assert examples.weight.tolist() == [0, 2, 3] and examples.attributes.shape == (3, 2)
    both = Examples.concatenate([examples[1:], examples[:1]])
    both.save(tmp_path / "stored")
    np.testing.assert_equal(Examples.open(tmp_path / "stored").attributes[:, 0], [2, 3, 0])
    changed = Examples.concatenate([examples[1:], examples[:1]])
    changed.attributes[0, 0] = 1
    assert changed.hash != both.hash
