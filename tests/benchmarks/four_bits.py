"""The loss of a language model whose matrices are kept in four bits (--load_in_4bit), before any training.

python -m tests.benchmarks.four_bits --model MODEL --data pairs.jsonl.gz --records 64 --out docs/benchmarks/...
"""

import tempfile
from pathlib import Path

import torch

import train_sft
from rm.config import parse
from rm.data import dataset
from rm.data.batch import EvalBatches, PackingSettings
from rm.data.encode import Task
from rm.data.tokenizer import Tokenizer
from rm.distributed import process_group as dist
from rm.distributed.sharding import ParallelSettings
from rm.hf import build
from rm.model.heads import LanguageModel
from rm.model.lora import LoraSettings
from tests.benchmarks.common import MIB, Page, flags, table
from tests.benchmarks.short_states import texts


def main() -> None:
    args = flags(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    page, rows = Page("A base in four bits", args), []
    with tempfile.TemporaryDirectory() as name, dist.session(args.seed):
        file = texts(args.data, args.records, Path(name) / "texts.jsonl")
        words = ["--model_name_or_path", args.model, "--dataset_path", str(file), "--output_dir", name,
                 "--cache_dir", name, "--max_length", str(args.max_length)]  # fmt: skip
        settings = parse(train_sft.Settings, "", words)
        data = dataset.load(Task.SFT, settings.data, settings.text, settings.mixture, settings.split,
                            Tokenizer(args.model), args.seed, settings.keys)  # fmt: skip
        batches = EvalBatches(data.train, PackingSettings(max_tokens=2048))
        for in_4bit in (False, True):
            training = build.Training(lora=LoraSettings(use_lora=True, load_in_4bit=in_4bit))
            model = build.build(LanguageModel, args.model, ParallelSettings(dtype="float32"), training=training)
            build.load(model, args.model, seed=0).eval()  # new adapters change nothing
            with torch.no_grad():
                sums = [model(batch.to(dist.device())) for batch in batches]
            loss = sum(x["loss"] for x in sums) / sum(x["count"] for x in sums)
            layers = sum(x.nbytes for x in (*model.layers.parameters(), *model.layers.buffers()) if not x.requires_grad)
            rows.append(["4 bits" if in_4bit else "float32", f"{layers / MIB:,.1f}", f"{loss:.4f}"])
    page.add(table(["frozen layers", "their memory, MiB", "loss"], rows))
    page.finish()


if __name__ == "__main__":
    main()
