"""rm.model.lora: what is trained, computed and saved, against peft."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from rm.config import updated
from rm.data.batch import Loader, pack
from rm.distributed import sharding
from rm.hf import build
from rm.model import lora
from rm.model.attention import SplitAttention
from rm.model.heads import LanguageModel, RewardModel
from rm.training import optim
from tests import made, text_fixtures, tiny
from tests.ranks import run_ranks
from tests.training_runs import ATTENTION_COST, Settings, load_reward_model, lora_settings, run_step, train_lora

peft = pytest.importorskip("peft")


@pytest.fixture(params=["llama", "gpt_neo"])
def folder(request, tmp_path):
    """A tiny base model of each family, as a reward model would start from it."""
    text_fixtures.byte_level(tmp_path / "base")
    getattr(tiny, request.param)(vocab_size=400).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_and_transformers_score_the_saved_models_as_this_package_does(folder, tmp_path, rslora):
    from transformers import AutoModelForSequenceClassification as Classifier

    (ours,) = run_ranks(1, train_lora, folder, tmp_path, lora_settings(use_rslora=rslora))
    assert ours.trained == ours.states and all(lora.is_adapter(n) or n == "score.weight" for n in ours.trained)
    assert ours.lines[-1][0] != ours.lines[0][0]

    base = Classifier.from_pretrained(folder, num_labels=1, pad_token_id=0)
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    merged = Classifier.from_pretrained(tmp_path / "model").eval()
    for model in (adapted, merged):
        model.config.pad_token_id = None  # one text at a time: the last token is the last token
        with torch.no_grad():
            scores = [model(torch.tensor([text])).logits.item() for p in made.token_pairs(5, seed=9) for text in p]
        torch.testing.assert_close(torch.tensor(scores), ours.scores, rtol=1e-5, atol=1e-5)


def test_the_saved_tokenizer_has_a_padding_token_that_does_not_hide_the_eos(folder, tmp_path):
    """Where the base pads with its EOS, transformers would read the reward one token early."""
    from transformers import AutoModelForSequenceClassification as Classifier
    from transformers import AutoTokenizer

    from rm.data.tokenizer import Tokenizer
    from rm.scoring.scorer import Scorer

    for file in (folder / "tokenizer_config.json", folder / "config.json"):
        content = json.loads(file.read_text())
        if "eos_token" in content:
            content["pad_token"] = content["eos_token"]
        else:
            content["pad_token_id"] = Tokenizer(folder).eos_id
        file.write_text(json.dumps(content))
    run_ranks(1, train_lora, folder, tmp_path)
    base = Classifier.from_pretrained(folder, num_labels=1)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    base.config.pad_token_id = tokenizer.pad_token_id
    texts = ["hello", "good bye to all of you"]
    padded = tokenizer([text + tokenizer.eos_token for text in texts], padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = model(**padded).logits[:, 0].tolist()
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert scores == pytest.approx(Scorer(tmp_path / "adapter").score(texts), abs=1e-5)


@pytest.mark.parametrize(("folder", "world"), [("llama", 2), ("gpt_neo", 4)], indirect=["folder"])
def test_several_ranks_train_save_and_score_as_one_does(folder, tmp_path, world):
    from safetensors.torch import load_file

    settings = lora_settings(gradient_checkpointing="full" if world == 2 else "none")
    (one,) = run_ranks(1, train_lora, folder, tmp_path / "one", settings)
    for rank in run_ranks(world, train_lora, folder, tmp_path / "many", settings):
        torch.testing.assert_close(torch.tensor(rank.lines), torch.tensor(one.lines), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rank.scores, one.scores, rtol=1e-4, atol=1e-5)
    a, b = (load_file(tmp_path / which / "adapter" / "adapter_model.safetensors") for which in ("one", "many"))
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= 1e-3 * a[name].norm()


def dtypes_and_gradients(folder, settings: Settings):
    """Name of each parameter -> its dtype, whether it requires a gradient, whether it gets one."""
    model = load_reward_model(folder, settings)
    model(pack(made.pair_examples(made.token_pairs(3)), np.arange(3)))["loss"].backward()
    return {name: (p.dtype, p.requires_grad, p.grad is not None) for name, p in model.named_parameters()}


def test_a_frozen_base_is_stored_in_the_compute_dtype_and_gets_no_gradient(folder):
    (parameters,) = run_ranks(1, dtypes_and_gradients, folder, lora_settings(dtype="bfloat16"))
    for name, (dtype, trains, has_gradient) in parameters.items():
        new = lora.is_adapter(name) or name == "score.weight"
        assert (dtype, trains, has_gradient) == (torch.float32 if new else torch.bfloat16, new, new), name


def test_dropout_changes_the_training_and_repeats_with_the_seed(folder):
    with_dropout, repeated, without = (
        run_ranks(1, train_lora, folder, None, lora_settings(lora_dropout=dropout), 2)[0].lines
        for dropout in (0.5, 0.5, 0.0)
    )
    assert with_dropout == repeated and with_dropout[1] != without[1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"lora_target_modules": ("q_porj",)},
            "--lora_target_modules q_porj: no such linear layer; give some of down_proj",
        ),
        ({"lora_r": 99}, "--lora_r 99 is more than the 8 features of a target layer"),
    ],
)
def test_adapt_refuses_a_target_or_a_rank_that_does_not_fit(wrong, message):
    with torch.device("meta"):
        model = LanguageModel(replace(made.LLAMA, n_kv_heads=1), SplitAttention)
    with pytest.raises(ValueError, match=message):
        lora.adapt(model, lora_settings(**wrong).lora, torch.float32)


def test_new_adapters_change_neither_rewards_nor_existing_names():
    settings = lora_settings(lora_target_modules=("q_proj", "up_proj"))
    plain, adapted = made.model(RewardModel), made.model(RewardModel)
    lora.adapt(adapted, settings.lora, torch.float32)
    names = dict(adapted.named_parameters())
    assert names.keys() - dict(plain.named_parameters()).keys() == {n for n in names if lora.is_adapter(n)}
    assert len([n for n in names if lora.is_adapter(n)]) == 2 * 2 * made.LLAMA.n_layers
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if lora.is_adapter(name):
                p.copy_(lora.initial_values(name, p.shape, torch.Generator().manual_seed(0)))
    batch = pack(made.pair_examples(made.token_pairs(3)), np.arange(3))
    assert torch.equal(plain.rewards(batch), adapted.rewards(batch))


def local_sizes(folder, settings: Settings):
    """Name of each parameter -> the number of values that this rank holds, and that there are."""
    model = load_reward_model(folder, settings)
    return {name: (sharding.local(p).numel(), p.numel()) for name, p in model.named_parameters()}


@pytest.mark.parametrize("folder", ["gpt_neo"], indirect=True)
def test_without_shard_base_every_rank_holds_all_of_it_and_trains_the_same(folder):
    settings = lora_settings(dtype="float32")
    replicated = updated(settings, shard_base=False)
    sizes_of_ranks = run_ranks(2, local_sizes, folder, replicated)
    assert all(local == total for sizes in sizes_of_ranks for local, total in sizes.values())
    first, second = run_ranks(2, local_sizes, folder, settings)
    assert all(first[name][0] + second[name][0] == total for name, (_, total) in first.items())
    one, of_sharded, of_replicated = (
        torch.tensor(run_ranks(world, train_lora, folder, None, chosen)[0].lines)
        for world, chosen in ((1, settings), (2, settings), (2, replicated))
    )
    torch.testing.assert_close(of_replicated, one, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_replicated, of_sharded, rtol=1e-5, atol=1e-5)


def train_with_schedule(folder, settings: Settings, steps: int):
    """Losses; adapters and score head before and after; the indices of the examples of each step."""
    model = load_reward_model(folder, settings)
    optimizer = optim.adamw(model, settings.optim)
    examples = made.pair_examples(made.token_pairs(12))
    loader = Loader(examples, settings.batch, settings.packing, seed=0, attention_cost=ATTENTION_COST)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: sharding.full_tensor(p).clone() for name, p in trained.items()}
    losses, indices = [], []
    for s in range(steps):
        optim.set_learning_rate(optimizer, optim.learning_rate(s, steps, settings.optim))
        loss, _ = run_step(model, optimizer, loader.at(s))
        losses.append(loss)
        indices.append(loader.indices(s))
    return losses, before, {name: sharding.full_tensor(p) for name, p in trained.items()}, indices


def test_ten_steps_give_the_losses_and_adapters_that_peft_gives(folder):
    from transformers import AutoModelForSequenceClassification as Classifier

    settings = lora_settings(learning_rate=1e-3, num_train_epochs=5)
    ((losses, before, after, indices),) = run_ranks(1, train_with_schedule, folder, settings, 10)
    family = build.weights.read_config(folder)[1]
    adapted = {f"{name.rpartition('.')[0]}.weight" for name in before if lora.is_adapter(name)}
    targets = sorted({family.checkpoint_name(name).split(".")[-2] for name in adapted})
    base = Classifier.from_pretrained(folder, num_labels=1, pad_token_id=0)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=32, lora_dropout=0.0, target_modules=targets)
    peft_model = peft.get_peft_model(base, config).train()
    for module in peft_model.modules():
        if isinstance(module, torch.nn.Dropout):  # of GPT-Neo itself
            module.p = 0.0
    peft_model.config.pad_token_id = None
    peft_parameters = {}  # by our names
    for name, p in peft_model.named_parameters():
        if p.requires_grad:
            name = name.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", "")
            layer, _, matrix = name.removesuffix(".weight").rpartition(".")
            if "lora" in matrix:
                (weight,) = family.parameter_names(f"{layer}.weight")
                name = weight.replace("weight", matrix)
            peft_parameters[name] = p
    assert peft_parameters.keys() == before.keys()
    with torch.no_grad():
        for name, p in peft_parameters.items():
            p.copy_(before[name])
    optimizer = torch.optim.AdamW(peft_parameters.values(), lr=1e-3, weight_decay=0.0)
    pairs = made.token_pairs(12)
    for s in range(10):
        optimizer.param_groups[0]["lr"] = optim.learning_rate(s, 10, settings.optim)
        rewards = [[peft_model(torch.tensor([text])).logits[0, 0] for text in pairs[i]] for i in indices[s]]
        loss = -torch.nn.functional.logsigmoid(torch.stack([a - b for a, b in rewards])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peft_parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert losses[s] == pytest.approx(loss.item(), abs=1e-5)
    for name, p in peft_parameters.items():
        torch.testing.assert_close(after[name], p.detach(), rtol=1e-5, atol=1e-5)


def test_a_merge_that_changes_the_scores_is_refused_after_saving_the_adapter(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(build.adapter, "merge", lambda model: model.norm.weight.detach().mul_(1.1))
    with pytest.raises(RuntimeError, match="merging the adapter changes the model's output by"):
        run_ranks(1, train_lora, folder, tmp_path)
    assert (tmp_path / "adapter").is_dir() and not (tmp_path / "model").exists()
