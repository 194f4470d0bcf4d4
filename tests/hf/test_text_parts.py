"""rm.hf.families.multimodal and internlm2: folders that are saved as those of another family."""

import json
import shutil

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rm.data.batch import pack
from rm.distributed import process_group as dist
from rm.hf import adapter, build, saving, weights
from rm.model import lora
from rm.model.attention import SplitAttention
from rm.model.heads import LanguageModel, RewardModel
from tests import made, tiny
from tests.family_cases import gap, their_reward

VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
PIXTRAL = VISION | {"patch_size": 14, "head_dim": 8}
# model_type -> its vision_config, and the model_type of text_config
CASES = {
    "gemma3": (VISION | {"patch_size": 14}, "gemma3_text"),
    "mistral3": (PIXTRAL, "mistral"),
    "mistral3 of Ministral 3": (PIXTRAL, "ministral3"),
}
in_every_case = pytest.mark.parametrize("case", CASES)


def with_images(case: str, auto=transformers.AutoModelForImageTextToText, **settings):
    """A model of transformers that reads images, with random weights."""
    vision, text = CASES[case]
    text_config = tiny.SETTINGS[text] | {"model_type": text, "tie_word_embeddings": case == "gemma3"}
    config = transformers.AutoConfig.for_model(
        case.split()[0],
        text_config=text_config,
        vision_config=vision | {"model_type": "pixtral" if vision is PIXTRAL else "siglip_vision_model"},
        tie_word_embeddings=case == "gemma3",
        **settings,
    )
    return tiny.spread(auto.from_config(config))


def assert_close(actual, expected):
    assert gap(actual, expected) <= 1e-5


@pytest.mark.parametrize("published", [False, True], ids=["names of transformers", "published names"])
@in_every_case
def test_the_text_part_is_read_and_saved_as_a_text_model(tmp_path, capsys, case, published):
    hf_model, tokens = with_images(case), tiny.tokens(50)
    source = tiny.save_with(hf_model, tmp_path / "m")
    if published:
        tensors = load_file(source / "model.safetensors")
        renamed = {
            name.replace("model.language_model.", "language_model.model.")
            .replace("model.vision_tower.", "vision_tower.")
            .replace("model.multi_modal_projector.", "multi_modal_projector."): tensor
            for name, tensor in tensors.items()
        }
        if "lm_head.weight" in renamed:
            renamed["language_model.lm_head.weight"] = renamed.pop("lm_head.weight")
        save_file(renamed, source / "model.safetensors", metadata={"format": "pt"})
    expected = tiny.their_logits(hf_model, tokens)
    with dist.session(seed=0):
        model = tiny.ours(source)
        saving.save(model, tmp_path / "out", source, torch.float32)
    said = capsys.readouterr().out
    assert "only the text model is read;" in said and "vision_tower" in said
    assert f"is a {CASES[case][1]}, which transformers opens as" in said
    assert_close(tiny.logits(model, tokens), expected)
    opened, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert_close(tiny.their_logits(opened.eval(), tokens), expected)


def test_a_reward_model_of_gemma_3_is_read_and_saved_as_a_text_model(tmp_path):
    hf_model = with_images("gemma3", AutoModelForSequenceClassification, num_labels=1)
    source = tiny.save_with(hf_model, tmp_path / "m")
    assert build.head_of(source) is RewardModel
    model, pairs = tiny.ours(source, RewardModel), made.token_pairs(6, longest=40)
    with torch.no_grad():
        rewards = model.rewards(pack(made.pair_examples(pairs), np.arange(6)))
    assert_close(rewards, torch.stack([their_reward(hf_model, text) for pair in pairs for text in pair]))
    with dist.session(seed=0):
        saving.save(model, tmp_path / "out", source, torch.float32)
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert type(opened).__name__ == "Gemma3TextForSequenceClassification"
    opened.config.pad_token_id = None  # the exported one, which texts of random tokens end in
    assert_close(rewards, torch.stack([their_reward(opened, text) for pair in pairs for text in pair]))


@in_every_case
def test_peft_loads_the_adapter_of_a_text_part_on_the_whole_model(tmp_path, case):
    hf_model = with_images(case)
    peft_loads_the_adapter_on(hf_model, tiny.save_with(hf_model, tmp_path / "m"), tmp_path)


def peft_loads_the_adapter_on(hf_model, source, tmp_path):
    """A random adapter on the model in `source`, which `hf_model` is in transformers, computes the same in both."""
    tokens = tiny.tokens(50)
    config, family, _ = weights.read_config(source)
    model = LanguageModel(config, SplitAttention)
    settings = lora.LoraSettings(lora_r=4, lora_dropout=0.0, lora_target_modules=("q_proj", "v_proj"))
    lora.adapt(model, settings, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if lora.is_adapter(name):
                parameter.normal_(std=0.2)
    with dist.session(seed=0):
        weights.load(model, source)
        adapter.save(model, tmp_path / "adapter", str(source), settings, family)
    expected = tiny.logits(model, tokens)
    assert (expected - tiny.their_logits(hf_model, tokens)).abs().max() > 0.1
    assert_close(
        tiny.their_logits(peft.PeftModel.from_pretrained(hf_model, tmp_path / "adapter").eval(), tokens), expected
    )
    assert_close(tiny.logits(tiny.ours(tmp_path / "adapter"), tokens), expected)


def test_a_text_part_of_another_family_is_refused_by_name(tmp_path):
    hf = {"model_type": "mistral3", "text_config": tiny.LLAMA | {"model_type": "qwen2"}}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ValueError, match="text_config.model_type 'qwen2' is not supported, only mistral, ministral3"):
        weights.read_config(tmp_path)


def test_exaone_3_is_a_llama_by_other_names(tmp_path):
    """transformers has the same names in its table of conversions, and reads the folder."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | {
        "original_max_position_embeddings": 16
    }
    hf_model = tiny.llama(num_key_value_heads=2, head_dim=16, rope_parameters=rope | {"rope_theta": 5e5})
    llama, tokens = tiny.save_with(hf_model, tmp_path / "llama"), tiny.tokens(60)
    source = tmp_path / "exaone"
    source.mkdir()
    names = {
        "model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f", "model.layers": "transformer.h",
        "self_attn.o_proj": "self_attn.out_proj", "self_attn": "attn.attention", "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2", "mlp.gate_proj": "mlp.c_fc_0", "mlp.up_proj": "mlp.c_fc_1",
        "mlp.down_proj": "mlp.c_proj",
    }  # fmt: skip
    renamed = load_file(llama / "model.safetensors")
    for ours, theirs in names.items():
        renamed = {name.replace(ours, theirs): tensor for name, tensor in renamed.items()}
    save_file(renamed, source / "model.safetensors")
    hf = {name: value for name, value in tiny.LLAMA.items() if name != "num_hidden_layers"} | {
        "model_type": "exaone", "num_layers": 2, "num_key_value_heads": 2, "head_dim": 16, "rope_scaling": rope,
        "activation_function": "silu", "layer_norm_epsilon": 1e-6, "architectures": ["ExaoneForCausalLM"],
        "embed_dropout": 0.0, "auto_map": {"AutoModelForCausalLM": "modeling_exaone.ExaoneForCausalLM"},
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(hf))
    expected = tiny.their_logits(hf_model, tokens)
    theirs = AutoModelForCausalLM.from_pretrained(source).eval()
    assert_close(tiny.their_logits(theirs, tokens), expected)
    peft_loads_the_adapter_on(theirs, source, tmp_path)
    model = tiny.ours(source)
    assert_close(tiny.logits(model, tokens), expected)
    with dist.session(seed=0):
        saving.save(model, tmp_path / "out", source, torch.float32)
    opened, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and opened.config.model_type == "llama"
    assert_close(tiny.their_logits(opened.eval(), tokens), expected)


@pytest.mark.parametrize("bias", [False, True])
def test_internlm2_is_a_llama_with_fused_q_k_and_v(tmp_path, bias):
    """The layout is that of modeling_internlm2.py: wqkv.view(kv heads, q heads of a kv head + 2, head width, ...)."""
    hf_model, tokens = tiny.llama(num_key_value_heads=2, attention_bias=bias), tiny.tokens(60)
    llama = tiny.save_with(hf_model, tmp_path / "llama")
    names = {
        "embed_tokens": "tok_embeddings", "input_layernorm": "attention_norm", "self_attn.o_proj": "attention.wo",
        "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2", "lm_head": "output",
    }  # fmt: skip
    tensors, renamed = load_file(llama / "model.safetensors"), {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            q, k, v = (tensors[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj"))
            parts = [q.unflatten(0, (2, 2, 8)), k.unflatten(0, (2, 1, 8)), v.unflatten(0, (2, 1, 8))]
            renamed[name.replace("self_attn.q_proj", "attention.wqkv")] = torch.cat(parts, 1).flatten(0, 2)
        elif ".k_proj." not in name and ".v_proj." not in name:
            renamed[next((name.replace(a, b) for a, b in names.items() if a in name), name)] = tensor
    source = tmp_path / "internlm2"
    source.mkdir()
    save_file(renamed, source / "model.safetensors")
    hf = tiny.LLAMA | {
        "model_type": "internlm2", "num_key_value_heads": 2, "bias": bias, "attn_implementation": "eager",
        "architectures": ["InternLM2ForCausalLM"], "auto_map": {"AutoModel": "modeling_internlm2.InternLM2Model"},
        "rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 10000, "hidden_act": "silu",
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(hf))
    model = tiny.ours(source)
    assert model.config.longest_text == hf["max_position_embeddings"]
    assert_close(tiny.logits(model, tokens), tiny.their_logits(hf_model, tokens))
    with dist.session(seed=0):
        saving.save(model, tmp_path / "out", source, torch.float32)
    opened, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and type(opened).__name__ == "LlamaForCausalLM"
    shutil.rmtree(source)
    assert_close(tiny.their_logits(opened.eval(), tokens), tiny.their_logits(hf_model, tokens))
