"""Evaluate a reward model on preference pairs.

    python eval_rm.py --model_name_or_path runs/rm/model --dataset_path test.jsonl --output_dir runs/eval
    torchrun --nproc_per_node 8 eval_rm.py ...       the same numbers from eight GPUs

Writes report.json (accuracy with its 95 % interval, loss, margins) and scores.jsonl (one line a pair, in file
order, chosen first).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from rm import batch, data, dist, heads, log, metrics, parallel
from rm.config import REQUIRED, parse, setting
from rm.step import score
from rm.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Settings(heads.ModelSettings, data.DataSettings, batch.RowSettings, parallel.ParallelSettings):
    output_dir: str = setting(REQUIRED, "folder for report.json and scores.jsonl")


def main(settings: Settings) -> None:
    log.check_free(settings.output_dir, ("report.json", "run.json"))
    tokenizer = Tokenizer(settings.model_name_or_path)
    pairs, counts = data.read_once(data.pairs, settings.dataset_path, settings, tokenizer)
    log.say(str(counts))
    model = heads.load(heads.RewardModel, settings, new_head=False)

    scores = score(model, batch.InOrder(pairs, settings)).numpy().reshape(-1, 2)
    bad = np.flatnonzero(~np.isfinite(scores).all(1))
    if len(bad):
        raise ValueError(
            f"{settings.dataset_path}: record {pairs.record[bad[0]]} has a score that is not finite: {scores[bad[0]]}"
        )

    report = metrics.pair_metrics(scores)
    if dist.is_main():
        write(Path(settings.output_dir), settings, report | {"data": asdict(counts)}, pairs.record, scores)
    low, high = report["accuracy_ci95"]
    log.say(f"accuracy {report['accuracy']:.4f}  (95 % interval {low:.4f} to {high:.4f}, {report['n']:,} pairs)")
    log.say(f"loss {report['loss']:.4f}  margin {report['margin_mean']:.4f}  ties {report['ties']}")


def write(folder: Path, settings: Settings, report: dict, records: np.ndarray, scores: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "scores.jsonl", "w") as out:
        for record, pair in zip(records.tolist(), scores.tolist(), strict=True):
            out.write(json.dumps({"record": record, "scores": pair}) + "\n")
    whole = report | log.provenance(settings)
    (folder / "report.json").write_text(json.dumps(whole, indent=2) + "\n")


if __name__ == "__main__":
    settings = parse(Settings, __doc__)
    with dist.one_line_errors(), dist.session(seed=0):
        main(settings)
