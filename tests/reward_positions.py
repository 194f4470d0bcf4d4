"""The rewards of the same dialogues from Scorer and from the software that reads an exported folder."""

import json
from pathlib import Path

import torch
import transformers

import eval_rm
from rm.config import compose
from rm.data.dataset import TextSettings
from rm.distributed import process_group as dist
from rm.distributed.sharding import ParallelSettings
from rm.files import read_json, write_json
from rm.hf import build, saving
from rm.model.heads import RewardModel
from rm.scoring import Scorer, contract
from tests import tiny
from tests.templates import folder_of


def dialogue(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


DIALOGUES = [
    dialogue("what is the capital of France?", "the capital of France is Paris."),
    dialogue("hi", "<think>\nhm\n</think>\n\nhello", "the cat?", "<think>\nthe mat\n</think>\n\nit sat on the mat."),
    dialogue("hi", ""),
    dialogue("hi", " \n the cat sat \n\n"),
    dialogue("\n\n", "☃ ends in a character that the tokenizer may not know: ☃"),
    dialogue("boil an egg", "put it in boiling water " * 12),
]


def reward_folder(kind: str, make, folder: Path, pad: str = "eos", **text) -> Path:
    """A tiny reward model with this kind of template, as train_rm.py leaves it.

    Args:
        make: a function of `tests.text_fixtures` that makes its tokenizer.
        pad: which of the base's tokens it pads with: "eos" or "unk".
        text: its `TextSettings`.
    """
    base = folder_of(kind, folder / "base", make)
    settings = read_json(base / "tokenizer_config.json")
    token = settings["eos_token"] if pad == "eos" else "<unk>"
    write_json(base / "tokenizer_config.json", settings | {"pad_token": token, "unk_token": "<unk>"})
    tiny.llama(vocab_size=480, max_position_embeddings=512).save_pretrained(base)
    with dist.session(0):
        model = build.load(build.build(RewardModel, base, ParallelSettings(dtype="float32")), base, seed=0)
        saving.save(model, folder / "model", base, torch.float32)
        contract.write(folder / "model", TextSettings(**{"max_length": 300} | text), torch.float32)
    return folder / "model"


class Clients:
    """Rewards of dialogues, or of token ids, as other software computes them from a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def ids(self, dialogues: list) -> list[list[int]]:
        return [self.tokenizer.apply_chat_template(messages, return_dict=False) for messages in dialogues]

    @torch.no_grad()
    def alone(self, ids: list[list[int]]) -> list[float]:
        return [self.model(torch.tensor([one])).logits.item() for one in ids]

    @torch.no_grad()
    def padded(self, ids: list[list[int]], side: str) -> list[float]:
        batch = self.tokenizer.pad({"input_ids": ids}, padding_side=side, return_tensors="pt")
        return self.model(**batch).logits[:, 0].tolist()

    def pipeline(self, dialogues: list) -> list[float]:
        """As reward-bench does: text by the template, then the pipeline, which tokenizes it in batches."""
        texts = [self.tokenizer.apply_chat_template(messages, tokenize=False) for messages in dialogues]
        pipe = transformers.pipeline("text-classification", model=self.model, tokenizer=self.tokenizer, device="cpu")
        return [one["score"] for one in pipe(texts, add_special_tokens=False, batch_size=4)]

    def trl_ids(self, dialogues: list) -> list[list[int]]:
        """The token ids that TRL's RewardTrainer makes of dialogues."""
        import datasets
        import trl

        arguments = trl.RewardConfig(
            output_dir=str(self.folder / "trl"), report_to=[], use_cpu=True, bf16=False, max_length=None
        )
        pairs = datasets.Dataset.from_list([{"chosen": one, "rejected": one} for one in dialogues])
        trainer = trl.RewardTrainer(self.model, arguments, train_dataset=pairs, processing_class=self.tokenizer)
        return trainer.train_dataset["chosen_ids"]

    def rewards(self, dialogues: list, trl_ids: list[list[int]]) -> dict[str, list[float]]:
        """Client -> the reward of every dialogue. `trl_ids` are theirs by the method of that name."""
        ids = self.ids(dialogues)
        return {
            "transformers, one by one": self.alone(ids),
            "padded on the right": self.padded(ids, "right"),
            "padded on the left": self.padded(ids, "left"),
            "pipeline": self.pipeline(dialogues),
            "TRL RewardTrainer's ids": self.padded(trl_ids, "right"),
        }


def tokens(scorer: Scorer, texts: list) -> list[list[int]]:
    """The token ids that a Scorer scores."""
    examples = scorer.encoder.examples([[text] for text in texts])
    return [[*example.prefix.tolist(), *example.replies[0].tolist()] for example in examples]


def eval_scores(folder: Path, data: Path, out: Path) -> list[list[float]]:
    """What eval_rm.py writes for the replies of a file's records."""
    flat = dict(model_name_or_path=(str(folder),), dataset_path=(str(data),), output_dir=str(out), score_only=True)
    with dist.session(0):
        eval_rm.main(compose(eval_rm.Settings, **flat, cache_dir=str(out / "cache")))
    return [json.loads(line)["scores"] for line in open(out / "scores.jsonl")]


def rewards_in(trainer) -> list[tuple]:
    """Train; returns what the trainer computed: (prompts, completions, (N, F) rewards) of every batch."""
    calculate, computed = trainer._calculate_rewards, []

    def record(inputs, prompts, completions, ids):
        rewards = calculate(inputs, prompts, completions, ids)
        computed.append((prompts, completions, rewards))
        return rewards

    trainer._calculate_rewards = record
    trainer.train()
    return computed


def trainer_of(name: str, reward_funcs: list, prompts: list, folder: Path):
    """A trainer of TRL, "GRPO" or "RLOO", with a tiny policy, for one step."""
    import datasets
    import trl

    config, cls = getattr(trl, f"{name}Config"), getattr(trl, f"{name}Trainer")
    arguments = config(
        output_dir=str(folder / "run"),
        report_to=[],
        use_cpu=True,
        bf16=False,
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        save_strategy="no",
        disable_tqdm=True,
    )
    policy = folder_of("ChatML", folder / "policy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(policy)
    tokenizer.pad_token = "<|endoftext|>"
    data = datasets.Dataset.from_list([{"prompt": prompt, "column": 1} for prompt in prompts])
    tiny.llama(vocab_size=480, max_position_embeddings=512).save_pretrained(policy)
    return cls(str(policy), reward_funcs=reward_funcs, args=arguments, train_dataset=data, processing_class=tokenizer)
