"""Rewards from a trained model: from Python (`Scorer`), and the contract that says how its texts are written."""

from rm.scoring.client import remote
from rm.scoring.scorer import Scorer
from rm.scoring.trl import reward_function

__all__ = ["Scorer", "remote", "reward_function"]
