"""How well a model predicts numbers that are known: the attributes of replies, such as HelpSteer2's.

Shapes: R replies, A attributes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rm.evaluation.stats import average_ranks, mean, pearson


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model says of the replies of one set, and what is known."""

    names: Sequence[str]  # A
    outputs: np.ndarray  # (R, A)
    known: np.ndarray  # (R, A), nan where it is not

    @property
    def report(self) -> dict:
        """`loss`, the mean over replies of the training's loss, and of each attribute the number of known values, the
        mean squared error, the variance of the known values (the error of always saying their mean), and Pearson's and
        Spearman's correlation.
        """
        is_known = ~np.isnan(self.known)
        errors = np.where(is_known, np.square(self.outputs.astype(np.float64) - self.known), 0)
        columns = zip(self.names, self.outputs.T, self.known.T, is_known.T, errors.T, strict=True)
        of_each = {}
        for name, output, known, has, error in columns:
            x, y = output[has].astype(np.float64), known[has].astype(np.float64)
            of_each[name] = {
                "n": int(has.sum()),
                "mse": mean(error[has]),
                "variance": float(y.var()) if len(y) else None,
                "pearson": pearson(x, y),
                "spearman": pearson(average_ranks(x), average_ranks(y)),
            }
        loss = mean(errors.sum(1) / np.maximum(is_known.sum(1), 1))
        return {"n": len(self.known), "loss": loss, "attributes": of_each}

    def lines(self, records: Sequence[int], dropped: Mapping[int, str]) -> Iterator[dict]:
        """The lines of scores.jsonl: one for each record, counted from 1; a record that was left out has a reason.

        Args:
            records: (R,) number of each reply's record, from 0.
            dropped: number of a record that was left out -> why.
        """
        scores = dict(zip(np.asarray(records).tolist(), self.outputs.tolist(), strict=True))
        for number in sorted(scores.keys() | dropped.keys()):
            if number in scores:
                yield {"record": number + 1, "scores": dict(zip(self.names, scores[number], strict=True))}
            else:
                yield {"record": number + 1, "scores": None, "dropped": dropped[number]}

    @property
    def line(self) -> dict[str, float]:
        """For a line of metrics: what is defined of `report`."""
        report = self.report
        line = {"loss": report["loss"]}
        for name, values in report["attributes"].items():
            line |= {f"{key}_{name}": values[key] for key in ("mse", "pearson") if values[key] is not None}
        return line


def together(sets: Sequence[Predictions]) -> Predictions:
    """Several sets in one."""
    outputs, known = (np.concatenate([getattr(one, name) for one in sets]) for name in ("outputs", "known"))
    return Predictions(sets[0].names, outputs, known)
