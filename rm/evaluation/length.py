"""How far the length of replies alone explains rewards and grades.

Lengths are in characters, of a reply's last message.

Shapes: R replies, P ordered pairs, B bins.
"""

import numpy as np

from rm.evaluation.metrics import ScoredReplies, correctness
from rm.evaluation.stats import average_ranks, balanced_interval, mean, pearson

BINS = 10  # of length, with equally many replies in each
FOLDS = 5
RIDGE = 1.0


def length_report(scored: ScoredReplies) -> dict:
    """The entry `length` of a set in report.json.

    `longest_accuracy` is the accuracy of always preferring the longer reply; equal lengths count half.
    `controlled_accuracy` is the mean of the model's accuracies on the pairs whose better reply is the longer and on
    those whose better reply is the shorter: a model for which longer is always better, or always worse, gets 0.5.

    A rule of length need not be monotone: it may like middle lengths. `rule_accuracy` is the accuracy of the best rule
    that knows only in which of ten bins of length a reply is (`rule_margins`), on pairs that it was not fitted to.
    `rule_controlled_accuracy` is the mean of the model's accuracies on the pairs that this rule gets right and on those
    that it gets wrong: about 0.5 for a model that follows the rule.

    The correlations of reward with length are over all replies, and within prompts (after subtracting each prompt's
    mean).
    """
    difference, correct = scored.length_difference, correctness(scored.margin)
    cluster = scored.conversation[scored.pairs[2]]
    rule = rule_margins(scored)
    rewards_within, length_within = _centred(scored.rewards, scored.offsets), _centred(scored.length, scored.offsets)
    return {
        # A positive length difference stands for a positive margin of the rule "longer is better".
        "longest_accuracy": mean(correctness(difference)),
        "accuracy_better_longer": mean(correct[difference > 0]),
        "accuracy_better_shorter": mean(correct[difference < 0]),
        "controlled_accuracy": _balanced(correct, difference),
        "controlled_accuracy_ci95_clustered": balanced_interval(correct, difference, cluster),
        "rule_accuracy": None if rule is None else mean(correctness(rule)),
        "rule_controlled_accuracy": None if rule is None else _balanced(correct, rule),
        "rule_controlled_accuracy_ci95_clustered": None if rule is None else balanced_interval(correct, rule, cluster),
        "pearson": pearson(scored.rewards, scored.length),
        "spearman": pearson(average_ranks(scored.rewards), average_ranks(scored.length)),
        "pearson_within_prompts": pearson(rewards_within, length_within),
        "spearman_within_prompts": pearson(average_ranks(rewards_within), average_ranks(length_within)),
    }


def rule_margins(scored: ScoredReplies) -> np.ndarray | None:
    """(P,) margins by which a rule of length alone prefers the better replies; None for less than two conversations.

    The rule gives every bin of length a score. The scores are fitted by Bradley-Terry, with a ridge, to the grades of
    the pairs of other conversations: each conversation is in one of five folds, whose pairs the others' rule judges.
    """
    better, worse, prompt = scored.pairs
    conversations, fold = np.unique(scored.conversation[prompt], return_inverse=True)
    if len(conversations) < 2:
        return None
    fold = fold % FOLDS
    edges = np.unique(np.quantile(scored.length, np.linspace(0, 1, BINS + 1)[1:-1]))
    bin_of = np.digitize(scored.length, edges)  # (R,)
    margins = np.zeros(len(better))
    for one in np.unique(fold):
        others = fold != one
        scores = bradley_terry_scores(bin_of[better[others]], bin_of[worse[others]], len(edges) + 1)
        margins[~others] = scores[bin_of[better[~others]]] - scores[bin_of[worse[~others]]]
    return margins


def bradley_terry_scores(better: np.ndarray, worse: np.ndarray, count: int) -> np.ndarray:
    """(B,) scores s that minimize the sum over pairs of -log sigmoid(s[better] - s[worse]), plus RIDGE / 2 |s|^2.

    Args:
        better, worse: (P,) the bin of each pair's better and worse reply.
        count: B.
    """
    wins = np.zeros((count, count))
    np.add.at(wins, (better, worse), 1)
    games = wins + wins.T
    scores = np.zeros(count)
    for _ in range(50):  # Newton's method: the sum is convex, and has its ridge
        probability = 1 / (1 + np.exp(scores[None, :] - scores[:, None]))  # [i, j]: that i beats j
        gradient = (games * probability - wins).sum(1) + RIDGE * scores
        weight = games * probability * (1 - probability)
        step = np.linalg.solve(np.diag(weight.sum(1) + RIDGE) - weight, gradient)
        scores -= step
        if abs(step).max() < 1e-10:
            break
    return scores


def _balanced(correct: np.ndarray, sign: np.ndarray) -> float | None:
    """The mean of the accuracies where `sign` is positive and where it is negative."""
    positive, negative = mean(correct[sign > 0]), mean(correct[sign < 0])
    return None if positive is None or negative is None else (positive + negative) / 2


def _centred(x: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(R,) each value minus the mean of its prompt; exactly 0 if all values of a prompt are equal."""
    counts = np.diff(offsets)
    if not len(counts):
        return x
    # Subtracting the prompt's first value makes equal values exactly 0, which the rounded mean alone would not.
    x = x - np.repeat(x[offsets[:-1]], counts)
    return x - np.repeat(np.add.reduceat(x, offsets[:-1]) / counts, counts)
