"""The page and the terminal table of an evaluation, from the content of report.json and the scored sets."""

import itertools
from functools import partial

from rm.evaluation.metrics import Scored
from rm.evaluation.results import Mistake, Result
from rm.report import figures, html

CUTS = {
    "subset": "Accuracy by subset",
    "turns": "Accuracy by the user's turns",
    "margin": "Accuracy by |margin|",
    "length_difference": "Accuracy by characters the better answer is longer",
}
OVERVIEW = {  # column -> where in a set's report
    "pairs": ("n",),
    "accuracy": ("accuracy",),
    "95 % interval": ("accuracy_ci95",),
    "clustered": ("accuracy_ci95_clustered",),
    "loss": ("loss",),
    "ECE": ("calibration", "ece"),
    "temperature": ("calibration", "temperature"),
    "longest": ("length", "longest_accuracy"),
    "controlled": ("length", "controlled_accuracy"),
}
NOTE = (
    "A tie counts half. 95 % interval: Wilson's; clustered: bootstrap over conversations. Temperature: what to divide "
    "rewards by to calibrate them. Longest: the accuracy of preferring the longer answer; controlled: the model's, "
    "where pairs whose better answer is the longer and those where it is the shorter weigh the same."
)


def overview(report: dict) -> tuple[list[str], list[list]]:
    """(headers, rows): a row for every set, and one for all pairs where there are several."""
    rows = [[name, *(_at(one, path) for path in OVERVIEW.values())] for name, one in report["sets"].items()]
    if len(rows) > 1:
        rows.append(["all", *(_at(report, path) for path in OVERVIEW.values())])
    return ["set", *OVERVIEW], rows


def _at(report: dict, path: tuple[str, ...]):
    for key in path:
        report = report.get(key) if isinstance(report, dict) else None
    return report


def terminal(report: dict) -> str:
    """What eval_rm.py prints at its end."""
    lines = [html.text_table(*overview(report))]
    for name, one in report["sets"].items():
        if benchmark := one.get("rewardbench"):
            sections = "  ".join(f"{section} {html.shown(value)}" for section, value in benchmark["sections"].items())
            lines.append(f"{name}: RewardBench {benchmark['version']} {html.shown(benchmark['score'])}  ({sections})")
        if test := one.get("baseline"):
            lines.append(f"{name}: {_verdict(test)}")
    return "\n".join(lines)


def _verdict(test: dict) -> str:
    return (
        f"accuracy less the baseline's {html.shown(test['difference'])} (95 % interval "
        f"{html.shown(test['difference_ci95_clustered'])}); better on {test['better']:,} pairs, worse on "
        f"{test['worse']:,} of {test['n']:,}, McNemar's p {html.shown(test['mcnemar_p'])}"
    )


def evaluation_page(report: dict, results: dict[str, Result]) -> str:
    """The whole page."""
    settings = report.get("settings", {})
    about = [settings.get("model_name_or_path"), report.get("started"), report.get("device")]
    parts = [html.note(" · ".join(str(fact) for fact in about if fact)), html.table(*overview(report)), html.note(NOTE)]
    for name, one in report["sets"].items():
        parts += [html.heading(name), *_set(one, results[name].scored), *_mistakes(results[name].mistakes())]
    facts = [[key, str(value)] for key, value in settings.items()]
    return html.page("Evaluation of a reward model", [*parts, html.heading("Settings"), html.table(["", ""], facts)])


def _set(one: dict, scored: Scored) -> list[str]:
    parts = []
    if one["n"]:
        lengths = one["accuracy_by"]["length_difference"]
        by_length = partial(figures.accuracies, "Accuracy by length difference", "characters longer (pairs)", lengths)
        parts.append(
            html.figures(
                partial(figures.margins, scored.margin),
                partial(figures.reliability, one["calibration"]["reliability"]),
                by_length,
                partial(figures.length, scored.length, scored.rewards),
            )
        )
    if test := one.get("baseline"):
        parts += [html.heading("Against the baseline", 3), f"<p>{_verdict(test)}</p>"]
    if benchmark := one.get("rewardbench"):
        rows = [*benchmark["sections"].items(), ("score", benchmark["score"])]
        parts += [html.heading(f"RewardBench {benchmark['version']}", 3), html.table(["section", "score"], rows)]
        if benchmark["absent"]:
            parts.append(html.note(f"Not in this file, and left out of the score: {', '.join(benchmark['absent'])}."))
    tables = [_cut(title, one["accuracy_by"][cut]) for cut, title in CUTS.items() if cut in one["accuracy_by"]]
    parts.append('<div class="grid">' + "".join(f"<div>{table}</div>" for table in tables) + "</div>")
    numbers = {name: one[name] for name in ("top1", "ties", "margin_mean", "margin_std", "reward_mean", "reward_std")}
    numbers |= {f"margin {at}": value for at, value in (one["margin_quantiles"] or {}).items()}
    numbers |= {f"reward {at}": value for at, value in (one["reward_quantiles"] or {}).items()}
    numbers |= {f"length: {name}": value for name, value in one["length"].items()}
    more = html.table(["number", "value"], [*numbers.items()])
    return [*parts, html.details("More numbers", more)]


def _cut(title: str, rows: dict[str, dict]) -> str:
    filled = [[name, row["n"], row["accuracy"], row["ci95"]] for name, row in rows.items() if row["n"]]
    return html.heading(title, 3) + html.table(["", "pairs", "accuracy", "95 % interval"], filled)


def _mistakes(found: list[Mistake]) -> list[str]:
    if not found:
        return []
    intro = html.note("The pairs with the widest wrong margin, one of a prompt.")
    return [html.heading("Worst mistakes", 3), intro, *map(_mistake, found)]


def _mistake(mistake: Mistake) -> str:
    """The dialogue that both sides share, and below it the sides beside each other."""
    both = itertools.takewhile(
        lambda pair: pair[0] == pair[1], zip(mistake.better[:-1], mistake.worse[:-1], strict=False)
    )
    shared = len(list(both))
    prompt = "".join(html.turn(message["role"], message["content"]) for message in mistake.better[:shared])
    sides = ""
    for kind, side, reward in zip(("better", "worse"), (mistake.better, mistake.worse), mistake.rewards, strict=True):
        who = f"graded {kind}, reward {reward:.3f}"
        turns = (html.turn(f"{message['role']} ({who})", message["content"], kind) for message in side[shared:])
        sides += f"<div>{''.join(turns)}</div>"
    good, bad = mistake.rewards
    return html.details(f"Record {mistake.id}: margin {good - bad:.3f}", f'{prompt}<div class="pair">{sides}</div>')
