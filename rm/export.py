"""Write a model again: an adapter merged into its base, another dtype, files of another size; or the mean of several.

    python -m rm.export --model_name_or_path runs/rm/adapter --output_dir reward-model --dtype bfloat16
    python -m rm.export --average runs/a/model runs/b/model runs/c/model --dataset_path test.jsonl --output_dir mean
    torchrun --nproc_per_node 8 -m rm.export ...      where one process has too little memory: 4 bytes a parameter, or 8
                                                      for a mean

Reads what the training scripts read, and writes what they write: a Hugging Face folder. `docs/exports.md` says which
software reads it, and how.
"""

import contextlib
import reprlib
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from rm import cli
from rm.config import REQUIRED, SettingsGroup, parse, require_positive, setting
from rm.data.batch import EvalBatches, PackingSettings
from rm.data.dataset import TextSettings, read_cached
from rm.data.encode import Task
from rm.data.examples import Examples
from rm.data.tokenizer import Tokenizer
from rm.distributed import lease, sharding
from rm.distributed import process_group as dist
from rm.distributed.sharding import ParallelSettings
from rm.evaluation import metrics
from rm.evaluation.results import Result, compare
from rm.files import read_json
from rm.hf import build, hub, outputs, saving, weights
from rm.hf.folder import TextFiles
from rm.hf.outputs import HeadSettings
from rm.model.attention import SplitAttention
from rm.model.heads import RewardModel, reward_model
from rm.model.losses import LossSettings
from rm.model.transformer import Transformer
from rm.report import model_card
from rm.scoring import contract
from rm.scoring.contract_file import KEYS
from rm.scoring.score import all_rewards, reward_statistics
from rm.scoring.settings import ScoringTextSettings


@dataclass(frozen=True, kw_only=True)
class SourceSettings(HeadSettings):
    """Model"""

    model_name_or_path: str | None = setting(
        None, "Hugging Face folder, of a model or an adapter, or hub id, org/name or org/name@revision", hub="model"
    )
    average: tuple[str, ...] = setting(
        (), "models of one architecture and scoring contract, of whose weights the mean is written", hub="model"
    )
    dataset_path: tuple[str, ...] = setting(
        (), "with --average: files of pairs or rankings, on which the models and their mean are evaluated", hub="data"
    )

    def check(self) -> None:
        super().check()
        if (self.model_name_or_path is None) == (not self.average):
            raise ValueError("give --model_name_or_path, or --average with the models whose mean is wanted")
        if self.chooses and self.average:
            raise ValueError("--reward_label and --reward_weights go with --model_name_or_path")
        if len(self.average) == 1:
            raise ValueError("--average needs two models at least; of one, --model_name_or_path is for that")
        if len(set(self.average)) < len(self.average):
            raise ValueError(f"--average names a model twice: {' '.join(self.average)}")
        if self.dataset_path and not self.average:
            raise ValueError("--dataset_path goes with --average; eval_rm.py evaluates a model")


@dataclass(frozen=True, kw_only=True)
class ExportSettings(SettingsGroup):
    """Export"""

    output_dir: str = setting(REQUIRED, "folder to write: new, or of a model that is replaced")
    dtype: str = setting(
        "bfloat16", "of all weights but a score head, which is float32", ("float32", "bfloat16", "float16")
    )
    max_shard_gb: float = setting(5.0, "largest size of one safetensors file in 10^9 bytes")
    center_rewards: bool = setting(
        False, "subtract scoring.json's reward_mean from all rewards, in the bias of the head, which has to have one"
    )

    def check(self) -> None:
        require_positive(max_shard_gb=self.max_shard_gb)


@dataclass(frozen=True, kw_only=True)
class Settings(SettingsGroup):
    """Settings of an export"""

    source: SourceSettings
    export: ExportSettings

    def check(self) -> None:
        if self.source.average and self.export.center_rewards:
            raise ValueError("--center_rewards goes with --model_name_or_path: export the mean of models once more")


def main(settings: Settings) -> None:
    """All ranks call it; each holds its shards, in float32, so that a merged adapter or a mean is rounded once."""
    settings = hub.fetched(settings)
    if settings.source.average:
        write_mean(settings.source.average, settings.source.dataset_path, settings.export)
    else:
        write_again(settings.source.model_name_or_path, settings.source, settings.export)
    dist.say(f"saved {settings.export.output_dir}")


def write_again(source: str, head: HeadSettings, export: ExportSettings) -> None:
    """Write one model."""
    model = _load(source, SplitAttention, head)  # which computes nothing here
    shift = _center(model, source) if export.center_rewards else 0.0
    _save(model, source, export)
    if isinstance(model, RewardModel):
        contract.copy_to(source, export.output_dir, shift, model.reward_output)
    card = Path(source) / model_card.FILE
    if dist.is_main() and card.is_file() and not export.center_rewards:  # it states the mean as it was
        shutil.copyfile(card, Path(export.output_dir) / model_card.FILE)


def write_mean(sources: tuple[str, ...], dataset_path: tuple[str, ...], export: ExportSettings) -> None:
    """Write the mean of the weights of several models (WARM, arXiv 2401.12187).

    Raises:
        ValueError: the models differ in more than their weights.
    """
    for other in sources[1:]:
        _check_alike(sources[0], other)
    first = sources[0]
    is_reward_model = build.head_of(first) is RewardModel
    if dataset_path and not is_reward_model:
        raise ValueError(f"--dataset_path: {first} is a language model, which has no accuracy on pairs; leave it out")
    if dataset_path and outputs.names_of(first):
        raise ValueError(f"--dataset_path: {first} has several outputs, of which none is the reward; leave it out")
    examples = _examples(first, dataset_path) if dataset_path else None
    results: dict[str, Result] = {}

    def evaluate(name: str, model: Transformer) -> None:
        if examples is not None:
            rewards = all_rewards(model, _batches(examples)).numpy()
            results[name] = Result(dataset_path, examples, rewards)
            results[name].check_finite()

    mean = _load(first)
    evaluate(first, mean)
    for other in sources[1:]:
        model = _load(other)
        evaluate(other, model)
        for total, parameter in zip(mean.parameters(), model.parameters(), strict=True):
            sharding.local(total.detach()).add_(sharding.local(parameter.detach()))
        sharding.release(model)
    for total in mean.parameters():
        sharding.local(total.detach()).div_(len(sources))
    evaluate("mean", mean)
    statistics = None
    summaries: dict[str, dict] = {}
    if examples is not None:
        statistics = reward_statistics(mean, _batches(examples))
        statistics["reward_set"] = f"{len(examples)} examples of {' '.join(dataset_path)}"
        if dist.is_main():  # which reads the files again, for the conversations of the intervals
            summaries = {name: metrics.summary(result.scored) for name, result in results.items()}
            _say_accuracies(summaries, results)
    _save(mean, first, export)
    agreed = contract.read(first)
    if agreed is not None:
        text, _ = contract.resolve(first, ScoringTextSettings())
        contract.write(export.output_dir, text, getattr(torch, agreed.dtype), statistics, agreed.labels)
    elif is_reward_model:
        contract.copy_to(first, export.output_dir)  # its padding token
    if dist.is_main() and is_reward_model:
        out, names = Path(export.output_dir), " ".join(Path(path).name for path in dataset_path)
        own = read_json(out / contract.FILE)
        model_card.write(out, model_card.of_mean(list(sources), own, list(summaries.values()), names))


def _load(source: str, kernel: type | None = None, head: HeadSettings = HeadSettings()) -> Transformer:  # noqa: B008
    cls, agreed, options = build.head_of(source), contract.read(source), {}
    if agreed is not None and agreed.labels and not head.chooses:  # all outputs are kept
        loss = LossSettings.of_outputs(agreed.labels)
        cls, options = reward_model(loss), {"loss": loss}
    parallel, max_length = ParallelSettings(dtype="float32"), None if agreed is None else agreed.max_length
    model = build.build(cls, source, parallel, kernel=kernel, max_length=max_length, head=head, **options)
    return build.load(model, source)


def _center(model: Transformer, source: str) -> float:
    """Subtract the contract's mean reward in the bias of the head; return what every reward has changed by."""
    mean = contract.mean_reward(source)
    bias = getattr([*model.score.modules()][-1], "bias", None)
    if bias is None:
        raise ValueError(
            f"{source}: its reward head has no bias, as no head of transformers has, so that its rewards cannot be "
            f"centred in the weights; eval_rm.py --center_rewards subtracts their mean, {mean:.6g}"
        )
    sharding.local(bias.detach()).sub_(mean)
    return -mean


def _save(model: Transformer, source: str, export: ExportSettings) -> None:
    """Write the weights with the files of `source`, and release the model."""
    max_shard_bytes = int(export.max_shard_gb * 10**9)
    saving.save(model, export.output_dir, source, getattr(torch, export.dtype), max_shard_bytes, _texts(source))
    sharding.release(model)


def _check_alike(first: str, other: str) -> None:
    """Raise ValueError where two models differ in what has to be equal for their weights to have a mean."""
    facts, of_other = _facts(first), _facts(other)
    for name, value in facts.items():
        if of_other[name] != value:
            difference = f"{name} of {other} is {reprlib.repr(of_other[name])}, and of {first} {reprlib.repr(value)}"
            raise ValueError(
                f"--average: {difference}: only models of one architecture, tokenizer and scoring contract have a mean"
            )


def _facts(source: str) -> dict:
    """What models have to agree in: architecture, tokenizer, and how texts are written and scored."""
    config, _, hf = weights.read_config(source)
    facts = {"the kind": build.head_of(source).__name__, "model_type": hf["model_type"]} | vars(config)
    facts["the tokenizer"] = Tokenizer(hub.tokenizer_folder(source)).fingerprint
    agreed = contract.read(source)
    facts[contract.FILE] = "missing" if agreed is None else "there"
    of_contract = dict.fromkeys(KEYS) if agreed is None else asdict(agreed)
    # Of the weights, or of a training:
    for measured in ("golden", "dtype", "reward_mean", "reward_std", "reward_set", "step"):
        del of_contract[measured]
    return facts | {f"{name} in {contract.FILE}": value for name, value in of_contract.items()}


def _examples(source: str, paths: tuple[str, ...]) -> Examples:
    """The pairs and rankings of files, as the models' contract writes them."""
    text, agreed = contract.resolve(source, ScoringTextSettings())
    encoder = contract.text_encoder(source, text, agreed)
    examples, report = read_cached(Task.PREFERENCE, paths, text, encoder.tokenizer, None, encoder.padding_id)
    dist.say(str(report))
    if not len(metrics.ordered_pairs(examples.grade, examples.reply_offsets)[0]):
        raise ValueError(f"--dataset_path {' '.join(paths)}: no reply is graded better than another; take other files")
    return examples


def _batches(examples: Examples) -> EvalBatches:
    packing = PackingSettings()
    return EvalBatches(examples, replace(packing, max_tokens=max(packing.max_tokens, int(examples.lengths.max()))))


def _say_accuracies(summaries: dict[str, dict], results: dict[str, Result]) -> None:
    """Print the accuracy of each model and of the mean, and what the mean gains."""
    mean = results["mean"].scored
    for name, summary in summaries.items():
        low, high = summary["accuracy_ci95_clustered"] or summary["accuracy_ci95"]
        line = f"{name}: accuracy {summary['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f})"
        if name != "mean":
            test = compare(mean, results[name].scored)
            line += f"; the mean's minus it {test['difference']:+.4f}"
            if test["difference_ci95_clustered"]:
                line += " ({:+.4f} to {:+.4f})".format(*test["difference_ci95_clustered"])
        dist.say(line)


def _texts(source: str) -> TextFiles | None:
    """What an adapter's folder says about texts, beyond its base; None where it has no tokenizer of its own."""
    if hub.base_of(source) is None or hub.tokenizer_folder(source) != Path(source):
        return None
    return TextFiles.of_training(weights.base_folder(source), Tokenizer(source), TextSettings())


if __name__ == "__main__":
    with cli.one_line_errors():
        settings = parse(Settings, __doc__)
        out = Path(settings.export.output_dir).absolute()
        # Beside the folder, which is replaced as a whole.
        beside = out.with_name(f".{out.name}.lease")
        with dist.session(0), lease.held(str(beside)):
            main(settings)
        if dist.is_main():
            with contextlib.suppress(OSError):  # of an export that was killed
                beside.rmdir()
