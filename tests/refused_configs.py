"""Published config.json files that are refused, and why."""

from tests.real_configs import CONFIGS, LLAMA_8B, MISTRAL_SMALL_TEXT, QWEN_7B

# model_type -> published models of it, by name. Behind *: their config.json says that they are quantized, and the type
# is to be named all the same.
NOT_SUPPORTED = {
    "albert": "albert-base-v1",
    "baichuan": "Baichuan2-7B",
    "bert": "bert-base",
    "bloom": "bloom-7b1",
    "chatglm": "chatglm3-6b",
    "codegen": "codegen-2B",
    "cohere": "c4ai-command-r-v01",
    "cohere2": "c4ai-command-r7b",
    "deepseek_ref": "*DeepSeek-V4-Flash-FP8 *DeepSeek-V4-Pro-FP8",
    "deepseek_v2": "DeepSeek-V2",
    "deepseek_v3": "*DeepSeek-V3 *DeepSeek-R1 DeepSeek-V3.1-NVFP4",
    "deepseek_v32": "*DeepSeek-V3.2 DeepSeek-V3.2-NVFP4",
    "deepseek_v4": "*DeepSeek-V4-Flash *DeepSeek-V4-Pro *DeepSeek-V4-Flash-NVFP4 *DeepSeek-V4-Pro-NVFP4",
    "falcon": "falcon-7b falcon-40b",
    "gemma4": "gemma-4-26B-A4B *Gemma-4-26B-A4B-NVFP4 *Gemma-4-31B-IT-NVFP4",
    "git": "git-base",
    "glm_moe_dsa": "GLM-5 GLM-5.1 GLM-5.2 *GLM-5-FP8 *GLM-5.1-FP8 *GLM-5.2-FP8 GLM-5-NVFP4 *GLM-5.1-NVFP4 "
    "*GLM-5.2-NVFP4",
    "gpt_bigcode": "starcoder",
    "gpt_neox_reward_model": "oasst-rm-2-pythia-6.9b",
    "gpt_oss": "*gpt-oss-20b *gpt-oss-120b",
    "gptj": "gpt-j-6b",
    "jamba": "Jamba-v0.1",
    "kimi_k2": "*Kimi-K2-Instruct",
    "kimi_k25": "Kimi-K2.5 *Kimi-K2.5-NVFP4 *Kimi-K2.6-NVFP4 *Kimi-K2.7-Code-NVFP4",
    "kimi_k3": "Kimi-K3",
    "lfm2": "LFM2-1.2B",
    "llama4": "Llama-4-Scout-17B-16E Llama-4-Maverick-17B-128E",
    "llava": "llava-1.5-7b",
    "maira2": "maira-2",
    "mimo": "MiMo-7B-Base",
    "mimo_v2_flash": "*MiMo-V2-Flash",
    "minicpm": "MiniCPM-2B",
    "minimax_m2": "*MiniMax-M2.5 *MiniMax-M2.7 *MiniMax-M2.5-NVFP4 *MiniMax-M2.7-NVFP4",
    "minimax_m3": "MiniMax-M3",
    "minimax_m3_vl": "*MiniMax-M3-NVFP4",
    "mixtral": "Mixtral-8x7B Mixtral-8x22B",
    "mllama": "Llama-3.2-11B-Vision",
    "mpt": "mpt-7b",
    "nemotron-nas": "Llama-3.3-Nemotron-Super-49B",
    "nemotron_h": "Nemotron-H-8B Nemotron-H-56B-Base-8K Nemotron-3-Nano-30B-A3B-BF16 Nemotron-3-Nano-30B-A3B-NVFP4 "
    "Nemotron-3-Super-120B-A12B-FP8 Nemotron-3-Super-120B-A12B-NVFP4 Nemotron-3-Ultra-550B-A55B-BF16 "
    "Nemotron-3-Ultra-550B-A55B-FP8 Nemotron-3-Ultra-550B-A55B-NVFP4 Nemotron-3.5-Lightning-30B-A3B-NVFP4",
    "olmo": "OLMo-7B-hf",
    "opt": "opt-1.3b",
    "phi": "phi-2",
    "phi4mm": "Phi-4-multimodal",
    "qwen": "Qwen-7B",
    "qwen2_5_vl": "Qwen2.5-VL-7B",
    "qwen3_5": "Qwen3.5-4B Qwen3.5-27B *Qwen3.6-27B-NVFP4",
    "qwen3_5_moe": "Qwen3.5-35B-A3B Qwen3.5-122B-A10B Qwen3.5-397B-A17B *Qwen3.5-122B-A10B-NVFP4 "
    "*Qwen3.5-397B-A17B-NVFP4 *Qwen3.6-35B-A3B-NVFP4",
    "qwen3_moe": "Qwen3-30B-A3B Qwen3-235B-A22B Qwen3-Coder-480B-A35B *Qwen3-30B-A3B-FP8 *Qwen3-235B-A22B-FP8 "
    "Qwen3-235B-A22B-NVFP4",
    "qwen3_vl": "Qwen3-VL-2B Qwen3-VL-4B Qwen3-VL-8B Qwen3-VL-32B Qwen3-VL-32B-Thinking",
    "qwen3_vl_moe": "Qwen3-VL-30B-A3B Qwen3-VL-235B-A22B",
    "stablelm_alpha": "stablelm-base-alpha-3b-v2 stablelm-base-alpha-7b-v2",
    "step3p7": "Step-3.7-Flash *Step-3.7-Flash-FP8",
    "t5": "t5-small",
    "whisper": "whisper-large",
    "yuan": "Yuan2-2B",
}

# Name of a published model -> what its config.json says, as far as it decides, and the reason for which it is refused.
REFUSED = {
    **{
        name: (
            {"model_type": model_type} | ({"quantization_config": {"quant_method": "fp8"}} if "*" in name else {}),
            f"model_type '{model_type}' is not supported",
        )
        for model_type, names in NOT_SUPPORTED.items()
        for name in names.split()
    },
    "Llama-3.1-70B-FP8": (
        LLAMA_8B | {"quantization_config": {"quant_method": "fp8"}},
        "quantization_config: quantized weights are not implemented",
    ),
    "stablelm-2-12b": (
        CONFIGS["stablelm-2-1_6b"][0] | {"qk_layernorm": True, "use_parallel_residual": True},
        "qk_layernorm True is not implemented",
    ),
    "crfm's GPT-2": (
        CONFIGS["gpt2"][0] | {"scale_attn_by_inverse_layer_idx": True},
        "scale_attn_by_inverse_layer_idx True is not implemented",
    ),
    "granite-4.0-h-micro": (
        CONFIGS["granite-4.0-micro"][0] | {"layer_types": ["mamba"] * 5 + ["attention"] + ["mamba"] * 34},
        r"layer_types.0. 'mamba' is not implemented",
    ),
    "granite-4.0-tiny": (CONFIGS["granite-4.0-micro"][0] | {"num_local_experts": 64}, "num_local_experts 64 is not"),
    "embeddinggemma-300m": (
        CONFIGS["gemma-3-1b"][0] | {"use_bidirectional_attention": True},
        "use_bidirectional_attention True is not implemented",
    ),
    "Qwen3-32B-FP8": (
        CONFIGS["Qwen3-32B"][0] | {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}},
        "quantization_config: quantized weights are not implemented",
    ),
    "Qwen3-32B-FP8-Static-PerTensor": (
        CONFIGS["Qwen3-32B"][0] | {"quantization_config": {"quant_algo": "FP8", "producer": {"name": "modelopt"}}},
        "quantization_config: quantized weights are not implemented",
    ),
    "Mistral-Small-3.1-24B, text part in FP8": (
        CONFIGS["Mistral-Small-3.1-24B"][0]
        | {"text_config": MISTRAL_SMALL_TEXT | {"quantization_config": {"quant_method": "fp8"}}},
        "config.json: text_config: quantization_config: quantized weights are not implemented",
    ),
    "ArmoRM": (LLAMA_8B | {"architectures": ["LlamaForRewardModelWithGating"]}, "'LlamaForRewardModelWithGating'"),
    "QRM-Llama3.1-8B": (LLAMA_8B | {"architectures": ["LlamaForRewardModelWithGating31"]}, "RewardModelWithGating31'"),
    "LDL-Reward-Gemma-2-27B": (
        CONFIGS["gemma-2-27b"][0] | {"architectures": ["LDLRewardModel27B"]}, "'LDLRewardModel27B'"
    ),
    "GRM-llama3-8B-sftreg": (LLAMA_8B | {"architectures": ["GRewardModel"]}, "'GRewardModel'"),
    "beaver-7b-reward": (LLAMA_8B | {"architectures": ["LlamaForScore"]}, "'LlamaForScore'"),
    "Qwen2.5-Math-PRM-7B": (QWEN_7B | {"architectures": ["Qwen2ForProcessRewardModel"]}, "ForProcessRewardModel'"),
    "internlm2-7b-reward": (
        CONFIGS["internlm2_5-7b"][0] | {"architectures": ["InternLM2ForRewardModel"], "reward_token_id": 92527},
        "'InternLM2ForRewardModel'",
    ),
}  # fmt: skip
