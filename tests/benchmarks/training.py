"""Two training loops that take turns: our script itself, and a TRL trainer itself, on the same batches.

Neither loop is re-implemented. Three names in `train_rm.py` (or `train_sft.py`) are replaced, so that a step waits for
its turn, is recorded, and takes the data in the file's order. Everything else, FSDP2 and logging included, is what a
user runs. A TRL trainer runs `train()` with a callback at its step boundaries, so that data loading, logging, clipping
and the scheduler are measured as well.
"""

import importlib
import itertools
import json
import shlex
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rm.config import parse
from rm.data import dataset
from rm.data.batch import Loader, Segment, StepBatches
from rm.data.encode import Task
from rm.data.examples import Examples
from rm.data.records import read_records
from rm.data.tokenizer import Tokenizer
from rm.distributed import process_group as dist
from rm.distributed.sharding import ParallelSettings, local
from rm.hf import build, saving
from rm.model.heads import RewardModel
from rm.training.run_log import RunLog
from tests.benchmarks.turns import Turns


def first_layers(model: str, layers: int | None, folder: Path) -> str:
    """A copy of a LLaMA-like model's first layers; the model itself where no number is given."""
    if layers is None:
        return model
    folder.mkdir(parents=True)
    for file in Path(model).glob("*token*.json"):
        (folder / file.name).symlink_to(file.resolve())
    config = json.loads(Path(model, "config.json").read_text()) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    with safe_open(Path(model, "model.safetensors"), "pt") as stored:
        kept = [n for n in stored.keys() if not n.startswith("model.layers.") or int(n.split(".")[2]) < layers]
        save_file({n: stored.get_tensor(n) for n in kept}, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def export_reward_model(source: str, folder: str, seed: int) -> None:
    """Save the language model with a new score head, fp32, as a Hugging Face folder that both sides start from."""
    with dist.session(seed):
        model = build.build(RewardModel, source, ParallelSettings(dtype="float32"))
        saving.save(build.load(model, source, seed), folder, source, torch.float32)


def choose(
    args: Namespace, model: str, size: int, rounds: int, task: Task, folder: Path, again: int = 2
) -> tuple[str, Examples]:
    """A file of batches of `size` records, in the order in which both sides take them, and its examples.

    The file has `rounds` batches to be timed, and then `again` times the one with the longest text: for the profiled
    turn, so that its memory is that of the most expensive step, and for the step that is loaded ahead and never taken.

    The batches are drawn from one epoch over the first --records records: shuffled, or with --group_by_length in the
    order of transformers' own sampler, by the length of the longer side.
    """
    all_records = (record for path in args.data for _, record in read_records(path))
    records = list(itertools.islice(all_records, args.records))
    if task is Task.SFT:
        records = [{"text": record["chosen"]} for record in records]
    tokenizer = Tokenizer(model)
    examples, _ = dataset.read(task, [_write(folder / "pool.jsonl", records)], tokenizer, args.max_length)
    if len(examples) < size * rounds:
        raise SystemExit(f"{size * rounds} examples are needed, {len(examples)} fit: raise --records")
    longest = examples.prefix_lengths + np.maximum.reduceat(examples.reply_lengths, examples.reply_offsets[:-1])
    if getattr(args, "group_by_length", False):
        from transformers.trainer_pt_utils import get_length_grouped_indices

        generator = torch.Generator().manual_seed(args.seed)
        order = np.array(get_length_grouped_indices(longest.tolist(), size, generator=generator))
    else:
        order = np.random.default_rng(args.seed).permutation(len(examples))
    epoch = order[: len(order) // size * size].reshape(-1, size)
    drawn = epoch[np.random.default_rng(args.seed + 1).choice(len(epoch), rounds, replace=False)]
    drawn = np.concatenate([drawn, drawn[[longest[drawn].max(1).argmax()] * again]])
    path = _write(folder / "data.jsonl", [records[examples.record[i]] for i in drawn.flatten()])
    return path, dataset.read(task, [path], tokenizer, args.max_length)[0]


def _write(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def ours(turns: Turns, name: str, flags: list[str]) -> None:
    """Run `train_rm` or `train_sft`: one step a turn, the examples in the file's order."""
    script = importlib.import_module(name)
    train_step = script.train_step  # the script's own, which is replaced below
    facts = {}

    class InTurns(Loader):
        def at(self, step: int) -> StepBatches:
            turns.begin()
            return super().at(step)

        def indices(self, step: int) -> np.ndarray:
            size = self.batch.global_batch_size
            return np.arange(step * size, (step + 1) * size) % len(self.examples)

    class Recorded(RunLog):
        def log_step(self, step: int, sums: dict, grad_norm: Tensor, rate: float, batches: StepBatches, unit: str):
            super().log_step(step, sums, grad_norm, rate, batches, unit)
            segments = [micro_batch.segments for micro_batch in batches.micro_batches]
            turns.end(
                loss=float(sums["loss"]) / float(sums["count"]),
                tokens=batches.num_tokens,
                micro_batches=[sum(map(sum, of_micro_batch)) for of_micro_batch in segments],
                attention_pairs=sum(_attention_pairs(segment) for some in segments for segment in some),
                **facts,
            )

    def counted(model: nn.Module, optimizer: torch.optim.Optimizer, *rest) -> tuple:
        result = train_step(model, optimizer, *rest)
        facts["trained"] = _parameters_trained(model)
        facts["states"] = sum(local(x).nbytes for state in optimizer.state.values() for x in state.values())
        return result

    script.Loader, script.RunLog, script.train_step = InTurns, Recorded, counted
    settings = parse(script.Settings, script.__doc__, flags)
    with dist.session(settings.run.seed):
        script.main(settings)


def _parameters_trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _attention_pairs(segment: Segment) -> int:
    """The number of (query, key) pairs in the attention of a segment (P, R1, ..., RK)."""
    prefix, *replies = segment
    return prefix * (prefix + 1) // 2 + sum(n * (n + 1) // 2 + n * prefix for n in replies)


def our_flags(args: Namespace, model: str, file: str, size: int, steps: int, folder: Path) -> list[str]:
    """The command line of our script: TRL's optimizer, that is no weight decay, no warmup, a constant rate."""
    values = {
        "model_name_or_path": model,
        "dataset_path": file,
        "output_dir": folder,
        "global_batch_size": size,
        "max_steps": steps,
        "max_length": args.max_length,
        "max_tokens": getattr(args, "max_tokens", 4096),
        "learning_rate": getattr(args, "learning_rate", 1e-5),
        "dtype": "bfloat16" if getattr(args, "bf16", False) else "float32",
    }
    constant = "--lr_scheduler_type constant --warmup_ratio 0 --weight_decay 0 --max_grad_norm 1"
    named = [str(word) for name, value in values.items() for word in (f"--{name}", value)]
    return [*named, *shlex.split(constant), *shlex.split(args.ours)]


def trl_settings(args: Namespace, folder: Path, steps: int, size: int) -> dict:
    """What differs from the defaults of a TRL config: the optimizer of `our_flags`, and no progress bar."""
    return {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": size,
        "learning_rate": args.learning_rate, "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "max_grad_norm": 1.0, "max_length": args.max_length, "gradient_checkpointing": args.gradient_checkpointing,
        "bf16": args.bf16, "use_cpu": True, "train_sampling_strategy": "sequential", "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "seed": args.seed,
    }  # fmt: skip


def trl(turns: Turns, method: str, model: str, settings: dict, records: list[dict], lora: int | None = None) -> None:
    """Run TRL's RewardTrainer or SFTTrainer: one step a turn, the records (token ids) in their order."""
    import datasets
    import transformers
    import trl

    class Recorded(getattr(trl, f"{method}Trainer")):
        def training_step(self, model, inputs, *rest):
            self.facts = {"tokens": inputs["input_ids"].numel(), "trained": _parameters_trained(self.model)}
            loss = super().training_step(model, inputs, *rest)
            self.facts["loss"] = loss.item()
            return loss

    class InTurns(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            turns.begin()

        def on_step_end(self, *_, **__):  # what follows in the loop, such as logging, belongs to the next turn
            turns.end(**trainer.facts)
            turns.begin()

    adapter = None
    if lora:
        from peft import LoraConfig

        linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        adapter = LoraConfig(task_type="SEQ_CLS", r=lora, lora_alpha=2 * lora, lora_dropout=0.0,
                             target_modules=linears, modules_to_save=["score"])  # fmt: skip
    trainer = Recorded(
        model=model,
        args=getattr(trl, f"{method}Config")(**settings),
        train_dataset=datasets.Dataset.from_list(records),
        callbacks=[InTurns()],
        peft_config=adapter,
    )
    for parameter in trainer.model.parameters():  # a file mapped into memory is not anonymous memory
        parameter.data = parameter.data.clone()
    trainer.train()
