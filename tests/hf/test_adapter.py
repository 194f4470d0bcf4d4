"""rm.hf.adapter: what peft saved reads here as the model that peft makes of it, on any number of ranks."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from rm.data import batch
from rm.data.tokenizer import Tokenizer
from rm.hf import build, weights
from rm.model.heads import LanguageModel, RewardModel
from rm.scoring.score import all_rewards
from tests import made, text_fixtures, tiny
from tests.model.test_lora import Settings, train
from tests.ranks import run_ranks

peft = pytest.importorskip("peft")
PAIRS = made.token_pairs(5, seed=9)


@pytest.fixture(params=["llama", "gpt_neo"])
def folder(request, tmp_path):
    text_fixtures.byte_level(tmp_path / "base")
    getattr(tiny, request.param)(vocab_size=400).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def by_peft(base, out, head="SEQ_CLS", **config):
    """An adapter of random matrices that peft made and saved, and the model that it makes of its base."""
    import transformers

    if head == "SEQ_CLS":
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(task_type=head, **{"r": 4, "target_modules": ["q_proj", "v_proj"]} | config)
    model = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    model.save_pretrained(out)
    model.config.pad_token_id = None
    return model


@torch.no_grad()
def their_scores(model):
    return torch.tensor([[model(torch.tensor([text])).logits.item() for text in pair] for pair in PAIRS])


def our_scores(settings, head=RewardModel):
    model = build.load(head, settings, train=False)
    return all_rewards(model, batch.EvalBatches(made.pair_examples(PAIRS), settings))


@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"alpha_pattern": {"v_proj": 3}, "rank_pattern": {"v_proj": 2}}]
)
@pytest.mark.parametrize("world", [1, 2])
def test_an_adapter_that_peft_saved_scores_as_it_does_there(folder, tmp_path, config, world):
    theirs = their_scores(by_peft(folder, tmp_path / "adapter", **config))
    for ours in run_ranks(world, our_scores, Settings(model_name_or_path=str(tmp_path / "adapter"))):
        torch.testing.assert_close(ours.view(-1, 2), theirs, rtol=1e-5, atol=1e-5)


def test_our_own_adapter_and_its_merged_model_score_the_same(folder, tmp_path):
    settings = Settings(model_name_or_path=str(folder))
    run_ranks(1, train, settings, tmp_path)
    apart, merged = (
        run_ranks(1, our_scores, replace(settings, model_name_or_path=str(tmp_path / form)))[0]
        for form in ("adapter", "model")
    )
    torch.testing.assert_close(apart, merged, rtol=1e-5, atol=1e-5)


def test_a_reward_model_trains_on_top_of_an_sft_adapter_as_on_the_merged_model(folder, tmp_path):
    model = by_peft(folder, tmp_path / "sft", "CAUSAL_LM")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    settings = Settings(model_name_or_path=str(tmp_path / "sft"))
    (on_adapter, scores, *_), (on_merged, others, *_) = (
        run_ranks(1, train, replace(settings, model_name_or_path=str(tmp_path / base)), tmp_path / f"on_{base}")[0]
        for base in ("sft", "merged")
    )
    torch.testing.assert_close(torch.tensor(on_adapter), torch.tensor(on_merged), rtol=1e-4, atol=1e-5)
    ours = run_ranks(1, our_scores, replace(settings, model_name_or_path=str(tmp_path / "on_sft" / "adapter")))[0]
    torch.testing.assert_close(ours, scores, rtol=1e-4, atol=1e-4)  # an adapter on an adapter on a base
    torch.testing.assert_close(ours, others, rtol=1e-3, atol=1e-3)


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(folder, tmp_path):
    by_peft(folder, tmp_path / "adapter")
    assert Tokenizer(tmp_path / "adapter").fingerprint == Tokenizer(folder).fingerprint


def error(settings, head=RewardModel):
    with pytest.raises(RuntimeError) as caught:
        run_ranks(1, our_scores, settings, head)
    return str(caught.value)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_does_not_belong_together_is_refused_by_name(tmp_path):
    tiny.llama(vocab_size=400).save_pretrained(tmp_path / "base")
    tiny.llama(vocab_size=400, hidden_size=64).save_pretrained(tmp_path / "wider")
    tiny.gpt_neo(vocab_size=400).save_pretrained(tmp_path / "other")
    out = tmp_path / "adapter"
    by_peft(tmp_path / "base", out)
    settings, config = Settings(model_name_or_path=str(out)), out / "adapter_config.json"

    edit(config, base_model_name_or_path=str(tmp_path / "wider"))
    assert "belongs to another base: " in (said := error(settings)) and "on (64, 64)" in said
    edit(config, base_model_name_or_path=str(tmp_path / "other"))
    assert "belongs to another base: it has 8 unknown tensors, such as base_model.model.model.layers.0" in error(
        settings
    )
    edit(config, base_model_name_or_path=str(tmp_path / "nowhere"))
    assert "is an adapter without its base" in error(settings)
    edit(config, base_model_name_or_path=str(tmp_path / "base"), use_dora=True)
    assert "use_dora True is not implemented" in error(settings)
    edit(config, use_dora=False)
    with pytest.raises(ValueError, match="is a reward model's adapter"):
        weights.load(_plain(tmp_path / "base"), out)
    (out / "adapter_model.safetensors").write_bytes(b"cut")
    assert "adapter_model.safetensors is not a whole safetensors file" in error(settings)


def _plain(folder):
    config, *_ = weights.read_config(folder)
    return LanguageModel(config, made.SplitAttention)


def test_a_matrix_that_is_missing_is_not_taken_for_zero(tmp_path):
    tiny.llama(vocab_size=400).save_pretrained(tmp_path / "base")
    by_peft(tmp_path / "base", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, file)
    assert "is not a whole safetensors file" in error(Settings(model_name_or_path=str(tmp_path / "adapter")))


def test_a_whole_model_beside_an_adapters_settings_is_read_as_the_model(tmp_path):
    tiny.llama(vocab_size=400).save_pretrained(tmp_path / "base")
    by_peft(tmp_path / "base", tmp_path / "adapter")
    shutil.copy(tmp_path / "adapter" / "adapter_config.json", tmp_path / "base")
    assert weights.foundation(tmp_path / "base") == tmp_path / "base"
