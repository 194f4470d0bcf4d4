"""rm.audit.index: some of the pairs are as if only those had been read."""

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rm.audit.index import Pairs, read_pairs

texts = st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map(
    lambda said: "".join(f"###{('Human', 'Assistant')[i % 2]}: {each}" for i, each in enumerate(said))
)
records = st.fixed_dictionaries({"chosen": texts, "rejected": texts, "subset": st.just("one")})


def read(made: list[dict], folder) -> Pairs:
    (folder / "pairs.json").write_text(json.dumps(made))
    return read_pairs([folder / "pairs.json"])


@given(made=st.lists(records, min_size=1, max_size=6), data=st.data())
def test_a_selection_is_as_if_nothing_else_had_been_read(made, data, tmp_path_factory):
    kept = data.draw(st.lists(st.booleans(), min_size=len(made), max_size=len(made)).filter(any))
    folder = tmp_path_factory.getbasetemp()
    some = read(made, folder).only(np.array(kept))
    alone = read([record for record, keep in zip(made, kept, strict=True) if keep], folder)
    assert len(some) == len(alone) == sum(kept)
    for name in ("conversation", "whole", "prompt", "inside", "answered", "reply_length", "length", "human_turns"):
        assert getattr(some, name).tolist() == getattr(alone, name).tolist(), name
    for name in ("hashes", "owner"):
        assert getattr(some.quotes, name).tolist() == getattr(alone.quotes, name).tolist()
    assert some.quotes.count(some.whole).tolist() == [
        [len(some.quotes.owners(hash)) for hash in row] for row in some.whole.tolist()
    ]
    assert [where.rpartition(" ")[2] for where in some.where] == [str(i + 1) for i, keep in enumerate(kept) if keep]
