"""rm.scoring: rewards are those of the contract, however texts are batched, sharded or computed."""

import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rm import export
from rm.config import compose
from rm.data.dataset import TextSettings
from rm.distributed import process_group as dist
from rm.distributed.sharding import ParallelSettings
from rm.hf import build
from rm.model.heads import RewardModel
from rm.scoring import contract
from rm.scoring.score import local_rewards
from rm.scoring.scorer import Scorer
from rm.scoring.settings import ScoringTextSettings
from tests import text_fixtures, tiny
from tests.ranks import run_ranks

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
SIZE = dict(vocab_size=400, num_labels=1, max_position_embeddings=512)


def write(folder: Path, **text) -> None:
    """Write the contract of a model that was trained, in float32, with these settings of its texts."""
    with dist.session(0):
        contract.write(folder, TextSettings(**{"max_length": 200} | text), torch.float32)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A tiny reward model and its contract."""
    folder = tmp_path_factory.mktemp("rm")
    text_fixtures.byte_level(folder)
    config = transformers.LlamaConfig(**(tiny.LLAMA | SIZE))
    tiny.spread(transformers.LlamaForSequenceClassification(config)).save_pretrained(folder)
    write(folder)
    return folder


def changed(model_folder: Path, folder: Path, **entries) -> Path:
    """A copy of the model whose scoring.json has other entries, without checksums."""
    folder.mkdir()
    for file in model_folder.iterdir():
        if file.name != "SHA256SUMS":
            (folder / file.name).write_bytes(file.read_bytes())
    saved = json.loads((model_folder / "scoring.json").read_text())
    (folder / "scoring.json").write_text(json.dumps(saved | entries))
    return folder


def without_contract(model_folder: Path, folder: Path, template: str | None = None) -> Path:
    """A copy of the model without scoring.json, and with a chat template of its own where one is given."""
    changed(model_folder, folder)
    (folder / "scoring.json").unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def probes(model_folder: Path) -> tuple[list[str], torch.Tensor]:
    """The probe texts of a contract, and their scores."""
    golden = contract.read(model_folder).golden
    return [one.text for one in golden], torch.tensor([one.score for one in golden])


def test_the_contracts_scores_are_those_of_transformers(model_folder):
    texts, scores = probes(model_folder)
    hf_model = transformers.AutoModelForSequenceClassification.from_pretrained(model_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    with torch.no_grad():
        logits = [hf_model(**tokenizer(text + tokenizer.eos_token, return_tensors="pt")).logits[0, 0] for text in texts]
    torch.testing.assert_close(scores, torch.stack(logits), rtol=1e-4, atol=1e-4)
    assert len(texts) == 5 and contract.read(model_folder).eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("max_tokens", [1, 10_000], ids=["alone", "packed"])
def test_probe_texts_keep_their_scores_alone_packed_and_shuffled(model_folder, max_tokens):
    texts, scores = probes(model_folder)
    order = np.random.default_rng(0).permutation(len(texts))
    rewards = Scorer(model_folder, max_tokens=max_tokens).score([texts[i] for i in order])
    torch.testing.assert_close(torch.tensor(rewards), scores[order.tolist()], rtol=1e-5, atol=1e-5)


def test_probe_texts_keep_their_scores_in_bfloat16_within_the_tolerance(model_folder):
    texts, scores = probes(model_folder)
    gap = (torch.tensor(Scorer(model_folder, dtype="bfloat16").score(texts)) - scores).abs()
    assert 0 < gap.max() < contract.TOLERANCE["bfloat16"]


def largest_change(folder: Path, dtype: str) -> float:
    """How far the scores of probe texts move in a sharded model, as eval_rm.py verifies them."""
    model = build.load(build.build(RewardModel, folder, ParallelSettings(dtype=dtype)), folder)
    text, agreed = contract.resolve(folder, ScoringTextSettings())
    encoder = contract.text_encoder(folder, text, agreed)
    score = functools.partial(contract.score_examples, model)
    scores = contract.verify(agreed, folder, encoder, getattr(torch, dtype), score)
    return max(abs(now - one.score) for now, one in zip(scores, agreed.golden, strict=True))


@pytest.mark.parametrize("world", [1, 2])
def test_probe_texts_keep_their_scores_on_one_and_two_ranks(model_folder, world):
    assert max(run_ranks(world, largest_change, model_folder, "float32")) < 1e-5
    assert max(run_ranks(world, largest_change, model_folder, "bfloat16")) < contract.TOLERANCE["bfloat16"]


def test_two_ranks_write_the_contract_that_one_writes(model_folder, tmp_path):
    folder = without_contract(model_folder, tmp_path / "rm")
    run_ranks(2, contract.write, folder, TextSettings(max_length=200), torch.float32)
    by_two, by_one = contract.read(folder), contract.read(model_folder)
    assert [one.tokens for one in by_two.golden] == [one.tokens for one in by_one.golden]
    torch.testing.assert_close(probes(folder)[1], probes(model_folder)[1], rtol=1e-5, atol=1e-5)


def test_changed_weights_are_an_error_that_names_the_text_and_its_change(model_folder, tmp_path):
    golden = json.loads((model_folder / "scoring.json").read_text())["golden"]
    golden[2] = golden[2] | {"score": golden[2]["score"] + 0.5}
    folder = changed(model_folder, tmp_path / "rm", golden=golden)
    with pytest.raises(ValueError, match=r"probe text 3, '###Human: Ho.*moved by 0\.5, more than 0\.001 in float32"):
        Scorer(folder)


def test_a_changed_tokenizer_is_an_error_that_names_the_text(model_folder, tmp_path):
    golden = json.loads((model_folder / "scoring.json").read_text())["golden"]
    golden[0]["tokens"][3] += 1
    with pytest.raises(
        ValueError, match="probe text 1, .* has other tokens than after training; restore the tokenizer"
    ):
        Scorer(changed(model_folder, tmp_path / "rm", golden=golden))


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"version": 1}, "is version 1, of a model whose rewards were read at another token: train the model again"),
        ({"version": 3}, "version 3 is not implemented, only 2; restore it, or delete it"),
        ({"golden": None}, "the setting 'golden' is missing; restore it"),
        ({"bare_text": None}, "the setting 'bare_text' is missing"),
        ({"bare_text": "auto"}, "bare_text 'auto' is not implemented, only 'dialogue' or 'plain'; restore it"),
        ({"max_length": "512"}, "max_length '512' has to be of type whole number"),
        ({"scored_token": "the first"}, "scored_token 'the first' is not implemented"),
        ({"surprise": 1}, "surprise 1 is not implemented: it may change"),
        ({"golden": [{"text": "a"}]}, r"the setting 'golden\[0\].tokens' is missing"),
        ({"golden": [{"text": "a", "tokens": [1], "score": "2"}]}, r"golden\[0\].score '2' has to be of type number"),
        (
            {"golden": [{"text": [{"role": "user"}], "tokens": [1], "score": 2}]},
            r"golden\[0\].text\[0\].content' is mis",
        ),
        (
            {"golden": [{"text": ["a"], "tokens": [1], "score": 2}]},
            r"golden\[0\].text\[0\] 'a' has to be of type object",
        ),
        ({"eos_token_id": 7}, "BOS and EOS of .* are None and 3.., and were None and 7 in training"),
    ],
)
def test_an_invalid_scoring_json_is_an_error_that_names_file_and_key(model_folder, tmp_path, entries, message):
    with pytest.raises(ValueError, match=rf"scoring\.json.*{message}") as error:
        Scorer(changed(model_folder, tmp_path / "rm", **entries))
    assert "\n" not in str(error.value)


def test_a_model_without_a_contract_is_scored_with_the_default_settings(model_folder, tmp_path):
    folder = without_contract(model_folder, tmp_path / "rm")
    scorer, (texts, scores) = Scorer(folder), probes(model_folder)
    assert scorer.contract is None and scorer.encoder.max_length == 512
    torch.testing.assert_close(torch.tensor(scorer.score(texts)), scores, rtol=1e-5, atol=1e-5)


def test_responses_share_their_prompt_and_score_as_whole_texts(model_folder):
    scorer = Scorer(model_folder, max_tokens=100)
    prompts = ["###Human: hi there###Assistant:", "###Human: 1?###Assistant:", "unanswered"]
    responses = [[" hello", " go away", " hi", " hello"], [" one"], []]
    shared = scorer.score_responses(prompts, responses)
    whole = [[scorer.score([p + r])[0] for r in rs] for p, rs in zip(prompts, responses, strict=True)]
    assert [len(rewards) for rewards in shared] == [4, 1, 0] and shared[0][0] == pytest.approx(shared[0][3])
    for rewards, expected in zip(shared, whole, strict=True):
        assert rewards == pytest.approx(expected, abs=1e-5)
    assert scorer.score([]) == [] and scorer.score_responses([], []) == []


def test_a_text_that_is_asked_for_twice_is_scored_once(model_folder, monkeypatch):
    computed = []

    def counted(model, batches, reply_offsets):
        computed.append(reply_offsets[-1])
        return local_rewards(model, batches, reply_offsets)

    monkeypatch.setattr("rm.scoring.scorer.local_rewards", counted)
    model = Scorer(model_folder)
    computed.clear()
    once = model.score(["one text", "another"])
    assert model.score(["one text", "another", "one text"]) == pytest.approx([*once, once[0]], abs=1e-5)
    assert computed == [2, 2]


def test_a_dialogue_without_messages_is_an_error(model_folder):
    with pytest.raises(ValueError, match="conversation 0 cannot be encoded .not ending with an assistant message"):
        Scorer(model_folder).score([[]])


def test_a_text_longer_than_in_training_is_an_error_that_names_it(model_folder):
    with pytest.raises(
        ValueError, match=r"conversation 1 cannot be encoded \(longer than max_length 200\): shorten it"
    ):
        Scorer(model_folder).score(["short", "long " * 200])
    with pytest.raises(ValueError, match=r"conversation 1 cannot be encoded \(longer"):
        Scorer(model_folder).score_responses(["unanswered", "a"], [[], ["b", "long " * 200]])
    assert len(Scorer(model_folder, max_length=400).score(["long " * 60])) == 1


def test_normalized_rewards_use_the_mean_and_deviation_of_the_contract(model_folder, tmp_path):
    scorer = Scorer(changed(model_folder, tmp_path / "rm", reward_mean=0.5, reward_std=2.0, reward_set="mine"))
    raw = scorer.score(["a", "b"])
    assert scorer.score(["a", "b"], normalized=True) == pytest.approx([(r - 0.5) / 2 for r in raw])
    with pytest.raises(ValueError, match="states no mean and standard deviation"):
        Scorer(model_folder).score(["a"], normalized=True)


def test_openrlhfs_mean_and_deviation_are_read_from_config_json(model_folder, tmp_path):
    folder = without_contract(model_folder, tmp_path / "rm")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mean": 0.5, "std": 2.0, "normalize_reward": True}))
    scorer = Scorer(folder)
    raw = scorer.score(["a", "b"])
    assert raw == Scorer(model_folder).score(["a", "b"])
    assert scorer.score(["a", "b"], normalized=True) == pytest.approx([(r - 0.5) / 2 for r in raw])


def test_a_plain_python_process_scores_without_a_launcher(model_folder):
    program = f"from rm.scoring.scorer import Scorer; print(Scorer({str(model_folder)!r}).score(['hello']))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == pytest.approx(Scorer(model_folder).score(["hello"]))


def test_probe_texts_longer_than_max_length_are_left_out(model_folder, tmp_path):
    folder = changed(model_folder, tmp_path / "rm")
    write(folder, max_length=60)
    assert 0 < len(contract.read(folder).golden) < 5
    write(folder, max_length=3)
    assert contract.read(folder).golden == () and Scorer(folder).score(["a"])


def test_the_example_in_the_documentation_runs(model_folder, tmp_path):
    text = (ROOT / "docs" / "evaluation.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.S)
    folder = changed(model_folder, tmp_path / "rm", reward_mean=0.0, reward_std=1.0, reward_set="none")
    variables: dict = {}
    exec(example.replace("runs/rm/model", str(folder)), variables)
    assert len(variables["rewards"]) == 1 and len(variables["advantages"][0]) == 3
    assert variables["best"][0][0] == max(variables["advantages"][0])


CHATML = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '\n' }}{% endfor %}"
DIALOGUE = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "hello"}]


def test_a_dialogue_format_is_part_of_the_contract(model_folder, tmp_path):
    folder = without_contract(model_folder, tmp_path / "rm")
    write(folder, dialogue_format="hh")
    scorer, plain = Scorer(folder), Scorer(model_folder)
    assert contract.read(folder).golden[0].text[0] == {"role": "user", "content": "What is the capital of France?"}
    (reward,) = scorer.score([DIALOGUE])
    assert scorer.score(["\n\nHuman: hi there\n\nAssistant: hello"]) == pytest.approx([reward], abs=1e-5)
    assert plain.score(["###Human: hi there###Assistant: hello"]) == pytest.approx([reward], abs=1e-5)
    assert scorer.score_responses([DIALOGUE[:1]], [["hello"]])[0] == pytest.approx([reward], abs=1e-5)
    assert scorer.score_responses(["hi there"], [["hello"]])[0] == pytest.approx([reward], abs=1e-5)
    with pytest.raises(ValueError, match="training had --dialogue_format hh, as .* says; leave the flag out"):
        Scorer(folder, dialogue_format="anthropic")
    with pytest.raises(ValueError, match="no chat template; give"):
        plain.score([DIALOGUE])
    # Training had no template: nothing says how messages are to be written, so that a setting may.
    by_setting = Scorer(model_folder, dialogue_format="hh")
    assert by_setting.score([DIALOGUE]) == pytest.approx([reward], abs=1e-5)
    assert by_setting.score_responses(["hi there"], [["hello"]])[0] == pytest.approx([reward], abs=1e-5)


def test_a_setting_that_says_what_the_contract_says_is_accepted(model_folder, tmp_path):
    (tmp_path / "mine.jinja").write_text(CHATML)
    (tmp_path / "other.jinja").write_text(CHATML.replace("<", "("))
    mine, other = str(tmp_path / "mine.jinja"), str(tmp_path / "other.jinja")
    cases = {  # name -> settings of training, settings that agree, settings that differ
        "file": ({"chat_template": mine}, {"chat_template": mine}, {"chat_template": other}),
        "own": ({}, {"chat_template": mine}, {"dialogue_format": "hh"}),
        "hh": ({"dialogue_format": "hh"}, {"dialogue_format": "hh"}, {"chat_template": other}),
        "dialogue": ({}, {"bare_text": "dialogue"}, {"bare_text": "plain"}),
        "plain": ({"bare_text": "plain"}, {"bare_text": "plain"}, {"bare_text": "dialogue"}),
    }
    for name, (of_training, agree, differ) in cases.items():
        folder = without_contract(model_folder, tmp_path / name, CHATML)
        write(folder, **of_training)
        (reward,) = Scorer(folder).score([DIALOGUE])
        for same in (agree, {"chat_template": str(folder)}, {"chat_template": f"{folder}/"}, {"bare_text": "auto"}):
            assert Scorer(folder, **same).score([DIALOGUE]) == [reward]
        with pytest.raises(ValueError, match=f"--{[*differ][0]} .*: training had .*, as .* says; leave the flag out"):
            Scorer(folder, **differ)


def test_a_template_from_a_file_is_saved_with_the_model(model_folder, tmp_path):
    folder = without_contract(model_folder, tmp_path / "rm")
    (tmp_path / "mine.jinja").write_text(CHATML)
    write(folder, chat_template=str(tmp_path / "mine.jinja"))
    (tmp_path / "mine.jinja").unlink()
    assert contract.read(folder).chat_template == CHATML == (folder / "chat_template.jinja").read_text()
    assert len(Scorer(folder).score([DIALOGUE, "###Human: hi there###Assistant: hello"])) == 2
    (folder / "chat_template.jinja").write_text(CHATML.replace("<", "("))
    with pytest.raises(ValueError, match="the chat template of .* is not that of training"):
        Scorer(folder)


def test_a_models_own_template_writes_messages_and_leaves_strings_unchanged(model_folder, tmp_path):
    folder = without_contract(model_folder, tmp_path / "rm", CHATML)
    write(folder)
    scorer = Scorer(folder)
    assert {type(one.text) for one in contract.read(folder).golden} == {str, list}
    assert scorer.score(["plain"]) == pytest.approx(Scorer(model_folder).score(["plain"]), abs=1e-5)
    assert scorer.score([DIALOGUE])[0] != pytest.approx(scorer.score(["hi there"])[0])


def test_a_training_that_shortened_texts_scores_shortened_texts(model_folder, tmp_path):
    folder = without_contract(model_folder, tmp_path / "rm")
    write(folder, overlong="truncate", max_length=120)
    long = "###Human: " + "long " * 200 + "###Assistant: yes"
    assert len(Scorer(folder).score([long])) == 1 and len(contract.read(folder).golden) > 2


def test_an_export_has_the_contract_with_the_scores_of_its_own_files(model_folder, tmp_path):
    flat = dict(model_name_or_path=str(model_folder), output_dir=str(tmp_path / "out"), dtype="bfloat16")
    with dist.session(0):
        export.main(compose(export.Settings, **flat))
    texts, scores = probes(tmp_path / "out")
    assert Scorer(tmp_path / "out").score(texts) == pytest.approx(scores.tolist(), abs=1e-5)
    assert 1e-5 < (scores - probes(model_folder)[1]).abs().max() < contract.TOLERANCE["bfloat16"]
