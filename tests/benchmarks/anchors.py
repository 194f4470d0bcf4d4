"""The roofline of --plan beside speeds that others published, measured on H100s with their own software.

    python -m tests.benchmarks.anchors

Neither weights nor a GPU are needed. What is planned are SFT runs of the published shape, in this package: texts of one
length, and every token carries loss. What was published: NeMo Automodel, docs/performance-summary; torchtitan,
benchmarks of December 2024; prime-rl, BENCHMARKS.md of 2026-02-01, whose number of texts a step is assumed here.
"""

import numpy as np

from rm.data.examples import Example, Examples
from tests.acceptance.speed import LLAMA_8B
from tests.benchmarks.scale import LORA, planned, print_row
from tests.real_configs import CONFIGS

QWEN = CONFIGS["Qwen3-0.6B"][0]
ANCHORS = (  # software, training, model, tokens of a text, texts of a micro-batch and of a step, GPUs, settings, speed
    ("NeMo Automodel", "Llama-3-8B, LoRA", LLAMA_8B, 4096, 2, 32, 1, LORA, 12_473),
    ("torchtitan", "Llama-3.1-8B", LLAMA_8B, 8192, 2, 16, 8, {"gradient_checkpointing": "selective"}, 5_762),
    ("prime-rl", "Qwen3-0.6B", QWEN, 8192, 1, 8, 1, {"gradient_checkpointing": "full"}, 26_000),
)


def main() -> None:
    print_row("software", "training", "GPUs", "tokens of a text", "recomputed", "tokens/s of a GPU, published",
              "on paper", "MFU on paper", "limited by", header=True)  # fmt: skip
    for software, training, config, length, texts, batch, processes, changes, published in ANCHORS:
        text = Example(np.zeros(0, np.int32), (np.zeros(length, np.int32),), (np.ones(length, bool),))
        size = {"global_batch_size": batch, "max_tokens": texts * length}
        with planned(config, "sft", Examples.build([text] * batch), processes, **size, **changes) as plan_of_run:
            step, rate, utilization = plan_of_run.on_paper("H100")
        recomputed = changes.get("gradient_checkpointing", "none")
        print_row(software, training, processes, f"{length:,}", recomputed, f"{published:,}", f"{rate:,.0f}",
                  f"{utilization:.0%}", step.limit)  # fmt: skip


if __name__ == "__main__":
    main()
