"""rm.hf.adapter: an adapter that peft saved is loaded as the model that peft makes of it, on any number of ranks."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rm.data.batch import EvalBatches
from rm.data.tokenizer import Tokenizer
from rm.hf import hub, weights
from rm.model.attention import SplitAttention
from rm.model.heads import LanguageModel, RewardModel
from rm.scoring.score import all_rewards
from tests import made, text_fixtures, tiny
from tests.ranks import run_ranks
from tests.training_runs import load_reward_model, lora_settings, train_lora

peft = pytest.importorskip("peft")
PAIRS = made.token_pairs(5, seed=9)


@pytest.fixture(params=["llama", "gpt_neo"])
def folder(request, tmp_path):
    text_fixtures.byte_level(tmp_path / "base")
    getattr(tiny, request.param)(vocab_size=400).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def peft_model(base, out, head="SEQ_CLS", **config):
    """A peft model of `base` with a random adapter, which is saved to `out`."""
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


def our_scores(folder):
    settings = lora_settings()
    model = load_reward_model(folder, settings, train=False)
    return all_rewards(model, EvalBatches(made.pair_examples(PAIRS), settings.packing))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"v_proj": 3}, "rank_pattern": {"v_proj": 2}},
        # Anchored at the beginning of the name, as peft documents it; and two patterns, of which the first counts.
        {"alpha_pattern": {r"^(model|transformer)\.(layers|h)\.0\..*q_proj": 64}},
        {"alpha_pattern": {r"(layers|h)\.1\..*": 5, "q_proj": 40}},
        {"init_lora_weights": "gaussian"},
    ],
)
@pytest.mark.parametrize("world", [1, 2])
def test_an_adapter_saved_by_peft_gives_the_scores_that_peft_gives(folder, tmp_path, config, world):
    expected = their_scores(peft_model(folder, tmp_path / "adapter", **config))
    for scores in run_ranks(world, our_scores, tmp_path / "adapter"):
        torch.testing.assert_close(scores.view(-1, 2), expected, rtol=1e-5, atol=1e-5)


def test_a_saved_adapter_and_its_merged_model_give_the_same_scores(folder, tmp_path):
    run_ranks(1, train_lora, folder, tmp_path)
    of_adapter, of_merged = (run_ranks(1, our_scores, tmp_path / form)[0] for form in ("adapter", "model"))
    torch.testing.assert_close(of_adapter, of_merged, rtol=1e-5, atol=1e-5)


def test_training_on_an_sft_adapter_equals_training_on_the_merged_model(folder, tmp_path):
    model = peft_model(folder, tmp_path / "sft", "CAUSAL_LM")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    on_adapter, on_merged = (
        run_ranks(1, train_lora, tmp_path / base, tmp_path / f"on_{base}")[0] for base in ("sft", "merged")
    )
    torch.testing.assert_close(torch.tensor(on_adapter.lines), torch.tensor(on_merged.lines), rtol=1e-4, atol=1e-5)
    # The new adapter's base is an adapter again.
    loaded = run_ranks(1, our_scores, tmp_path / "on_sft" / "adapter")[0]
    torch.testing.assert_close(loaded, on_adapter.scores, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded, on_merged.scores, rtol=1e-3, atol=1e-3)


def test_peft_loads_an_adapter_that_was_trained_on_an_adapter(folder, tmp_path):
    """It names a full model as its base, since peft loads an adapter on nothing else. All have its tokenizer."""
    import transformers

    peft_model(folder, tmp_path / "sft", "CAUSAL_LM")
    text_fixtures.llama_like(tmp_path / "sft")  # a tokenizer of its own
    (trained,) = run_ranks(1, train_lora, tmp_path / "sft", tmp_path / "rm")
    for written in ("adapter", "base", "model"):  # what the new adapter was trained with, not that of its base
        tokenizers = [(path / "tokenizer.json").read_bytes() for path in (tmp_path / "rm" / written, tmp_path / "sft")]
        assert tokenizers[0] == tokenizers[1]
    base = json.loads((tmp_path / "rm" / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.config.pad_token_id = None
    theirs = their_scores(peft.PeftModel.from_pretrained(model, str(tmp_path / "rm" / "adapter")).eval())
    torch.testing.assert_close(trained.scores.view(-1, 2), theirs, rtol=1e-4, atol=1e-4)


def test_an_adapter_without_a_tokenizer_has_the_tokenizer_of_its_base(folder, tmp_path):
    peft_model(folder, tmp_path / "adapter")
    tokenizer = Tokenizer(hub.tokenizer_folder(tmp_path / "adapter"))
    assert tokenizer.fingerprint == Tokenizer(folder).fingerprint


def error(folder):
    with pytest.raises(RuntimeError) as caught:
        run_ranks(1, our_scores, folder)
    return str(caught.value)


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_an_adapter_that_does_not_fit_its_base_is_refused(tmp_path):
    tiny.llama(vocab_size=400).save_pretrained(tmp_path / "base")
    tiny.llama(vocab_size=400, hidden_size=64).save_pretrained(tmp_path / "wider")
    tiny.gpt_neo(vocab_size=400).save_pretrained(tmp_path / "other")
    out = tmp_path / "adapter"
    peft_model(tmp_path / "base", out)
    config = out / "adapter_config.json"

    edit(config, base_model_name_or_path=str(tmp_path / "wider"))
    assert "belongs to another base: base_model.model.score.weight has the shape (1, 32), not (1, 64)" in error(out)
    edit(config, base_model_name_or_path=str(tmp_path / "other"))
    assert "belongs to another base: it has 8 unknown tensors, such as base_model.model.model.layers.0" in error(out)
    edit(config, base_model_name_or_path=str(tmp_path / "nowhere"))
    assert "is an adapter without its base" in error(out)
    edit(config, base_model_name_or_path=str(tmp_path / "base"))
    with pytest.raises(ValueError, match="is a reward model's adapter"):
        weights.load(_language_model(tmp_path / "base"), out)
    (out / "adapter_model.safetensors").write_bytes(b"cut")
    assert "adapter_model.safetensors is not a whole safetensors file" in error(out)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora True is not implemented"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not implemented, only 'LORA'"),
        ({"bias": "all"}, "bias 'all' is not implemented"),
        # These change the base's own weights when peft loads the adapter.
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' is not implemented"),
        ({"init_lora_weights": "olora"}, "init_lora_weights 'olora' is not implemented"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens [5, 6] is not implemented"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication [[0, 2], [1, 3]] is not implemented"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices [3] is not implemented"),
        ({"a_method_of_next_year": {"on": True}}, "a_method_of_next_year {'on': True} is not implemented"),
        ({"lora_alpha": "16"}, "lora_alpha '16' has to be of type number"),
        ({"lora_alpha": True}, "lora_alpha True has to be of type number"),
        ({"r": 0}, "r 0 has to be at least 1"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern['q_proj'] '4' has to be of type whole number"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern['q_proj'] 'x' has to be of type number"),
        ({"alpha_pattern": {"(.*.*)*x": 3}}, "alpha_pattern '(.*.*)*x' repeats a group"),
        ({"alpha_pattern": {"(?x:(.+) +)x": 3}}, "alpha_pattern '(?x:(.+) +)x' repeats a group, sets flags"),
        ({"alpha_pattern": {".?" * 50 + "x": 3}}, "has more than four groups and repetitions"),
        ({"rank_pattern": {"(.|..)" * 30 + "x": 3}}, "has more than four groups and repetitions"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path 3 has to be of type string"),
        ({"alpha_pattern": {"a{1,9999999999}": 3}}, "alpha_pattern 'a{1,9999999999}' is not a regular expression"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern '(' is not a regular expression"),
    ],
)
def test_what_an_adapter_config_says_beyond_b_a_is_refused_by_name(tmp_path, changes, named):
    tiny.llama(vocab_size=400).save_pretrained(tmp_path / "base")
    peft_model(tmp_path / "base", tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", **changes)
    with pytest.raises(ValueError) as caught:
        weights.load(_language_model(tmp_path / "base"), tmp_path / "adapter")
    assert named in str(caught.value) and "adapter_config.json: " in str(caught.value)


def test_features_that_are_off_and_null_are_not_refused(tmp_path):
    tiny.llama(vocab_size=400).save_pretrained(tmp_path / "base")
    expected = their_scores(peft_model(tmp_path / "base", tmp_path / "adapter"))
    off = {"a_method_of_next_year": None, "another": False, "a_third": {}, "use_dora": None, "lora_alpha": 8.0}
    edit(tmp_path / "adapter" / "adapter_config.json", **off)
    text_fixtures.byte_level(tmp_path / "adapter")
    scores = run_ranks(1, our_scores, tmp_path / "adapter")[0]
    torch.testing.assert_close(scores.view(-1, 2), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["embed_tokens", "q_proj"]])
def test_an_adapter_of_embeddings_is_refused_for_what_it_is(tmp_path, targets):
    tiny.llama(vocab_size=400).save_pretrained(tmp_path / "base")
    peft_model(tmp_path / "base", tmp_path / "adapter", target_modules=targets)
    assert "the adapter adapts embeddings (" in error(tmp_path / "adapter")


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_a_replaced_embedding_or_head_of_a_tied_base_is_refused(tmp_path, module):
    """peft keeps the other one as the base has it: the two are no longer tied."""
    tiny.llama(vocab_size=400, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    peft_model(tmp_path / "base", tmp_path / "adapter", "CAUSAL_LM", modules_to_save=[module])
    with pytest.raises(ValueError, match=f"replaces .*{module}.*, and its base ties embedding and head"):
        weights.load(_language_model(tmp_path / "base"), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("changes", "declared"), [({"r": 99}, 99), ({"rank_pattern": {r"^model\.layers\.0\..*q_proj": 3}}, 3)]
)
def test_matrices_of_another_rank_than_the_config_says_are_refused(tmp_path, changes, declared):
    """The scale depends on the rank. peft refuses them, too."""
    tiny.llama(vocab_size=400).save_pretrained(tmp_path / "base")
    peft_model(tmp_path / "base", tmp_path / "adapter", "CAUSAL_LM")
    edit(tmp_path / "adapter" / "adapter_config.json", **changes)
    with pytest.raises(ValueError, match=rf"the rank of .*q_proj is {declared}, and its tensors have 4"):
        weights.load(_language_model(tmp_path / "base"), tmp_path / "adapter")


def test_a_wider_base_is_refused_for_its_language_model_too(tmp_path):
    tiny.llama(vocab_size=400).save_pretrained(tmp_path / "base")
    tiny.llama(vocab_size=400, hidden_size=64).save_pretrained(tmp_path / "wider")
    peft_model(tmp_path / "base", tmp_path / "adapter", "CAUSAL_LM")
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "wider"))
    with pytest.raises(ValueError, match=r"belongs to another base: .* for a weight of \(64, 64\)"):
        weights.load(_language_model(tmp_path / "wider"), tmp_path / "adapter")


def test_an_adapted_lm_head_with_a_weight_of_its_own_is_read_as_peft_reads_it(tmp_path):
    """peft writes the weight of an adapted head, which here is not that of the base, beside its matrices."""
    import transformers

    tiny.llama(vocab_size=400).save_pretrained(tmp_path / "base")
    peft_model(tmp_path / "base", tmp_path / "adapter", "CAUSAL_LM", target_modules=["q_proj", "lm_head"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.base_layer.weight"] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    expected = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload().lm_head.weight
    model = _language_model(tmp_path / "base")
    weights.load(model, tmp_path / "adapter")
    torch.testing.assert_close(model.lm_head.weight, expected, rtol=1e-5, atol=1e-5)


def _language_model(folder):
    config, *_ = weights.read_config(folder)
    return LanguageModel(config, SplitAttention)


def test_an_adapter_that_lacks_a_matrix_is_refused(tmp_path):
    tiny.llama(vocab_size=400).save_pretrained(tmp_path / "base")
    peft_model(tmp_path / "base", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, file)
    assert "has only one of A and B for base_model.model.model.layers.0.self_attn." in error(tmp_path / "adapter")


def test_an_adapter_whose_head_is_not_finite_is_refused(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    peft_model(tmp_path / "base", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    (head,) = (name for name in tensors if "score" in name)
    save_file(tensors | {head: tensors[head].fill_(float("nan"))}, file)
    with pytest.raises(ValueError, match=rf"adapter_model.safetensors: {head}, the reward head, holds numbers that"):
        tiny.ours(tmp_path / "adapter", RewardModel)


def test_a_full_model_with_an_adapter_config_is_loaded_as_the_full_model(tmp_path):
    tiny.llama(vocab_size=400).save_pretrained(tmp_path / "base")
    peft_model(tmp_path / "base", tmp_path / "adapter")
    shutil.copy(tmp_path / "adapter" / "adapter_config.json", tmp_path / "base")
    assert weights.base_folder(tmp_path / "base") == tmp_path / "base"
