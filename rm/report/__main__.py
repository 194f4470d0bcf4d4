"""Write the HTML report of a training run, its curves, drawn from metrics.jsonl; and the model card of a reward model.

python -m rm.report runs/rm              writes runs/rm/report.html; also works while the run is still in progress
python -m rm.report runs/rm runs/eval    and into runs/rm/model/README.md the numbers of an evaluation with eval_rm.py
python -m rm.report runs/a runs/b ...    writes runs/a/comparison.html: the runs' curves side by side
"""

import sys
from pathlib import Path

from rm.cli import one_line_errors
from rm.distributed import process_group as dist
from rm.report import training


def main() -> None:
    folders = sys.argv[1:]
    if not folders or folders[0].startswith("-"):
        sys.exit(__doc__)
    with one_line_errors():
        has_evaluation = len(folders) == 2 and not (Path(folders[1]) / "metrics.jsonl").is_file()
        if len(folders) > 1 and not has_evaluation:
            return dist.say(str(training.write_comparison(folders)))
        dist.say(str(training.write_training_report(folders[0])))
        card = training.write_model_card(*folders)
        if card is not None:
            dist.say(str(card))
        elif has_evaluation:
            raise ValueError(f"{folders[0]} holds no reward model yet (model/scoring.json), for whose card this is")


if __name__ == "__main__":
    main()
