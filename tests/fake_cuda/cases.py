"""What is run on the fake device. torch is not imported here: `test_step.py` reads these tables as well."""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Case:
    """Some steps of a training of a tiny model.

    Attributes:
        script: whose `train_step` is run, "train_rm" or "train_sft".
        settings: of the training, by their flat names.
        model: a key of _MODELS.
        layers: of the model.
        rankings: whether the data are rankings of up to 5 replies; else they are pairs, or for SFT texts.
        world_size: ranks, of which the first is run.
        micro_batches: of each step, by the number of their examples.
        steps: how many, each of other examples.
        fault: a function of `faults.py`, called before the last step.
    """

    script: str = "train_rm"
    settings: dict = field(default_factory=dict)
    model: str = "llama"
    layers: int = 2
    rankings: bool = False
    world_size: int = 2
    micro_batches: tuple[int, ...] = (3,)
    steps: int = 1
    fault: str | None = None


_SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, head_dim=8, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128,
)  # fmt: skip
_MODELS = {  # config.json
    "llama": lambda layers: _SIZES | dict(model_type="llama", num_hidden_layers=layers),
    "gemma3": lambda layers: (
        _SIZES | dict(model_type="gemma3_text", num_hidden_layers=layers, sliding_window=8, sliding_window_pattern=2)
    ),
    "gpt2": lambda layers: dict(model_type="gpt2", n_layer=layers, vocab_size=64, n_embd=32, n_head=4, n_positions=128),
}

_LORA = dict(use_lora=True, lora_r=4, lora_target_modules=("all-linear",))
_LISA = dict(use_lisa=True, lisa_activated_layers=1, lisa_interval_steps=1)
_OFFLOADED = dict(activation_offloading=True)
_METHODS = {
    "full": Case(micro_batches=(3, 0)),
    "one GPU": Case(world_size=1),
    "HSDP": Case(settings=dict(shard_group_size=2), world_size=4, micro_batches=(3, 0)),
    "float32": Case(settings=dict(dtype="float32")),
    "selective recomputation": Case(settings=dict(gradient_checkpointing="selective")),
    "full recomputation": Case(settings=dict(gradient_checkpointing="full")),
    "LoRA": Case(settings=_LORA),
    "LoRA, whole base": Case(settings=_LORA | dict(shard_base=False)),
    "LISA, drop": Case(settings=_LISA | dict(lisa_state="drop"), steps=3),
    "LISA, keep": Case(settings=_LISA | dict(lisa_state="keep"), steps=3),
    "LISA, cpu": Case(settings=_LISA | dict(lisa_state="cpu"), steps=3),
}

STEPS = {
    **{f"RM, {name}": case for name, case in _METHODS.items()},
    **{f"SFT, {name}": replace(case, script="train_sft") for name, case in _METHODS.items()},
    "RM, gradients wait": replace(_METHODS["HSDP"], settings=dict(shard_group_size=2, sync_each_batch=False)),
    "RM, short states": Case(settings=dict(optimizer_state_dtype="bfloat16")),
    "RM, activations offloaded": Case(settings=_OFFLOADED, layers=3, micro_batches=(3, 2)),
    "RM, activations offloaded, full recomputation": Case(settings=_OFFLOADED | dict(gradient_checkpointing="full")),
    "RM, LoRA, 4 bits": Case(settings=_LORA | dict(load_in_4bit=True)),
    "RM, rankings": Case(rankings=True, settings=dict(loss="plackett_luce")),
    "RM, SFT loss": Case(settings=dict(sft_loss_coefficient=0.1)),
    "RM, GPT-2": Case(model="gpt2"),
    "RM, Gemma 3": Case(model="gemma3"),
}
# Two depths of each: the difference is what a layer costs.
BUDGETS = {
    f"{name}, {layers} layers": replace(STEPS[name], layers=layers, micro_batches=(24,))
    for name in ("RM, full", "RM, LoRA", "RM, selective recomputation", "SFT, full")
    for layers in (1, 2)
}
COMPILED = Case(steps=3, settings=dict(torch_compile=True))
COMPILED_LORA = replace(COMPILED, settings=_LORA | dict(torch_compile=True), layers=1)

FAULTS = {
    "waits": Case(layers=1, fault="waits"),
    "mixed_devices": Case(layers=1, fault="mixed_devices"),
    "state_on_cpu": Case(layers=1, steps=2, fault="state_on_cpu"),
    "split_attention": Case(layers=1, fault="split_attention"),
    **{f"twice, {layers} layers": replace(BUDGETS[f"RM, full, {layers} layers"], fault="twice") for layers in (1, 2)},
    "all_reduce_always": replace(STEPS["RM, HSDP"], fault="all_reduce_always"),
    "graph_break": replace(COMPILED, layers=1, steps=2, fault="graph_break"),
}

ALL = (
    STEPS
    | BUDGETS
    | {"compiled": COMPILED, "compiled LoRA": COMPILED_LORA}
    | {f"fault: {name}": case for name, case in FAULTS.items()}
)


def config(case: Case) -> dict:
    """The content of its model's config.json."""
    return _MODELS[case.model](case.layers)
