"""Where a reward is read: Scorer against eval_rm.py, transformers and TRL, for ten kinds of chat templates.

python -m tests.benchmarks.reward_positions --out docs/benchmarks/reward_positions.md
"""

import argparse
import contextlib
import io
import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers

from rm.scoring import Scorer, reward_function
from tests.benchmarks.common import Page, table
from tests.reward_positions import (
    DIALOGUES,
    Clients,
    dialogue,
    eval_scores,
    reward_folder,
    rewards_in,
    tokens,
    trainer_of,
)
from tests.templates import KINDS
from tests.text_fixtures import byte_level, metaspace

EXPLANATION = f"""\
A tiny random LLaMA with a reward head for each template and tokenizer, in float32, saved as train_rm.py saves it. The
numbers are the largest differences from `rm.scoring.Scorer` over {len(DIALOGUES)} dialogues: several turns, thoughts,
an empty reply, white space around a reply, a character at the end that the tokenizer may not know.

- *read at*: the last token of a dialogue. *padding*: the padding token of the saved model. That of its base is EOS, or
  `<unk>` for the template that ends no turn.
- *shortened*: a dialogue that is cut on the right; its ids in a padded batch of transformers.
- *GRPO*, *RLOO*: the rewards that these trainers of TRL compute in a step, with the folder as `reward_funcs` / with
  `rm.scoring.reward_function`.
"""
TOKENIZERS = {"byte-level BPE": byte_level, "metaspace BPE": metaspace}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", help="also write the page to this file")
    args = parser.parse_args()
    args.threads = torch.get_num_threads()
    page = Page("Where a reward is read", args)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows = [row(kind, name) for kind in KINDS for name in TOKENIZERS]
    head = ["template", "tokenizer", "read at", "padding", *rows[0][1]]
    page.add(EXPLANATION, table(head, [[*names, *cells.values()] for names, cells in rows]))
    page.finish()


def row(kind: str, tokenizer: str) -> tuple[list[str], dict[str, str]]:
    """(names, client -> largest difference from Scorer)"""
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        folder, make, pad = Path(name), TOKENIZERS[tokenizer], "unk" if "no turn" in kind else "eos"
        model = reward_folder(kind, make, folder, pad)
        scorer, clients = Scorer(model), Clients(model)
        expected = scorer.score(DIALOGUES)
        data = folder / "data.jsonl"
        data.write_text("\n".join(json.dumps({"prompt": d[:-1], "responses": [d[-1:]]}) for d in DIALOGUES))
        found = {"eval_rm.py": [one for (one,) in eval_scores(model, data, folder / "eval")]}
        found |= clients.rewards(DIALOGUES, clients.trl_ids(DIALOGUES))
        cells = {client: f"{np.abs(np.subtract(scores, expected)).max():.0e}" for client, scores in found.items()}
        cells |= {"shortened": shortened(kind, make, folder / "short", pad)}
        cells |= {trainer: in_trainer(trainer, model, folder / trainer) for trainer in ("GRPO", "RLOO")}
        last = clients.tokenizer.decode(clients.ids(DIALOGUES[:1])[0][-1:])
        shown = [repr(token).replace("|", "\\|") for token in (last, clients.tokenizer.pad_token)]
    return [kind, tokenizer, *shown], cells


def shortened(kind: str, make, folder: Path, pad: str) -> str:
    model = reward_folder(kind, make, folder, pad, overlong="truncate", truncation_side="right", max_length=60)
    long = [dialogue("boil an egg", "put it in boiling water for seven minutes and " * 40)]
    scorer = Scorer(model)
    (ids,) = tokens(scorer, long)
    return f"{abs(Clients(model).padded([ids, ids[:9]], 'right')[0] - scorer.score(long)[0]):.0e}"


def in_trainer(name: str, model: Path, folder: Path) -> str:
    prompts = [dialogue("what is the capital of France?"), dialogue("hi")]
    trainer = trainer_of(name, [str(model), reward_function(model)], prompts, folder)
    ((prompts, completions, rewards),) = rewards_in(trainer)
    expected = Scorer(model).score([prompt + reply for prompt, reply in zip(prompts, completions, strict=True)])
    gaps = (rewards - torch.tensor(expected)[:, None]).abs().max(dim=0).values
    return " / ".join(f"{gap:.0e}" for gap in gaps.tolist())


if __name__ == "__main__":
    main()
