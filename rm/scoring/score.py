"""SCORE"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from rm.data.batch import EvalBatches, MicroBatch
from rm.distributed import process_group as dist


def all_rewards(model: nn.Module, rows: EvalBatches) -> Tensor:
    """The reward of every reply as `rows.examples` stores them, on every rank: (R,) fp32 on the CPU.

    Those of example i are `[reply_offsets[i] : reply_offsets[i + 1]]`; where all are pairs, `.view(-1, 2)` has the
    chosen ones first.
    """
    numbers, rewards = local_rewards(model, rows, rows.examples.reply_offsets)
    return dist.concat_over_ranks(rewards)[dist.concat_over_ranks(numbers).argsort()]


@torch.no_grad()
def local_rewards(model: nn.Module, rows: Iterable[MicroBatch], reply_offsets: np.ndarray) -> tuple[Tensor, Tensor]:
    """(numbers of the replies, their rewards) of these rows, on this rank alone."""
    model.eval()
    numbers, rewards = [np.zeros(0, np.int64)], [torch.zeros(0)]
    for row in rows:
        numbers += [np.arange(reply_offsets[i], reply_offsets[i + 1]) for i in row.examples]
        rewards.append(model.rewards(row.to(dist.device())).cpu())
    model.train()
    return torch.from_numpy(np.concatenate(numbers)), torch.cat(rewards)


def reward_statistics(model: nn.Module, rows: EvalBatches) -> dict[str, float]:
    """{"reward_mean", "reward_std"} of a set's best replies: of a pair the chosen one, of a demonstration its text.

    Preferences leave open where zero is; minus this mean, rewards are 0 on average over the set, as InstructGPT's are
    over its demonstrations (arXiv 2203.02155, section 3.5). Tied best replies all count. Exact over ranks, in fp64.
    """
    examples = rows.examples
    best = np.maximum.reduceat(examples.grade, examples.reply_offsets[:-1])
    rewards = all_rewards(model, rows).double().numpy()[examples.grade == best.repeat(np.diff(examples.reply_offsets))]
    return {"reward_mean": float(rewards.mean()), "reward_std": float(rewards.std())}
