"""Granite 4, dense: a Granite 3 whose checkpoint has fused gate and up. `model_type` "granitemoehybrid".

The same model_type has mixtures of experts and state-space layers, which are not implemented.
"""

from dataclasses import replace

from rm.hf.families import granite, llama
from rm.hf.families.keys import OFF, SIZE
from rm.hf.families.layout import Layout
from rm.json_keys import Key
from rm.model.transformer import ModelConfig

OF_EXPERTS_AND_STATES = """num_experts_per_tok output_router_logits router_aux_loss_coef time_step_limit init_method
    mamba_chunk_size mamba_conv_bias mamba_d_conv mamba_d_head mamba_d_state mamba_expand mamba_n_groups mamba_n_heads
    mamba_proj_bias""".split()


def config(hf: dict) -> ModelConfig:
    like_granite = granite.config(hf | {"intermediate_size": hf.get("shared_intermediate_size", 1024)})
    if len(hf["layer_types"]) != like_granite.n_layers:
        raise ValueError(f"layer_types describe {len(hf['layer_types'])} layers, not {like_granite.n_layers}")
    if hf.get("position_embedding_type") == "rope":
        return like_granite
    return replace(like_granite, ropes=(None,) * like_granite.n_layers)


GATE_UP = Layout(("layers.{}.mlp.gate_proj", "layers.{}.mlp.up_proj"))
FAMILY = replace(
    granite.FAMILY,
    keys=granite.FAMILY.keys
    | dict.fromkeys(OF_EXPERTS_AND_STATES, Key())
    | {
        "num_local_experts": Key(int, only=(0,), required=True),
        "layer_types": Key(list, items=Key(str, only=("full_attention", "attention")), required=True),
        "shared_intermediate_size": replace(SIZE, required=False),
        "position_embedding_type": Key(str, only=("rope", "nope")),
        "normalization_function": Key(str, only=("rmsnorm",)),
        "mlp_bias": OFF,
    },
    aliases={"layers_block_type": "layer_types"},
    config=config,
    modules={name: part for name, part in llama.FAMILY.modules.items() if ".mlp." not in name}
    | {
        "model.layers.{}.shared_mlp.input_linear": GATE_UP,
        "model.layers.{}.shared_mlp.output_linear": "layers.{}.mlp.down_proj",
    },
    classes={"lm": "GraniteMoeHybridForCausalLM", "reward": "GraniteMoeHybridForSequenceClassification"},
    other_classes=("GraniteMoeHybridModel",),
)
