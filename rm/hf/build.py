"""How a model is made from a Hugging Face folder, and what training leaves: the one place where all parts meet.

`build` makes the architecture on the meta device: adapters, compilation, recomputation, shards. `load` gives it memory
and values. `save` writes the trained model, and its adapter.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rm.config import REQUIRED, setting
from rm.data.batch import MicroBatch, pack
from rm.data.examples import Examples
from rm.distributed import checkpoint, sharding
from rm.distributed import process_group as dist
from rm.distributed.sharding import MemorySettings, ParallelSettings, dtype_name
from rm.files import read_json
from rm.hf import adapter, checksums, hub, outputs, saving, weights
from rm.hf.checkpoint_folder import ModelFiles
from rm.hf.families.keys import DROPOUT
from rm.hf.folder import TextFiles, copy_tokenizer, name_padding
from rm.hf.outputs import HeadSettings
from rm.json_keys import Key, check_keys
from rm.model import lisa, lora
from rm.model.attention import choose_kernel
from rm.model.heads import LanguageModel, RewardModel, reward_model
from rm.model.lisa import LisaSettings
from rm.model.lora import LoraSettings
from rm.model.losses import LossSettings
from rm.model.transformer import Transformer

MERGE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # of a reward or mean loss, times its size above 1
NO_SCORE = "{folder} is not a reward model: it holds no score.weight. Train one with train_rm.py"


@dataclass(frozen=True, kw_only=True)
class ModelSettings(HeadSettings):
    """Model"""

    model_name_or_path: str = setting(
        REQUIRED,
        "Hugging Face folder (config.json, *.safetensors, tokenizer) or hub id, org/name or org/name@revision",
        may_change=True,
        hub="model",
    )


@dataclass(frozen=True)
class Training:
    """What `build` has to know of a training."""

    memory: MemorySettings = MemorySettings()
    lora: LoraSettings = LoraSettings()
    lisa: LisaSettings = LisaSettings()


def build(
    cls: type[Transformer],
    folder: str | Path,
    parallel: ParallelSettings,
    *,
    training: Training | None = None,
    loss: LossSettings | None = None,
    kernel: type | None = None,
    sharded: bool = True,
    new_ids: Sequence[int] = (),
    offload: bool = False,
    max_length: int | None = None,
    head: HeadSettings = HeadSettings(),  # noqa: B008
) -> Transformer:
    """The model of a folder's config.json on the meta device, without values.

    Args:
        cls: LanguageModel, RewardModel, or what `rm.model.heads.reward_model` gives.
        training: None for a model that is not trained: it gets no adapters, no recomputation, no master weights.
        loss: of a reward model.
        kernel: a class of `rm.model.attention`; None: the fastest one here.
        sharded: False for a model that this process uses alone, without a process group.
        new_ids: of tokens that are added to the folder's vocabulary. LoRA trains embedding and LM head in full then.
        offload: of a model on a GPU, keep only the layers that are being computed there, and the rest in host memory.
        max_length: of the texts, where rotary positions depend on it (Phi 3 for long texts); None: they are short.
        head: which output is the reward, of a reward model's folder that has several.
    """
    config, *_ = weights.read_config(folder)
    config = replace(config, vocab_size=max([config.vocab_size, *(i + 1 for i in new_ids)])).for_texts(max_length or 0)
    dtype = sharding.compute_dtype(parallel.dtype)
    if loss is not None and loss.has_sft_loss and head_of(weights.base_folder(folder)) is RewardModel:
        raise ValueError(
            f"--sft_loss_coefficient needs the LM head of a language model, and {folder} is a reward model: start from "
            f"a language model, or set it to 0"
        )
    if kernel is None:
        heads = config.n_heads, config.n_kv_heads, config.head_dim
        kernel = choose_kernel(dist.device(), dtype, *heads, config.attn_softcap)
    options = {} if loss is None else {"loss": loss}
    with torch.device("meta"), _WithoutInitialization():
        model = cls(config, kernel, **options)
    model.compute_dtype = dtype
    if head.chooses and (cls is not RewardModel or config.score != "linear"):
        raise ValueError(
            "--reward_label and --reward_weights are of a linear reward head, and of a model with one reward: leave "
            "them out"
        )
    model.reward_output = outputs.chosen(folder, head)
    names = outputs.names_of(folder) if loss is not None and loss.attributes else ()
    if names and names != loss.attributes:
        raise ValueError(
            f"--attributes {' '.join(loss.attributes)}: the outputs of {folder} are {' '.join(names)}; give these, in "
            f"this order, or start from a language model"
        )
    if training is not None:
        sharding.check_offload(training.memory)
        offload = training.memory.cpu_offload
    if offload:
        model.memory_device = torch.device("cpu")
    if not sharded:
        sharding.cast_to_compute(model, dtype)
        return model
    recompute, offload_activations = "none", False
    if training is not None:
        lisa.check_depth(config.n_layers, training.lisa)
        recompute = training.memory.gradient_checkpointing
        offload_activations = training.memory.activation_offloading
        if training.lora.use_lora:
            lora.adapt(model, training.lora, dtype, trained=("embed", "lm_head") if new_ids else ())
            if not training.lora.shard_base:  # every process is a shard group of its own: nothing is gathered
                parallel = replace(parallel, shard_group_size=1)
    is_training = training is not None
    sharding.parallelize(model, parallel, recompute, is_training, offload, offload_activations)
    return model


class _WithoutInitialization(TorchFunctionMode):
    """Skips torch.nn.init: on the meta device there are no values, and `normal_` would import torch._dynamo."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == "torch.nn.init":  # methods of tensors have no module
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


def load(model: Transformer, folder: str | Path, seed: int | None = None, new_ids: Sequence[int] = ()) -> Transformer:
    """Give a built model memory and the values of a folder, to each rank its own shard.

    Args:
        seed: of what the folder lacks: new adapters, and the score head of a reward model that starts from a language
            model, N(0, 1/sqrt(D + 1)) (Stiennon et al., arXiv 2009.01325). The values do not depend on the number of
            ranks. None: a folder without a score head is refused.
        new_ids: as for `build`; their rows become the mean of the others.
    """
    weights.check(model, folder, new_ids)
    if seed is not None:  # a training
        _say_dropout(folder)
    sharding.allocate(model, model.memory_device)
    missing = weights.load(model, folder, new_ids)
    if missing and seed is None:
        raise ValueError(NO_SCORE.format(folder=folder))
    if weights.SCORE in missing and model.reward_output is not None:
        raise ValueError(f"{folder} has no reward head whose output --reward_label or --reward_weights could choose")
    # Drawn in full and in order on every rank: the same for any world size.
    generator = torch.Generator().manual_seed(seed or 0)
    for name, parameter in model.named_parameters():
        if name in missing:
            if name == weights.SCORE:
                values = torch.randn(parameter.shape, generator=generator) / (model.config.dim + 1) ** 0.5
            else:
                values = lora.initial_values(name, parameter.shape, generator)
            sharding.fill(parameter, values)
    return model


def _say_dropout(folder: str | Path) -> None:
    """Say which dropout of config.json, such as that of GPT-2, is left out."""
    _, _, hf = weights.read_config(folder)
    asked = [f"{name} {hf[name]:g}" for name in DROPOUT if hf.get(name)]
    if asked:
        dist.say(f"the model is trained without the dropout of its config.json ({', '.join(asked)})")


def check_data(model: Transformer, max_length: int, *sets: Examples) -> None:
    """Raise ValueError where the model has no embedding for a token id, or for a position.

    Checked at the start, since on a GPU an out-of-range id is a device-side assert that does not name the token.
    """
    positions = model.config.longest_text
    if positions is not None and max_length > positions:
        raise ValueError(f"--max_length {max_length} is more than the {positions} positions of the model: lower it")
    for examples in sets:
        highest = int(examples.tokens.max(initial=0))
        if highest >= model.config.vocab_size:
            raise ValueError(
                f"a text has the token id {highest}, and the model has {model.config.vocab_size} embeddings: its "
                "tokenizer or chat template has tokens that the model was not trained with; use the model's own"
            )


def save(
    model: Transformer,
    folder: Path,
    base: str,
    settings: LoraSettings,
    examples: Examples,
    texts: TextFiles | None = None,
) -> Transformer:
    """Write `folder/model`, and with LoRA `folder/adapter`, which is merged in the model. All ranks call it.

    With --load_in_4bit the adapter is merged into the base's own weights, which are read again, and the trained model
    is released.

    Args:
        base: the folder that the training started from.
        examples: of the training. On the first few, adapter and merged model are compared by their rewards, or a
            language model's mean loss. Where they differ by more than rounding, the adapter is saved and the merged
            model is refused.
        texts: what the folders say about texts; None: the same as the base.

    Returns:
        The model that was written.
    """
    _check_finite(model)
    if settings.use_lora:
        _, family, hf = weights.read_config(base)
        is_base = hub.base_of(base) is None and not checkpoint.is_checkpoint(base)
        if not is_base or (texts is not None and texts.tokenizer.new_ids):
            base = _write_base(base, folder / "base", model, texts)
        with saving.replaced_folder(folder / "adapter", adapter.CONFIG) as writing:
            adapter.save(model, writing, base, settings, family)
            if dist.is_main():
                copy_tokenizer(writing, hub.tokenizer_folder(base), texts)
                if model.head == RewardModel.head:
                    name_padding(writing, hf, None if texts is None else texts.template)
                checksums.write(writing)
        probe = pack(examples, range(min(4, len(examples))))
        if settings.load_in_4bit:
            model = _merge_into_original(model, folder / "adapter", probe)
        else:
            _merge(model, folder, probe)
    saving.save(model, folder / "model", base, model.compute_dtype, texts=texts)
    dist.say(f"saved {folder / 'model'}")
    return model


def checkpoint_files(model: Transformer, base: str, settings: LoraSettings, texts: TextFiles) -> ModelFiles:
    """What makes each checkpoint of a training a model's folder. All ranks call it; the arguments are as for `save`."""
    return ModelFiles.written_by(
        lambda folder: saving.save_description(model, folder, base, model.compute_dtype, texts), base, settings
    )


def _check_finite(model: Transformer) -> None:
    """Raise ValueError where the last update made weights infinite or NaN: no later loss has shown it."""
    damaged = [name for name, p in model.named_parameters() if not sharding.local(p).isfinite().all()]
    if dist.any_rank(bool(damaged)):
        raise ValueError(
            f"the trained weights are not finite{f' ({damaged[0]}, ...)' if damaged else ''}: they are not exported. "
            f"Try a lower --learning_rate"
        )


def _write_base(base: str, folder: Path, model: Transformer, texts: TextFiles | None) -> str:
    """Write a full model for the new adapter, where the base that the training started from does not serve as one.

    peft loads an adapter on a full model only: an adapter's folder is written with the adapter merged, which are the
    values that the new one was trained on, and a checkpoint as a model's folder. Where tokens were added, the trained
    embedding and LM head are written: a base without their rows does not fit the adapter.
    """
    new_ids = [] if texts is None else texts.tokenizer.new_ids
    parallel = ParallelSettings(dtype=dtype_name(model.compute_dtype))
    # Offloaded, since the model that was trained is still in memory.
    kind = _kind_of(model) if head_of(base) is RewardModel else {"cls": LanguageModel}
    full = load(build(folder=base, parallel=parallel, offload=True, new_ids=new_ids, **kind), base, new_ids=new_ids)
    if new_ids:
        trained = dict(model.named_parameters())
        for name, parameter in full.named_parameters():
            if name in weights.OF_VOCABULARY and name in trained:
                sharding.fill(parameter, sharding.full_tensor(trained[name]))
    saving.save(full, folder, base, model.compute_dtype, texts=texts)
    sharding.release(full)
    kind = "a checkpoint" if checkpoint.is_checkpoint(base) else "an adapter itself"
    why = "with the new tokens" if new_ids else f"as {base} is {kind}"
    dist.say(f"saved {folder}, the base of the new adapter, {why}")
    return str(folder)


def _kind_of(model: Transformer) -> dict:
    """The arguments of `build` that make another model with the same head."""
    if model.head != RewardModel.head:
        return {"cls": LanguageModel}
    loss = LossSettings.of_outputs(model.loss.attributes)
    return {"cls": reward_model(loss), "loss": loss}


def _merge(model: Transformer, folder: Path, probe: MicroBatch) -> None:
    """Merge the adapters of a model, and check that its outputs stay the same."""
    before = _output(model, probe)
    adapter.merge(model)
    difference, size = (_output(model, probe) - before).abs().max().item(), before.abs().max().item()
    if not difference <= MERGE_TOLERANCE[model.compute_dtype] * max(1.0, size):
        raise ValueError(
            f"merging the adapter changes the model's output by {difference:.2g} (of {size:.2g}) in "
            f"{dtype_name(model.compute_dtype)}, more than "
            f"rounding does: {folder / 'adapter'} is saved, {folder / 'model'} is not; merge it with --dtype float32"
        )
    dist.say(f"adapter and merged model differ by at most {difference:.1e}")


def _merge_into_original(model: Transformer, adapter_folder: Path, probe: MicroBatch) -> Transformer:
    """The adapter that was saved, on its base as it was before it was kept in 4 bits; `model` is released."""
    before = _output(model, probe)
    sharding.release(model)
    is_long = bool(model.config.long_ropes) and model.config.ropes == model.config.long_ropes
    parallel = ParallelSettings(dtype=dtype_name(model.compute_dtype))
    max_length = model.config.long_beyond + 1 if is_long else None
    full = build(folder=adapter_folder, parallel=parallel, offload=True, max_length=max_length, **_kind_of(model))
    load(full, adapter_folder)
    difference = (_output(full, probe) - before).abs().max().item()
    dist.say(f"the adapter is merged into the original base: outputs differ by up to {difference:.1e} from 4 bits")
    return full


@torch.no_grad()
def _output(model: Transformer, batch: MicroBatch) -> Tensor:
    """What a model computes of a micro-batch: its rewards, or a language model's mean loss."""
    was_training = model.training
    batch = batch.to(dist.device())
    model.eval()
    if model.head == RewardModel.head:
        output = model.rewards(batch)
    else:
        sums = model(batch)
        output = sums["loss"] / sums["count"]
    model.train(was_training)
    sharding.reshard(model)  # the weights may change before the next forward
    return output


def head_of(folder: str | Path) -> type[Transformer]:
    """LanguageModel or RewardModel: what a folder, of a model or an adapter, declares itself to be."""
    adapter_config, config = (read_json(Path(folder) / name) for name in (adapter.CONFIG, "config.json"))
    check_keys(Path(folder) / adapter.CONFIG, adapter_config, {"task_type": Key(str)}, others=True)
    check_keys(Path(folder) / "config.json", config, {"architectures": Key(list, items=Key(str))}, others=True)
    declared = [adapter_config.get("task_type") or "", *(config.get("architectures") or [])]
    is_reward_model = any(name.endswith(("SEQ_CLS", "SequenceClassification", "RewardModel")) for name in declared)
    return RewardModel if is_reward_model else LanguageModel
