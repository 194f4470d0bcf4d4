"""What a set of scored pairs says: accuracy with its interval, loss, margin. Pure functions of fp64 arrays.

Shapes: N pairs.
"""

import math

import numpy as np


def pair_metrics(scores: np.ndarray) -> dict[str, float]:
    """The numbers of report.json.

    Args:
        scores: (N, 2) rewards, the chosen reply first. A tie counts half: neither `>` nor `>=` is right about it.
    """
    margin = scores[:, 0].astype(np.float64) - scores[:, 1]
    right = np.where(margin == 0, 0.5, margin > 0)
    accuracy = float(right.mean())
    return {
        "n": len(margin),
        "accuracy": accuracy,
        "accuracy_ci95": wilson(accuracy, len(margin)),
        "loss": float(np.logaddexp(0, -margin).mean()),  # -log sigmoid
        "margin_mean": float(margin.mean()),
        "margin_std": float(margin.std()),
        "ties": int((margin == 0).sum()),
        "reward_mean": float(scores.mean()),
        "reward_std": float(scores.std()),
    }


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share observed in n trials (Wilson 1927)."""
    z = 1.959963984540054
    centre, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))
