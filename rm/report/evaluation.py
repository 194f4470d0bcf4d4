"""The HTML page and the terminal table of an evaluation, from the content of report.json and the scored sets."""

from functools import partial

from rm.evaluation.metrics import ScoredReplies
from rm.evaluation.results import Mistake, Result
from rm.report import figures, html

BREAKDOWNS = {  # key in a set's "accuracy_by" -> title
    "subset": "Accuracy by subset",
    "turns": "Accuracy by number of user turns",
    "margin": "Accuracy by |margin|",
    "length_difference": "Accuracy by length difference (better minus worse reply, in characters)",
}
OVERVIEW = {  # column -> path of the value in a set's report
    "pairs": ("n",),
    "accuracy": ("accuracy",),
    "95% CI": ("accuracy_ci95",),
    "clustered 95% CI": ("accuracy_ci95_clustered",),
    "loss": ("loss",),
    "ECE": ("calibration", "ece"),
    "temperature": ("calibration", "temperature"),
    "longest reply": ("length", "longest_accuracy"),
    "length-controlled": ("length", "controlled_accuracy"),
}
NOTE = (
    "Ties count half. 95% CI: Wilson score interval. Clustered 95% CI: bootstrap over conversations. ECE: expected "
    "calibration error. Temperature: the value by which rewards are to be divided to calibrate them; above 1 means "
    "overconfident. Longest reply: the accuracy of always preferring the longer reply. Length-controlled: the mean of "
    "the model's accuracies on pairs whose better reply is the longer and on pairs whose better reply is the shorter, "
    "which is 0.5 for a model to which longer, or shorter, is always better. Reward margins: the outermost bars also "
    "hold the few margins beyond them."
)
BENCHMARK_NOTE = (
    "Scores by each benchmark's published rules, which count ties as wrong (RewardBench 2 shares them). Clustered 95% "
    "CI: bootstrap over conversations. Baseline and difference: on the records that both models have scored. Sign "
    "test: two-sided, over conversations, for scores that are one mean."
)


def overview(report: dict) -> tuple[list[str], list[list]]:
    """(headers, rows) of the overview table: a row per set, and a row for all pairs if there are several sets."""
    rows = [[name, *(_value_at(one, path) for path in OVERVIEW.values())] for name, one in report["sets"].items()]
    if len(rows) > 1:
        rows.append(["all", *(_value_at(report, path) for path in OVERVIEW.values())])
    return ["set", *OVERVIEW], rows


def benchmark_table(report: dict) -> tuple[list[str], list[list]]:
    """(headers, rows) of the scores of benchmarks: a row for each, with its sections below it, and for their mean.

    There are no rows where no set is a benchmark's, and more columns where there is a baseline.
    """
    rows = []
    for name, one in report["sets"].items():
        if benchmark := one.get("benchmark"):
            title = benchmark["name"] if name == benchmark["name"] else f"{name} ({benchmark['name']})"
            length = [_value_at(one, ("length", key)) for key in ("longest_accuracy", "controlled_accuracy")]
            rows.append([title, *_score_cells(benchmark), *length])
            rows += [[f"· {part}", *_score_cells(row), None, None] for part, row in benchmark["sections"].items()]
    if mean := report.get("benchmarks"):
        rows.append([f"mean of {mean['sets']}", *_score_cells(mean), None, None])
    headers = ["benchmark", "prompts", "score", "clustered 95% CI", "baseline", "difference", "its clustered 95% CI",
               "sign test p", "longest reply", "length-controlled"]  # fmt: skip
    if "baseline" not in report:
        headers, rows = headers[:4] + headers[8:], [row[:4] + row[8:] for row in rows]
    return headers, rows


def _score_cells(row: dict) -> list:
    test = row.get("baseline") or {}
    of_test = [test.get(key) for key in ("score", "difference", "difference_ci95_clustered", "sign_test_p")]
    return [row.get("prompts"), row["score"], row["ci95_clustered"], *of_test]


def accuracy_interval(report: dict) -> list[float] | None:
    """The 95 % interval to show of a set's accuracy: over conversations, if it has several."""
    return report.get("accuracy_ci95_clustered") or report.get("accuracy_ci95")


def _value_at(report: dict, path: tuple[str, ...]):
    """The value under nested keys, None if there is none: the row for all pairs has no calibration and no length."""
    for key in path:
        report = report.get(key) if isinstance(report, dict) else None
    return report


def terminal_table(report: dict) -> list[str]:
    """The lines that eval_rm.py prints when it ends: the overview, benchmarks, and the test of the baseline."""
    lines = html.text_table(*overview(report))
    headers, rows = benchmark_table(report)
    if rows:
        lines += ["", *html.text_table(headers, rows), ""]
    for name, one in report["sets"].items():
        if absent := one.get("benchmark", {}).get("absent"):
            lines.append(f"{name}: lacks, of {one['benchmark']['name']}, {', '.join(absent)}")
        if one.get("lists"):
            lines.append(f"{name}: {_describe_lists(one['lists'])}")
        if "ensemble" in one:
            lines.append(f"{name}: {_describe_ensemble(one['ensemble'])}")
        test = one.get("baseline")
        if test:
            lines.append(f"{name}: {_describe_test(test)}")
    return lines


def attribute_table(report: dict) -> tuple[list[str], list[list]]:
    """(headers, rows) of an evaluation of attributes (eval_rm.py --attributes)."""
    columns = ("n", "mse", "variance", "pearson", "spearman")
    rows = [
        [name, attribute, *(values[key] for key in columns)]
        for name, one in report["sets"].items()
        for attribute, values in one["attributes"].items()
    ]
    return ["set", "attribute", "known", *columns[1:]], rows


def _describe_lists(lists: dict) -> str:
    tau, gain = (
        f"{html.format_value(lists[key])} ({html.format_value(lists[f'{key}_ci95_clustered'])})"
        for key in ("kendall_tau_b", "ndcg")
    )
    last = lists["best_of_n"][-1]
    regret = f"{html.format_value(last['regret'])} ({html.format_value(last['regret_ci95_clustered'])})"
    return f"{lists['prompts']:,} rankings: Kendall's tau-b {tau}, NDCG {gain}; regret of best of {last['n']} {regret}"


def _describe_ensemble(ensemble: dict) -> str:
    each = ", ".join(html.format_value(model["accuracy"]) for model in ensemble["models"])
    agree, differ = (
        f"{row['n']:,} pairs (accuracy {html.format_value(row['accuracy'])})"
        for row in (ensemble["where_all_agree"], ensemble["where_they_differ"])
    )
    return f"accuracy of each model {each}; all rank alike {agree}, and not {differ}"


def _describe_test(test: dict) -> str:
    return (
        f"accuracy minus the baseline's accuracy: {html.format_value(test['difference'])} (clustered 95% CI "
        f"{html.format_value(test['difference_ci95_clustered'])}); better on {test['better']:,} and worse on "
        f"{test['worse']:,} of {test['n']:,} pairs; McNemar's exact test p = {html.format_value(test['mcnemar_p'])}"
    )


def evaluation_page(report: dict, results: dict[str, Result]) -> str:
    """The HTML page.

    Args:
        report: the content of report.json.
        results: {set name: rewards of the evaluated model}.
    """
    settings = report.get("settings", {})
    models = ", ".join(settings.get("model_name_or_path") or [])
    subtitle = [models, report.get("started"), report.get("device")]
    parts = [
        html.note(" · ".join(str(item) for item in subtitle if item)),
        html.table(*overview(report)),
        html.note(NOTE),
    ]
    headers, rows = benchmark_table(report)
    if rows:
        parts += [html.heading("Benchmarks"), html.table(headers, rows), html.note(BENCHMARK_NOTE)]
    for name, one in report["sets"].items():
        parts += [html.heading(name), *_set_parts(one, results[name].scored), *_mistake_parts(results[name].mistakes())]
    parts += [
        html.heading("Settings"),
        html.table(["setting", "value"], [[key, str(value)] for key, value in settings.items()]),
    ]
    return html.page("Reward model evaluation", parts)


def _set_parts(one: dict, scored: ScoredReplies) -> list[str]:
    """The figures and tables of one set, from its entry in report.json."""
    parts = []
    # Without pairs there is nothing to draw.
    if one["n"]:
        by_length = partial(
            figures.accuracies,
            "Accuracy by length difference",
            "better minus worse reply, in characters (number of pairs)",
            one["accuracy_by"]["length_difference"],
        )
        parts.append(
            html.figures(
                partial(figures.margins, scored.margin),
                partial(figures.reliability, one["calibration"]["reliability"]),
                by_length,
                partial(figures.length, scored.length, scored.rewards),
            )
        )
    if lists := one.get("lists"):
        rows = [list(row.values()) for row in lists["best_of_n"]]
        head = ["best of", "prompts", "grade of the chosen reply", "best grade", "regret", "clustered 95% CI"]
        parts += [html.heading("Rankings", 3), html.note(_describe_lists(lists)), html.table(head, rows)]
    if "ensemble" in one:
        rows = [[i, *model.values()] for i, model in enumerate(one["ensemble"]["models"], start=1)]
        table = html.table(["model", "accuracy", "95% CI", "clustered 95% CI"], rows)
        parts += [html.heading("Each model", 3), table, html.note(_describe_ensemble(one["ensemble"]))]
    test = one.get("baseline")
    if test:
        parts += [html.heading("Comparison with the baseline", 3), f"<p>{_describe_test(test)}</p>"]
    if absent := one.get("benchmark", {}).get("absent"):
        lacks = f"Parts of {one['benchmark']['name']} that this set lacks, not included in its scores"
        parts.append(html.note(f"{lacks}: {', '.join(absent)}."))
    tables = ""
    for key, title in BREAKDOWNS.items():
        if key in one["accuracy_by"]:
            tables += f"<div>{_breakdown_table(title, one['accuracy_by'][key])}</div>"
    parts.append(f'<div class="grid">{tables}</div>')
    return [*parts, html.details("Further statistics", html.table(["statistic", "value"], _further_statistics(one)))]


def _further_statistics(one: dict) -> list[tuple]:
    """(name, value) rows of what one set's other tables do not show."""
    keys = ("top1", "ties", "margin_mean", "margin_std", "reward_mean", "reward_std")
    rows = [(key, one[key]) for key in keys]
    # The quantiles of nothing are None.
    rows += [(f"margin {level}", value) for level, value in (one["margin_quantiles"] or {}).items()]
    rows += [(f"reward {level}", value) for level, value in (one["reward_quantiles"] or {}).items()]
    rows += [(f"length: {name}", value) for name, value in one["length"].items()]
    return rows


def _breakdown_table(title: str, rows: dict[str, dict]) -> str:
    cells = [[name, row["n"], row["accuracy"], row["ci95"]] for name, row in rows.items() if row["n"]]
    return html.heading(title, 3) + html.table(["", "pairs", "accuracy", "95% CI"], cells)


def _mistake_parts(mistakes: list[Mistake]) -> list[str]:
    if not mistakes:
        return []
    intro = html.note("The misranked pairs with the largest |margin|, at most one per prompt.")
    return [html.heading("Worst mistakes", 3), intro, *map(_mistake, mistakes)]


def _mistake(mistake: Mistake) -> str:
    """The messages that both dialogues share, and below them the two remainders side by side."""
    shared = 0
    # The last message of each dialogue is its reply, which is not shared.
    for better, worse in zip(mistake.better[:-1], mistake.worse[:-1], strict=False):
        if better != worse:
            break
        shared += 1
    prompt = "".join(html.turn(message["role"], message["content"]) for message in mistake.better[:shared])
    better_reward, worse_reward = mistake.rewards
    better = _side("better", mistake.better[shared:], better_reward)
    worse = _side("worse", mistake.worse[shared:], worse_reward)
    title = f"Record {mistake.id}: margin {better_reward - worse_reward:.3f}"
    return html.details(title, f'{prompt}<div class="pair">{better}{worse}</div>')


def _side(kind: str, messages: list[dict[str, str]], reward: float) -> str:
    """One side of a pair; `kind` is "better" or "worse"."""
    turns = ""
    for message in messages:
        turns += html.turn(f"{message['role']} ({kind} reply, reward {reward:.3f})", message["content"], kind)
    return f"<div>{turns}</div>"
