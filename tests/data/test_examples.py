"""rm.data.examples: grades, labels and margins come back as they were stored (tokens: tests/test_data.py)."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rm.data.examples import Example, Examples


def example(n: int, **judged) -> Example:
    """An example of n replies of one token."""
    replies = tuple(np.array([i], np.int32) for i in range(n))
    return Example(np.zeros(0, np.int32), replies, tuple(np.zeros(1, bool) for _ in replies), **judged)


def test_without_a_judgement_the_first_reply_is_the_best_for_certain():
    examples = Examples.build(example(n) for n in (1, 2, 4))
    assert examples.grade.tolist() == [0, 1, 0, 3, 2, 1, 0]
    assert examples.label.tolist() == [1, 1, 1] and examples.margin.tolist() == [0, 0, 0]
    assert examples.grade.dtype == examples.label.dtype == examples.margin.dtype == np.float32


floats = st.floats(-4, 4, width=32)
judged = st.lists(floats, min_size=1, max_size=9).flatmap(
    lambda grade: st.builds(lambda p, m: (np.array(grade, np.float32), p, m), st.floats(0, 1, width=32), floats)
)


@given(made=st.lists(judged), first=st.integers(0, 5), last=st.integers(0, 9))
def test_judgements_come_back_from_storage_and_from_a_view(made, first, last, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    examples = Examples.build(example(len(g), grade=g, label=p, margin=m) for g, p, m in made)
    examples.save(folder)
    for stored, expected in ((Examples.open(folder), made), (examples[first:last], made[first:last])):
        assert [(e.grade.tolist(), e.label, e.margin) for e in stored] == [(g.tolist(), p, m) for g, p, m in expected]


def test_the_hash_tells_a_changed_judgement():
    made = [{}, {"grade": [0, 1]}, {"grade": [0, 0]}, {"label": 0.5}, {"margin": 1.0}]
    assert len({Examples.build([example(2, **judged)]).hash for judged in made}) == len(made)


@given(counts=st.lists(st.integers(1, 4), min_size=1), data=st.data())
def test_a_selection_is_those_examples_wherever_their_tokens_lie(counts, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("selected")
    made = [example(n, label=1 / n, margin=float(i), conversation=-i) for i, n in enumerate(counts)]
    numbers = sorted(data.draw(st.lists(st.integers(0, len(made) - 1))))
    selected, alone = Examples.build(made).select(np.array(numbers, np.int64)), Examples.build(made[i] for i in numbers)
    selected.save(folder)
    for examples in (selected, Examples.open(folder)):
        assert [[r.tolist() for r in e.replies] for e in examples] == [[r.tolist() for r in e.replies] for e in alone]
        assert [(e.label, e.margin, e.conversation) for e in examples] == [
            (e.label, e.margin, e.conversation) for e in alone
        ]
        assert examples.record.tolist() == numbers and examples.hash == alone.hash
