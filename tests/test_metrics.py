"""rm.metrics on cases whose answers are known."""

import numpy as np
import pytest

from rm.metrics import pair_metrics, wilson


def test_accuracy_counts_a_tie_half_and_loss_is_minus_log_sigmoid():
    got = pair_metrics(np.array([[2.0, 1.0], [0.0, 0.0], [1.0, 3.0]], np.float32))
    assert got["n"] == 3 and got["accuracy"] == 0.5 and got["ties"] == 1
    assert got["loss"] == pytest.approx(np.mean([-np.log(1 / (1 + np.exp(-m))) for m in (1.0, 0.0, -2.0)]))
    assert got["margin_mean"] == pytest.approx(-1 / 3)


def test_wilson_interval_of_a_published_example():
    # Newcombe (1998), Statistics in Medicine 17:857, table I, method 3
    for right, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(right / n, n) == pytest.approx((low, high), abs=5e-5)


def test_all_ties_and_a_single_pair_have_an_answer():
    assert pair_metrics(np.zeros((4, 2)))["accuracy"] == 0.5
    one = pair_metrics(np.array([[1.0, 0.0]]))
    assert one["accuracy"] == 1.0 and 0 < one["accuracy_ci95"][0] < one["accuracy_ci95"][1] == 1.0


def test_a_huge_margin_does_not_overflow():
    assert pair_metrics(np.array([[-1e4, 1e4]]))["loss"] == pytest.approx(2e4)
