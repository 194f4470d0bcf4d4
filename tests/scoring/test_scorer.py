"""rm.scoring.scorer: the contract holds however texts are batched, sharded or computed."""

import functools
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from rm import export
from rm.data import dataset
from rm.distributed import process_group as dist
from rm.distributed import sharding
from rm.hf import build
from rm.model import heads
from rm.scoring import contract
from rm.scoring.scorer import Scorer
from tests import text_fixtures, tiny
from tests.ranks import run_ranks

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
SIZE = dict(vocab_size=400, num_labels=1, max_position_embeddings=512)


@dataclass(frozen=True, kw_only=True)
class Training(build.ModelSettings, dataset.DataSettings, sharding.ParallelSettings):
    """What train_rm.py has, as far as a contract says it."""

    dataset_path: tuple[str, ...] = ()
    max_length: int = 200


def write(folder: Path, **settings) -> None:
    with dist.session(0):
        contract.write(folder, Training(model_name_or_path=str(folder), **settings))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A tiny reward model and its contract."""
    folder = tmp_path_factory.mktemp("rm")
    text_fixtures.byte_level(folder)
    config = transformers.LlamaConfig(**(tiny.LLAMA | SIZE))
    tiny.spread(transformers.LlamaForSequenceClassification(config)).save_pretrained(folder)
    write(folder)
    return folder


def changed(made: Path, folder: Path, **entries) -> Path:
    """A copy of the model whose scoring.json has other entries."""
    folder.mkdir()
    for file in made.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    kept = json.loads((made / "scoring.json").read_text())
    (folder / "scoring.json").write_text(json.dumps(kept | entries))
    return folder


def golden(made: Path) -> tuple[list[str], torch.Tensor]:
    kept = contract.read(made).golden
    return [one.text for one in kept], torch.tensor([one.score for one in kept])


def test_the_golden_scores_are_those_of_transformers(made):
    texts, scores = golden(made)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(made).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(made)
    with torch.no_grad():
        logits = [theirs(**tokenizer(text + tokenizer.eos_token, return_tensors="pt")).logits[0, 0] for text in texts]
    torch.testing.assert_close(scores, torch.stack(logits), rtol=1e-4, atol=1e-4)
    assert len(texts) == 5 and contract.read(made).eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("max_tokens", [1, 10_000], ids=["alone", "packed"])
def test_golden_scores_come_again_alone_packed_and_shuffled(made, max_tokens):
    texts, scores = golden(made)
    order = np.random.default_rng(0).permutation(len(texts))
    got = Scorer(made, max_tokens=max_tokens).score([texts[i] for i in order])
    torch.testing.assert_close(torch.tensor(got), scores[order.tolist()], rtol=1e-5, atol=1e-5)


def test_golden_scores_come_again_in_bfloat16_within_the_stated_tolerance(made):
    texts, scores = golden(made)
    gap = (torch.tensor(Scorer(made, dtype="bfloat16").score(texts)) - scores).abs()
    assert 0 < gap.max() < contract.TOLERANCE["bfloat16"]


def checked(folder: Path, dtype: str) -> float:
    """How far golden texts move in a sharded model, as eval_rm.py has it."""
    settings = Training(model_name_or_path=str(folder), dtype=dtype)
    model = build.load(heads.RewardModel, settings, train=False)
    kept = contract.read(folder)
    score = functools.partial(contract.score_examples, model)
    scores = contract.check(kept, folder, contract.encoding(settings, kept), getattr(torch, dtype), score)
    return max(abs(now - one.score) for now, one in zip(scores, kept.golden, strict=True))


@pytest.mark.parametrize("world", [1, 2])
def test_golden_scores_come_again_on_one_and_two_ranks(made, world):
    assert max(run_ranks(world, checked, made, "float32")) < 1e-5
    assert max(run_ranks(world, checked, made, "bfloat16")) < contract.TOLERANCE["bfloat16"]


def test_two_ranks_write_the_contract_that_one_writes(made, tmp_path):
    folder = changed(made, tmp_path / "rm")
    (folder / "scoring.json").unlink()
    run_ranks(2, contract.write, folder, Training(model_name_or_path=str(folder)))
    ours, theirs = contract.read(folder), contract.read(made)
    assert [one.tokens for one in ours.golden] == [one.tokens for one in theirs.golden]
    torch.testing.assert_close(golden(folder)[1], golden(made)[1], rtol=1e-5, atol=1e-5)


def test_weights_that_changed_are_an_error_that_says_which_text_moved_by_how_much(made, tmp_path):
    kept = json.loads((made / "scoring.json").read_text())["golden"]
    kept[2] = kept[2] | {"score": kept[2]["score"] + 0.5}
    folder = changed(made, tmp_path / "rm", golden=kept)
    with pytest.raises(ValueError, match=r"golden text 3, '###Human: Ho.*moved by 0\.5, more than 0\.001 in float32"):
        Scorer(folder)


def test_a_tokenizer_that_changed_is_an_error(made, tmp_path):
    kept = json.loads((made / "scoring.json").read_text())["golden"]
    kept[0]["tokens"][3] += 1
    with pytest.raises(ValueError, match="golden text 1, .* becomes other tokens"):
        Scorer(changed(made, tmp_path / "rm", golden=kept))


@pytest.mark.parametrize("entries", [{"version": 2}, {"golden": None}, {"surprise": 1}, {"golden": [{"text": "a"}]}])
def test_a_file_that_is_no_contract_is_one_clear_error(made, tmp_path, entries):
    with pytest.raises(ValueError, match=r"scoring\.json"):
        Scorer(changed(made, tmp_path / "rm", **entries))


def test_a_model_without_a_contract_is_scored_all_the_same(made, tmp_path):
    folder = changed(made, tmp_path / "rm")
    (folder / "scoring.json").unlink()
    scorer, (texts, scores) = Scorer(folder), golden(made)
    assert scorer.contract is None and scorer.text.max_length == 512
    torch.testing.assert_close(torch.tensor(scorer.score(texts)), scores, rtol=1e-5, atol=1e-5)


def test_responses_share_their_prompt_and_score_as_whole_texts(made):
    scorer = Scorer(made, max_tokens=100)
    prompts = ["###Human: hi there###Assistant:", "###Human: 1?###Assistant:", "unanswered"]
    responses = [[" hello", " go away", " hi", " hello"], [" one"], []]
    got = scorer.score_responses(prompts, responses)
    whole = [[scorer.score([p + r])[0] for r in rs] for p, rs in zip(prompts, responses, strict=True)]
    assert [len(rewards) for rewards in got] == [4, 1, 0] and got[0][0] == pytest.approx(got[0][3])
    for ours, theirs in zip(got, whole, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    assert scorer.score([]) == [] and scorer.score_responses([], []) == []


def test_a_text_longer_than_training_saw_is_an_error_that_names_it(made):
    with pytest.raises(ValueError, match="conversation 1 is one longer than max_length 200: shorten it"):
        Scorer(made).score(["short", "long " * 200])
    with pytest.raises(ValueError, match="conversation 1 is one longer"):
        Scorer(made).score_responses(["unanswered", "a"], [[], ["b", "long " * 200]])
    assert len(Scorer(made, max_length=400).score(["long " * 60])) == 1


def test_normalized_rewards_are_standard_on_the_contracts_set(made, tmp_path):
    scorer = Scorer(changed(made, tmp_path / "rm", reward_mean=0.5, reward_std=2.0, reward_set="mine"))
    raw = scorer.score(["a", "b"])
    assert scorer.score(["a", "b"], normalized=True) == pytest.approx([(r - 0.5) / 2 for r in raw])
    with pytest.raises(ValueError, match="names no mean and standard deviation"):
        Scorer(made).score(["a"], normalized=True)


def test_openrlhfs_mean_and_deviation_are_read_from_config_json(made, tmp_path):
    folder = changed(made, tmp_path / "rm")
    (folder / "scoring.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mean": 0.5, "std": 2.0, "normalize_reward": True}))
    scorer = Scorer(folder)
    raw = scorer.score(["a", "b"])
    assert raw == Scorer(made).score(["a", "b"])
    assert scorer.score(["a", "b"], normalized=True) == pytest.approx([(r - 0.5) / 2 for r in raw])


def test_a_plain_python_process_scores_without_a_launcher(made):
    program = f"from rm.scoring.scorer import Scorer; print(Scorer({str(made)!r}).score(['hello']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == pytest.approx(Scorer(made).score(["hello"]))


def test_golden_texts_longer_than_max_length_are_left_out(made, tmp_path):
    folder = changed(made, tmp_path / "rm")
    write(folder, max_length=60)
    assert 0 < len(contract.read(folder).golden) < 5
    write(folder, max_length=3)
    assert contract.read(folder).golden == () and Scorer(folder).score(["a"])


def test_the_example_in_the_documentation_runs(made, tmp_path):
    text = (ROOT / "docs" / "evaluation.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.S)
    folder = changed(made, tmp_path / "rm", reward_mean=0.0, reward_std=1.0, reward_set="none")
    names: dict = {}
    exec(example.replace("runs/rm/model", str(folder)), names)
    assert len(names["rewards"]) == 1 and len(names["advantages"][0]) == 3
    assert names["best"][0][0] == max(names["advantages"][0])


CHATML = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '\n' }}{% endfor %}"
DIALOGUE = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hello"}]


def untaught(made: Path, folder: Path, template: str | None = None) -> Path:
    """The model without a contract, and with a template of its own."""
    changed(made, folder)
    (folder / "scoring.json").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def test_a_dialogue_format_is_part_of_the_contract(made, tmp_path):
    folder = untaught(made, tmp_path / "rm")
    write(folder, dialogue_format="hh")
    scorer, plain = Scorer(folder), Scorer(made)
    assert contract.read(folder).golden[0].text[0] == {"role": "user", "content": "What is the capital of France?"}
    (ours,) = scorer.score([DIALOGUE])
    assert scorer.score(["\n\nHuman: hi there\n\nAssistant: hello"]) == pytest.approx([ours], abs=1e-5)
    assert plain.score(["###Human: hi there###Assistant: hello"]) == pytest.approx([ours], abs=1e-5)
    assert scorer.score_responses([DIALOGUE[:1]], [["hello"]])[0] == pytest.approx([ours], abs=1e-5)
    assert scorer.score_responses(["hi there"], [["hello"]])[0] == pytest.approx([ours], abs=1e-5)
    with pytest.raises(ValueError, match="training had --dialogue_format hh, as .* says; leave the flag out"):
        Scorer(folder, dialogue_format="anthropic")
    with pytest.raises(ValueError, match="no chat template; give"):
        plain.score([DIALOGUE])


def test_a_template_from_a_file_comes_along_with_the_model(made, tmp_path):
    folder = untaught(made, tmp_path / "rm")
    (tmp_path / "mine.jinja").write_text(CHATML)
    write(folder, chat_template=str(tmp_path / "mine.jinja"))
    (tmp_path / "mine.jinja").unlink()
    assert contract.read(folder).chat_template == CHATML
    assert len(Scorer(folder).score([DIALOGUE, "###Human: hi there###Assistant: hello"])) == 2
    (folder / "chat_template.jinja").write_text(CHATML.replace("<", "("))
    with pytest.raises(ValueError, match="the chat template of .* is another than in training"):
        Scorer(folder)


def test_a_models_own_template_writes_messages_and_leaves_strings_as_they_are(made, tmp_path):
    folder = untaught(made, tmp_path / "rm", CHATML)
    write(folder)
    scorer = Scorer(folder)
    assert {type(one.text) for one in contract.read(folder).golden} == {str, list}
    assert scorer.score(["plain"]) == pytest.approx(Scorer(made).score(["plain"]), abs=1e-5)
    assert scorer.score([DIALOGUE])[0] != pytest.approx(scorer.score(["hi there"])[0])


def test_a_training_that_shortened_texts_scores_shortened_texts(made, tmp_path):
    folder = untaught(made, tmp_path / "rm")
    write(folder, overlong="truncate", max_length=120)
    long = "###Human: " + "long " * 200 + "###Assistant: yes"
    assert len(Scorer(folder).score([long])) == 1 and len(contract.read(folder).golden) > 2


def test_an_export_carries_the_contract_with_the_scores_of_its_own_files(made, tmp_path):
    with dist.session(0):
        export.main(export.Settings(model_name_or_path=str(made), output_dir=str(tmp_path / "out"), dtype="bfloat16"))
    texts, scores = golden(tmp_path / "out")
    assert Scorer(tmp_path / "out").score(texts) == pytest.approx(scores.tolist(), abs=1e-5)
    assert 1e-5 < (scores - golden(made)[1]).abs().max() < contract.TOLERANCE["bfloat16"]
