"""Which evaluation was the best so far, and whether to stop early: decided as transformers' Trainer and
EarlyStoppingCallback do (transformers/trainer.py, trainer_callback.py).
"""

import math
from dataclasses import dataclass

from rm.config import SettingsGroup, require_not_negative, require_positive, setting


@dataclass(frozen=True, kw_only=True)
class BestSettings(SettingsGroup):
    """Best checkpoint and early stopping"""

    load_best_model_at_end: bool = setting(
        False, "save the model of the step whose evaluation was best, not of the last; its checkpoint is kept for that"
    )
    metric_for_best_model: str = setting(
        "eval_loss",
        "the metric that makes an evaluation the best, such as eval_accuracy or eval_NAME_loss; lower is better for a "
        "loss or a perplexity, else higher",
    )
    early_stopping_patience: int | None = setting(
        None, "stop after this many evaluations in a row that are no better than the best one before"
    )
    early_stopping_threshold: float = setting(
        0.0, "for --early_stopping_patience, better means better by more than this"
    )

    def check(self) -> None:
        require_positive(early_stopping_patience=self.early_stopping_patience)
        require_not_negative(early_stopping_threshold=self.early_stopping_threshold)
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise ValueError("--early_stopping_threshold has no effect without --early_stopping_patience: give both")

    @property
    def metric(self) -> str:
        """Its name in metrics.jsonl; the setting may leave out eval_."""
        return f"eval_{self.metric_for_best_model.removeprefix('eval_')}"

    @property
    def lower_is_better(self) -> bool:
        return self.metric.endswith(("loss", "perplexity"))


class Best:
    """The best evaluation so far. Its state is part of every checkpoint.

    The evaluation before the first step does not count: there is no checkpoint of it.
    """

    def __init__(self, settings: BestSettings, held_out: dict | None = None, saved: dict | None = None):
        """
        Args:
            held_out: what identifies the data of the evaluations.
            saved: the `state` of a checkpoint. It counts if its evaluations were on the same data.
        """
        self.settings, self.held_out = settings, held_out
        self.step: int | None = None  # of the best evaluation
        self.value: float | None = None
        self.evaluated_step: int | None = None  # of the last evaluation
        self.patience_counter = 0  # evaluations in a row without an improvement that counts
        self.is_restored = saved is not None and saved.get("held_out") == held_out
        if self.is_restored:
            self.step, self.value = saved.get("step"), saved.get("value")
            self.evaluated_step, self.patience_counter = saved.get("evaluated_step"), saved["patience_counter"]

    @property
    def state(self) -> dict:
        """What a checkpoint has to keep."""
        return {
            "step": self.step,
            "value": self.value,
            "evaluated_step": self.evaluated_step,
            "patience_counter": self.patience_counter,
            "held_out": self.held_out,
        }

    def take(self, step: int, line: dict[str, float]) -> None:
        """Take in an evaluation, once.

        Args:
            line: its metrics, named as in metrics.jsonl.
        """
        value = line.get(self.settings.metric)
        if value is None or step <= (self.evaluated_step or 0):
            return
        if not math.isfinite(value):
            gain = 0.0
        elif self.value is None:  # so far there was no evaluation, or none with a finite value
            gain = math.inf
        else:
            gain = self.value - value if self.settings.lower_is_better else value - self.value
        if gain > self.settings.early_stopping_threshold or self.evaluated_step is None:
            self.patience_counter = 0
        else:
            self.patience_counter += 1
        if gain > 0:
            self.step, self.value = step, value
        self.evaluated_step = step

    @property
    def stops(self) -> bool:
        """Whether the training ends here, before its last step."""
        patience = self.settings.early_stopping_patience
        return patience is not None and self.patience_counter >= patience

    def __str__(self) -> str:
        if self.value is None:
            return f"none: no {self.settings.metric} was finite"
        return f"step {self.step} with {self.settings.metric} {self.value:.4g}"
