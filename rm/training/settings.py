"""The settings that both training scripts have; each script adds its own."""

from dataclasses import dataclass

from rm.config import SettingsGroup
from rm.data.batch import BatchSettings, PackingSettings
from rm.data.dataset import DataSettings, MixtureSettings, TextSettings, check_mixture
from rm.data.reader import KeySettings
from rm.data.special_tokens import TokenizerSettings
from rm.data.split import SplitSettings
from rm.distributed.sharding import MemorySettings, ParallelSettings, check_memory
from rm.hf.build import ModelSettings
from rm.model.lisa import LisaSettings
from rm.model.lora import LoraSettings
from rm.training.best import BestSettings
from rm.training.optim import OptimSettings
from rm.training.resume import CheckpointSettings
from rm.training.run_log import RunSettings


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(SettingsGroup):
    """Training"""

    model: ModelSettings
    data: DataSettings
    run: RunSettings
    mixture: MixtureSettings
    keys: KeySettings
    text: TextSettings
    tokenizer: TokenizerSettings
    split: SplitSettings
    batch: BatchSettings
    packing: PackingSettings
    optim: OptimSettings
    lora: LoraSettings
    lisa: LisaSettings
    parallel: ParallelSettings
    memory: MemorySettings
    checkpoint: CheckpointSettings
    best: BestSettings

    def check(self) -> None:
        check_mixture(self.data, self.mixture)
        check_memory(self.parallel, self.memory)
        self._check_evaluation()
        if self.lisa.use_lisa and self.lora.use_lora:
            raise ValueError("--use_lora and --use_lisa exclude each other: LoRA trains in every layer; give one")
        if self.lora.use_lora and self.model.chooses:
            raise ValueError(
                "--reward_label and --reward_weights exclude --use_lora: an adapter needs a base with one output; "
                "write that first, by python -m rm.export --reward_label"
            )
        trains_all_tokens = self.lisa.lisa_train_embeddings and self.lisa.lisa_train_head
        if self.tokenizer.add_special_tokens and self.lisa.use_lisa and not trains_all_tokens:
            raise ValueError(
                "--add_special_tokens needs --lisa_train_embeddings true and --lisa_train_head true: embedding and LM "
                "head have new rows, which have to be trained"
            )

    def _check_evaluation(self) -> None:
        compares = {
            "--load_best_model_at_end": self.best.load_best_model_at_end,
            "--early_stopping_patience": self.best.early_stopping_patience is not None,
        }
        for name, is_set in compares.items():
            if is_set and self.run.eval_steps is None:
                raise ValueError(f"{name} compares evaluations, and there is only one, at the end: give --eval_steps")
        for name, is_set in ({"--eval_on_start": self.run.eval_on_start} | compares).items():
            if is_set and not self.split.holds_out:
                raise ValueError(
                    f"{name} needs held-out data: give --eval_dataset_path or --validation_split_percentage"
                )
