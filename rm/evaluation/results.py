"""An evaluation, set by set: what the records say, and the content of report.json.

A set is a named group of files. Its records are read twice: for their tokens (`rm.data.dataset`), and here for what
the tables are cut by: turns, lengths, subset. Only the main process needs the second.

Shapes: N prompts, R replies.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from rm.data.conversation import turns
from rm.data.examples import Examples
from rm.data.formats import Message, preference
from rm.data.records import read_records
from rm.evaluation import benchmarks, metrics, stats
from rm.evaluation.metrics import Scored


@dataclass(frozen=True)
class Fact:
    """What is known of one record beside its tokens."""

    id: str | int  # the record's own `id`, or its number
    subset: str
    turns: int  # the user's messages
    lengths: list[int]  # characters of each answer


@dataclass(frozen=True)
class Mistake:
    """A pair that was ranked wrong, as dialogues."""

    id: str | int
    better: list[Message]
    worse: list[Message]
    rewards: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Result:
    """One model's rewards of one set."""

    paths: Sequence[str]
    examples: Examples
    rewards: np.ndarray  # (R,) fp32, as `examples` stores the replies

    @cached_property
    def facts(self) -> list[Fact]:
        """(N,) of every example's record."""
        return [_fact(number, record) for number, _, record in numbered(self.paths, self.examples.record)]

    @cached_property
    def scored(self) -> Scored:
        """As `rm.evaluation.metrics` takes it. A pair whose label is below a half is graded the other way round; at a
        half it is a tie."""
        sure = np.sign(self.examples.label.astype(np.float64) - 0.5)
        return Scored(
            rewards=self.rewards.astype(np.float64),
            grade=self.examples.grade * np.repeat(sure, np.diff(self.examples.reply_offsets)),
            length=np.array([n for fact in self.facts for n in fact.lengths], np.int64),
            offsets=np.asarray(self.examples.reply_offsets),
            conversation=np.asarray(self.examples.conversation),
            turns=np.array([fact.turns for fact in self.facts], np.int64),
            subset=np.array([fact.subset for fact in self.facts], str),
        )

    def check_finite(self) -> None:
        """Raise ValueError with the file and record of the first reward that is not a number to rank by."""
        bad = np.flatnonzero(~np.isfinite(self.rewards))
        if len(bad):
            number = np.searchsorted(self.examples.reply_offsets, bad[0], side="right") - 1
            ((_, where, _),) = numbered(self.paths, self.examples.record[number : number + 1])
            reply = bad[0] - self.examples.reply_offsets[number] + 1
            raise ValueError(
                f"{where}: the score of reply {reply} is {self.rewards[bad[0]]}, not finite; "
                f"are the weights whole, and does --dtype float32 help?"
            )

    def lines(self) -> Iterator[dict]:
        """What scores.jsonl says of each record, in file order."""
        ends = np.asarray(self.examples.reply_offsets).tolist()
        rewards, tokens = (
            self.rewards.tolist(),
            self.examples.reply_lengths + np.repeat(self.examples.prefix_lengths, np.diff(ends)),
        )
        for i, (record, fact) in enumerate(zip(self.examples.record.tolist(), self.facts, strict=True)):
            replies = slice(ends[i], ends[i + 1])
            line = {"record": record, "id": fact.id, "scores": rewards[replies]}
            yield line | {"characters": fact.lengths, "tokens": tokens[replies].tolist()}

    def best(self) -> Iterator[dict]:
        """Every record's highest scored reply, the first of those tied."""
        records = numbered(self.paths, self.examples.record)
        for line, (_, _, record) in zip(self.lines(), records, strict=True):
            number = int(np.argmax(line["scores"]))
            content = as_dialogues(record)[number][-1]["content"]
            yield {name: line[name] for name in ("record", "id")} | {
                "best": number, "score": line["scores"][number], "response": content,
            }  # fmt: skip

    def mistakes(self, most: int = 10) -> list[Mistake]:
        """The worst wrong pairs, the widest margin first, at most one a prompt."""
        one, (better, worse, prompt) = self.scored, self.scored.pairs
        order = np.argsort(one.margin, kind="stable")
        order = order[one.margin[order] < 0]
        _, first = np.unique(prompt[order], return_index=True)
        chosen = order[np.sort(first)][:most]
        wanted = np.unique(self.examples.record[prompt[chosen]])
        texts = {number: as_dialogues(record) for number, _, record in numbered(self.paths, wanted)}
        found = []
        for pair in chosen:
            dialogues = texts[int(self.examples.record[prompt[pair]])]
            sides = [dialogues[reply - one.offsets[prompt[pair]]] for reply in (better[pair], worse[pair])]
            rewards = float(one.rewards[better[pair]]), float(one.rewards[worse[pair]])
            found.append(Mistake(self.facts[prompt[pair]].id, *sides, rewards))
        return found


def named_sets(paths: Sequence[str]) -> dict[str, list[str]]:
    """{name: files} from "name=file" or "file", which is named after the file where that says enough."""
    stems = [Path(path).name.split(".")[0] for path in paths]
    sets: dict[str, list[str]] = {}
    for path, stem in zip(paths, stems, strict=True):
        name, sign, file = path.partition("=")
        if not sign or Path(path).exists():  # a file may have = in its name
            name, file = stem if stems.count(stem) == 1 else path, path
        sets.setdefault(name, []).append(file)
    return sets


def numbered(paths: Iterable[str], records: Iterable[int]) -> Iterator[tuple[int, str, dict]]:
    """(number, where, record) of the records with these numbers, ascending, counted over all files as rm.data.dataset
    does.
    """
    wanted = iter(np.asarray(records).tolist())
    number = next(wanted, None)
    for n, (where, record) in enumerate(pair for path in paths for pair in read_records(path)):
        if n == number:
            yield n, where, record
            number = next(wanted, None)
        if number is None:
            return


def as_dialogues(record: dict) -> list[list[Message]]:
    """The replies of a record as dialogues; a plain text without turns is one message."""
    return [turns(text) for text in preference(record, as_messages="prompt" in record).texts]


def _fact(number: int, record: dict) -> Fact:
    dialogues = as_dialogues(record)
    return Fact(
        id=record.get("id", number),
        subset=str(record.get("subset") or ""),
        turns=sum(message["role"] == "user" for message in dialogues[0]),
        lengths=[len(dialogue[-1]["content"]) for dialogue in dialogues],
    )


def report(results: dict[str, Result], baseline: dict[str, Result]) -> dict:
    """What report.json says of the rewards: a summary over all pairs, then every set's summary and tables.

    Args:
        baseline: another model's results of the same sets, or {}. The test takes the records that both kept.
    """
    sets = {}
    for name, result in results.items():
        sets[name] = metrics.summary(result.scored) | metrics.details(result.scored)
        if benchmark := benchmarks.scores(result.scored, [str(fact.id) for fact in result.facts]):
            sets[name]["rewardbench"] = benchmark
    whole = metrics.summary(metrics.joined([result.scored for result in results.values()]))
    if baseline:
        both = {name: shared(result, baseline[name]) for name, result in results.items()}
        for name, pair in both.items():
            sets[name]["baseline"] = compared(*pair)
        whole["baseline"] = compared(*map(metrics.joined, zip(*both.values(), strict=True)))
    return whole | {"sets": sets}


def shared(ours: Result, theirs: Result) -> tuple[Scored, Scored]:
    """Both models' scores of the records that neither left out as too long."""
    _, a, b = np.intersect1d(ours.examples.record, theirs.examples.record, return_indices=True)
    return ours.scored.only(a), theirs.scored.only(b)


def compared(ours: Scored, theirs: Scored) -> dict:
    """The paired test of two models' scores of the same prompts."""
    cluster = ours.conversation[ours.pairs[2]]
    return stats.paired(metrics.right(ours.margin), metrics.right(theirs.margin), cluster)
