"""rm.model.lora against peft: what is trained, what it computes, what is saved."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from rm.data import batch
from rm.distributed import sharding
from rm.hf import build
from rm.model import lisa, lora
from rm.model.attention import SplitAttention
from rm.model.heads import LanguageModel, RewardModel
from rm.scoring import score
from rm.training import optim, step
from tests import made, text_fixtures, tiny
from tests.ranks import run_ranks

peft = pytest.importorskip("peft")


@dataclass(frozen=True, kw_only=True)
class Settings(
    build.ModelSettings, batch.BatchSettings, batch.PackingSettings, optim.OptimSettings, lora.LoraSettings,
    lisa.LisaSettings, sharding.ParallelSettings,
):  # fmt: skip
    seed: int = 0
    max_length: int = 64
    use_lora: bool = True
    lora_r: int = 4
    lora_dropout: float = 0.0
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    learning_rate: float = 1e-2
    global_batch_size: int = 6
    max_tokens: int = 60


@pytest.fixture(params=["llama", "gpt_neo"])
def folder(request, tmp_path):
    """A tiny base model of each family, as a reward model would start from it."""
    text_fixtures.byte_level(tmp_path / "base")
    getattr(tiny, request.param)(vocab_size=400).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def train(settings: Settings, out, steps: int = 3):
    """Losses and gradient norms of some steps; the adapter and the merged model are saved."""
    model = build.load(RewardModel, settings)
    optimizer = optim.adamw(model, settings)
    loader = batch.Loader(made.pair_examples(made.token_pairs(12)), settings, 0, 0.01)
    lines = []
    for s in range(steps):
        work = loader.at(s)
        sums = step.train_step(model, optimizer, work, settings.max_grad_norm)
        loss = step.dist.sum_over_ranks(sums["loss"].clone()) / work.examples
        lines.append((loss.item(), sums["grad_norm"].item()))
    if out is not None:
        build.save(model, out, settings, batch.pack(made.pair_examples(made.token_pairs(3)), range(3)))
    scores = score.all_rewards(model, batch.EvalBatches(made.pair_examples(made.token_pairs(5, seed=9)), settings))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    states = {name for name, p in model.named_parameters() if p in optimizer.state}
    return lines, scores, trained, states


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_the_adapter_and_transformers_the_merged_model_and_both_score_as_we_do(folder, tmp_path, rslora):
    from transformers import AutoModelForSequenceClassification as Classifier

    settings = Settings(model_name_or_path=str(folder), use_rslora=rslora)
    ((lines, scores, trained, states),) = run_ranks(1, train, settings, tmp_path)
    assert trained == states and all(lora.is_adapter(n) or n == "score.weight" for n in trained)
    assert lines[-1][0] != lines[0][0]

    base = Classifier.from_pretrained(folder, num_labels=1, pad_token_id=0)
    adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    merged = Classifier.from_pretrained(tmp_path / "model").eval()
    for model in (adapted, merged):
        model.config.pad_token_id = None  # one text at a time: the last token is the last token
        with torch.no_grad():
            rows = [[model(torch.tensor([text])).logits.item() for text in p] for p in made.token_pairs(5, seed=9)]
        torch.testing.assert_close(torch.tensor(rows).flatten(), scores, rtol=1e-5, atol=1e-5)


def test_the_adapters_tokenizer_names_a_padding_that_does_not_hide_the_eos(folder, tmp_path):
    """Where the base pads with its EOS, transformers would read the reward one token early."""
    from transformers import AutoModelForSequenceClassification as Classifier
    from transformers import AutoTokenizer

    from rm.data.tokenizer import Tokenizer
    from rm.scoring.scorer import Scorer

    for file in (folder / "tokenizer_config.json", folder / "config.json"):
        held = json.loads(file.read_text())
        eos = {"pad_token": held["eos_token"]} if "eos_token" in held else {"pad_token_id": Tokenizer(folder).eos_id}
        file.write_text(json.dumps(held | eos))
    run_ranks(1, train, Settings(model_name_or_path=str(folder)), tmp_path)
    base = Classifier.from_pretrained(folder, num_labels=1)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    base.config.pad_token_id = tokenizer.pad_token_id
    texts = ["hello", "good bye to all of you"]
    batch = tokenizer([text + tokenizer.eos_token for text in texts], padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**batch).logits[:, 0].tolist()
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert theirs == pytest.approx(Scorer(tmp_path / "adapter").score(texts), abs=1e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_train_save_and_score_as_one_does(folder, tmp_path, world):
    from safetensors.torch import load_file

    settings = Settings(model_name_or_path=str(folder), gradient_checkpointing="full" if world == 2 else "none")
    ((one, scores, *_),) = run_ranks(1, train, settings, tmp_path / "one")
    for lines, others, *_ in run_ranks(world, train, settings, tmp_path / "many"):
        torch.testing.assert_close(torch.tensor(lines), torch.tensor(one), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(others, scores, rtol=1e-4, atol=1e-5)
    a, b = (load_file(tmp_path / which / "adapter" / "adapter_model.safetensors") for which in ("one", "many"))
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name] - b[name]).norm() <= 1e-3 * a[name].norm()


def frozen(settings: Settings):
    model = build.load(RewardModel, settings)
    row = batch.pack(made.pair_examples(made.token_pairs(3)), np.arange(3))
    model(row)["loss"].backward()
    return {name: (p.dtype, p.requires_grad, p.grad is not None) for name, p in model.named_parameters()}


def test_a_frozen_base_is_held_in_what_it_computes_in_and_gets_no_gradient(folder):
    (found,) = run_ranks(1, frozen, Settings(model_name_or_path=str(folder), dtype="bfloat16"))
    for name, (dtype, trains, has_gradient) in found.items():
        new = lora.is_adapter(name) or name == "score.weight"
        assert (dtype, trains, has_gradient) == (torch.float32 if new else torch.bfloat16, new, new), name


def test_dropout_is_drawn_anew_each_step_and_repeats_with_the_seed(folder):
    settings = Settings(model_name_or_path=str(folder), lora_dropout=0.5)
    first, again = (run_ranks(1, train, settings, None, 2)[0][0] for _ in range(2))
    other = run_ranks(1, train, replace(settings, lora_dropout=0.0), None, 2)[0][0]
    assert first == again and first[1] != other[1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"lora_target_modules": ("q_porj",)},
            "--lora_target_modules q_porj: no such linear layer; there are down_proj",
        ),
        ({"lora_r": 99}, "--lora_r 99 is more than the 8 that a target is wide"),
    ],
)
def test_a_target_or_a_rank_that_does_not_fit_is_refused(wrong, message):
    with torch.device("meta"):
        model = LanguageModel(replace(made.LLAMA, n_kv_heads=1), SplitAttention)
    with pytest.raises(ValueError, match=message):
        lora.adapt(model, replace(Settings(model_name_or_path=""), **wrong), torch.float32)


def test_an_adapter_starts_as_nothing_and_leaves_all_names_as_they_are():
    settings = replace(Settings(model_name_or_path=""), lora_target_modules=("q_proj", "up_proj"))
    plain, adapted = made.model(RewardModel), made.model(RewardModel)
    lora.adapt(adapted, settings, torch.float32)
    names = dict(adapted.named_parameters())
    assert names.keys() - dict(plain.named_parameters()).keys() == {n for n in names if lora.is_adapter(n)}
    assert len([n for n in names if lora.is_adapter(n)]) == 2 * 2 * made.LLAMA.n_layers
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if lora.is_adapter(name):
                p.copy_(lora.drawn(name, p.shape, torch.Generator().manual_seed(0)))
    row = batch.pack(made.pair_examples(made.token_pairs(3)), np.arange(3))
    assert torch.equal(plain.rewards(row), adapted.rewards(row))


def held(settings: Settings):
    model = build.load(RewardModel, settings)
    return {name: (sharding.local(p).numel(), p.numel()) for name, p in model.named_parameters()}


def test_a_base_that_is_not_sharded_lies_whole_on_every_rank_and_trains_the_same(folder):
    settings = Settings(model_name_or_path=str(folder), dtype="float32")
    copied = replace(settings, shard_base=False)
    assert all(mine == all_ for ranks in run_ranks(2, held, copied) for mine, all_ in ranks.values())
    first, second = run_ranks(2, held, settings)
    assert all(first[name][0] + second[name][0] == all_ for name, (_, all_) in first.items())
    (one, *_), (sharded, *_), (whole, *_) = (
        run_ranks(n, train, s, None)[0] for n, s in ((1, settings), (2, settings), (2, copied))
    )
    torch.testing.assert_close(torch.tensor(whole), torch.tensor(one), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(whole), torch.tensor(sharded), rtol=1e-5, atol=1e-5)


def matrices(settings: Settings, steps: int):
    """Our losses, and the adapters and score head before and after."""
    model = build.load(RewardModel, settings)
    optimizer = optim.adamw(model, settings)
    loader = batch.Loader(made.pair_examples(made.token_pairs(12)), settings, 0, 0.01)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: sharding.full_tensor(p).clone() for name, p in trained.items()}
    losses, numbers = [], []
    for s in range(steps):
        optim.set_learning_rate(optimizer, optim.learning_rate(s, steps, settings))
        work = loader.at(s)
        losses.append(step.train_step(model, optimizer, work, 1.0)["loss"].item() / work.examples)
        numbers.append(loader.indices(s))
    return losses, before, {name: sharding.full_tensor(p) for name, p in trained.items()}, numbers


def test_ten_steps_give_the_losses_and_the_matrices_that_peft_gives(folder):
    from transformers import AutoModelForSequenceClassification as Classifier

    settings = Settings(model_name_or_path=str(folder), learning_rate=1e-3, num_train_epochs=5)
    ((losses, before, after, numbers),) = run_ranks(1, matrices, settings, 10)
    family = build.weights.read_config(folder)[1]
    targets = sorted(
        {family.theirs(f"{n.rpartition('.')[0]}.weight").split(".")[-2] for n in before if lora.is_adapter(n)}
    )
    base = Classifier.from_pretrained(folder, num_labels=1, pad_token_id=0)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=32, lora_dropout=0.0, target_modules=targets)
    theirs = peft.get_peft_model(base, config).train()
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):  # of GPT-Neo itself
            module.p = 0.0
    theirs.config.pad_token_id = None
    named = {}
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            plain = name.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", "")
            layer, matrix = plain.removesuffix(".weight").rpartition(".")[::2]
            ours = "".join(family.ours(f"{layer}.weight"))
            named[ours.replace("weight", matrix) if "lora" in matrix else plain] = p
    assert named.keys() == before.keys()
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(before[name])
    optimizer = torch.optim.AdamW(named.values(), lr=1e-3, weight_decay=0.0)
    pairs = made.token_pairs(12)
    for s in range(10):
        optimizer.param_groups[0]["lr"] = optim.learning_rate(s, 10, settings)
        rewards = [[theirs(torch.tensor([text])).logits[0, 0] for text in pairs[i]] for i in numbers[s]]
        loss = -torch.nn.functional.logsigmoid(torch.stack([a - b for a, b in rewards])).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert losses[s] == pytest.approx(loss.item(), abs=1e-5)
    for name, p in named.items():
        torch.testing.assert_close(after[name], p.detach(), rtol=1e-5, atol=1e-5)


def test_a_merge_that_changes_the_scores_is_refused_when_the_adapter_is_saved(folder, tmp_path, monkeypatch):
    settings = Settings(model_name_or_path=str(folder))
    monkeypatch.setattr(build.adapter, "merge", lambda model: [p.mul_(1.1) for p in [model.norm.weight.detach()]])
    with pytest.raises(RuntimeError, match="merging moves what the model says by"):
        run_ranks(1, train, settings, tmp_path)
    assert (tmp_path / "adapter").is_dir() and not (tmp_path / "model").exists()
