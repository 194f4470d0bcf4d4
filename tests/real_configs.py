"""Published config.json files of well-known models: their numbers of parameters. See `tests.refused_configs`.

The numbers are the published ones, or those of the model that transformers makes of the file.

Settings that `rm.hf.families` does not read (dropout, initializer, cache, version) are left out.
"""

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | {
    "original_max_position_embeddings": 8192
}
OLMO3_ROPE = {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.2079441541679836, "beta_fast": 32.0} | {
    "beta_slow": 1.0, "original_max_position_embeddings": 8192
}  # fmt: skip
LINEAR_ROPE = {"factor": 4.0, "type": "linear"}
GEMMA3_4B_TEXT = (
    dict(model_type="gemma3_text", hidden_size=2560, intermediate_size=10240, num_hidden_layers=34)
    | dict(rope_scaling={"factor": 8.0, "rope_type": "linear"}, sliding_window=1024)
)  # fmt: skip
GEMMA3_27B_TEXT = (
    GEMMA3_4B_TEXT | dict(hidden_size=5376, intermediate_size=21504, num_attention_heads=32, num_hidden_layers=62)
    | dict(num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168)
)  # fmt: skip
MISTRAL_SMALL_TEXT = (
    dict(model_type="mistral", attention_dropout=0.0, head_dim=128, hidden_act="silu", hidden_size=5120)
    | dict(intermediate_size=32768, max_position_embeddings=131072, num_attention_heads=32, num_hidden_layers=40)
    | dict(num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1000000000.0, sliding_window=None, vocab_size=131072)
)  # fmt: skip


def llama(width: int, inner: int, layers: int, heads: int, vocab: int, **others) -> dict:
    """The config.json of a LLaMA."""
    sizes = dict(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads)
    same = dict(model_type="llama", hidden_act="silu", rms_norm_eps=1e-5, tie_word_embeddings=False)
    return same | sizes | {"vocab_size": vocab} | others


CONFIGS = {
    "Llama-2-7b": (
        dict(model_type="llama", hidden_act="silu", hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
        | dict(num_hidden_layers=32, num_key_value_heads=32, pretraining_tp=1, rms_norm_eps=1e-5, rope_scaling=None)
        | dict(max_position_embeddings=4096, tie_word_embeddings=False, vocab_size=32000),
        6_738_415_616,
    ),
    "Llama-3.1-8B": (
        dict(model_type="llama", attention_bias=False, hidden_act="silu", hidden_size=4096, intermediate_size=14336)
        | dict(num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, rms_norm_eps=1e-5, mlp_bias=False)
        | dict(rope_scaling=LLAMA3_ROPE, rope_theta=500000.0, max_position_embeddings=131072)
        | dict(tie_word_embeddings=False, vocab_size=128256, eos_token_id=[128001, 128008, 128009]),
        8_030_261_248,
    ),
    "Llama-3.2-1B": (
        dict(model_type="llama", head_dim=64, hidden_act="silu", hidden_size=2048, intermediate_size=8192)
        | dict(num_attention_heads=32, num_hidden_layers=16, num_key_value_heads=8, rms_norm_eps=1e-5)
        | dict(rope_scaling=LLAMA3_ROPE | {"factor": 32.0}, rope_theta=500000.0, max_position_embeddings=131072)
        | dict(tie_word_embeddings=True, vocab_size=128256),
        1_235_814_400,
    ),
    "Mistral-7B-v0.1": (
        dict(model_type="mistral", hidden_act="silu", hidden_size=4096, intermediate_size=14336, rms_norm_eps=1e-5)
        | dict(num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8, rope_theta=10000.0)
        | dict(max_position_embeddings=32768, sliding_window=4096, tie_word_embeddings=False, vocab_size=32000),
        7_241_732_096,
    ),
    "Qwen2.5-7B": (
        dict(model_type="qwen2", hidden_act="silu", hidden_size=3584, intermediate_size=18944, max_window_layers=28)
        | dict(num_attention_heads=28, num_hidden_layers=28, num_key_value_heads=4, rms_norm_eps=1e-6)
        | dict(rope_theta=1000000.0, sliding_window=131072, use_sliding_window=False, use_mrope=False)
        | dict(max_position_embeddings=131072, tie_word_embeddings=False, vocab_size=152064),
        7_615_616_512,
    ),
    "Qwen3-8B": (
        dict(model_type="qwen3", attention_bias=False, head_dim=128, hidden_act="silu", hidden_size=4096)
        | dict(intermediate_size=12288, max_position_embeddings=40960, max_window_layers=36, num_attention_heads=32)
        | dict(num_hidden_layers=36, num_key_value_heads=8, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000)
        | dict(sliding_window=None, use_sliding_window=False, tie_word_embeddings=False, vocab_size=151936),
        8_190_735_360,
    ),
    "pythia-1.4b": (
        dict(model_type="gpt_neox", hidden_act="gelu", hidden_size=2048, intermediate_size=8192, layer_norm_eps=1e-5)
        | dict(max_position_embeddings=2048, num_attention_heads=16, num_hidden_layers=24, rotary_emb_base=10000)
        | dict(rotary_pct=0.25, tie_word_embeddings=False, use_parallel_residual=True, vocab_size=50304),
        1_414_647_808,
    ),
    "gpt2": (
        dict(model_type="gpt2", activation_function="gelu_new", layer_norm_epsilon=1e-5, n_ctx=1024, n_embd=768)
        | dict(n_head=12, n_layer=12, n_positions=1024, vocab_size=50257),
        124_439_808,
    ),
    "gpt-neo-1.3B": (
        dict(model_type="gpt_neo", activation_function="gelu_new", attention_types=[[["global", "local"], 12]])
        | dict(hidden_size=2048, intermediate_size=None, layer_norm_epsilon=1e-5, max_position_embeddings=2048)
        | dict(num_heads=16, num_layers=24, vocab_size=50257, window_size=256),
        1_315_575_808,
    ),
    "gemma-2b": (
        dict(model_type="gemma", head_dim=256, hidden_act="gelu", hidden_activation=None, hidden_size=2048)
        | dict(intermediate_size=16384, max_position_embeddings=8192, num_attention_heads=8, num_hidden_layers=18)
        | dict(num_key_value_heads=1, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=10000.0, vocab_size=256000),
        2_506_172_416,
    ),
    "gemma-3-1b": (
        dict(model_type="gemma3_text", attn_logit_softcapping=None, final_logit_softcapping=None, head_dim=256)
        | dict(hidden_activation="gelu_pytorch_tanh", hidden_size=1152, intermediate_size=6912, num_hidden_layers=26)
        | dict(max_position_embeddings=32768, num_attention_heads=4, num_key_value_heads=1, query_pre_attn_scalar=256)
        | dict(rms_norm_eps=1e-6, rope_local_base_freq=10000, rope_scaling=None, rope_theta=1000000)
        | dict(sliding_window=512, sliding_window_pattern=6, vocab_size=262144),
        999_885_952,
    ),
    "Phi-3-mini-4k": (
        dict(model_type="phi3", hidden_act="silu", hidden_size=3072, intermediate_size=8192, rope_theta=10000.0)
        | dict(max_position_embeddings=4096, original_max_position_embeddings=4096, num_attention_heads=32)
        | dict(num_hidden_layers=32, num_key_value_heads=32, rms_norm_eps=1e-5, rope_scaling=None, sliding_window=2047)
        | dict(tie_word_embeddings=False, vocab_size=32064, attention_bias=False),
        3_821_079_552,
    ),
    "SmolLM3-3B": (
        dict(model_type="smollm3", attention_bias=False, hidden_act="silu", hidden_size=2048, intermediate_size=11008)
        | dict(max_position_embeddings=65536, max_window_layers=28, mlp_bias=False, no_rope_layer_interval=4)
        | dict(no_rope_layers=[1, 1, 1, 0] * 9, num_attention_heads=16, num_hidden_layers=36, num_key_value_heads=4)
        | dict(rms_norm_eps=1e-6, rope_scaling=None, rope_theta=5000000.0, sliding_window=None, vocab_size=128256)
        | dict(layer_types=["full_attention"] * 36, pretraining_tp=2, use_sliding_window=False),
        3_075_098_624,
    ),
    "Ministral-8B-2410": (
        dict(model_type="mistral", head_dim=128, hidden_act="silu", hidden_size=4096, intermediate_size=12288)
        | dict(max_position_embeddings=32768, num_attention_heads=32, num_hidden_layers=36, num_key_value_heads=8)
        | dict(rms_norm_eps=1e-5, rope_theta=100000000.0, sliding_window=32768, tie_word_embeddings=False)
        | dict(vocab_size=131072),
        8_019_808_256,
    ),
    "stablelm-2-1_6b": (
        dict(model_type="stablelm", hidden_act="silu", hidden_size=2048, intermediate_size=5632, layer_norm_eps=1e-5)
        | dict(max_position_embeddings=4096, num_attention_heads=32, num_hidden_layers=24, num_key_value_heads=32)
        | dict(partial_rotary_factor=0.25, rope_theta=10000, tie_word_embeddings=False, use_qkv_bias=True)
        | dict(vocab_size=100352),
        1_644_515_328,
    ),
    "starcoder2-3b": (
        dict(model_type="starcoder2", attention_dropout=0.1, embedding_dropout=0.1, residual_dropout=0.1)
        | dict(hidden_act="gelu_pytorch_tanh", hidden_size=3072, intermediate_size=12288, layer_norm_epsilon=1e-5)
        | dict(max_position_embeddings=16384, mlp_type="default", norm_epsilon=1e-5, norm_type="layer_norm")
        | dict(num_attention_heads=24, num_hidden_layers=30, num_key_value_heads=2, rope_theta=999999.4420358813)
        | dict(attention_softmax_in_fp32=True, scale_attention_softmax_in_fp32=True, scale_attn_weights=True)
        | dict(sliding_window=4096, use_bias=True, vocab_size=49152),
        3_030_371_328,
    ),
    "Seed-OSS-36B": (
        dict(model_type="seed_oss", attention_bias=True, attention_out_bias=False, head_dim=128, hidden_act="silu")
        | dict(attention_dropout=0.1, residual_dropout=0.1, hidden_size=5120, intermediate_size=27648, mlp_bias=False)
        | dict(max_position_embeddings=524288, num_attention_heads=80, num_hidden_layers=64, num_key_value_heads=8)
        | dict(rms_norm_eps=1e-6, rope_scaling={"rope_type": "default"}, rope_theta=10000000.0, vocab_size=155136)
        | dict(tie_word_embeddings=False),
        36_151_104_512,
    ),
    "gemma-2-9b": (
        dict(model_type="gemma2", attn_logit_softcapping=50.0, final_logit_softcapping=30.0, head_dim=256)
        | dict(hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh", hidden_size=3584)
        | dict(intermediate_size=14336, max_position_embeddings=8192, num_attention_heads=16, num_hidden_layers=42)
        | dict(num_key_value_heads=8, query_pre_attn_scalar=256, rms_norm_eps=1e-6, rope_theta=10000.0)
        | dict(sliding_window=4096, sliding_window_size=4096, vocab_size=256000, cache_implementation="hybrid"),
        9_241_705_984,
    ),
    "OLMo-2-1124-7B": (
        dict(model_type="olmo2", attention_bias=False, attention_dropout=0.0, hidden_act="silu", hidden_size=4096)
        | dict(intermediate_size=11008, max_position_embeddings=4096, num_attention_heads=32, num_hidden_layers=32)
        | dict(num_key_value_heads=32, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=500000)
        | dict(tie_word_embeddings=False, vocab_size=100352),
        7_298_617_344,
    ),
    "Olmo-3-1025-7B": (
        dict(model_type="olmo3", attention_bias=False, hidden_act="silu", hidden_size=4096, intermediate_size=11008)
        | dict(layer_types=(["sliding_attention"] * 3 + ["full_attention"]) * 8, max_position_embeddings=65536)
        | dict(num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32, rms_norm_eps=1e-6)
        | dict(rope_theta=500000, rope_scaling=OLMO3_ROPE, sliding_window=4096, tie_word_embeddings=False)
        | dict(vocab_size=100278),
        7_298_011_136,
    ),
    "granite-3.1-2b": (
        dict(model_type="granite", attention_bias=False, attention_dropout=0.1, attention_multiplier=0.015625)
        | dict(embedding_multiplier=12.0, hidden_act="silu", hidden_size=2048, intermediate_size=8192)
        | dict(logits_scaling=8.0, max_position_embeddings=131072, mlp_bias=False, num_attention_heads=32)
        | dict(num_hidden_layers=40, num_key_value_heads=8, residual_multiplier=0.22, rms_norm_eps=1e-5)
        | dict(rope_scaling=None, rope_theta=5000000.0, tie_word_embeddings=True, vocab_size=49155),
        2_533_531_648,
    ),
    "granite-4.0-micro": (
        dict(model_type="granitemoehybrid", attention_bias=False, attention_multiplier=0.015625, hidden_act="silu")
        | dict(embedding_multiplier=12, hidden_size=2560, intermediate_size=8192, shared_intermediate_size=8192)
        | dict(layer_types=["attention"] * 40, logits_scaling=10, max_position_embeddings=131072, num_local_experts=0)
        | dict(num_attention_heads=40, num_experts_per_tok=0, num_hidden_layers=40, num_key_value_heads=8)
        | dict(normalization_function="rmsnorm", position_embedding_type="rope", residual_multiplier=0.22)
        | dict(rms_norm_eps=1e-5, rope_theta=10000000, tie_word_embeddings=True, vocab_size=100352)
        | dict(mamba_n_heads=128, mamba_expand=2, mamba_d_head="auto", output_router_logits=False),
        3_402_836_480,
    ),
    "EXAONE-3.5-7.8B": (
        dict(model_type="exaone", activation_function="silu", embed_dropout=0.0, head_dim=128, hidden_size=4096)
        | dict(intermediate_size=14336, layer_norm_epsilon=1e-5, max_position_embeddings=32768, num_layers=32)
        | dict(num_attention_heads=32, num_key_value_heads=8, rope_scaling=LLAMA3_ROPE, rope_theta=1000000.0)
        | dict(architectures=["ExaoneForCausalLM"], tie_word_embeddings=False, vocab_size=102400),
        7_818_448_896,
    ),
    "EXAONE-4.0-1.2B": (
        dict(model_type="exaone4", head_dim=64, hidden_act="silu", hidden_size=2048, intermediate_size=4096)
        | dict(layer_types=["full_attention"] * 30, max_position_embeddings=65536, num_attention_heads=32)
        | dict(num_hidden_layers=30, num_key_value_heads=8, rms_norm_eps=1e-5, rope_theta=1000000)
        | dict(rope_scaling=LLAMA3_ROPE | {"factor": 16.0}, sliding_window=None, sliding_window_pattern=None)
        | dict(tie_word_embeddings=True, vocab_size=102400),
        1_279_391_488,
    ),
    "GLM-4-9B-0414": (
        dict(model_type="glm4", attention_bias=True, head_dim=128, hidden_act="silu", hidden_size=4096)
        | dict(intermediate_size=13696, max_position_embeddings=32768, num_attention_heads=32, num_hidden_layers=40)
        | dict(num_key_value_heads=2, partial_rotary_factor=0.5, rms_norm_eps=1e-5, rope_theta=10000.0)
        | dict(tie_word_embeddings=False, vocab_size=151552, eos_token_id=[151329, 151336, 151338]),
        9_400_279_040,
    ),
    "Phi-4-mini": (
        dict(model_type="phi3", attention_bias=False, hidden_act="silu", hidden_size=3072, intermediate_size=8192)
        | dict(lm_head_bias=False, max_position_embeddings=131072, mlp_bias=False, num_attention_heads=24)
        | dict(num_hidden_layers=32, num_key_value_heads=8, original_max_position_embeddings=4096)
        | dict(partial_rotary_factor=0.75, rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=262144)
        | dict(rope_scaling={"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.5] * 48})  # not theirs
        | dict(tie_word_embeddings=True, vocab_size=200064),
        3_836_021_760,
    ),
    "gemma-3-4b": (
        dict(model_type="gemma3", boi_token_index=255999, eoi_token_index=256000, eos_token_id=[1, 106])
        | dict(image_token_index=262144, initializer_range=0.02, mm_tokens_per_image=256)
        | dict(text_config=GEMMA3_4B_TEXT, vision_config=dict(model_type="siglip_vision_model", hidden_size=1152)),
        3_880_263_168,
    ),
    "Mistral-Small-3.1-24B": (
        dict(model_type="mistral3", image_token_index=10, multimodal_projector_bias=False, spatial_merge_size=2)
        | dict(projector_hidden_act="gelu", vision_feature_layer=-1, text_config=MISTRAL_SMALL_TEXT)
        | dict(vision_config=dict(model_type="pixtral", hidden_size=1024)),
        23_572_403_200,
    ),
    "internlm2_5-7b": (
        dict(model_type="internlm2", attn_implementation="eager", bias=False, hidden_act="silu", hidden_size=4096)
        | dict(intermediate_size=14336, max_position_embeddings=32768, num_attention_heads=32, num_hidden_layers=32)
        | dict(num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-5, rope_theta=1000000, vocab_size=92544)
        | dict(rope_scaling={"factor": 2.0, "type": "dynamic"}, tie_word_embeddings=False),
        7_737_708_544,
    ),
    "LLaMA-1-7b": (
        dict(model_type="llama", architectures=["LLaMAForCausalLM"], hidden_act="silu", hidden_size=4096)
        | dict(intermediate_size=11008, max_sequence_length=2048, num_attention_heads=32, num_hidden_layers=32)
        | dict(rms_norm_eps=1e-6, vocab_size=32000),
        6_738_415_616,
    ),
    "Yi-1.5-34B": (
        dict(model_type="llama", attention_bias=False, hidden_act="silu", hidden_size=7168, intermediate_size=20480)
        | dict(max_position_embeddings=4096, num_attention_heads=56, num_hidden_layers=60, num_key_value_heads=8)
        | dict(rms_norm_eps=1e-6, rope_scaling=None, rope_theta=5000000.0, tie_word_embeddings=False)
        | dict(vocab_size=64000, pretraining_tp=1, attention_dropout=0.0),
        34_388_917_248,
    ),
    "Mistral-Nemo-2407": (
        dict(model_type="mistral", head_dim=128, hidden_act="silu", hidden_size=5120, intermediate_size=14336)
        | dict(max_position_embeddings=131072, num_attention_heads=32, num_hidden_layers=40, num_key_value_heads=8)
        | dict(rms_norm_eps=1e-5, rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False)
        | dict(vocab_size=131072),
        12_247_782_400,
    ),
    "Qwen3-0.6B": (
        dict(model_type="qwen3", attention_bias=False, head_dim=128, hidden_act="silu", hidden_size=1024)
        | dict(intermediate_size=3072, max_position_embeddings=40960, max_window_layers=28, num_attention_heads=16)
        | dict(num_hidden_layers=28, num_key_value_heads=8, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=1000000)
        | dict(sliding_window=None, use_sliding_window=False, tie_word_embeddings=True, vocab_size=151936),
        596_049_920,
    ),
    "phi-4": (
        dict(model_type="phi3", attention_bias=False, hidden_act="silu", hidden_size=5120, intermediate_size=17920)
        | dict(max_position_embeddings=16384, num_attention_heads=40, num_hidden_layers=40, num_key_value_heads=10)
        | dict(original_max_position_embeddings=16384, rms_norm_eps=1e-5, rope_scaling=None, rope_theta=250000)
        | dict(sliding_window=None, tie_word_embeddings=False, vocab_size=100352),
        14_659_507_200,
    ),
    "gemma-7b": (
        dict(model_type="gemma", attention_bias=False, head_dim=256, hidden_act="gelu", hidden_size=3072)
        | dict(intermediate_size=24576, max_position_embeddings=8192, num_attention_heads=16, num_hidden_layers=28)
        | dict(num_key_value_heads=16, rms_norm_eps=1e-6, rope_scaling=None, rope_theta=10000.0, vocab_size=256000),
        8_537_680_896,
    ),
    "gpt-neox-20b": (
        dict(model_type="gpt_neox", attention_probs_dropout_prob=0, hidden_act="gelu_fast", hidden_size=6144)
        | dict(hidden_dropout_prob=0, intermediate_size=24576, layer_norm_eps=1e-5, max_position_embeddings=2048)
        | dict(num_attention_heads=64, num_hidden_layers=44, rotary_emb_base=10000, rotary_pct=0.25)
        | dict(tie_word_embeddings=False, vocab_size=50432),
        20_554_567_680,
    ),
    "gpt2-xl": (
        dict(model_type="gpt2", activation_function="gelu_new", attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1)
        | dict(layer_norm_epsilon=1e-5, n_ctx=1024, n_embd=1600, n_head=25, n_layer=48, n_positions=1024)
        | dict(output_past=True, vocab_size=50257),
        1_557_611_200,
    ),
}

LLAMA_8B, QWEN_7B, GEMMA2_9B, PYTHIA, GPT_NEO = (
    CONFIGS[name][0] for name in ("Llama-3.1-8B", "Qwen2.5-7B", "gemma-2-9b", "pythia-1.4b", "gpt-neo-1.3B")
)
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
CHUNKS = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
# Others of the same families, by what differs.
CONFIGS |= {
    "Llama-2-13b": (llama(5120, 13824, 40, 40, 32000, rope_scaling=None, pretraining_tp=1), 13_015_864_320),
    "Llama-3-8B": (llama(4096, 14336, 32, 32, 128256, num_key_value_heads=8, rope_theta=5e5), 8_030_261_248),
    "Llama-3.3-70B": (
        LLAMA_8B | dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
        70_553_706_496,
    ),
    "Llama-3.1-405B": (
        LLAMA_8B | dict(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128),
        405_853_388_800,
    ),
    "Llama-3.2-3B": (
        CONFIGS["Llama-3.2-1B"][0] | dict(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24, head_dim=128),
        3_212_749_824,
    ),
    "CodeLlama-7b": (llama(4096, 11008, 32, 32, 32016, rope_theta=1e6, max_position_embeddings=16384), 6_738_546_688),
    "vicuna-7b-16k": (llama(4096, 11008, 32, 32, 32000, rope_scaling=LINEAR_ROPE), 6_738_415_616),
    "deepseek-coder-6.7b": (llama(4096, 11008, 32, 32, 32256, rope_scaling=LINEAR_ROPE, rope_theta=1e5), 6_740_512_768),
    "Yarn-Llama-2-7b-128k": (
        llama(4096, 11008, 32, 32, 32000, max_position_embeddings=131072)
        | dict(rope_scaling=dict(factor=32.0, original_max_position_embeddings=4096, type="yarn", finetuned=True)),
        6_738_415_616,
    ),
    "open_llama_3b": (llama(3200, 8640, 26, 32, 32000), 3_426_473_600),
    "Falcon3-7B": (
        llama(3072, 23040, 28, 12, 131072, head_dim=256, num_key_value_heads=4, rope_theta=1000042), 7_455_550_464,
    ),
    "SmolLM2-135M": (
        llama(576, 1536, 30, 9, 49152, num_key_value_heads=3, rope_theta=100000, rope_interleaved=False)
        | dict(tie_word_embeddings=True, is_llama_config=True),
        134_515_008,
    ),
    "Mistral-7B-v0.3": (
        CONFIGS["Mistral-7B-v0.1"][0] | dict(rope_theta=1e6, sliding_window=None, vocab_size=32768), 7_248_023_552,
    ),
    "Qwen2.5-0.5B": (
        QWEN_7B | dict(hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_hidden_layers=24)
        | dict(max_window_layers=24, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True),
        494_032_768,
    ),
    "Qwen2.5-1.5B": (
        QWEN_7B | dict(hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2)
        | dict(vocab_size=151936, tie_word_embeddings=True),
        1_543_714_304,
    ),
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        QWEN_7B | dict(hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2)
        | dict(vocab_size=151936, rope_theta=10000, max_window_layers=21),
        1_777_088_000,
    ),
    "QwQ-32B": (
        QWEN_7B | dict(hidden_size=5120, intermediate_size=27648, num_hidden_layers=64, num_attention_heads=40)
        | dict(num_key_value_heads=8, max_window_layers=64),
        32_763_876_352,
    ),
    "Qwen2.5-72B": (
        QWEN_7B | dict(hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, num_attention_heads=64)
        | dict(num_key_value_heads=8, max_window_layers=70),
        72_706_203_648,
    ),
    "Qwen3-1.7B": (
        CONFIGS["Qwen3-0.6B"][0] | dict(hidden_size=2048, intermediate_size=6144), 1_720_574_976,
    ),
    "Qwen3-4B-2507": (
        CONFIGS["Qwen3-0.6B"][0] | dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36)
        | dict(num_attention_heads=32, rope_theta=5000000),
        4_022_468_096,
    ),
    "Qwen3-32B": (
        CONFIGS["Qwen3-8B"][0] | dict(hidden_size=5120, intermediate_size=25600, num_hidden_layers=64)
        | dict(num_attention_heads=64, max_window_layers=64),
        32_762_123_264,
    ),
    "Phi-3-medium-4k": (
        CONFIGS["Phi-3-mini-4k"][0] | dict(hidden_size=5120, intermediate_size=17920, num_hidden_layers=40)
        | dict(num_attention_heads=40, num_key_value_heads=10),
        13_960_238_080,
    ),
    "gemma-2-2b": (
        GEMMA2_9B | dict(hidden_size=2304, intermediate_size=9216, num_attention_heads=8, num_hidden_layers=26)
        | dict(num_key_value_heads=4),
        2_614_341_888,
    ),
    "gemma-2-27b": (
        GEMMA2_9B | dict(hidden_size=4608, intermediate_size=36864, num_attention_heads=32, num_hidden_layers=46)
        | dict(num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=144),
        27_227_128_320,
    ),
    "gemma-3-270m": (
        CONFIGS["gemma-3-1b"][0] | dict(hidden_size=640, intermediate_size=2048, num_hidden_layers=18), 268_098_176,
    ),
    "gemma-3-27b": (
        CONFIGS["gemma-3-4b"][0] | dict(text_config=GEMMA3_27B_TEXT), 27_009_346_304,
    ),
    "OLMo-2-1124-13B": (
        CONFIGS["OLMo-2-1124-7B"][0] | dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40)
        | dict(num_attention_heads=40, num_key_value_heads=40),
        13_716_198_400,
    ),
    "OLMo-2-0425-1B": (
        CONFIGS["OLMo-2-1124-7B"][0] | dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16)
        | dict(num_attention_heads=16, num_key_value_heads=16),
        1_484_916_736,
    ),
    "granite-3.3-8b": (
        CONFIGS["granite-3.1-2b"][0] | dict(hidden_size=4096, intermediate_size=12800, logits_scaling=16.0)
        | dict(attention_multiplier=0.0078125, rope_theta=10000000.0, vocab_size=49159),
        8_170_864_640,
    ),
    "EXAONE-3.5-2.4B": (
        CONFIGS["EXAONE-3.5-7.8B"][0] | dict(hidden_size=2560, intermediate_size=7168, num_layers=30, head_dim=80)
        | dict(tie_word_embeddings=True),
        2_405_327_360,
    ),
    "internlm2-1_8b": (
        CONFIGS["internlm2_5-7b"][0] | dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24)
        | dict(num_attention_heads=16),
        1_889_110_016,
    ),
    "internlm2-20b": (
        CONFIGS["internlm2_5-7b"][0] | dict(hidden_size=6144, intermediate_size=16384, num_hidden_layers=48)
        | dict(num_attention_heads=48),
        19_861_149_696,
    ),
    "pythia-410m": (
        PYTHIA | dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24), 405_334_016,
    ),
    "pythia-6.9b": (
        PYTHIA | dict(hidden_size=4096, intermediate_size=16384, num_hidden_layers=32, num_attention_heads=32)
        | dict(vocab_size=50432),
        6_857_302_016,
    ),
    "pythia-12b": (
        PYTHIA | dict(hidden_size=5120, intermediate_size=20480, num_hidden_layers=36, num_attention_heads=40)
        | dict(vocab_size=50688),
        11_846_072_320,
    ),
    "RedPajama-INCITE-3B": (
        PYTHIA | dict(hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32)
        | dict(vocab_size=50432, rotary_pct=1.0, use_parallel_residual=False),
        2_775_864_320,
    ),
    "DialoGPT-medium": (CONFIGS["gpt2"][0] | dict(n_embd=1024, n_head=16, n_layer=24), 354_823_168),
    "gpt-neo-125M": (
        CONFIGS["gpt-neo-1.3B"][0] | dict(hidden_size=768, num_heads=12, num_layers=12)
        | dict(attention_types=[[["global", "local"], 6]]),
        125_198_592,
    ),
    "Llama-3.1-70B": (
        LLAMA_8B | dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
        | dict(eos_token_id=128001, attention_dropout=0.0, pretraining_tp=1),
        70_553_706_496,
    ),
    "Llama-3-8B-Gradient-1048k": (
        llama(4096, 14336, 32, 32, 128256, num_key_value_heads=8, rope_theta=3580165449.0, rope_scaling=None)
        | dict(max_position_embeddings=1048576, attention_bias=False, mlp_bias=False),
        8_030_261_248,
    ),
    "granite-3b-code-base": (
        llama(2560, 10240, 32, 32, 49152, attention_bias=True, mlp_bias=True, attention_dropout=0.1)
        | dict(num_key_value_heads=32, rope_theta=10000, tie_word_embeddings=True, max_position_embeddings=2048),
        3_482_503_680,
    ),
    "Atom-7B": (
        llama(4096, 11008, 32, 32, 65000, rope_scaling={"factor": 8.0, "type": "dynamic"}, rope_theta=500000)
        | dict(max_length=4096, max_position_embeddings=4096, num_key_value_heads=32, pad_token_id=2),
        7_008_751_616,
    ),
    "LongAlpaca-7b-32k-chinese": (
        llama(4096, 11008, 32, 32, 65000, rope_scaling={"factor": 8.0, "type": "linear"}, rope_theta=10000.0),
        7_008_751_616,
    ),
    "zephyr-7b-beta": (CONFIGS["Mistral-7B-v0.1"][0] | dict(pad_token_id=2), 7_241_732_096),
    "Mistral-Small-22B-2409": (
        MISTRAL_SMALL_TEXT | dict(hidden_size=6144, intermediate_size=16384, num_attention_heads=48, vocab_size=32768)
        | dict(num_hidden_layers=56, max_position_embeddings=32768, rope_theta=1000000.0),
        22_247_282_688,
    ),
    "Mistral-Small-24B-2501": (
        MISTRAL_SMALL_TEXT | dict(max_position_embeddings=32768, rope_theta=100000000.0), 23_572_403_200,
    ),
    "Qwen1.5-0.5B": (
        QWEN_7B | dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=24, num_attention_heads=16)
        | dict(num_key_value_heads=16, max_window_layers=21, sliding_window=32768, max_position_embeddings=32768)
        | dict(vocab_size=151936, tie_word_embeddings=True),
        463_987_712,
    ),
    "Qwen2-7B-Instruct": (
        QWEN_7B | dict(max_position_embeddings=32768, sliding_window=None, pad_token_id=151643), 7_615_616_512,
    ),
    "Qwen2.5-7B-Instruct, for 128k tokens": (QWEN_7B | dict(rope_scaling=YARN, sliding_window=32768), 7_615_616_512),
    "Qwen2.5-7B-Instruct-1M": (
        QWEN_7B | dict(dual_chunk_attention_config=CHUNKS, max_position_embeddings=1010000, rms_norm_eps=1e-5)
        | dict(rope_scaling=None, rope_theta=10000000.0, sliding_window=None),
        7_615_616_512,
    ),
    "Qwen2.5-14B-Instruct-1M": (
        QWEN_7B | dict(dual_chunk_attention_config=CHUNKS, max_position_embeddings=1010000, rms_norm_eps=1e-5)
        | dict(rope_theta=10000000.0, sliding_window=1010000, hidden_size=5120, intermediate_size=13824)
        | dict(num_hidden_layers=48, num_attention_heads=40, num_key_value_heads=8, max_window_layers=48),
        14_770_033_664,
    ),
    "Qwen3-8B, for 128k tokens": (
        CONFIGS["Qwen3-8B"][0] | dict(rope_scaling=YARN, max_position_embeddings=131072), 8_190_735_360,
    ),
    "Qwen3-Embedding-0.6B": (
        CONFIGS["Qwen3-0.6B"][0] | dict(max_position_embeddings=32768, vocab_size=151669), 595_776_512,
    ),
    "Phi-3.5-mini": (
        CONFIGS["Phi-3-mini-4k"][0] | dict(max_position_embeddings=131072, sliding_window=262144)
        | dict(rope_scaling={"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.5] * 48}),  # not theirs
        3_821_079_552,
    ),
    "medgemma-27b-text": (
        GEMMA3_27B_TEXT | dict(vocab_size=262144), 27_009_002_240,
    ),
    "dolly-v2-3b": (
        PYTHIA | dict(hidden_size=2560, intermediate_size=10240, num_hidden_layers=32, num_attention_heads=32)
        | dict(vocab_size=50280, custom_pipelines={"text-generation": {"pt": "AutoModelForCausalLM"}}),
        2_775_086_080,
    ),
    "stablelm-base-alpha-3b": (
        PYTHIA | dict(hidden_size=4096, intermediate_size=16384, num_hidden_layers=16, num_attention_heads=32)
        | dict(vocab_size=50688, max_position_embeddings=4096, rope_scaling=None, classifier_dropout=0.1),
        3_637_321_728,
    ),
    "stablelm-base-alpha-7b": (
        PYTHIA | dict(hidden_size=6144, intermediate_size=24576, num_hidden_layers=16, num_attention_heads=48)
        | dict(vocab_size=50432, max_position_embeddings=4096),
        7_868_755_968,
    ),
    "japanese-gpt-neox-3.6b": (
        PYTHIA | dict(hidden_size=2816, intermediate_size=11264, num_hidden_layers=36, num_attention_heads=22)
        | dict(vocab_size=32000, rotary_pct=1.0, use_parallel_residual=False),
        3_607_245_312,
    ),
    "TinyStories-33M": (
        GPT_NEO | dict(hidden_size=768, num_heads=16, num_layers=4, attention_types=[[["global", "local"], 2]])
        | dict(attention_layers=["global", "local"] * 2, embed_dropout=0, resid_dropout=0),
        68_514_048,
    ),
    "pythia-410m, with three labels": (
        PYTHIA | dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, classifier_dropout=0.1)
        | dict(architectures=["GPTNeoXForSequenceClassification"], id2label={"0": "a", "1": "b", "2": "c"}),
        405_334_016,
    ),
}  # fmt: skip

# Those that a library for inference is tested with: sizes of real models, one layer.
CONFIGS |= {
    f"{name}, one layer": (CONFIGS[of][0] | changes | dict(num_hidden_layers=1), size)
    for name, of, changes, size in (
        ("llama", "LLaMA-1-7b", dict(pad_token_id=-1), 464_531_456),
        ("llama3", "Llama-3.1-8B", dict(pretraining_tp=1), 1_268_789_248),
        ("mistral", "Mistral-7B-v0.1", dict(hidden_size=2048, num_attention_heads=16), 231_741_440),
        ("phi3", "Phi-3-mini-4k", dict(sliding_window=2048, embd_pdrop=0.0, resid_pdrop=0.0), 310_256_640),
        ("qwen2", "Qwen2.5-7B", dict(max_position_embeddings=32768), 1_323_056_128),
        ("qwen3", "Qwen3-0.6B", dict(max_position_embeddings=32768), 171_314_432),
        ("gpt_neox", "gpt-neox-20b", dict(hidden_size=2048, num_attention_heads=16), 324_057_088),
        ("stablelm", "stablelm-2-1_6b", dict(num_attention_heads=16, num_key_value_heads=16), 462_440_448),
    )
}
