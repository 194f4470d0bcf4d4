"""Cases of every model family, and how far rm's model is from that of transformers: for tests and benchmarks."""

import numpy as np
import torch
from torch.nn.functional import cross_entropy, logsigmoid

from rm.data.batch import pack
from rm.hf import weights
from tests import made, tiny

LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 5e5,
}  # fmt: skip
YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
LINEAR_ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.5, 2.0], "long_factor": [1.0, 2.0, 5.0, 9.0],
    "rope_theta": 1e4,
}  # fmt: skip
CASES = [
    ("gemma", "untied", {"tie_word_embeddings": False}),
    ("gemma3_text", "linear rope", {"rope_parameters": {"full_attention": LINEAR_ROPE, "sliding_attention": None}}),
    ("gpt2", "untied, narrow, relu", {"tie_word_embeddings": False, "n_inner": 40, "activation_function": "relu"}),
    ("gpt2", "silu", {"activation_function": "silu"}),
    ("llama", "exact GELU", {"hidden_act": "gelu"}),
    ("exaone4", "no window", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    ("gemma2", "no caps", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("granitemoehybrid", "no positions, biases", {"position_embedding_type": None, "attention_bias": True}),
    ("ministral3", "its default rope", {"rope_parameters": None, "sliding_window": None}),
    ("olmo2", "biases, yarn", {"attention_bias": True, "rope_parameters": YARN_ROPE, "head_dim": 32}),
    ("smollm3", "listed layers", {"no_rope_layers": [0, 1], "sliding_window": None}),
    ("stablelm", "a quarter, tied", {"rope_parameters": None, "head_dim": None, "tie_word_embeddings": True}),
    ("starcoder2", "no biases, no window", {"use_bias": False, "sliding_window": None}),
    ("gpt_neox", "serial, other activation", {"use_parallel_residual": False, "hidden_act": "gelu_new"}),
    ("gpt_neox", "rope on whole heads, no biases, tied", {"attention_bias": False, "tie_word_embeddings": True}
     | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 1.0}}),
    ("phi3", "longrope below its length", {"rope_parameters": LONGROPE, "max_position_embeddings": 2048}
     | {"original_max_position_embeddings": 512}),
    ("llama", "dynamic rope below its length", {"max_position_embeddings": 512}
     | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    ("phi3", "no window", {"sliding_window": None}),
    ("phi3", "partial rope", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    ("llama", "grouped queries", {"num_key_value_heads": 2}),
    ("llama", "one kv head, tied", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("llama", "biases", {"attention_bias": True, "mlp_bias": True}),
    ("llama", "wide heads", {"head_dim": 24}),
    ("llama", "other rope base", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ("llama", "epsilon", {"rms_norm_eps": 1e-2}),
    ("llama", "llama 3 rope", {"rope_parameters": LLAMA3_ROPE, "head_dim": 32}),
    ("llama", "linear rope", {"rope_parameters": LINEAR_ROPE}),
    ("llama", "yarn rope", {"rope_parameters": YARN_ROPE, "head_dim": 32}),
    ("llama", "yarn rope, its length at the top level", {"original_max_position_embeddings": 32, "head_dim": 32}
     | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}),
    ("gpt_neo", "untied, narrow", {"tie_word_embeddings": False, "intermediate_size": 40}),
    ("gpt_neo", "other windows", {"attention_types": [[["global"], 1], [["local"], 3]], "window_size": 7}),
    ("mistral", "no window, wide heads", {"sliding_window": None, "head_dim": 24}),
    ("qwen2", "no window, tied", {"use_sliding_window": False, "tie_word_embeddings": True}),
    ("qwen2", "windows in all layers", {"max_window_layers": 0}),
    ("qwen3", "biases, windows", {"attention_bias": True, "use_sliding_window": True, "sliding_window": 5}
     | {"max_window_layers": 1, "tie_word_embeddings": False}),
]  # fmt: skip
CASES = [(family, "plain", {}) for family in sorted(tiny.SETTINGS)] + CASES


def gap(actual, expected):
    """Largest absolute difference, divided by the largest expected value if that is more than one."""
    return (actual - expected).abs().max().item() / max(1, expected.abs().max().item())


@torch.no_grad()
def their_reward(model, tokens):
    """The reward of one sequence, by a model of transformers."""
    return model(torch.as_tensor(tokens)[None]).logits[0, 0]


def losses_of_texts(model, hf_model):
    """Summed cross entropy of the same texts: ours packed, those of transformers one text at a time."""
    texts = [chosen for chosen, _ in made.token_pairs(4, longest=30)]
    loss = model(pack(made.text_examples(texts), np.arange(4)))["loss"]
    their_losses = [
        cross_entropy(hf_model(text[None]).logits[0, :-1], text[1:], reduction="sum")
        for text in map(torch.tensor, texts)
    ]
    return loss, sum(their_losses)


def losses_of_pairs(model, hf_model):
    """Summed Bradley-Terry losses of the same pairs: ours packed, those of transformers one text at a time."""
    pairs = made.token_pairs(4, longest=30)
    loss = model(pack(made.pair_examples(pairs), np.arange(4)))["loss"]
    rewards = [[hf_model(torch.tensor(text)[None]).logits[0, 0] for text in pair] for pair in pairs]
    return loss, sum(-logsigmoid(chosen - rejected) for chosen, rejected in rewards)


def gradient_gaps(folder, model, hf_model, loss, their_loss):
    """Parameter of the transformers model -> relative difference between its gradient and ours in the same layout."""
    assert gap(loss.detach(), their_loss.detach()) <= 1e-5
    loss.backward()
    their_loss.backward()
    config, family, _ = weights.read_config(folder)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    compared, gaps = set(), {}
    for hf_name, parameter in hf_model.named_parameters():
        names = family.parameter_names(hf_name)
        compared.update(names)
        joined = family.layout(hf_name).join([gradients[name] for name in names], config.n_kv_heads)
        gaps[hf_name] = ((joined - parameter.grad).norm() / (parameter.grad.norm() + 0.1)).item()
    assert compared == gradients.keys()
    return gaps
