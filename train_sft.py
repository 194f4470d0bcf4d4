"""Fine-tune a language model on texts.

    python train_sft.py --model_name_or_path models/llama-7b --dataset_path sft.json --output_dir runs/sft
    torchrun --nproc_per_node 8 train_sft.py ...     the same flags on eight GPUs; --global_batch_size stays
    what it is

Data: {"type": "text_only", "instances": [{"text": ...}]}, or JSON lines of texts, of input and output, or of
messages: docs/data.md. Loss: cross entropy of a whole text, of the output or of the assistant's turns, and of
the end-of-text token; packed texts never see one another.
"""

from dataclasses import dataclass

from rm import cli
from rm.config import parse, setting
from rm.data import batch, dataset, split
from rm.data.tokenizer import Tokenizer
from rm.distributed import process_group as dist
from rm.distributed import sharding
from rm.hf import build, hub
from rm.model import heads, lisa, lora
from rm.plan import plan
from rm.report import training
from rm.training import checkpointer, optim, resume, run_log
from rm.training.step import evaluate, train_step


@dataclass(frozen=True, kw_only=True)
class Settings(
    build.ModelSettings,
    dataset.DataSettings,
    dataset.MixtureSettings,
    split.SplitSettings,
    batch.BatchSettings,
    batch.PackingSettings,
    optim.OptimSettings,
    lora.LoraSettings,
    lisa.LisaSettings,
    sharding.ParallelSettings,
    run_log.RunSettings,
    resume.ResumeSettings,
    plan.PlanSettings,
):
    learning_rate: float = setting(2e-5, "peak learning rate")


def main(settings: Settings) -> None:
    settings = hub.fetched(settings)
    if settings.plan:
        return plan.show(heads.LanguageModel, dataset.texts, settings)
    resume.check_folder(settings)

    # text: files -> examples
    tokenizer = Tokenizer(settings.model_name_or_path)
    train, held_out, facts = dataset.load(dataset.texts, settings, tokenizer, dist.say)

    # weights: shapes, shards, numbers
    model = build.load(heads.LanguageModel, settings)
    build.check_ids(model, train, held_out)
    optimizer = optim.adamw(model, settings)

    # examples -> the work of every step
    loader = batch.Loader(train, settings, settings.seed, model.config.attention_cost)
    held_out = batch.EvalBatches(held_out, settings)

    # the step to begin with: 0, or where this run was stopped
    start = resume.restore(model, optimizer, settings, facts)
    with (
        run_log.RunLog(settings, loader.steps, loader.steps_per_epoch, facts, start) as run,
        checkpointer.Checkpointer(model, optimizer, run) as checkpoints,
    ):
        if held_out and run.evaluates(start.step):
            run.evaluation(start.step, evaluate(model, held_out, checkpoints.poll))
        # ------------------------------------------------------------------ the loop: change me
        for step in range(start.step, loader.steps):
            lisa.switch(model, optimizer, step, settings)
            work = loader.at(step)
            rate = optim.learning_rate(step, loader.steps, settings)
            optim.set_learning_rate(optimizer, rate)
            sums = train_step(model, optimizer, work, settings.max_grad_norm)
            run.train(step + 1, sums, rate, work.examples, work.tokens, "texts")
            checkpoints.after(step + 1)
            if held_out and run.evaluates(step + 1):
                run.evaluation(step + 1, evaluate(model, held_out, checkpoints.poll))
        # ------------------------------------------------------------------ the loop ends
        build.save(model, run.folder, settings, probe=batch.pack(train, range(min(4, len(train)))))
    plan.compare(settings)
    training.write_for(settings.output_dir)


if __name__ == "__main__":
    with cli.one_line_errors():
        settings = parse(Settings, __doc__)
        with dist.session(settings.seed):
            main(settings)
