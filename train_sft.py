"""Fine-tune a language model on texts.

    python train_sft.py --model_name_or_path models/llama-7b --dataset_path sft.json --output_dir runs/sft
    torchrun --nproc_per_node 8 train_sft.py ...     the same flags on eight GPUs; --global_batch_size counts
                                                     texts over all of them

Data: {"type": "text_only", "instances": [{"text": ...}]}, or JSON lines of texts, of input and output, or of
messages: docs/data.md. Loss: cross entropy of a whole text, of the output or of the assistant's turns, and of
the token that ends it; texts that are packed together do not attend to each other.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from rm import cli
from rm.config import defaults, parse
from rm.data import dataset, show, special_tokens
from rm.data.batch import Loader, StepBatches
from rm.data.dataset import ReplySettings
from rm.data.encode import Task
from rm.distributed import lease
from rm.distributed import process_group as dist
from rm.distributed.sharding import full_tensor, set_gradient_sync
from rm.hf import build, hub, weights
from rm.hf.folder import TextFiles
from rm.model import lisa
from rm.model.heads import LanguageModel, Model, Sums
from rm.plan.settings import PlanSettings, compare_with_plan
from rm.report.training import write_report
from rm.training import flops, optim, resume, trackers
from rm.training.checkpointer import Checkpointer
from rm.training.evaluate import add_sums, evaluate, evaluation_sets
from rm.training.optim import OptimSettings
from rm.training.run_log import RunLog
from rm.training.settings import TrainingSettings
from rm.training.summary import say_start


@dataclass(frozen=True, kw_only=True)
class Settings(TrainingSettings):
    """Settings of supervised fine-tuning"""

    optim: OptimSettings = defaults(learning_rate=2e-5)
    replies: ReplySettings
    plan: PlanSettings


def train_step(
    model: Model, optimizer: torch.optim.Optimizer, batches: StepBatches, max_grad_norm: float
) -> tuple[Sums, Tensor]:
    """One optimizer step, in which the host never waits for the device.

    Returns:
        this rank's summed metrics, and the gradient norm over all ranks before clipping.
    """
    total: Sums = {}
    torch.manual_seed(batches.seed)  # of dropout: a resumed run repeats it
    last = len(batches.micro_batches)
    for n, batch in enumerate(batches.micro_batches, start=1):
        set_gradient_sync(model, n == last)  # between shard groups, gradients are exchanged once a step
        sums = model(batch.to(dist.device()))
        # Sums are divided once, by the count of the whole step over all ranks and micro-batches, so that gradients do
        # not depend on how it is split. FSDP averages gradients over ranks: world_size undoes that.
        loss = sums["loss"] * (dist.world_size() / model.count(batches))
        # The upstream gradient is 1, or NaN where the loss is not finite: then so is the gradient norm, on every rank.
        loss.backward(loss.detach() * 0 + 1)
        add_sums(total, sums)
    grad_norm = full_tensor(nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf")))
    # Fused AdamW skips the update, on the device, where this is 1. `run.log_step` names the step and ends the run.
    optimizer.found_inf = (~grad_norm.isfinite()).float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # frees the gradients' memory until the next backward
    return total, grad_norm


def main(settings: Settings) -> None:
    out, seed = settings.run.output_dir, settings.run.seed
    if not settings.plan.plan and resume.is_finished(out, settings.checkpoint, settings):
        write_report(out, if_missing=True)
        return dist.say(f"{out}: this run is finished; nothing to do")
    trackers.log_in("none" if settings.plan.plan else settings.run.report_to)
    given, settings = settings, hub.fetched(settings, weights=not settings.plan.plan)
    base = settings.model.model_name_or_path

    # text: files -> examples
    tokenizer = special_tokens.tokenizer_for(hub.tokenizer_folder(base), settings.tokenizer, settings.text)
    texts = TextFiles.of_training(weights.base_folder(base), tokenizer, settings.text)
    data = dataset.load(
        Task.SFT, settings.data, settings.text, settings.mixture, settings.split, tokenizer, seed, settings.keys,
        settings.replies,
    )  # fmt: skip
    if settings.plan.plan:
        from rm.plan import plan

        return plan.show(LanguageModel, settings, settings.plan, data.train, new_ids=tokenizer.new_ids)

    # weights: architecture and shards, then values
    training = build.Training(settings.memory, settings.lora, settings.lisa)
    max_length = settings.text.max_length
    model = build.build(
        LanguageModel,
        base,
        settings.parallel,
        training=training,
        new_ids=tokenizer.new_ids,
        max_length=max_length,
        head=settings.model,
    )
    build.check_data(model, max_length, data.train, *data.held_out.values())
    build.load(model, base, seed, tokenizer.new_ids)
    optimizer = optim.adamw(model, settings.optim)

    # examples -> the micro-batches of every step
    loader = Loader(data.train, settings.batch, settings.packing, seed, model.config.attention_cost)
    held_out = evaluation_sets(model, data.held_out, settings.packing, settings.best)

    # the step to begin with: 0, or where this run was stopped
    start = resume.restore(model, optimizer, out, settings.checkpoint, settings, base, data.facts, loader.steps)
    say_start(settings, model, data, loader, start, "texts")
    if start.step == 0:
        show.say_example(data.train, tokenizer)
    files = build.checkpoint_files(model, base, settings.lora, texts)
    facts = {"data": data.facts, "given": hub.names(given, settings)}
    mfu = partial(flops.utilization, model, loader)
    with (
        RunLog(settings.run, settings, loader.steps, loader.steps_per_epoch, facts, start, mfu, settings.best) as run,
        Checkpointer(model, optimizer, run, settings.checkpoint, files) as checkpointer,
    ):
        if held_out and run.evaluation_due(start.step):
            run.log_evaluation(start.step, evaluate(model, held_out, checkpointer.poll))
            checkpointer.after_evaluation()
        # ------------------------------------------------------------------ the loop: change me
        for step in range(start.step, loader.steps):
            if run.stops_early:
                break
            lisa.activate_layers(model, optimizer, step, settings.lisa, seed)
            rate = optim.learning_rate(step, loader.steps, settings.optim)
            optim.set_learning_rate(optimizer, rate)
            batches = loader.at(step)
            sums, grad_norm = train_step(model, optimizer, batches, settings.optim.max_grad_norm)
            run.log_step(step + 1, sums, grad_norm, rate, batches, "texts")
            checkpointer.after_step(step + 1)
            if held_out and run.evaluation_due(step + 1):
                run.log_evaluation(step + 1, evaluate(model, held_out, checkpointer.poll))
                checkpointer.after_evaluation()
        # ------------------------------------------------------------------ the loop ends
        optimizer.state.clear()  # the end needs memory
        checkpointer.load_best()
        model = build.save(model, run.folder, base, settings.lora, data.train, texts)
    compare_with_plan(settings)
    write_report(out)


if __name__ == "__main__":
    with cli.one_line_errors():
        settings = parse(Settings, __doc__)
        with dist.session(settings.run.seed), lease.held(None if settings.plan.plan else settings.run.output_dir):
            main(settings)
