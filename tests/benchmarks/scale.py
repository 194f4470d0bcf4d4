"""Memory and time of the recipes and of large models, as `--plan` predicts them: the tables of docs/scale.md.

    python -m tests.benchmarks.scale recipes        launch/recipes on 8 GPUs and on one
    python -m tests.benchmarks.scale sizes          7B, 13B and 70B on 8 to 512 GPUs
    python -m tests.benchmarks.scale measured       the roofline beside what one H200 reached
    python -m tests.benchmarks.scale methods        the roofline of 8B, for each method and GPU
    python -m tests.benchmarks.scale sync           the roofline of --sync_each_batch
    python -m tests.benchmarks.scale cards          what fits on 1, 8 and 16 GPUs, for each method; or of one model,
                                                    as in: cards llama-7b
    python -m tests.benchmarks.scale dialogues      long ones: memory, and operations
    python -m tests.benchmarks.scale families       a reward model of each family, in real sizes

Neither weights nor a GPU are needed. Lengths are drawn from log-normal distributions like those of HH-RLHF: prompts of
125 tokens on average, replies of 45.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import train_rm
import train_sft
from rm.config import parse, updated
from rm.data.examples import Example, Examples
from rm.distributed import process_group as dist
from rm.hf import weights
from rm.hf.saving import MAX_SHARD_BYTES
from rm.model.attention import VarlenAttention
from rm.model.heads import LanguageModel, RewardModel
from rm.model.nf4 import count_parameters
from rm.plan import plan
from rm.plan.memory import Footprint
from rm.plan.settings import GIB
from rm.training.flops import PEAKS
from tests.acceptance.speed import LLAMA_1B, LLAMA_8B, PAIRS, PROMPT, REPLY
from tests.real_configs import CONFIGS

LLAMA = {"model_type": "llama", "hidden_act": "silu", "vocab_size": 32000, "max_position_embeddings": 2048}
GPT_NEO = {"model_type": "gpt_neo", "vocab_size": 50257, "max_position_embeddings": 2048, "window_size": 256}


def llama(width: int, inner: int, layers: int, heads: int, **more) -> dict:
    sizes = dict(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads)
    return LLAMA | sizes | more


MODELS = {
    "llama-tiny": llama(256, 688, 4, 4),
    "llama-1.3b": llama(2048, 5504, 24, 16),
    "llama-3b": llama(3200, 8640, 26, 32),
    "llama-7b": llama(4096, 11008, 32, 32),
    "llama-13b": llama(5120, 13824, 40, 40),
    "llama-70b": llama(8192, 28672, 80, 64, num_key_value_heads=8),
    "llama-3.1-8b": llama(4096, 14336, 32, 32, num_key_value_heads=8, vocab_size=128256),
    "qwen3-8b": llama(4096, 12288, 36, 32, num_key_value_heads=8, vocab_size=151936, head_dim=128)
    | {"model_type": "qwen3"},
    "gpt-neo-2.7b": GPT_NEO
    | {"hidden_size": 2560, "num_layers": 32, "num_heads": 20, "attention_types": [[["global", "local"], 16]]},
    "gpt-neo-1.3b": GPT_NEO
    | {"hidden_size": 2048, "num_layers": 24, "num_heads": 16, "attention_types": [[["global", "local"], 12]]},
    "skywork-reward-v2": CONFIGS["Qwen3-8B"][0],
    "grm": CONFIGS["gemma-2b"][0],
    "tulu-3-8b": CONFIGS["Llama-3.1-8B"][0],
}


def lengths(n: int, pairs: bool) -> Examples:
    """Examples of HH-RLHF's shape; all token ids are 0."""
    draw = np.random.default_rng(0)

    def ids(mean: float, most: int) -> np.ndarray:
        return np.zeros(int(np.clip(draw.lognormal(np.log(mean) - 0.4, 0.9), 4, most)), np.int32)

    def example() -> Example:
        prompt, replies = ids(125, 350), [ids(45, 150) for _ in range(1 + pairs)]
        if not pairs:
            prompt, replies = prompt[:0], [np.concatenate([prompt, *replies])]
        return Example(prompt, tuple(replies), tuple(np.ones(len(reply), bool) for reply in replies))

    return Examples.build(example() for _ in range(n))


def row(name: str, kind: str, processes: int, **changes) -> None:
    """One line of a table: the heaviest step of such a run."""
    script, cls = (train_sft, LanguageModel) if kind == "sft" else (train_rm, RewardModel)
    recipe = Path("launch/recipes") / f"{name}.{kind}.json"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[name]))
        basis = ["--config", str(recipe)] if recipe.exists() else ["--dataset_path", "x", "--output_dir", "x"]
        settings = parse(script.Settings, "", [*basis, "--model_name_or_path", folder, "--dtype", "bfloat16"])
        settings = updated(settings, **changes)
        examples = lengths(max(2000, settings.batch.global_batch_size), kind == "rm")
        loss = settings.loss if kind == "rm" else None
        with dist.fake_process_group(processes), plan.logits_of_a_gpu():
            planned = plan.Plan(cls, settings, settings.plan, examples, VarlenAttention, loss)
            heaviest, recompute = planned.heaviest, settings.memory.gradient_checkpointing
            flops = plan.step_flops(planned.model, planned.loader, recompute)
    parts = heaviest.footprint
    seconds = flops / (processes * 0.4 * 312e12)  # of an A100
    gib = [x / GIB for x in (parts.weights, parts.gradients, parts.optimizer, parts.activations, parts.gathered)]
    traffic = [x / GIB for x in (parts.group_traffic, parts.replica_traffic)]
    cells = [name, kind, processes, settings.parallel.shard_group_size or processes, recompute,
             f"{heaviest.tokens:,}", *(f"{x:.1f}" for x in gib), f"{heaviest.reserved / GIB:.0f}", f"{seconds:.2f}",
             *(f"{x:.1f}" for x in traffic)]  # fmt: skip
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


LORA = {"use_lora": True, "lora_target_modules": ("all-linear",)}
MEASURED = (  # tokens per second, docs/benchmarks/2026-11-26_acceptance_h200.md
    (LLAMA_1B, "rm", {}, 67_228),
    (LLAMA_1B, "sft", {}, 49_498),
    (LLAMA_8B, "rm", LORA, 14_846),
    (LLAMA_1B, "rm", {"gradient_checkpointing": "full"}, 50_892),
    (LLAMA_8B, "rm", LORA | {"gradient_checkpointing": "full"}, 10_019),
)


def measured() -> None:
    """The runs of `tests.acceptance.speed`, on paper."""
    zeros, ones = (lambda n: np.zeros(n, np.int32)), (lambda n: np.ones(n, bool))
    texts = {
        "rm": Example(zeros(PROMPT), (zeros(REPLY),) * 2, (ones(REPLY),) * 2),
        "sft": Example(zeros(0), (zeros(PROMPT + 2 * REPLY),), (ones(PROMPT + 2 * REPLY),)),
    }
    print_row("model", "run", "kernels a step", "tokens/s measured", "on paper", "off by", "MFU on paper", header=True)
    for config, kind, changes, found in MEASURED:
        size = {"global_batch_size": 2 * PAIRS, "max_tokens": PAIRS * (PROMPT + 2 * REPLY)}
        with planned(config, kind, Examples.build([texts[kind]] * 4 * PAIRS), 1, **size, **changes) as plan_of_run:
            _, rate, utilization = plan_of_run.on_paper("H200")
        words = {"use_lora": "LoRA", "gradient_checkpointing": "full recomputation"}
        how = ", ".join([kind, *(word for name, word in words.items() if name in changes)])
        print_row("8B" if config is LLAMA_8B else "1B", how, f"{plan_of_run.heaviest.work.count:,}", f"{found:,}",
                  f"{rate:,.0f}", f"{rate / found - 1:+.0%}", f"{utilization:.3f}")  # fmt: skip


def methods() -> None:
    """Llama-3.1-8B on eight GPUs of one machine."""
    print_row("run", "method", "recomputed", "GPU", "GiB reserved", "kernels a micro-batch", "s a step",
              "tokens/s each", "MFU", "launching, s", "communication, s", "limited by", header=True)  # fmt: skip
    ways = {"all weights": {}, "LoRA": LORA, "LISA": {"use_lisa": True}}
    cards = {"none": ("H100", "A100"), "full": ("RTX 4090", "A10", "L4")}
    for kind, (method, changes), recompute in itertools.product(("rm", "sft"), ways.items(), cards):
        size = {"global_batch_size": 384, "max_tokens": 8192, "gradient_checkpointing": recompute}
        examples = lengths(1920, kind == "rm")
        with planned(LLAMA_8B, kind, examples, 8, **size, **changes) as plan_of_run:
            heaviest = plan_of_run.heaviest
            for gpu in cards[recompute]:
                step, rate, utilization = plan_of_run.on_paper(gpu)
                print_row(kind, method, recompute, gpu, f"{heaviest.reserved / GIB:.0f}",
                          f"{heaviest.work.count / heaviest.simulated[1]:,.0f}", f"{step.total:.2f}",
                          f"{rate:,.0f}", f"{utilization:.0%}", f"{step.host:.2f}", f"{step.communication:.2f}",
                          step.limit)  # fmt: skip


def sync() -> None:
    """A reward model on eight GPUs, all weights in training: gradients reduced in each micro-batch, or once a step."""
    print_row("sync_each_batch", "GiB reserved", "gathered", "reduced", "H100", "A100", "RTX 4090", header=True)
    for each in (True, False):
        size = {"global_batch_size": 384, "max_tokens": 8192, "sync_each_batch": each}
        with planned(LLAMA_8B, "rm", lengths(1920, True), 8, **size) as plan_of_run:
            heaviest = plan_of_run.heaviest
            traffic = heaviest.footprint.gather_traffic / GIB, heaviest.footprint.reduce_traffic / GIB
            steps = [plan_of_run.on_paper(gpu)[0] for gpu in ("H100", "A100", "RTX 4090")]
            print_row(each, f"{heaviest.reserved / GIB:.0f}", *(f"{x:.1f}" for x in traffic),
                      *(f"{step.total:.2f}, {step.communication:.2f}" for step in steps))  # fmt: skip


LARGE = ("llama-7b", "llama-3.1-8b", "llama-13b", "llama-70b")
METHODS = {
    "full": {},
    "LISA": {"use_lisa": True},
    "LoRA": LORA,
    "LoRA, 4 bits": LORA | {"load_in_4bit": True},
    "full, offloaded": {"cpu_offload": True},
}
FEW = (3, 4)  # layers


def cards(names: tuple[str, ...]) -> None:
    """Reward models with full recomputation: GiB reserved on a GPU, and the smallest of three cards that has as many.

    Traffic is in GiB a step; host memory, of a process, where something is offloaded.
    """
    print_row("model", "method", *(f"{n} GPU{'s' * (n > 1)}" for n in (1, 8, 16)), "traffic of 8", "of 16",
              "host GiB with 1, 8, 16", header=True)  # fmt: skip
    for name, (method, changes) in itertools.product(names, METHODS.items()):
        found = []
        for processes in (1, 8):
            size = {"global_batch_size": 48 * processes, "max_tokens": 8192, "gradient_checkpointing": "full"}
            examples = lengths(96 * processes, True)
            found.append(by_few(MODELS[name], "rm", examples, processes, size | changes)[0])
        found.append(of_more_processes(*found))
        host = ", ".join(f"{x.host / GIB:.0f}" for x in found) if "cpu_offload" in changes else ""
        traffic = [f"{x.group_traffic / GIB:.0f}" for x in found[1:]]
        print_row(name, method, *map(on_a_card, found), *traffic, host)
        if method == "full":
            short = [dataclasses.replace(x, optimizer=x.optimizer / 2) for x in found]
            print_row(name, "full, bfloat16 states", *map(on_a_card, short), *traffic, "")


def on_a_card(footprint: Footprint) -> str:
    gib = plan.reserved(footprint) / GIB
    card = next((size for size in (24, 40, 80) if gib <= size), "none")
    return f"{gib:.{0 if gib > 99 else 1}f} ({card})"


def of_more_processes(one: Footprint, eight: Footprint) -> Footprint:
    """A footprint with 16 processes: what they share among them has a part that is not divided, and one that is."""

    def divided(name: str) -> float:
        a, b = getattr(one, name), getattr(eight, name)
        return b - (a - b) / 14  # a + b / N through both

    shared = {name: divided(name) for name in ("weights", "gradients", "optimizer", "host")}
    sent = {name: getattr(eight, name) * (15 / 16) / (7 / 8) for name in ("gather_traffic", "reduce_traffic")}
    return dataclasses.replace(eight, **shared | sent)


class FewLayers(plan.Plan):
    """A plan of a model of which only a few layers are there: the inputs of the others are held for the backward."""

    more = 0  # layers

    def _model(self, settings, step: int = 0):
        model = super()._model(settings, step)
        if not settings.memory.activation_offloading:
            layer = model.layers[1]  # that of the first has no gradient with LoRA
            layer.forward = functools.partial(_hold_more, layer.forward, self.more)
        return model


def _hold_more(forward, more: int, x: torch.Tensor, *args) -> torch.Tensor:
    return forward(_Hold.apply(x, more), *args)


class _Hold(torch.autograd.Function):
    """The identity, which holds `more` tensors of the size of `x` from the forward to the backward."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, more: int) -> torch.Tensor:
        ctx.held = x.new_empty((more, *x.shape))
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        ctx.held = None
        return grad, None


def by_few(
    config: dict, kind: str, examples: Examples, processes: int, changes: dict
) -> tuple[Footprint, dict[str, float]]:
    """The footprint of a run with full recomputation, and its numbers of operations, from plans of few of its layers.

    All of it is linear in the layers, but activations, which are those of the few with the inputs of the others; what
    is gathered, which is the same for any depth; and files and shards in host memory at the end of a run, which are
    counted.
    """
    few, all_layers = [], config["num_hidden_layers"]
    for layers in FEW:
        FewLayers.more = all_layers - layers
        shallow = config | {"num_hidden_layers": layers}
        with planned(shallow, kind, examples, processes, FewLayers, **changes) as found:
            parameters, footprint = count_parameters(found.model), found.heaviest.footprint
            work = found.model, found.loader, found.settings.memory.gradient_checkpointing
            flops = {"all": plan.step_flops(*work), "attention": plan.attention_flops(*work)}
        at_the_end = host_at_the_end(parameters, kind, processes, changes)
        sizes = dataclasses.asdict(footprint) | {"parameters": parameters, "host": footprint.host - at_the_end}
        few.append(sizes | flops)
    more = (all_layers - FEW[0]) / (FEW[1] - FEW[0])
    sizes = {name: few[0][name] + more * (few[1][name] - few[0][name]) for name in few[0]}
    for name in ("activations", "gathered"):
        sizes[name] = max(x[name] for x in few)
    sizes["host"] += host_at_the_end(sizes.pop("parameters"), kind, processes, changes)
    flops = {name: sizes.pop(name) for name in flops}
    return Footprint(**sizes), flops


def host_at_the_end(parameters: float, kind: str, processes: int, changes: dict) -> float:
    """Bytes, as `rm.plan.memory` has them in bfloat16."""
    base = 2 * parameters / processes if "load_in_4bit" in changes else 0
    scored = 4 * parameters / processes if kind == "rm" else 0
    return max(min(MAX_SHARD_BYTES, 2 * parameters) + base, scored)


def dialogues() -> None:
    """SFT of long dialogues, one in a micro-batch and one a GPU, with full recomputation."""
    print_row("model", "method", "GPUs", "tokens", "GiB of activations", "GiB reserved", "offloaded",
              "s a step", "attention", header=True)  # fmt: skip
    for (name, method, processes), tokens in itertools.product(
        (("llama-3.1-8b", "full", 8), ("llama-70b", "full", 64)), (16384, 32768)
    ):
        ids, labels = np.zeros(tokens, np.int32), np.ones(tokens, bool)
        examples = Examples.build([Example(ids[:0], (ids,), (labels,))] * (2 * processes))
        size = {"global_batch_size": processes, "max_tokens": tokens, "gradient_checkpointing": "full"}
        found, flops = by_few(MODELS[name], "sft", examples, processes, size | METHODS[method])
        more = {"activation_offloading": True}
        offloaded, _ = by_few(MODELS[name], "sft", examples, processes, size | METHODS[method] | more)
        seconds = flops["all"] / processes / (0.4 * PEAKS["H100"] * 1e12)
        print_row(name, method, processes, f"{tokens:,}", f"{found.activations / GIB:.1f}",
                  *(f"{plan.reserved(x) / GIB:.0f}" for x in (found, offloaded)),
                  f"{seconds:.1f}", f"{flops['attention'] / flops['all']:.0%}")  # fmt: skip


REAL = """Qwen3-0.6B gemma-2-2b SmolLM3-3B granite-4.0-micro gemma-3-4b Olmo-3-1025-7B Qwen3-8B gemma-2-9b GLM-4-9B-0414
    Mistral-Small-3.1-24B gemma-2-27b Qwen3-32B Llama-3.3-70B""".split()


def families() -> None:
    """A reward model on eight H100s of one machine, all weights in training, with full recomputation."""
    print_row("model", "family", "billions of parameters", "GiB", "s a step", "tokens/s each", "MFU", "limited by",
              header=True)  # fmt: skip
    for name in REAL:
        config, _ = CONFIGS[name]
        size = {"global_batch_size": 384, "max_tokens": 8192, "gradient_checkpointing": "full"}
        with planned(config, "rm", lengths(1920, True), 8, **size) as plan_of_run:
            parameters = sum(p.numel() for p in plan_of_run.model.parameters()) / 1e9
            step, rate, utilization = plan_of_run.on_paper("H100")
            print_row(name, config["model_type"], f"{parameters:.2f}", f"{plan_of_run.heaviest.reserved / GIB:.0f}",
                      f"{step.total:.2f}", f"{rate:,.0f}", f"{utilization:.0%}", step.limit)  # fmt: skip


@contextlib.contextmanager
def planned(
    config: dict, kind: str, examples: Examples, processes: int, plan_class: type[plan.Plan] = plan.Plan, **changes
) -> Iterator[plan.Plan]:
    script, cls = (train_sft, LanguageModel) if kind == "sft" else (train_rm, RewardModel)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        basis = ["--dataset_path", "x", "--output_dir", "x", "--model_name_or_path", folder, "--dtype", "bfloat16"]
        settings = updated(parse(script.Settings, "", basis), **changes)
        loss = settings.loss if kind == "rm" else None
        with dist.fake_process_group(processes), plan.logits_of_a_gpu():
            kernel = plan.kernel_of(weights.read_config(folder)[0], on_a_gpu=True)
            yield plan_class(cls, settings, settings.plan, examples, kernel, loss)


def print_row(*cells, header: bool = False) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    if header:
        print("|" + "---|" * len(cells))


PAPER = {"measured": measured, "methods": methods, "sync": sync, "dialogues": dialogues, "families": families}
HEADER = (
    "model", "run", "GPUs", "shard group", "recomputed", "tokens", "weights", "gradients", "optimizer", "activations",
    "gathered", "reserved", "s a step", "within a group", "between groups",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("recipes", "sizes", "cards", *PAPER))
    parser.add_argument("model", nargs="*", help="for cards", default=("llama-1.3b", *LARGE))
    arguments = parser.parse_args()
    table = arguments.table
    if table == "cards":
        return cards(arguments.model)
    if table in PAPER:
        return PAPER[table]()
    print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
    if table == "recipes":
        for name, kind, processes in itertools.product(MODELS, ("sft", "rm"), (8, 1)):
            if Path(f"launch/recipes/{name}.{kind}.json").exists():
                row(name, kind, processes)
        return
    full = {"gradient_checkpointing": "full", "max_length": 2048}
    for name, processes, more in (
        ("llama-7b", 8, {}),
        ("llama-7b", 64, {}),
        ("llama-13b", 8, {}),
        ("llama-13b", 64, {}),
        ("llama-13b", 64, {"shard_group_size": 8}),
        ("llama-70b", 16, {}),
        ("llama-70b", 64, {}),
        ("llama-70b", 512, {}),
        ("llama-70b", 512, {"shard_group_size": 64}),
    ):
        # eight thousand tokens a GPU: 48 texts of 170 tokens
        row(name, "sft", processes, **full, global_batch_size=48 * processes, max_tokens=8192, **more)


if __name__ == "__main__":
    main()
