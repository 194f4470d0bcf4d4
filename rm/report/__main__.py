"""Write the HTML report of a training run, its curves, drawn from metrics.jsonl; and the model card of a reward model.

python -m rm.report runs/rm              writes runs/rm/report.html; also works while the run is still in progress
python -m rm.report runs/rm runs/eval    and into runs/rm/model/README.md the numbers of an evaluation with eval_rm.py
"""

import sys

from rm.cli import one_line_errors
from rm.distributed import process_group as dist
from rm.report import training


def main() -> None:
    if len(sys.argv) not in (2, 3) or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    with one_line_errors():
        dist.say(str(training.write_training_report(sys.argv[1])))
        card = training.write_model_card(*sys.argv[1:])
        if card is not None:
            dist.say(str(card))
        elif len(sys.argv) == 3:
            raise ValueError(f"{sys.argv[1]} holds no reward model yet (model/scoring.json), for whose card this is")


if __name__ == "__main__":
    main()
