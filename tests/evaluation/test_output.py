"""What eval_rm.py leaves in its output folder: all files or none, and only those of one command."""

import json
import os

import pytest

import eval_rm
from rm.config import compose
from rm.distributed import process_group as dist
from tests.reward_positions import reward_folder
from tests.text_fixtures import byte_level

PAIRS = [{"positive": f"what is {n}?it is {n}.", "negative": f"what is {n}?no."} for n in range(3)]


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Runs eval_rm.py with changed settings; returns the content of its output folder."""
    model, data, out = reward_folder("ChatML", byte_level, tmp_path), tmp_path / "pairs.jsonl", tmp_path / "eval"
    data.write_text("\n".join(map(json.dumps, PAIRS)))
    monkeypatch.setattr(eval_rm, "evaluation_page", lambda *_: "page")  # whose figures take seconds

    def run(**changes) -> dict[str, bytes]:
        given = dict(model_name_or_path=(str(model),), dataset_path=(str(data),), output_dir=str(out))
        with dist.session(0):
            eval_rm.main(compose(eval_rm.Settings, **given | {"cache_dir": str(tmp_path / "cache")} | changes))
        return {file.name: file.read_bytes() for file in out.iterdir()}

    run.out, run.model = out, str(model)
    return run


def killed_at(call: int):
    """os.replace, at whose call of this number the process is killed."""
    replace, calls = os.replace, []

    def counted(old, new):
        calls.append(new)
        if len(calls) == call:
            raise SystemExit
        replace(old, new)

    return counted


def test_the_same_command_replaces_its_files_and_another_is_refused(evaluate, tmp_path):
    first, second = evaluate(), evaluate()
    assert first.keys() == second.keys() == {"report.json", "report.html", "scores.jsonl"}
    assert first["scores.jsonl"] == second["scores.jsonl"]
    with pytest.raises(ValueError, match="already holds another evaluation.*best_of_n: then False, now True"):
        evaluate(best_of_n=True)
    (tmp_path / "another.jsonl").write_text(json.dumps(PAIRS[0]))
    with pytest.raises(ValueError, match="already holds another evaluation.*dataset_path: then .*, now .*another"):
        evaluate(dataset_path=(str(tmp_path / "another.jsonl"),))
    (evaluate.out / "report.json").unlink()
    with pytest.raises(ValueError, match=r"already holds another run \(scores.jsonl\)"):
        evaluate()


@pytest.mark.parametrize("call", [1, 2, 3])
def test_what_a_killed_evaluation_left_is_replaced_by_the_same_command(call, evaluate, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.unlink", lambda *_, **__: None)  # the process that is killed removes nothing
        evaluate.out.mkdir()
        write_together = eval_rm.write_together

        def dies(files):
            patch.setattr(os, "replace", killed_at(call))
            write_together(files)

        patch.setattr(eval_rm, "write_together", dies)
        with pytest.raises(SystemExit):
            evaluate()
    assert not (evaluate.out / "report.json").exists()
    with pytest.raises(ValueError, match="already holds another evaluation.*best_of_n"):
        evaluate(best_of_n=True)
    assert evaluate().keys() == {"report.json", "report.html", "scores.jsonl"}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (dict(score_only=True, best_of_n=True), {"best.jsonl", "scores.jsonl", "report.json"}),
        (dict(several=True), {"baseline_scores.jsonl", "scores.jsonl", "report.html", "report.json"}),
    ],
)
def test_every_kind_of_evaluation_may_be_done_again_and_is_whole_or_known_not_to_be(
    changes, names, evaluate, monkeypatch
):
    if changes.pop("several", False):
        changes = dict(model_name_or_path=2 * (evaluate.model,), baseline_model_name_or_path=evaluate.model)
    first = evaluate(**changes)
    assert first.keys() == names
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed_at(2))
        with pytest.raises(SystemExit):
            evaluate(**changes)
    assert not (evaluate.out / "report.json").exists(), "the files are of two evaluations"
    again = evaluate(**changes)
    assert again.keys() == names and again["scores.jsonl"] == first["scores.jsonl"]
    with pytest.raises(ValueError, match="already holds another evaluation.*max_length"):
        evaluate(**changes, max_length=99)


@pytest.mark.parametrize("name", eval_rm.FILES)
def test_files_of_others_are_left_alone(name, evaluate):
    evaluate.out.mkdir()
    (evaluate.out / name).write_text("mine")
    with pytest.raises(ValueError, match=f"already holds another run .{name}"):
        evaluate()
    assert (evaluate.out / name).read_text() == "mine"


def test_a_report_that_was_cut_off_while_it_was_written_is_no_evaluation(evaluate):
    evaluate.out.mkdir()
    (evaluate.out / ".report.json.writing").write_text('{"accur')
    assert evaluate().keys() == {"report.json", "report.html", "scores.jsonl"}
