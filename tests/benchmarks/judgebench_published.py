"""JudgeBench's score from the rewards that its repository publishes, against the decisions that it publishes.

    python -m tests.benchmarks.judgebench_published outputs/*judge_name=reward_model*.jsonl

Prints a row of a Markdown table for each file: the score here with its interval, and the share of right decisions.
"""

import sys
from pathlib import Path

import numpy as np

from rm.data import conversation
from rm.data.records import read_records
from rm.data.schemas import preference
from rm.evaluation.benchmarks import benchmark_of, benchmark_report
from rm.evaluation.metrics import ScoredReplies
from rm.evaluation.records import RecordInfo
from rm.report.html import format_value

KEYS = ("question", "source", "response_A", "response_B", "label")


def row(path: str) -> str:
    rewards, records, conversations, right = [], [], [], []
    for _, published in read_records(path):
        judgment = published["judgments"][0]  # the order A, B; of some models B, A is there too
        scores = judgment["judgment"]["scores"]
        rewards += scores if published["label"] == "A>B" else scores[::-1]
        right.append(judgment["decision"] == published["label"])
        sample = preference({key: published[key] for key in KEYS})
        records.append(RecordInfo(len(records), sample.subset, 1, [], sample.schema))
        conversations.append(conversation.key_of(sample))
    n = len(records)
    scored = ScoredReplies(
        rewards=np.array(rewards, float),
        grade=np.tile([1.0, 0.0], n),
        length=np.zeros(2 * n, int),
        offsets=np.arange(0, 2 * n + 1, 2),
        conversation=np.array(conversations),
        turns=np.ones(n, int),
        subset=np.array([record.subset for record in records]),
    )
    report = benchmark_report(benchmark_of(scored, records))
    model = Path(path).stem.split("judge_model=")[-1].replace("_", "/", 1)
    cells = [model, n, report["score"], report["ci95_clustered"], float(np.mean(right))]
    return "| " + " | ".join(map(format_value, cells)) + " |"


if __name__ == "__main__":
    print("| model | pairs | score | clustered 95% CI | published decisions |\n| --- | ---: | ---: | ---: | ---: |")
    for path in sys.argv[1:]:
        print(row(path))
