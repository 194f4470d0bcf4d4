"""Published config.json files that are refused, and why."""

from tests.real_configs import CONFIGS, LLAMA_8B, MISTRAL_SMALL_TEXT, QWEN_7B

# Name of a published model -> what its config.json says, as far as it decides, and the reason for which it is refused.
REFUSED = {
    **{
        name: (dict(model_type=model_type), f"model_type '{model_type}' is not supported")
        for name, model_type in {
            "Mixtral-8x7B": "mixtral", "Qwen3-30B-A3B": "qwen3_moe", "Qwen3.5-4B": "qwen3_5", "Llama-4-Scout": "llama4",
            "gemma-4": "gemma4", "DeepSeek-V3": "deepseek_v3", "gpt-oss-20b": "gpt_oss", "Kimi-K2": "kimi_k2",
            "falcon-7b": "falcon", "opt-1.3b": "opt", "bloom-7b1": "bloom", "gpt-j-6b": "gptj", "phi-2": "phi",
            "mpt-7b": "mpt", "OLMo-7B-hf": "olmo", "Nemotron-H-8B": "nemotron_h", "LFM2-1.2B": "lfm2",
            "c4ai-command-r7b": "cohere2", "Baichuan2-7B": "baichuan", "chatglm3-6b": "chatglm",
            "c4ai-command-r-v01": "cohere", "MiMo-7B": "mimo", "MiniCPM-2B": "minicpm",
            "Qwen-7B": "qwen", "starcoder": "gpt_bigcode", "codegen-2B": "codegen", "Jamba-v0.1": "jamba",
            "Qwen3-VL-8B": "qwen3_vl", "Qwen3-VL-30B-A3B": "qwen3_vl_moe", "Qwen3.5-35B-A3B": "qwen3_5_moe",
            "Phi-4-multimodal": "phi4mm", "Llama-3.2-11B-Vision": "mllama", "llava-1.5-7b": "llava", "Yuan2-2B": "yuan",
            "Llama-3.3-Nemotron-Super-49B": "nemotron-nas", "DeepSeek-V3.2": "deepseek_v32", "GLM-5": "glm_moe_dsa",
            "MiniMax-M2.5": "minimax_m2", "Kimi-K2.5": "kimi_k25", "Step-3.7-Flash": "step3p7",
            "oasst-rm-2-pythia-6.9b": "gpt_neox_reward_model", "Qwen2.5-VL-7B, of Skywork-VL-Reward": "qwen2_5_vl",
        }.items()
    },
    "DeepSeek-R1, quantized": (
        dict(model_type="deepseek_v3", quantization_config={"quant_method": "fp8"}),
        "model_type 'deepseek_v3' is not supported",
    ),
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
