"""Train a reward model on preference pairs.

    python train_rm.py --model_name_or_path runs/sft/model --dataset_path pairs.jsonl --output_dir runs/rm
    torchrun --nproc_per_node 8 train_rm.py ...      the same flags on eight GPUs; --global_batch_size counts
                                                     pairs over all of them

Data: {"positive": text, "negative": text}, {"chosen": ..., "rejected": ...} with or without a "prompt", texts or
messages, or rankings: docs/data.md. Loss: -log sigmoid(r_chosen - r_rejected), the mean over all pairs of a prompt's
replies, or another (--loss, docs/losses.md); the reward is read at the last token of every text. --loss regression
learns numbers that records give to single replies (--attributes).
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from rm import cli
from rm.config import defaults, parse
from rm.data import dataset, show, special_tokens
from rm.data.batch import Loader, PreferenceBatchSettings, StepBatches
from rm.data.encode import Task
from rm.distributed import lease
from rm.distributed import process_group as dist
from rm.distributed.sharding import full_tensor, set_gradient_sync
from rm.hf import build, hub, weights
from rm.hf.folder import TextFiles
from rm.model import lisa, losses
from rm.model.heads import Model, Sums, reward_model
from rm.model.losses import LossSettings
from rm.plan.settings import PlanSettings, compare_with_plan
from rm.report.training import write_report
from rm.scoring import contract, reward_set
from rm.scoring.reward_set import RewardSetSettings
from rm.training import flops, optim, resume, trackers
from rm.training.checkpointer import Checkpointer
from rm.training.evaluate import add_sums, evaluate, evaluation_sets
from rm.training.optim import OptimSettings
from rm.training.run_log import RunLog
from rm.training.settings import TrainingSettings
from rm.training.summary import say_start


@dataclass(frozen=True, kw_only=True)
class Settings(TrainingSettings):
    """Settings of reward modelling"""

    batch: PreferenceBatchSettings
    optim: OptimSettings = defaults(learning_rate=1e-5)
    loss: LossSettings
    reward_set: RewardSetSettings
    plan: PlanSettings

    def check(self) -> None:
        super().check()
        if self.loss.attributes and (self.batch.group_by_prompt or self.reward_set.reward_set_path):
            raise ValueError(
                "--group_by_prompt and --reward_set_path are of pairs, and --loss regression learns numbers of single "
                "replies: leave them out"
            )


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
    last_file = contract.last_file(settings.lora.use_lora)
    if not settings.plan.plan and resume.is_finished(out, settings.checkpoint, settings, last_file):
        write_report(out, if_missing=True)
        return dist.say(f"{out}: this run is finished; nothing to do")
    trackers.log_in("none" if settings.plan.plan else settings.run.report_to)
    given, settings = settings, hub.fetched(settings, weights=not settings.plan.plan)
    base = settings.model.model_name_or_path

    # text: files -> examples
    tokenizer = special_tokens.tokenizer_for(hub.tokenizer_folder(base), settings.tokenizer, settings.text)
    texts = TextFiles.of_training(weights.base_folder(base), tokenizer, settings.text)
    attributes = settings.loss.attributes
    task, unit = (Task.REGRESSION, "texts") if attributes else (Task.PREFERENCE, "pairs")
    model_class = reward_model(settings.loss)
    data = dataset.load(
        task, settings.data, settings.text, settings.mixture, settings.split, tokenizer, seed, settings.keys,
        group_by_prompt=settings.batch.group_by_prompt, attributes=attributes,
    )  # fmt: skip
    for examples in (data.train, *data.held_out.values()):
        losses.check_fits(examples, settings.loss)
    if settings.plan.plan:
        from rm.plan import plan

        return plan.show(model_class, settings, settings.plan, data.train, settings.loss, tokenizer.new_ids)
    reward_examples = reward_set.choose(
        settings.reward_set, data, settings.text, tokenizer, settings.data.cache_dir, settings.keys
    )

    # weights: architecture and shards, then values
    training = build.Training(settings.memory, settings.lora, settings.lisa)
    max_length = settings.text.max_length
    model = build.build(
        model_class,
        base,
        settings.parallel,
        training=training,
        loss=settings.loss,
        new_ids=tokenizer.new_ids,
        max_length=max_length,
        head=settings.model,
    )
    build.check_data(model, max_length, data.train, *data.held_out.values())
    build.load(model, base, seed, tokenizer.new_ids)
    optimizer = optim.adamw(model, settings.optim)

    # examples -> the micro-batches of every step
    loader = Loader(
        data.train, settings.batch, settings.packing, seed, model.config.attention_cost, settings.loss.has_sft_loss
    )
    held_out = evaluation_sets(model, data.held_out, settings.packing, settings.best)

    # the step to begin with: 0, or where this run was stopped
    start = resume.restore(model, optimizer, out, settings.checkpoint, settings, base, data.facts, loader.steps)
    say_start(settings, model, data, loader, start, unit)
    if start.step == 0:
        show.say_example(data.train, tokenizer)
    files = contract.checkpoint_files(model, base, settings.lora, texts, settings.text)
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
            run.log_step(step + 1, sums, grad_norm, rate, batches, unit)
            checkpointer.after_step(step + 1)
            if held_out and run.evaluation_due(step + 1):
                run.log_evaluation(step + 1, evaluate(model, held_out, checkpointer.poll))
                checkpointer.after_evaluation()
        # ------------------------------------------------------------------ the loop ends
        optimizer.state.clear()  # the end needs memory
        checkpointer.load_best()
        model = build.save(model, run.folder, base, settings.lora, data.train, texts)
        contract.write_all(model, run.folder, reward_examples, settings.text, settings.packing, run.model_step)
    compare_with_plan(settings)
    write_report(out)


if __name__ == "__main__":
    with cli.one_line_errors():
        settings = parse(Settings, __doc__)
        with dist.session(settings.run.seed), lease.held(None if settings.plan.plan else settings.run.output_dir):
            main(settings)
