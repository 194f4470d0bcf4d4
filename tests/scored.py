"""ScoredReplies built from nested lists, for the tests of rm.evaluation."""

import numpy as np

from rm.evaluation.metrics import ScoredReplies


def scored(rewards, grades, lengths=None, conversation=None, turns=None, subset=None) -> ScoredReplies:
    """Prompts with any number of replies: `rewards`, `grades` and `lengths` have one list per prompt."""
    n, counts = len(rewards), [len(of_prompt) for of_prompt in rewards]
    if lengths is None:
        lengths = [range(count) for count in counts]
    return ScoredReplies(
        rewards=np.array([x for of_prompt in rewards for x in of_prompt], np.float64),
        grade=np.array([x for of_prompt in grades for x in of_prompt], np.float32),
        length=np.array([x for of_prompt in lengths for x in of_prompt], np.int64),
        offsets=np.cumsum([0, *counts]),
        conversation=np.array(range(n) if conversation is None else conversation),
        turns=np.array([1] * n if turns is None else turns),
        subset=np.array([""] * n if subset is None else subset),
    )


def pairs(rewards, **attributes) -> ScoredReplies:
    """Pairs of replies whose first one is graded better; `attributes` as in `scored`."""
    return scored(rewards, [[1, 0]] * len(rewards), **attributes)


def random_pairs(n: int, seed: int = 0) -> ScoredReplies:
    """n pairs of random rewards, lengths, numbers of turns, and subsets "a" and "b"."""
    generator = np.random.default_rng(seed)
    rewards = generator.normal(size=(n, 2)) + generator.integers(0, 2, (n, 1)) * [1, 0]
    lengths = generator.integers(1, 900, (n, 2))
    subset = generator.choice(["a", "b"], n).tolist()
    turns = generator.integers(1, 4, n).tolist()
    return pairs(rewards.tolist(), lengths=lengths.tolist(), turns=turns, subset=subset)
