"""eval_rm.py with several models: the mean of their rewards, and how far they agree."""

import json

import numpy as np
import pytest

import eval_rm
from rm.config import compose
from rm.distributed import process_group as dist
from rm.report import html
from rm.scoring import Scorer
from tests import similar_models

pytest.importorskip("transformers")
RECORDS = [
    {"prompt": f"{i}?", "responses": [f" {j} is a reply" for j in range(3)], "ranks": [1, 2, 3]} for i in range(7)
]


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(html, "figures", lambda *_: "")  # to draw them takes longer than all the rest


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models whose rewards are of different scales, by what their contracts say, and one that says nothing."""
    folder = tmp_path_factory.mktemp("models")
    scales = [{"reward_mean": 1.0, "reward_std": 2.0}, {"reward_mean": -3.0, "reward_std": 0.5}, {}]
    return [similar_models.write(folder / str(seed), seed, **scale) for seed, scale in enumerate(scales)]


def evaluate(models, tmp_path, name: str, **settings) -> tuple[list[dict], dict]:
    """(lines of scores.jsonl, report.json)"""
    data, out = tmp_path / "data.jsonl", tmp_path / name
    data.write_text("\n".join(map(json.dumps, RECORDS)))
    flat = dict(model_name_or_path=tuple(map(str, models)), dataset_path=(str(data),), output_dir=str(out))
    flat |= settings
    with dist.session(0):
        eval_rm.main(compose(eval_rm.Settings, **flat, cache_dir=str(tmp_path / "cache")))
    lines = [json.loads(line) for line in open(out / "scores.jsonl")]
    return lines, json.loads((out / "report.json").read_text())


def rewards_of(models, normalized: bool) -> np.ndarray:
    """(M, N, K)"""
    asked = [record["prompt"] for record in RECORDS], [record["responses"] for record in RECORDS]
    return np.array([Scorer(model).score_responses(*asked, normalized=normalized) for model in models])


def test_an_ensembles_score_is_the_mean_over_models_on_one_scale(models, tmp_path):
    lines, report = evaluate(models[:2], tmp_path, "out")
    assert "Each model" in (tmp_path / "out" / "report.html").read_text()
    rewards = rewards_of(models[:2], normalized=True)
    for i, line in enumerate(lines):
        assert line["scores"] == pytest.approx(rewards[:, i].mean(0), abs=1e-4)
        assert line["spread"] == pytest.approx(rewards[:, i].std(0), abs=1e-4)
        assert np.array(line["scores_by_model"]) == pytest.approx(rewards[:, i], abs=1e-4)
    ensemble = report["sets"]["data"]["ensemble"]
    assert ensemble["spread_mean"] == pytest.approx(rewards.std(0).mean(), abs=1e-4)
    margins = np.stack([rewards[..., a] - rewards[..., b] for a, b in ((0, 1), (0, 2), (1, 2))], -1)  # (M, N, 3)
    for model, of_model in zip(ensemble["models"], margins, strict=True):
        assert model["accuracy"] == pytest.approx((of_model > 0).mean())
    agree = (np.sign(margins) == np.sign(margins[0])).all(0)
    assert 0 < agree.mean() < 1 and ensemble["agreement"] == pytest.approx(agree.mean())
    mean_is_right = margins.mean(0) > 0
    assert report["accuracy"] == pytest.approx(mean_is_right.mean())
    assert ensemble["where_all_agree"]["n"] == agree.sum()
    assert ensemble["where_all_agree"]["accuracy"] == pytest.approx(mean_is_right[agree].mean())
    assert ensemble["where_they_differ"]["accuracy"] == pytest.approx(mean_is_right[~agree].mean())
    assert ensemble["margin_spread_mean"] == pytest.approx(margins.std(0).mean(), abs=1e-4)


def test_where_a_model_states_no_scale_rewards_are_averaged_as_they_are(models, tmp_path, capfd):
    lines, _ = evaluate(models, tmp_path, "out")
    assert "a model states no mean and deviation of its rewards" in capfd.readouterr().out
    means = rewards_of(models, normalized=False).mean(0)
    assert np.array([line["scores"] for line in lines]) == pytest.approx(means, abs=1e-4)


def test_centred_rewards_are_those_minus_the_stated_mean(models, tmp_path):
    data, plain = tmp_path / "data.jsonl", rewards_of(models[:2], normalized=False)
    data.write_text("\n".join(map(json.dumps, RECORDS)))
    flat = dict(dataset_path=(str(data),), cache_dir=str(tmp_path / "cache"), score_only=True, center_rewards=True)
    for model, rewards, mean in zip(models[:2], plain, (1.0, -3.0), strict=True):
        paths = dict(model_name_or_path=(str(model),), output_dir=str(tmp_path / model.name))
        with dist.session(0):
            eval_rm.main(compose(eval_rm.Settings, **flat, **paths))
        lines = [json.loads(line) for line in open(tmp_path / model.name / "scores.jsonl")]
        assert np.array([line["scores"] for line in lines]) == pytest.approx(rewards - mean, abs=1e-4)
    with dist.session(0), pytest.raises(ValueError, match="2 has no scoring.json that states the mean"):
        paths = dict(model_name_or_path=(str(models[2]),), output_dir=str(tmp_path / "out"))
        eval_rm.main(compose(eval_rm.Settings, **flat, **paths))


def test_an_ensemble_on_one_scale_is_centred_already(models, tmp_path):
    lines = [evaluate(models[:2], tmp_path, str(flag), center_rewards=flag)[0] for flag in (False, True)]
    plain, centred = (np.array([line["scores"] for line in of]) for of in lines)
    assert centred == pytest.approx(plain, abs=1e-4)


def test_one_command_scores_the_files_of_several_benchmarks(models, tmp_path, capfd):
    judged, styled = [], []
    for i in range(6):
        label, domain, worse = ("A>B", "B>A")[i % 2], ("chat", "math")[i % 2], [f"{j}, {i}" * 9 for j in "abc"]
        pair = {"question": f"{i}?", "response_A": "yes", "response_B": f"no {i}", "label": label}
        judged.append(pair | {"pair_id": str(i), "source": "livecodebench"})
        replies = {"chosen": [f"{i} {j}" for j in range(3)], "rejected": worse}
        styled.append({"id": i, "prompt": f"{i}?", **replies, "domain": domain})
    paths = []
    for name, records in (("judged", judged), ("styled", styled)):
        paths.append(str(tmp_path / f"{name}.jsonl"))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    files = dict(dataset_path=tuple(paths), baseline_model_name_or_path=str(models[1]))
    lines, report = evaluate(models[:1], tmp_path, "out", **files)
    table = capfd.readouterr().out
    assert "styled: lacks, of RM-Bench, code, safety" in table and "mean of 2" in table and "· coding" in table
    page = (tmp_path / "out" / "report.html").read_text()
    assert "styled (RM-Bench)" in page and "sign test p" in page

    # Six replies need not fit into one micro-batch; one does.
    tokens = max(n for line in lines for n in line["tokens"])
    again = tmp_path / "again.jsonl"  # whose texts are all known
    again.write_text((tmp_path / "styled.jsonl").read_text())
    files["dataset_path"] += (str(again),)
    in_small, of_small = evaluate(models[:1], tmp_path, "small", **files, max_tokens=tokens)
    for one, other in zip([*lines, *lines[6:]], in_small, strict=True):
        assert other["scores"] == pytest.approx(one["scores"], abs=1e-5)
    assert of_small["sets"]["again"]["benchmark"] == of_small["sets"]["styled"]["benchmark"]

    for name, of_set in (("judged", lines[:6]), ("styled", lines[6:])):
        half = len(of_set[0]["scores"]) // 2
        right = [a > b for line in of_set for a in line["scores"][:half] for b in line["scores"][half:]]
        benchmark = report["sets"][name]["benchmark"]
        assert benchmark["score"] == pytest.approx(np.mean(right)) and benchmark["prompts"] == 6
        test = benchmark["baseline"]
        assert test["difference"] == pytest.approx(benchmark["score"] - test["score"])
        assert of_small["sets"][name]["benchmark"]["score"] == benchmark["score"]
    scores = [one["benchmark"]["score"] for one in report["sets"].values()]
    assert report["benchmarks"]["score"] == pytest.approx(np.mean(scores))


def test_one_model_is_no_ensemble(models, tmp_path):
    lines, report = evaluate(models[:1], tmp_path, "out")
    assert "spread" not in lines[0] and "ensemble" not in report["sets"]["data"]
    assert report["settings"]["model_name_or_path"] == [str(models[0])]


def test_the_paired_test_can_be_computed_again_from_the_scores_of_model_and_baseline(models, tmp_path):
    scipy_stats = pytest.importorskip("scipy.stats")
    lines, report = evaluate(models[:1], tmp_path, "out", baseline_model_name_or_path=str(models[1]))
    of_baseline = [json.loads(line) for line in open(tmp_path / "out" / "baseline_scores.jsonl")]
    assert [line["record"] for line in of_baseline] == [line["record"] for line in lines]
    right = []  # in both files, the first of three replies is the best
    for scores in (np.array([line["scores"] for line in of]) for of in (lines, of_baseline)):
        right.append(np.stack([scores[:, a] > scores[:, b] for a, b in ((0, 1), (0, 2), (1, 2))]))
    better, worse = (right[0] & ~right[1]).sum(), (~right[0] & right[1]).sum()
    assert (report["baseline"]["better"], report["baseline"]["worse"]) == (better, worse)
    assert report["baseline"]["mcnemar_p"] == pytest.approx(
        scipy_stats.binomtest(int(better), int(better + worse)).pvalue
    )
