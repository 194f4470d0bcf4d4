"""rm.audit.index: selecting pairs equals reading only those pairs."""

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rm.audit.index import Pairs, read_pairs

texts = st.lists(st.sampled_from("ab"), min_size=1, max_size=4).map(
    lambda contents: "".join(f"###{('Human', 'Assistant')[i % 2]}: {content}" for i, content in enumerate(contents))
)
records = st.fixed_dictionaries({"chosen": texts, "rejected": texts, "subset": st.just("one")})


def read(drawn: list[dict], folder) -> Pairs:
    (folder / "pairs.json").write_text(json.dumps(drawn))
    return read_pairs([folder / "pairs.json"])


@given(drawn=st.lists(records, min_size=1, max_size=6), data=st.data())
def test_selecting_pairs_equals_reading_only_those(drawn, data, tmp_path_factory):
    kept = data.draw(st.lists(st.booleans(), min_size=len(drawn), max_size=len(drawn)).filter(any))
    folder = tmp_path_factory.getbasetemp()
    selected = read(drawn, folder).select(np.array(kept))
    alone = read([record for record, keep in zip(drawn, kept, strict=True) if keep], folder)
    assert len(selected) == len(alone) == sum(kept)
    for name in ("conversation", "full_hash", "prompt_hash", "continued_by_other", "has_reply"):
        assert getattr(selected, name).tolist() == getattr(alone, name).tolist(), name
    for name in ("reply_length", "length", "human_turns"):
        assert getattr(selected, name).tolist() == getattr(alone, name).tolist(), name
    for name in ("hashes", "record"):
        assert getattr(selected.prefixes, name).tolist() == getattr(alone.prefixes, name).tolist()
    assert selected.prefixes.count(selected.full_hash).tolist() == [
        [len(selected.prefixes.records_with(hash)) for hash in pair] for pair in selected.full_hash.tolist()
    ]
    expected = [str(i + 1) for i, keep in enumerate(kept) if keep]
    assert [where.rpartition(" ")[2] for where in selected.where] == expected
