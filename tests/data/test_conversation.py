"""rm.data.conversation: hashes of dialogue prefixes, the same in every format."""

import hypothesis.strategies as st
from hypothesis import given

from rm.data.conversation import beginnings, key, turns

contents = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
messages = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": contents})
dialogues = st.lists(messages, min_size=1, max_size=5)


def stripped(dialogue):
    return [(message["role"], message["content"].strip()) for message in dialogue]


@given(a=dialogues, b=dialogues, shared=st.lists(messages, max_size=3))
def test_hashes_are_equal_exactly_where_dialogue_prefixes_are(a, b, shared):
    a, b = shared + a, shared + b
    for i, hash in enumerate(beginnings(a), start=1):
        for j, other in enumerate(beginnings(b), start=1):
            assert (hash == other) == (stripped(a[:i]) == stripped(b[:j]))


@given(a=dialogues, b=dialogues)
def test_dialogues_share_a_key_if_they_share_the_first_user_message(a, b):
    first_a, first_b = (next((m for m in stripped(d) if m[0] == "user"), stripped(d)) for d in (a, b))
    assert (key(a) == key(b)) == (first_a == first_b)


def test_a_hash_is_the_same_in_every_process():
    assert beginnings([{"role": "user", "content": " hi "}]) == [8384581696314740876]


def test_plain_texts_are_split_at_their_markers_or_are_one_reply():
    dialogue = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    anthropic, lmflow = "\n\nHuman: hi\n\nAssistant: yo", "###Human: hi###Assistant: yo"
    assert turns(anthropic) == turns(lmflow) == turns(dialogue) == dialogue
    assert turns("Human beings") == [{"role": "assistant", "content": "Human beings"}]
    assert turns("") == [{"role": "assistant", "content": ""}]
