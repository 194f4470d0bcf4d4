"""A bare prompt and reply, both strings, are written as the contract says, in every place that scores them."""

import json

import pytest

import eval_rm
from rm.config import compose
from rm.distributed import process_group as dist
from rm.scoring import Scorer
from tests.reward_positions import Clients, dialogue, reward_folder
from tests.text_fixtures import byte_level

pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
PROMPTS = ["what eats the cat?", "what is the capital of France?"]
REPLIES = [["the dog", "the mat", "the other cat", "no"], ["Paris.", "the cat", "France", "an egg"]]
SUBSETS = ["Focus", "Math"]
# Records of public benchmarks: file name -> (records, replies of each)
BENCHMARKS = {
    "rewardbench1.parquet": [
        {"prompt": p, "chosen": r[0], "chosen_model": "a", "rejected": r[1], "subset": s, "id": i}
        for i, (p, r, s) in enumerate(zip(PROMPTS, REPLIES, ["hep-cpp", "math-prm"], strict=True))
    ],
    "rewardbench2.parquet": [
        {"id": str(i), "prompt": p, "chosen": r[:1], "rejected": r[1:], "num_correct": 1, "models": ["a"], "subset": s}
        for i, (p, r, s) in enumerate(zip(PROMPTS, REPLIES, SUBSETS, strict=True))
    ],
    "rmbench.json": [
        {"id": f"chat_{i}", "prompt": p, "chosen": r[:2], "rejected": r[2:], "domain": "chat"}
        for i, (p, r) in enumerate(zip(PROMPTS, REPLIES, strict=True))
    ],
}


@pytest.fixture(scope="module", params=["dialogue", "plain"])
def model(request, tmp_path_factory):
    """(folder, clients, function: prompt, reply -> the ids that transformers gives)"""
    # Both have a chat template; "plain" was trained on bare texts that were joined.
    tmp_path = tmp_path_factory.mktemp(request.param)
    text = {} if request.param == "dialogue" else {"bare_text": "plain"}
    folder = reward_folder("ChatML", byte_level, tmp_path, **text)
    clients = Clients(folder)

    def ids(prompt: str, reply: str) -> list[int]:
        if request.param == "dialogue":
            return clients.ids([dialogue(prompt, reply)])[0]
        return clients.tokenizer(prompt + reply + clients.tokenizer.eos_token).input_ids

    return folder, clients, ids


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_are_scored_as_the_contract_says(name, model, tmp_path):
    folder, clients, ids = model
    records, file = BENCHMARKS[name], tmp_path / name
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.Table.from_pylist(records), file)
    else:
        file.write_text(json.dumps(records))
    with dist.session(0):
        flat = dict(model_name_or_path=(str(folder),), dataset_path=(str(file),), output_dir=str(tmp_path / "eval"))
        eval_rm.main(compose(eval_rm.Settings, **flat, cache_dir=str(tmp_path / "cache")))
    n = 2 if name == "rewardbench1.parquet" else 4
    lines = [json.loads(line) for line in open(tmp_path / "eval" / "scores.jsonl")]
    for line, prompt, replies in zip(lines, PROMPTS, REPLIES, strict=True):
        expected = clients.alone([ids(prompt, reply) for reply in replies[:n]])
        assert line["scores"] == pytest.approx(expected, abs=1e-4)


def test_a_scorer_writes_bare_prompts_and_responses_as_the_contract_says(model):
    folder, clients, ids = model
    scores = Scorer(folder).score_responses(PROMPTS, REPLIES)
    for rewards, prompt, replies in zip(scores, PROMPTS, REPLIES, strict=True):
        assert rewards == pytest.approx(clients.alone([ids(prompt, reply) for reply in replies]), abs=1e-4)
    # Full texts stay plain, as in training.
    (whole,) = Scorer(folder).score(["what eats the cat?the dog"])
    tokens = clients.tokenizer("what eats the cat?the dog" + clients.tokenizer.eos_token).input_ids
    assert whole == pytest.approx(clients.alone([tokens])[0], abs=1e-4)
