"""Results of an evaluation, set by set: rewards combined with what the records say, and the content of report.json.

A set is a named group of files. Every rank reads the records for their tokens (`rm.data.dataset`). The main process
also reads them here, for what metrics are broken down by: number of turns, reply lengths, subset.

Shapes: N prompts, R replies, M models of an ensemble.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from rm.data.examples import Examples
from rm.data.messages import Message
from rm.data.reader import KeySettings, Located, SampleReader
from rm.data.schemas import PREFERENCE
from rm.evaluation import benchmarks, metrics, stats
from rm.evaluation.benchmarks import Benchmark
from rm.evaluation.length import length_report
from rm.evaluation.lists import list_report
from rm.evaluation.metrics import ScoredReplies
from rm.evaluation.records import RecordInfo, record_info


@dataclass(frozen=True)
class Mistake:
    """A misranked pair: the worse reply has the higher reward."""

    id: str | int  # as RecordInfo.id
    better: list[Message]  # the dialogue of the reply that is graded better
    worse: list[Message]
    rewards: tuple[float, float]  # (better, worse)


@dataclass(frozen=True, eq=False)
class Result:
    """The rewards that one model, or the mean of several, gives to one set.

    The input files are read several times in the main process: once by `rm.data.dataset` for the tokens, then by
    `record_info` and `lines`, and by `best` and `mistakes` (or `check_finite`) where they are called. Holding all texts
    in memory instead would not scale to large files.
    """

    paths: Sequence[str]
    examples: Examples
    rewards: np.ndarray  # (R,) fp32, in the order of the replies in `examples`
    keys: KeySettings | None = None
    dropped: Mapping[int, str] = field(default_factory=dict)  # number of a record that was left out -> why
    members: np.ndarray | None = None  # (M, R) of an ensemble: the rewards of each model, whose mean `rewards` is

    @cached_property
    def record_info(self) -> list[RecordInfo]:
        """(N,) the information of every example's record."""
        return [record_info(located, str(self.paths[located.file])) for located in self._samples(self.examples.record)]

    @cached_property
    def scored(self) -> ScoredReplies:
        """The rewards, grades and attributes as `rm.evaluation.metrics` takes them.

        A pair's `label` is the probability that its grades are right: below 0.5 the pair counts with its sides
        exchanged, at 0.5 it is a tie.
        """
        direction = np.sign(self.examples.label.astype(np.float64) - 0.5)  # (N,) 1, -1, or 0 for a tie
        return ScoredReplies(
            rewards=self.rewards.astype(np.float64),
            grade=self.examples.grade * np.repeat(direction, np.diff(self.examples.reply_offsets)),
            length=np.array([n for info in self.record_info for n in info.lengths], np.int64),
            offsets=np.asarray(self.examples.reply_offsets),
            conversation=np.asarray(self.examples.conversation),
            turns=np.array([info.turns for info in self.record_info], np.int64),
            subset=np.array([info.subset for info in self.record_info], str),
        )

    def check_finite(self) -> None:
        """Check that all rewards are finite.

        Raises:
            ValueError: with the file, the record and the reply of the first reward that is nan or infinite.
        """
        bad = np.flatnonzero(~np.isfinite(self.rewards))
        if not len(bad):
            return
        offsets = self.examples.reply_offsets
        example = np.searchsorted(offsets, bad[0], side="right") - 1
        reply = bad[0] - offsets[example] + 1
        [located] = self._samples(self.examples.record[example : example + 1])
        raise ValueError(
            f"{located.where}: the reward of reply {reply} is {self.rewards[bad[0]]}, not a finite number; "
            f"check that the checkpoint is complete and undamaged, or try --dtype float32"
        )

    def lines(self) -> Iterator[dict]:
        """The lines of scores.jsonl: one for each record of the files, in order, counted from 1.

        A record that was left out has no scores, and the reason. Of records that were joined, since each has one reply
        to the same prompt, each has the score of its own.
        """
        offsets = np.asarray(self.examples.reply_offsets).tolist()
        example_of = {number: i for i, number in enumerate(self.examples.record.tolist())}
        for number, _, _, sample in SampleReader(PREFERENCE, self.keys).read(self.paths):
            is_joined = sample.joined_by is not None
            for n in range(len(sample.texts) if is_joined else 1):
                line = {"record": number + n + 1, "id": number + n + 1 if sample.id is None else sample.id}
                if number not in example_of:
                    yield line | {"scores": None, "dropped": self.dropped[number]}
                    continue
                i = example_of[number]
                first = offsets[i]
                replies = slice(first + n, first + n + 1) if is_joined else slice(first, offsets[i + 1])
                characters = self.record_info[i].lengths[replies.start - first : replies.stop - first]
                yield line | self._scores(replies) | {"characters": characters, "tokens": self._tokens[replies]}

    def _scores(self, replies: slice) -> dict:
        scores = {"scores": self.rewards[replies].tolist()}
        if self.members is not None:
            scores["spread"] = self.members[:, replies].std(0).tolist()
            scores["scores_by_model"] = self.members[:, replies].tolist()
        return scores

    @cached_property
    def _tokens(self) -> list[int]:
        """(R,) tokens of each reply's text."""
        replies = np.diff(self.examples.reply_offsets)
        return (self.examples.reply_lengths + np.repeat(self.examples.prefix_lengths, replies)).tolist()

    def best(self) -> Iterator[dict]:
        """The lines of best.jsonl: every scored record's highest-scoring reply, the first one of a tie."""
        offsets = self.examples.reply_offsets
        for i, located in enumerate(self._samples(self.examples.record)):
            rewards = self.rewards[offsets[i] : offsets[i + 1]]
            best = int(np.argmax(rewards))
            yield {
                "record": located.number + 1,
                "id": self.record_info[i].id,
                "best": best,
                "score": float(rewards[best]),
                "response": located.sample.dialogues()[best][-1]["content"],
            }

    def _samples(self, numbers: Iterable[int]) -> Iterator[Located]:
        """The samples with these numbers, which ascend and count from 0 over all files as in `rm.data.dataset`."""
        return SampleReader(PREFERENCE, self.keys).read(self.paths, set(np.asarray(numbers).tolist()))

    def mistakes(self, limit: int = 10) -> list[Mistake]:
        """The misranked pairs with the largest |margin|, largest first, at most one per prompt."""
        scored = self.scored
        better, worse, prompt = scored.pairs
        order = np.argsort(scored.margin, kind="stable")
        order = order[scored.margin[order] < 0]
        # np.unique gives the first, and thus the worst, pair of each prompt; sorting restores the order by margin.
        _, first_of_prompt = np.unique(prompt[order], return_index=True)
        pairs = order[np.sort(first_of_prompt)][:limit]
        numbers = np.unique(self.examples.record[prompt[pairs]])
        dialogues_of = {located.number: located.sample.dialogues() for located in self._samples(numbers)}
        mistakes = []
        for pair in pairs:
            example = prompt[pair]
            dialogues, start = dialogues_of[int(self.examples.record[example])], scored.offsets[example]
            mistake = Mistake(
                id=self.record_info[example].id,
                better=dialogues[better[pair] - start],
                worse=dialogues[worse[pair] - start],
                rewards=(float(scored.rewards[better[pair]]), float(scored.rewards[worse[pair]])),
            )
            mistakes.append(mistake)
        return mistakes


def ensemble(results: Sequence[Result], scales: Sequence[tuple[float, float] | None]) -> Result:
    """The mean of M models' rewards, over the records that all of them have scored.

    Args:
        results: of one set, one for each model.
        scales: (mean, standard deviation) of each model's rewards. Where all are known, rewards are brought to one
            scale by them: a model whose rewards are spread wider would otherwise have more of a say.
    """
    records = results[0].examples.record
    for result in results[1:]:
        records = np.intersect1d(records, result.examples.record)
    members, examples = [], None
    for result, scale in zip(results, scales, strict=True):
        kept = np.flatnonzero(np.isin(result.examples.record, records))
        counts = np.diff(result.examples.reply_offsets)
        rewards = result.rewards[np.isin(np.repeat(np.arange(len(counts)), counts), kept)]
        if None not in scales:
            rewards = (rewards - scale[0]) / scale[1]
        members.append(rewards)
        examples = result.examples.select(kept) if examples is None else examples
    members = np.stack(members)
    dropped = {number: reason for result in reversed(results) for number, reason in result.dropped.items()}
    return replace(results[0], examples=examples, rewards=members.mean(0), members=members, dropped=dropped)


def evaluation_report(results: dict[str, Result], baseline: dict[str, Result]) -> dict:
    """The metrics of report.json: a summary over all pairs, and the summary and tables of every set.

    Args:
        results: {set name: rewards of the evaluated model}.
        baseline: another model's results for the same sets, or {}. The models are compared on the records that both
            have scored.
    """
    sets, of_benchmarks = {}, []
    for name, result in results.items():
        sets[name] = set_report(result.scored)
        if result.members is not None:
            sets[name]["ensemble"] = ensemble_report(result)
        benchmark = benchmarks.benchmark_of(result.scored, result.record_info)
        if benchmark:
            common = common_benchmark(result, baseline[name]) if baseline else None
            sets[name]["benchmark"] = benchmarks.benchmark_report(benchmark, common)
            of_benchmarks.append((benchmark, common))
    report = metrics.summary(metrics.concatenate([result.scored for result in results.values()]))
    if baseline:
        model_sets, baseline_sets = [], []
        for name, result in results.items():
            model_scored, baseline_scored = common_records(result, baseline[name])
            sets[name]["baseline"] = compare(model_scored, baseline_scored)
            model_sets.append(model_scored)
            baseline_sets.append(baseline_scored)
        report["baseline"] = compare(metrics.concatenate(model_sets), metrics.concatenate(baseline_sets))
    if len(of_benchmarks) > 1:
        report["benchmarks"] = benchmarks.mean_report(*zip(*of_benchmarks, strict=True))
    return report | {"sets": sets}


def set_report(scored: ScoredReplies) -> dict:
    """All numbers of one set."""
    tables = {"length": length_report(scored), "lists": list_report(scored)}
    return metrics.summary(scored) | metrics.details(scored) | tables


def ensemble_report(result: Result) -> dict:
    """How far the models of an ensemble agree on a set: each one's accuracy, and how its rewards are spread."""
    scored = result.scored
    of_models = [replace(scored, rewards=rewards.astype(np.float64)) for rewards in result.members]
    margins = np.stack([one.margin for one in of_models])  # (M, P)
    agree = (np.sign(margins) == np.sign(margins[0])).all(0)  # (P,)
    names = ("accuracy", "accuracy_ci95", "accuracy_ci95_clustered")
    summaries = [metrics.summary(one) for one in of_models]
    return {
        "models": [{name: summary[name] for name in names} for summary in summaries],
        "spread_mean": stats.mean(result.members.std(0)),
        "margin_spread_mean": stats.mean(margins.std(0)),
        "agreement": stats.mean(agree),
        "where_all_agree": metrics.accuracy_row(metrics.correctness(scored.margin[agree])),
        "where_they_differ": metrics.accuracy_row(metrics.correctness(scored.margin[~agree])),
    }


def common_records(result: Result, baseline: Result) -> tuple[ScoredReplies, ScoredReplies]:
    """Both models' scores of the records that both have scored; each may have left out others as too long."""
    i, j = _common(result, baseline)
    return result.scored.select(i), baseline.scored.select(j)


def common_benchmark(result: Result, baseline: Result) -> tuple[Benchmark, Benchmark] | None:
    """Both models' results on the records of a benchmark that both have scored."""
    records = [result.record_info[i] for i in _common(result, baseline)[0]]
    ours, theirs = (benchmarks.benchmark_of(one, records) for one in common_records(result, baseline))
    return (ours, theirs) if ours and theirs else None


def _common(result: Result, baseline: Result) -> tuple[np.ndarray, np.ndarray]:
    """The indices, in each, of the records that both have scored."""
    return np.intersect1d(result.examples.record, baseline.examples.record, return_indices=True)[1:]


def compare(ours: ScoredReplies, baseline: ScoredReplies) -> dict:
    """The paired test of two models' scores of the same prompts."""
    cluster = ours.conversation[ours.pairs[2]]
    return stats.paired_test(metrics.correctness(ours.margin), metrics.correctness(baseline.margin), cluster)
