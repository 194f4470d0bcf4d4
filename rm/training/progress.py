"""What a person sees of a training: a bar on a terminal, and lines that stay, there and in a log file.

metrics.jsonl has every value. A line here has those that fit in a terminal's width, the most important ones first.
"""

import shutil
import sys

from tqdm import tqdm

from rm.data.sets import UNNAMED
from rm.distributed import process_group as dist

# The bar's own width is fixed, so that the metrics beside it have a place.
BAR = "{n_fmt}/{total_fmt} {percentage:3.0f}%|{bar:10}| {elapsed}<{remaining}{postfix}"
ON_BAR = ("loss", "accuracy")
FIRST = (*ON_BAR, "grad_norm", "tokens_per_second", "learning_rate", "margin", "mfu", "peak_memory_gib")
WITHOUT_TERMINAL = 120  # columns


class Progress:
    """The bar and the lines of a training. Other ranks than the main one have neither."""

    def __init__(self, steps: int, start: int):
        self.steps = steps
        is_hidden = not (dist.is_main() and sys.stderr.isatty())
        self.bar = tqdm(total=steps, initial=start, bar_format=BAR, dynamic_ncols=True, disable=is_hidden)

    def after_step(self) -> None:
        self.bar.update()

    def close(self) -> None:
        self.bar.close()

    def show_metrics(self, step: int, line: dict[str, float], seconds_per_step: float) -> None:
        """Show a line of metrics of the training."""
        names = [name for name in FIRST if name in line]
        names += [name for name in line if name not in (*FIRST, "step", "epoch")]
        parts = [f"{name} {short(line[name])}" for name in names]
        self.bar.set_postfix_str("  ".join(f"{name} {short(line[name])}" for name in ON_BAR if name in line))
        self._write(step, parts, f"{tqdm.format_interval(seconds_per_step * (self.steps - step))} left")

    def show_evaluation(self, step: int, means: dict[str, dict[str, float]], best: str | None) -> None:
        """Show an evaluation: a line for each set.

        Args:
            means: {name of the set: {metric: mean}}; UNNAMED is all sets together.
            best: which evaluation was the best so far; None: there is none.
        """
        for set_name, values in means.items():
            if set_name == UNNAMED:
                self._write(step, _evaluation(values, "eval_"))
            else:
                first, *more = _evaluation(values)
                self._write(step, [f"{set_name}: {first}", *more])
        if best is not None:
            self._write(step, [f"best so far: {best}"])

    def _write(self, step: int, parts: list[str], last: str = "") -> None:
        """Write a line with as many of the parts as fit, and at least the first of them."""
        columns = shutil.get_terminal_size((WITHOUT_TERMINAL, 0)).columns
        first, *more = parts
        line, end = f"step {step}/{self.steps}  {first}", f"  {last}" if last else ""
        for part in more:
            if len(f"{line}  {part}{end}") > columns:
                break
            line += f"  {part}"
        dist.say(line + end)


def _evaluation(means: dict[str, float], prefix: str = "") -> list[str]:
    """The parts of an evaluation's line; Wilson's interval stands behind its mean, others are in metrics.jsonl."""
    parts = []
    for name, value in means.items():
        if "_ci95_" in name:
            continue
        part = f"{prefix}{name} {short(value)}"
        if (low := means.get(f"{name}_ci95_low")) is not None:
            part += f" ({short(low)} to {short(means[f'{name}_ci95_high'])})"
        parts.append(part)
    return parts


def short(value: float) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"
