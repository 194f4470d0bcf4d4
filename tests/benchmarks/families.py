"""Differences between rm and transformers for each family: logits, rewards, gradients, files of tiny random models."""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rm.data.batch import pack
from rm.distributed import process_group as dist
from rm.hf import saving
from rm.model.heads import LanguageModel, RewardModel
from tests import family_cases, made, tiny
from tests.benchmarks.common import Page, table

LENGTHS = (1, 50, 300)
SUMMARY = ["`model_type`", "logits", "rewards", "gradients", "files"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="Hugging Face folder of a real language model, to be compared as well")
    parser.add_argument("--out", help="also write the page to this file")
    args = parser.parse_args()
    args.threads = torch.get_num_threads()
    page = Page("Families against transformers", args)
    with dist.session(seed=0):
        rows = [[family, case, *measure(family, settings)] for family, case, settings in family_cases.CASES]
    head = ["model_type", "case", "logits", "rewards", "gradients, language model", "gradients, reward model", "file"]
    page.add(
        "Two to four layers of width 32, all parameters random, fp32. *logits*: largest gap at lengths "
        f"{', '.join(map(str, LENGTHS))} (beyond every window), over the largest logit where that is more than one. "
        "*rewards*: the same, of six pairs in one micro-batch with shared prefixes against text by text. *gradients*: "
        "norm of the gap over 0.1 plus norm of the gradient, of the worst tensor. *file*: a folder of transformers, "
        "loaded and saved, has the same names and the same bits in every tensor.\n",
        table(head, rows),
    )
    page.add("The largest over all cases of a family, as in docs/families.md:\n", table(SUMMARY, summary(rows)))
    if args.model:
        page.add(real(args.model))
    page.finish()


def summary(rows: list[list[str]]) -> list[list[str]]:
    """The largest gaps of each family."""
    lines = []
    for family in dict.fromkeys(row[0] for row in rows):
        _, _, logits, rewards, *gradients, files = zip(*(row for row in rows if row[0] == family), strict=True)
        largest = (max(map(float, column)) for column in (logits, rewards, sum(gradients, ())))
        same = all(file == "same" for file in files)
        lines.append([family, *(f"{gap:.1e}" for gap in largest), "bit-identical" if same else "**differs**"])
    return lines


def real(folder: str) -> str:
    """Our logits of 256 random tokens against those of transformers, fp32."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(theirs.config.vocab_size, (256,), generator=torch.Generator().manual_seed(0))
    expected = tiny.their_logits(theirs, tokens)
    gap = (tiny.logits(tiny.ours(Path(folder)), tokens) - expected).abs().max()
    largest = f"the largest is {expected.abs().max():.1f}"
    return f"{Path(folder).name}, 256 random tokens: logits differ by at most {gap:.1e}, {largest}.\n"


def measure(family: str, settings: dict) -> list[str]:
    with tempfile.TemporaryDirectory() as name:
        theirs, rewarder = tiny.causal_lm(family, **settings), tiny.reward_model(family, **settings)
        lm, rm = (tiny.save_with(model, Path(name, kind)) for model, kind in ((theirs, "lm"), (rewarder, "rm")))
        ours, ours_rm = tiny.ours(lm), tiny.ours(rm, RewardModel)
        texts = [tiny.tokens(length) for length in LENGTHS]
        logits = max(family_cases.gap(tiny.logits(ours, t), tiny.their_logits(theirs, t)) for t in texts)
        pairs = made.token_pairs(6, longest=40)
        with torch.no_grad():
            rewards = ours_rm.rewards(pack(made.pair_examples(pairs), np.arange(6)))
        one_by_one = torch.stack([family_cases.their_reward(rewarder, text) for pair in pairs for text in pair])
        learned = [
            family_cases.gradient_gaps(lm, ours, theirs, *family_cases.losses_of_texts(ours, theirs)),
            family_cases.gradient_gaps(rm, ours_rm, rewarder, *family_cases.losses_of_pairs(ours_rm, rewarder)),
        ]
        same = all(round_trip(folder, head) for folder, head in ((lm, LanguageModel), (rm, RewardModel)))
    gaps = [logits, family_cases.gap(rewards, one_by_one), *(max(gaps.values()) for gaps in learned)]
    return [*(f"{gap:.1e}" for gap in gaps), "same" if same else "**differs**"]


def round_trip(source: Path, head: type) -> bool:
    out = source.with_name(f"{source.name} again")
    saving.save(tiny.ours(source, head), out, source, torch.float32)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, out))
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


if __name__ == "__main__":
    main()
