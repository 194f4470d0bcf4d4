"""rm.scoring.reward_set: the set that scoring.json names, and whose mean reward and standard deviation it states."""

import json

import numpy as np
import pytest

from rm.data.dataset import TextSettings, TrainingData
from rm.data.sets import UNNAMED
from rm.scoring import reward_set
from rm.scoring.reward_set import RewardSetSettings
from rm.scoring.scorer import Scorer
from tests import made
from tests.ranks import run_ranks
from tests.runs import TEXTS, main, settings, world


def test_the_default_set_is_held_out_examples_else_training_examples():
    train, held_out = (made.pair_examples(made.token_pairs(n)) for n in (300, 5))

    def choose(held_out):
        data = TrainingData(train, held_out, facts={})
        return reward_set.choose(RewardSetSettings(), data, TextSettings(), tokenizer=None, cache_dir=None)

    chosen = choose({UNNAMED: held_out})
    assert (len(chosen.examples), chosen.name) == (5, "5 examples held out")
    chosen = choose({"a": held_out, "b": train})
    assert (len(chosen.examples), chosen.name) == (133, "133 examples held out")
    parts = (held_out, train[:128])
    assert [e.replies[0].tolist() for e in chosen.examples] == [e.replies[0].tolist() for part in parts for e in part]
    chosen = choose({})
    assert (len(chosen.examples), chosen.name) == (reward_set.ENOUGH, "256 examples trained on")


def test_scoring_json_states_mean_and_deviation_of_given_demonstrations(tmp_path):
    file = str(world() / "texts.json")
    run_ranks(2, main, settings(tmp_path / "out", reward_set_path=(file,), num_train_epochs=1))
    saved = json.loads((tmp_path / "out" / "model" / "scoring.json").read_text())
    assert saved["reward_set"] == f"{len(TEXTS)} demonstrations of {file}"
    rewards = Scorer(tmp_path / "out" / "model").score(TEXTS)
    assert np.mean(rewards) == pytest.approx(saved["reward_mean"], abs=1e-4)
    assert np.std(rewards) == pytest.approx(saved["reward_std"], abs=1e-4)


def test_a_missing_file_of_demonstrations_is_an_error_before_training(tmp_path):
    chosen = settings(tmp_path / "out", reward_set_path=("nowhere.json",))
    with pytest.raises(RuntimeError, match="nowhere.json: no such file"):
        run_ranks(1, main, chosen)
    assert not (tmp_path / "out").exists()
