"""How much of the machine's GEMM rate our reward-model step reaches: model FLOPs utilisation.

    python -m tests.benchmarks.mfu --model MODEL --data pairs.jsonl.gz --out docs/benchmarks/mfu.md
    ... --bf16

After each step, the products of the step's own linear layers are timed alone: for every micro-batch of T tokens the
forward, dgrad and wgrad of q, k, v, o, gate, up and down, in the step's dtype, over `--gemm_layers` layers of distinct
weights. Model FLOPs of a step are 6 P T + 12 L H E S: P weights of the blocks' linear layers, T tokens, and S
(query, key) pairs of the attention mask. Recomputation, the embedding, norms, clipping and the optimizer are not model
FLOPs, but their time counts. Tokens are those computed: a shared prefix counts once, and behind the last layer's
attention there are only the last tokens of a pair's two replies.
"""

import shutil
import statistics
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import torch

from rm.data.encode import Task
from rm.hf.weights import read_config
from rm.model.transformer import ModelConfig
from tests.benchmarks import training
from tests.benchmarks.common import Page, flags, table
from tests.benchmarks.turns import Contender, Turns


def main() -> None:
    args = arguments()
    page = Page(f"Model FLOPs utilisation, {'bf16' if args.bf16 else 'fp32'}", args)
    folder = Path(tempfile.mkdtemp())
    try:
        model, rounds = training.first_layers(args.model, args.layers, folder / "layers"), args.warmup + args.steps
        config = read_config(model)[0]
        file, _ = training.choose(args, model, args.batch_pairs, rounds, Task.PREFERENCE, folder)
        words = training.our_flags(args, model, file, args.batch_pairs, rounds + 1, folder / "ours")
        step = Contender("step", args.threads, training.ours, "train_rm", words)
        gemm = Contender("GEMM", args.threads, products, config, args.gemm_layers, args.max_tokens, args.bf16)
        for number in range(rounds):
            step.turn()
            gemm.turn(step.turns[-1]["micro_batches"])
            print(f"round {number + 1}/{rounds}", file=sys.stderr)
        step.close()
        gemm.close()
    finally:
        shutil.rmtree(folder)
    page.add(
        f"{args.batch_pairs} random pairs a step, pairs over {args.max_length} tokens left out, "
        f"micro-batches of at most {args.max_tokens} tokens{' and ' + args.ours if args.ours else ''}. "
        f"Step, products, step, products, ... in two processes; {args.warmup} warm-up.\n",
        report(config, step, gemm, args.warmup, 2 * args.batch_pairs),
    )
    page.finish()


def report(config: ModelConfig, step: Contender, gemm: Contender, warmup: int, ends: int) -> str:
    rows, utilisation = [], {"wall": [], "cpu": []}
    layer = [a * b for a, b in shapes(config)]
    behind = sum(layer[3:])  # the attention's products: o, gate, up, down
    linears = sum(layer) * config.n_layers - behind
    pair = 12 * config.n_layers * config.n_heads * config.head_dim
    for i, (a, b) in enumerate(zip(step.turns, gemm.turns, strict=True)):
        flops = 6 * (linears * a["tokens"] + behind * ends) + pair * a["attention_pairs"]
        reached = {clock: (flops / a[clock], b["flops"] / b[clock]) for clock in utilisation}
        for clock, (own, peak) in reached.items():
            if i >= warmup:
                utilisation[clock].append(own / peak)
        own, peak = (x / 1e9 for x in reached["wall"])
        rows.append([f"{i}{' (warm-up)' if i < warmup else ''}", " + ".join(map(str, a["micro_batches"])),
                     f"{flops / 1e9:,.0f}", f"{a['wall']:.2f}", f"{own:.0f}", f"{peak:.0f}", f"{own / peak:.2f}",
                     f"{reached['cpu'][0] / reached['cpu'][1]:.2f}",
                     f"{a['others']:.2f}, {b['others']:.2f}"])  # fmt: skip
    head = ["step", "tokens of its micro-batches", "model GFLOP", "wall s", "step GFLOP/s", "GEMM GFLOP/s",
            "utilisation, wall", "utilisation, CPU seconds", "cores used by others, step and GEMM"]  # fmt: skip
    lines = [f"median **{statistics.median(x):.2f}** ({min(x):.2f} to {max(x):.2f}) by {c} seconds"
             for c, x in utilisation.items()]  # fmt: skip
    return table(head, rows) + f"\nUtilisation: {', '.join(lines)}.\n"


def shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """(in, out) of a block's linear layers: q, k, v, o, gate, up, down."""
    heads, kv_heads = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    attention = [(config.dim, heads), (config.dim, kv_heads), (config.dim, kv_heads), (heads, config.dim)]
    return [*attention, *[(config.dim, config.hidden_dim)] * (2 if config.mlp == "swiglu" else 1),
            (config.hidden_dim, config.dim)]  # fmt: skip


def products(turns: Turns, config: ModelConfig, layers: int, max_tokens: int, bf16: bool) -> None:
    """A turn: forward, dgrad and wgrad of every linear layer, for each micro-batch of the step before."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    weights = [torch.randn(b, a).to(dtype) for _ in range(layers) for a, b in shapes(config)]
    sides = {n: torch.randn(max_tokens, n).to(dtype) for w in weights for n in w.shape}
    while True:
        micro_batches = turns.begin()
        for tokens in micro_batches:
            for weight in weights:
                grad, x = (sides[n][:tokens] for n in weight.shape)  # (T, out), (T, in)
                _ = x @ weight.T, grad @ weight, grad.T @ x
        turns.end(flops=6 * sum(w.numel() for w in weights) * sum(micro_batches))


def arguments() -> Namespace:
    parser = flags(__doc__)
    add = parser.add_argument
    add("--batch_pairs", type=int, default=8, help="pairs a step (default: 8)")
    add("--max_tokens", type=int, default=4096, help="tokens a micro-batch (default: 4096)")
    add("--gemm_layers", type=int, default=4, help="layers whose products are timed after a step (default: 4)")
    add("--bf16", action="store_true", help="compute in bfloat16")
    return parser.parse_args()


if __name__ == "__main__":
    main()
