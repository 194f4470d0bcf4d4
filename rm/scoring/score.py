"""Rewards of examples, from a sharded model or from one that a process holds alone.

Shapes: R replies.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from rm.data.batch import EvalBatches, MicroBatch
from rm.distributed import process_group as dist
from rm.distributed import sharding


def all_rewards(model: nn.Module, batches: EvalBatches, between_batches: Callable[[], None] = lambda: None) -> Tensor:
    """The reward of every reply in the order of `batches.examples`, on every rank: (R,) fp32 on the CPU.

    Of a `RegressionModel` all outputs: (R, A).

    Those of example i are `[reply_offsets[i] : reply_offsets[i + 1]]`; where all are pairs, `.view(-1, 2)` has the
    chosen ones first. A text that stands in several places is scored once. All ranks call it.

    Args:
        between_batches: called before every micro-batch; may leave by raising.
    """
    texts, place = batches.distinct()
    return rewards_of_each(model, texts, between_batches)[place]


def rewards_of_each(
    model: nn.Module, batches: EvalBatches, between_batches: Callable[[], None] = lambda: None
) -> Tensor:
    """`all_rewards` of texts that are known to differ."""
    shown = dist.progress(batches, "scoring", "micro-batches")
    indices, rewards = local_rewards(model, shown, batches.examples.reply_offsets, between_batches)
    return dist.concat_over_ranks(rewards)[dist.concat_over_ranks(indices).argsort()]


@torch.no_grad()
def local_rewards(
    model: nn.Module,
    batches: Iterable[MicroBatch],
    reply_offsets: np.ndarray,
    between_batches: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """(indices of the replies, their rewards) of this rank's micro-batches."""
    model.eval()
    indices, rewards = [np.zeros(0, np.int64)], [torch.zeros(0)]
    for batch in batches:
        between_batches()
        indices += [np.arange(reply_offsets[i], reply_offsets[i + 1]) for i in batch.example_indices]
        rewards.append(model.rewards(batch.to(dist.device())).cpu())
    model.train()
    sharding.reshard(model)
    return torch.from_numpy(np.concatenate(indices)), torch.cat(rewards)


def reward_statistics(model: nn.Module, batches: EvalBatches) -> dict[str, float]:
    """{"reward_mean", "reward_std"} of a set's best replies: the chosen one of a pair, the text of a demonstration.

    Preferences do not determine where zero is; minus this mean, rewards are 0 on average over the set, as InstructGPT's
    are over its demonstrations (arXiv 2203.02155, section 3.5). Tied best replies all count. Exact over ranks, in fp64.
    """
    examples = batches.examples
    counts = np.diff(examples.reply_offsets)
    # A label below 0.5 says that the order of the grades is wrong, and 0.5 that the replies are tied.
    grade = examples.grade * np.sign(examples.label - 0.5).repeat(counts)
    best = np.maximum.reduceat(grade, examples.reply_offsets[:-1])
    is_best = grade == best.repeat(counts)
    rewards = all_rewards(model, batches).double().numpy()[is_best]
    return {"reward_mean": float(rewards.mean()), "reward_std": float(rewards.std())}
