"""rm.data.examples: grades, labels, margins and selections (tokens: tests/data/test_dataset.py)."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rm.data.examples import Example, Examples


def example(n: int, **labels) -> Example:
    """An example of n replies of one token."""
    replies = tuple(np.array([i], np.int32) for i in range(n))
    return Example(np.zeros(0, np.int32), replies, tuple(np.zeros(1, bool) for _ in replies), **labels)


def test_examples_without_grades_rank_replies_in_their_order():
    examples = Examples.build(example(n) for n in (1, 2, 4))
    assert examples.grade.tolist() == [0, 1, 0, 3, 2, 1, 0]
    assert examples.label.tolist() == [1, 1, 1] and examples.margin.tolist() == [0, 0, 0]
    assert examples.grade.dtype == examples.label.dtype == examples.margin.dtype == np.float32


floats = st.floats(-4, 4, width=32)
grades = st.lists(floats, min_size=1, max_size=9).map(lambda grade: np.array(grade, np.float32))
labels = st.tuples(grades, st.floats(0, 1, width=32), floats)  # grade, label, margin


@given(values=st.lists(labels), first=st.integers(0, 5), last=st.integers(0, 9))
def test_grades_labels_and_margins_survive_saving_and_slicing(values, first, last, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    examples = Examples.build(example(len(g), grade=g, label=p, margin=m) for g, p, m in values)
    examples.save(folder)
    for stored, expected in ((Examples.open(folder), values), (examples[first:last], values[first:last])):
        assert [(e.grade.tolist(), e.label, e.margin) for e in stored] == [(g.tolist(), p, m) for g, p, m in expected]


def test_the_hash_depends_on_grade_label_and_margin():
    changes = [{}, {"grade": [0, 1]}, {"grade": [0, 0]}, {"label": 0.5}, {"margin": 1.0}]
    assert len({Examples.build([example(2, **change)]).hash for change in changes}) == len(changes)


@given(counts=st.lists(st.integers(1, 4), min_size=1), data=st.data())
def test_a_selection_equals_examples_built_from_its_members(counts, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("selected")
    members = [example(n, label=1 / n, margin=float(i), conversation=-i) for i, n in enumerate(counts)]
    indices = sorted(data.draw(st.lists(st.integers(0, len(members) - 1))))
    selected = Examples.build(members).select(np.array(indices, np.int64))
    built = Examples.build(members[i] for i in indices)
    selected.save(folder)
    for examples in (selected, Examples.open(folder)):
        assert [[r.tolist() for r in e.replies] for e in examples] == [[r.tolist() for r in e.replies] for e in built]
        assert [(e.label, e.margin, e.conversation) for e in examples] == [
            (e.label, e.margin, e.conversation) for e in built
        ]
        assert examples.record.tolist() == indices and examples.hash == built.hash
