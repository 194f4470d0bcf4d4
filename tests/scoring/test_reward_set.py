"""rm.scoring.reward_set: the set that scoring.json names, and whose mean it gives."""

import json

import numpy as np
import pytest

from rm.scoring import reward_set
from rm.scoring.scorer import Scorer
from tests import made
from tests.ranks import run_ranks
from tests.runs import TEXTS, main, settings, world


def test_without_a_name_it_is_held_out_examples_else_those_trained_on(tmp_path):
    train, held_out = (made.pair_examples(made.token_pairs(n)) for n in (300, 5))
    chosen = settings(tmp_path / "out")
    examples, name = reward_set.choose(train, held_out, chosen)
    assert (len(examples), name) == (5, "5 examples held out")
    examples, name = reward_set.choose(train, held_out[:0], chosen)
    assert (len(examples), name) == (reward_set.ENOUGH, "256 examples trained on")


def test_named_demonstrations_are_zero_on_average_less_the_mean_of_scoring_json(tmp_path):
    file = str(world() / "texts.json")
    chosen = settings(tmp_path / "out", reward_set_path=(file,), num_train_epochs=1)
    run_ranks(2, main, chosen)
    said = json.loads((tmp_path / "out" / "model" / "scoring.json").read_text())
    assert said["reward_set"] == f"{len(TEXTS)} demonstrations of {file}"
    rewards = Scorer(tmp_path / "out" / "model").score(TEXTS)
    assert np.mean(rewards) == pytest.approx(said["reward_mean"], abs=1e-4)
    assert np.std(rewards) == pytest.approx(said["reward_std"], abs=1e-4)


def test_a_file_that_is_not_there_is_said_before_training(tmp_path):
    chosen = settings(tmp_path / "out", reward_set_path=("nowhere.json",))
    with pytest.raises(RuntimeError, match="nowhere.json: no such file"):
        run_ranks(1, main, chosen)
    assert not (tmp_path / "out").exists()
