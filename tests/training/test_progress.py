"""rm.training.progress: lines and a bar that fit in a terminal, the most important metrics first."""

import fcntl
import os
import struct
import sys
import termios

import pytest

from rm.data.sets import UNNAMED
from rm.distributed import process_group as dist
from rm.training.progress import Progress

LINE = {
    "step": 1200, "epoch": 0.4, "loss": 0.69314, "accuracy": 0.51234, "margin": 0.0123, "grad_norm": 12.3456,
    "learning_rate": 1.25e-5, "tokens_per_second": 12345.6, "pairs_per_second": 43.2, "peak_memory_gib": 41.3,
}  # fmt: skip
MEANS = {"loss": 0.61, "accuracy": 0.66, "accuracy_ci95_low": 0.6401, "accuracy_ci95_high": 0.6834, "margin": 0.31}


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(dist, "say", lines.append)
    return lines


def shown(monkeypatch, said, columns: int) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(columns))
    said.clear()
    progress = Progress(10000, 0)
    progress.show_metrics(1200, LINE, seconds_per_step=4.0)
    progress.show_evaluation(1200, {UNNAMED: MEANS, "helpful": MEANS}, "step 900 with eval_loss 0.6012")
    return list(said)


def test_lines_have_what_fits(monkeypatch, said):
    narrow, wide = shown(monkeypatch, said, 80), shown(monkeypatch, said, 140)
    assert narrow == [
        "step 1200/10000  loss 0.6931  accuracy 0.5123  grad_norm 12.35  9:46:40 left",
        "step 1200/10000  eval_loss 0.61  eval_accuracy 0.66 (0.6401 to 0.6834)",
        "step 1200/10000  helpful: loss 0.61  accuracy 0.66 (0.6401 to 0.6834)",
        "step 1200/10000  best so far: step 900 with eval_loss 0.6012",
    ]
    assert all(len(line) <= 140 for line in wide)
    assert wide[0].endswith("  tokens_per_second 12,346  learning_rate 1.25e-05  9:46:40 left")
    assert wide[1].endswith("  eval_margin 0.31")
    assert shown(monkeypatch, said, 20)[0] == "step 1200/10000  loss 0.6931  9:46:40 left"  # what a line always has


@pytest.mark.parametrize("columns", [80, 140])
def test_the_bar_keeps_its_place_beside_the_metrics(columns, said, monkeypatch):
    controller, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    with open(terminal, "w") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        progress = Progress(100000, 0)
        progress.bar.n = 51200
        progress.show_metrics(51200, LINE, seconds_per_step=4.0)
        progress.close()
        written = b""
        while b"accuracy" not in written:
            written += os.read(controller, 10000)
    os.close(controller)
    line = next(line.rstrip() for line in written.decode().split("\r") if "loss" in line)
    assert "51200/100000  51%|█████ " in line and line.endswith("loss 0.6931  accuracy 0.5123")
    assert len(line) <= columns


def test_other_bars_count_what_there_is(monkeypatch):
    drawn = []
    monkeypatch.setattr(dist, "tqdm", lambda items, **how: drawn.append(how["bar_format"]) or items)
    assert list(dist.progress([1, 2], "scoring", "micro-batches")) == [1, 2]
    assert list(dist.progress(iter([1, 2]), "reading a.json", "records")) == [1, 2]
    assert drawn == [
        "{desc}: {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} micro-batches, {elapsed}",
        "{desc}: {n_fmt} records, {elapsed}",
    ]
