"""Means of a model's metrics over held-out examples, set by set and over all of them.

Of a reward model: `loss`, `accuracy` with the bounds of its 95 % intervals, `margin`, and the mean rewards of chosen
and rejected replies. Of one of several attributes: `loss`, and of each attribute the mean squared error and the
correlation (`mse_NAME`, `pearson_NAME`). Of a language model: `loss`, `perplexity` and `token_accuracy`.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from rm.data.batch import EvalBatches, PackingSettings, preference_tables
from rm.data.examples import Examples
from rm.data.sets import UNNAMED
from rm.distributed import process_group as dist
from rm.distributed import sharding
from rm.evaluation import attributes
from rm.evaluation.stats import clustered_interval, wilson_interval
from rm.model.heads import Model, RegressionModel, RewardModel, Sums
from rm.scoring.score import all_rewards
from rm.training.best import BestSettings

MAX_EXPONENT = 700  # exp of more is no float64


def evaluation_sets(
    model: Model, held_out: dict[str, Examples], packing: PackingSettings, best: BestSettings
) -> dict[str, EvalBatches]:
    """The micro-batches of every set of held-out data.

    Raises:
        ValueError: an evaluation of this model on these sets has no --metric_for_best_model.
    """
    allowed = [f"eval_{name}" for name in model.evaluated]
    allowed += [f"eval_{set_name}_{name}" for set_name in held_out if set_name != UNNAMED for name in model.evaluated]
    if best.metric not in allowed:
        raise ValueError(f"--metric_for_best_model {best.metric_for_best_model} must be one of {', '.join(allowed)}")
    return {name: EvalBatches(examples, packing) for name, examples in held_out.items()}


@torch.no_grad()
def evaluate(
    model: Model, sets: dict[str, EvalBatches], between_batches: Callable[[], None] = lambda: None
) -> dict[str, dict[str, float]]:
    """Means over all examples, exact whatever the number of ranks.

    Args:
        sets: {name: micro-batches}, see `rm.data.sets`.
        between_batches: called before every micro-batch; may leave by raising.

    Returns:
        {name: {metric: mean}} of every set; UNNAMED is all of them together.
    """
    if isinstance(model, RegressionModel):
        return _evaluate_attributes(model, sets, between_batches)
    if model.head == RewardModel.head:
        return _evaluate_rewards(model, sets, between_batches)
    model.eval()
    totals: list[Sums] = []
    for name, batches in sets.items():
        totals.append({})
        for batch in dist.progress(batches, f"evaluating {name}".rstrip(), "micro-batches"):
            between_batches()
            add_sums(totals[-1], model(batch.to(dist.device())))
    model.train()
    names = list(totals[0])
    table = torch.stack([torch.stack([total[name].double() for name in names]) for total in totals])
    table = dist.sum_over_ranks(table)  # (sets, metrics)
    sharding.reshard(model)
    sums = {UNNAMED: table.sum(0)} | {name: row for name, row in zip(sets, table, strict=True) if name != UNNAMED}
    return {name: means(dict(zip(names, row.tolist(), strict=True))) for name, row in sums.items()}


def _evaluate_rewards(
    model: RewardModel, sets: dict[str, EvalBatches], between_batches: Callable[[], None]
) -> dict[str, dict[str, float]]:
    """`evaluate` of a reward model: every rank has all rewards, computed as for eval_rm.py, and all means."""
    measured, conversations = {}, {}
    for name, batches in sets.items():
        examples = batches.examples
        rewards = all_rewards(model, batches, between_batches).double()
        compared = np.split(np.arange(len(rewards)), examples.reply_offsets[1:-1])
        tables = preference_tables(examples, np.arange(len(examples)), compared)
        measures = model.measures(rewards, **{key: torch.from_numpy(table) for key, table in tables.items()})
        measured[name] = {key: values.double().numpy() for key, values in measures.items()}
        conversations[name] = np.asarray(examples.conversation)
    if UNNAMED not in sets:
        keys = next(iter(measured.values()))
        together = {key: np.concatenate([values[key] for values in measured.values()]) for key in keys}
        measured = {UNNAMED: together} | measured
        conversations[UNNAMED] = np.concatenate(list(conversations.values()))
    return {name: _means_of_prompts(values, conversations[name]) for name, values in measured.items()}


def _evaluate_attributes(
    model: RegressionModel, sets: dict[str, EvalBatches], between_batches: Callable[[], None]
) -> dict[str, dict[str, float]]:
    """`evaluate` of a model of several attributes."""
    found = {}
    for name, batches in sets.items():
        outputs = all_rewards(model, batches, between_batches).numpy()
        found[name] = attributes.Predictions(model.labels, outputs, np.asarray(batches.examples.attributes))
    if UNNAMED not in sets:
        found = {UNNAMED: attributes.together(list(found.values()))} | found
    return {name: predictions.line for name, predictions in found.items()}


def _means_of_prompts(values: dict[str, np.ndarray], conversation: np.ndarray) -> dict[str, float]:
    """The means of (N,) values, and the bounds of the accuracy's 95 % intervals, as eval_rm.py computes them."""
    line = {}
    for name, of_prompts in values.items():
        line[name] = float(of_prompts.mean())
        if name == "accuracy":
            intervals = {
                "ci95": wilson_interval(line[name], len(of_prompts)),
                "ci95_clustered": clustered_interval(of_prompts, conversation),  # None for one conversation
            }
            for kind, bounds in intervals.items():
                if bounds is not None:
                    line[f"accuracy_{kind}_low"], line[f"accuracy_{kind}_high"] = bounds
    return line


def add_sums(total: Sums, sums: Sums) -> None:
    """Add a micro-batch's sums to those of a step, without their graph."""
    for name, value in sums.items():
        total[name] = total[name] + value.detach() if name in total else value.detach()


def means(sums: dict[str, float]) -> dict[str, float]:
    """Divide summed metrics by the global count, and add what follows from them."""
    count = sums["count"]
    values = {}
    for name, value in sums.items():
        if name != "count":
            values[name] = value / count
    if "token_accuracy" in values:
        values["perplexity"] = math.exp(min(values["loss"], MAX_EXPONENT))
    return values
