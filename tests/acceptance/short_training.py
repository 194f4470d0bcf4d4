"""Six steps of a tiny model by every method, the same on any device.

CUDA_VISIBLE_DEVICES= python -m tests.acceptance.short_training OUT.safetensors     in float32 on the CPU
"""

import sys
from dataclasses import replace

import torch
from safetensors.torch import save_file
from torch import Tensor

from rm.config import compose
from rm.data.batch import StepBatches, pack
from rm.distributed import process_group as dist
from rm.distributed import sharding
from rm.distributed.sharding import ParallelSettings
from rm.model import lisa
from rm.model.attention import choose_kernel
from rm.model.heads import LanguageModel, RewardModel
from rm.model.transformer import Rope
from rm.training import optim
from tests import made
from tests.training_runs import Settings, sharded
from train_rm import train_step

STEPS = 6
CONFIG = replace(
    made.LLAMA, vocab_size=512, dim=128, head_dim=32, hidden_dim=256, attn_scale=32**-0.5,
    ropes=(Rope(tuple(10.0 ** -(i / 4) for i in range(16))),) * made.LLAMA.n_layers,
)  # fmt: skip
LORA = dict(use_lora=True, lora_r=4, lora_dropout=0.0, lora_target_modules=("all-linear",))
LISA = dict(use_lisa=True, lisa_activated_layers=1, lisa_interval_steps=1)
METHODS = {
    "full": {},
    "LoRA": LORA,
    "LoRA, whole base": LORA | dict(shard_base=False),
    "LISA, moments dropped": LISA,
    "LISA, moments kept": LISA | dict(lisa_state="keep"),
    "LISA, moments on the CPU": LISA | dict(lisa_state="cpu"),
    "selective recomputation": dict(gradient_checkpointing="selective"),
    "full recomputation": dict(gradient_checkpointing="full"),
}
RUNS = {f"{cls.head} {method}": (cls, method) for cls in (RewardModel, LanguageModel) for method in METHODS}


def train(name: str, dtype: str, forbid_waits: bool) -> tuple[Tensor, Tensor]:
    """(gradient norms (STEPS,), all trained weights (W,)), float32 on the CPU.

    Args:
        name: of RUNS.
        forbid_waits: raise an error where the host waits for the device, from the third step on.
    """
    cls, method = RUNS[name]
    settings = compose(Settings, learning_rate=1e-4, dtype=dtype, **METHODS[method])
    kernel = choose_kernel(dist.device(), getattr(torch, dtype), CONFIG.n_heads, CONFIG.n_kv_heads, CONFIG.head_dim)
    plain = made.model(cls, CONFIG, kernel)
    lora = settings.lora if settings.lora.use_lora else None
    model = sharded(plain, settings.parallel, settings.memory.gradient_checkpointing, lora)
    optimizer = optim.adamw(model, settings.optim)
    pairs = made.token_pairs(12, vocab=CONFIG.vocab_size, longest=40)
    if cls is RewardModel:
        examples = made.pair_examples(pairs)
    else:
        examples = made.text_examples([chosen for chosen, _ in pairs])
    norms = []
    for step in range(STEPS):
        micro_batches = [pack(examples, indices) for indices in (range(7), range(7, 12), [])]
        labels = sum(len(batch.targets) for batch in micro_batches)
        tokens = sum(len(batch.tokens) for batch in micro_batches)
        lisa.activate_layers(model, optimizer, step, settings.lisa, seed=0)
        if forbid_waits and step >= 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            _, norm = train_step(model, optimizer, StepBatches(micro_batches, 12, labels, tokens, step), 1.0)
        finally:
            if forbid_waits:
                torch.cuda.set_sync_debug_mode("default")
        norms.append(norm)
    weights = [sharding.full_tensor(p).float().cpu().flatten() for p in model.parameters()]
    return torch.stack(norms).float().cpu(), torch.cat(weights)


@torch.no_grad()
def rewards_of_lengths(dtype: str, torch_compile: bool) -> tuple[Tensor, int]:
    """Rewards of micro-batches of six lengths, and how many graphs were compiled for the last three."""
    kernel = choose_kernel(dist.device(), getattr(torch, dtype), CONFIG.n_heads, CONFIG.n_kv_heads, CONFIG.head_dim)
    plain = made.model(RewardModel, CONFIG, kernel)
    model = sharded(plain, ParallelSettings(dtype=dtype, torch_compile=torch_compile)).eval()
    rewards, compilations = [], []
    for n, pairs in enumerate((3, 5, 8, 4, 9, 7)):
        examples = made.pair_examples(made.token_pairs(pairs, seed=n, vocab=CONFIG.vocab_size, longest=40))
        rewards.append(model.rewards(pack(examples, range(pairs)).to(dist.device())).float().cpu())
        compilations.append(_compilations())
    return torch.cat(rewards), compilations[-1] - compilations[2]


def _compilations() -> int:
    import torch._dynamo.utils  # only here: its import takes a second

    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def main() -> None:
    results = {}
    with dist.session(0):
        for name in RUNS:
            norms, weights = train(name, "float32", forbid_waits=False)
            results |= {f"{name}.norms": norms, f"{name}.weights": weights}
    save_file(results, sys.argv[1])


if __name__ == "__main__":
    main()
