"""A reward is read at the same token here, in transformers and in TRL, for every kind of template and tokenizer."""

import json
import math

import pytest
import torch

from rm import export
from rm.config import compose
from rm.distributed import process_group as dist
from rm.scoring import Scorer, reward_function
from tests import tiny
from tests.reward_positions import (
    DIALOGUES,
    Clients,
    dialogue,
    eval_scores,
    reward_folder,
    rewards_in,
    tokens,
    trainer_of,
)
from tests.templates import KINDS, folder_of
from tests.text_fixtures import byte_level, metaspace

datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
OPEN = "GLM, which ends no turn"
LONG = dialogue("boil an egg", "put it in boiling water for seven minutes and " * 40)


@pytest.mark.parametrize("make", [byte_level, metaspace])
@pytest.mark.parametrize("kind", KINDS)
def test_every_client_reads_the_same_reward(kind, make, tmp_path):
    # A dialogue that no special token ends may end in <unk>: that is the padding of its base.
    folder = reward_folder(kind, make, tmp_path, pad="unk" if kind == OPEN else "eos")
    scorer, clients = Scorer(folder), Clients(folder)
    trl_ids = clients.trl_ids(DIALOGUES)
    assert tokens(scorer, DIALOGUES) == clients.ids(DIALOGUES) == trl_ids
    assert clients.model.config.pad_token_id == clients.tokenizer.pad_token_id not in {ids[-1] for ids in trl_ids}
    rewards = scorer.score(DIALOGUES)
    for name, others in clients.rewards(DIALOGUES, trl_ids).items():
        assert others == pytest.approx(rewards, abs=1e-4), name


@pytest.mark.parametrize("make", [byte_level, metaspace])
@pytest.mark.parametrize("kind", ["ChatML", "Llama-2", "Phi-3", "marks hold the line break", OPEN])
def test_a_text_shortened_on_the_right_keeps_what_ends_it(kind, make, tmp_path):
    folder = reward_folder(kind, make, tmp_path, overlong="truncate", truncation_side="right", max_length=60)
    scorer, clients = Scorer(folder), Clients(folder)
    (whole,), (short,) = clients.ids([LONG]), tokens(scorer, [LONG])
    ending = {"Llama-2": 1, "Phi-3": 2, OPEN: 0}.get(kind, 2)  # "</s>"; "<|end|>" EOS; nothing; "<|im_end|>" "\n"
    assert len(whole) > 100 and len(short) == 60
    assert short == whole[: 60 - ending] + whole[len(whole) - ending :]
    assert clients.padded([short, short[:9]], "right")[0] == pytest.approx(scorer.score([LONG])[0], abs=1e-4)


@pytest.mark.parametrize("make", [byte_level, metaspace])
@pytest.mark.parametrize("form", ["hh", "anthropic"])
def test_the_exported_template_of_a_plain_format_writes_bos_and_eos(form, make, tmp_path):
    folder = reward_folder("Llama-2" if make is metaspace else "Qwen2.5 base", make, tmp_path, dialogue_format=form)
    scorer, clients = Scorer(folder), Clients(folder)
    assert tokens(scorer, DIALOGUES) == clients.ids(DIALOGUES)
    assert clients.alone(clients.ids(DIALOGUES)) == pytest.approx(scorer.score(DIALOGUES), abs=1e-4)


def test_the_exported_template_has_the_date_of_training(tmp_path):
    folder = reward_folder("Llama-3.2", byte_level, tmp_path)
    scorer, clients = Scorer(folder), Clients(folder)
    assert "26 Jul 2024" in clients.tokenizer.apply_chat_template(DIALOGUES[0], tokenize=False)
    assert clients.alone(clients.ids(DIALOGUES)) == pytest.approx(scorer.score(DIALOGUES), abs=1e-4)


def test_eval_rm_scores_as_transformers_does(tmp_path):
    folder = reward_folder("ChatML", byte_level, tmp_path)
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": d[:-1], "responses": [d[-1:]]}) for d in DIALOGUES))
    scores = eval_scores(folder, data, tmp_path / "eval")
    clients = Clients(folder)
    assert [one for (one,) in scores] == pytest.approx(clients.alone(clients.ids(DIALOGUES)), abs=1e-4)


# Models that TRL trained


@pytest.fixture(scope="module", params=["plain", "messages"])
def trained_by_trl(request, tmp_path_factory):
    """(folder, texts) of a reward model that TRL trained, with EOS for padding, and saved."""
    tmp_path = tmp_path_factory.mktemp("trl")
    folder = folder_of("ChatML" if request.param == "messages" else "Qwen2.5 base", tmp_path / "base")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    if request.param == "plain":
        tokenizer.chat_template = None
        texts = ["the cat sat", "", "the other cat sat on the mat<|im_end|>", "☃"]
    else:
        # The template ends in its EOS, which is the padding: transformers reads the token before it.
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>' + '\n'", "<|im_end|>'")
        texts = DIALOGUES
    arguments = trl.RewardConfig(
        output_dir=str(tmp_path / "run"), report_to=[], use_cpu=True, bf16=False, max_steps=1, save_strategy="no"
    )
    pairs = datasets.Dataset.from_list([{"chosen": a, "rejected": b} for a, b in zip(texts, texts[1:], strict=False)])
    model = tiny.reward_model("llama", vocab_size=480, max_position_embeddings=512)
    trainer = trl.RewardTrainer(model, arguments, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    trainer.save_model(str(tmp_path / "rm"))
    return tmp_path / "rm", texts


def test_a_model_that_trl_trained_is_read_as_transformers_reads_it(trained_by_trl, tmp_path):
    folder, texts = trained_by_trl
    texts = [text for text in texts if not isinstance(text, str) or "<|" not in text]
    clients = Clients(folder)
    if isinstance(texts[0], str):
        expected = clients.padded([clients.tokenizer(text + "<|endoftext|>").input_ids for text in texts], "right")
        # It is read before its EOS.
        assert expected[0] == pytest.approx(clients.alone([clients.tokenizer(texts[0]).input_ids])[0], abs=1e-5)
        records = [{"prompt": text, "responses": [""]} for text in texts]
    else:
        expected = clients.padded(clients.ids(texts), "right")
        records = [{"prompt": text[:-1], "responses": [text[-1:]]} for text in texts]
    assert Scorer(folder).score(texts) == pytest.approx(expected, abs=1e-4)
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, records)))
    assert [one for (one,) in eval_scores(folder, data, tmp_path / "eval")] == pytest.approx(expected, abs=1e-4)

    with dist.session(0):
        flat = dict(model_name_or_path=str(folder), output_dir=str(tmp_path / "out"), dtype="float32")
        export.main(compose(export.Settings, **flat))
    assert Scorer(tmp_path / "out").score(texts) == pytest.approx(expected, abs=1e-4)


# TRL's trainers with a reward model of ours


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_trls_trainers_get_our_rewards_for_messages(name, tmp_path):
    folder = reward_folder("Gemma", metaspace, tmp_path)
    prompts = [dialogue("what is the capital of France?"), dialogue("hi")]
    ((prompts, completions, rewards),) = rewards_in(
        trainer_of(name, [str(folder), reward_function(folder)], prompts, tmp_path)
    )
    expected = Scorer(folder).score([prompt + reply for prompt, reply in zip(prompts, completions, strict=True)])
    assert len(expected) == 4 and torch.tensor(expected).std() > 1e-3
    for column in rewards.T:
        assert column.tolist() == pytest.approx(expected, abs=1e-4)


def test_the_reward_function_is_right_for_plain_prompts_too(tmp_path):
    folder = reward_folder("Qwen2.5 base", byte_level, tmp_path, bare_text="plain")
    prompts = ["what is the capital of France? ", "the cat "]
    ((prompts, completions, rewards),) = rewards_in(trainer_of("GRPO", [reward_function(folder)], prompts, tmp_path))
    clients = Clients(folder)
    texts = [prompt + reply + "<|endoftext|>" for prompt, reply in zip(prompts, completions, strict=True)]
    expected = clients.alone([clients.tokenizer(text).input_ids for text in texts])
    assert rewards[:, 0].tolist() == pytest.approx(expected, abs=1e-4)


def test_the_reward_function_takes_trls_arguments_and_refuses_prompts_that_a_template_has_written(tmp_path):
    folder = reward_folder("ChatML", byte_level, tmp_path)
    reward, scorer = reward_function(folder, max_tokens=64), Scorer(folder)
    prompts, replies = ["hi", "the cat", "hi"], ["hello", "sat", "the mat"]
    expected = scorer.score([dialogue(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True)])
    assert reward(prompts=prompts, completions=replies, completion_ids=[[1]] * 3) == pytest.approx(expected, abs=1e-5)
    as_messages = dict(prompts=[dialogue(p) for p in prompts], completions=[dialogue("", r)[1:] for r in replies])
    assert reward(**as_messages, trainer_state=None) == pytest.approx(expected, abs=1e-5)
    assert all(map(math.isfinite, expected)) and reward.__name__ == f"{folder.parent.name}/model"
    with pytest.raises(ValueError, match="a chat template has been applied to it already; give prompts as messages"):
        reward(prompts=["<|im_start|>user\nhi<|im_end|>\n"], completions=["a"])
