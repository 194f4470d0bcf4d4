"""The mathematics of one optimizer step and of one evaluation. The scripts say when; this says how.

Every row's loss is a sum. It is divided here, once, by the count of the whole global batch, which the plan knows
before the forward. FSDP2 averages gradients over ranks; the visible factor `world` undoes that. So the update is the
same for every split into rows and ranks, up to the order of fp32 additions.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rm import dist
from rm.batch import Batch, InOrder, Work
from rm.heads import Sums


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, work: Work, max_grad_norm: float) -> Sums:
    """One update. Nothing in it waits for the device.

    Returns:
        this rank's sums over its rows, and `grad_norm`, the global norm before clipping.
    """
    total: Sums = {}
    torch.manual_seed(work.seed)
    for row in work.rows:
        sums = model(row.to(dist.device()))
        (sums["loss"] * (dist.world() / model.count(work))).backward()
        _add(total, sums)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total | {"grad_norm": norm.full_tensor() if isinstance(norm, DTensor) else norm}


@torch.no_grad()
def evaluate(model: nn.Module, rows: InOrder, between_rows: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Means over all examples, exact whatever the number of ranks. `between_rows` may leave, by raising."""
    model.eval()
    total: Sums = {}
    for row in rows:
        between_rows()
        _add(total, model(row.to(dist.device())))
    model.train()
    summed = dist.sum_over_ranks(torch.stack([x.double() for x in total.values()]))
    return means(dict(zip(total, summed.tolist(), strict=True)))


def score(model: nn.Module, rows: InOrder) -> Tensor:
    """The reward of every reply as `rows.examples` stores them, on every rank: (R,) fp32 on the CPU.

    Those of example i are `[reply_offsets[i] : reply_offsets[i + 1]]`; where all are pairs, `.view(-1, 2)` has the
    chosen ones first.
    """
    numbers, rewards = score_rows(model, rows, rows.examples.reply_offsets)
    return dist.concat_over_ranks(rewards)[dist.concat_over_ranks(numbers).argsort()]


@torch.no_grad()
def score_rows(model: nn.Module, rows: Iterable[Batch], reply_offsets: np.ndarray) -> tuple[Tensor, Tensor]:
    """(numbers of the replies, their rewards) of these rows, on this rank alone."""
    model.eval()
    numbers, rewards = [np.zeros(0, np.int64)], [torch.zeros(0)]
    for row in rows:
        numbers += [np.arange(reply_offsets[i], reply_offsets[i + 1]) for i in row.examples]
        rewards.append(model.rewards(row.to(dist.device())).cpu())
    model.train()
    return torch.from_numpy(np.concatenate(numbers)), torch.cat(rewards)


def reward_statistics(model: nn.Module, rows: InOrder) -> dict[str, float]:
    """{"reward_mean", "reward_std"} of a set's best replies: of a pair the chosen one, of a demonstration its text.

    Preferences leave open where zero is; minus this mean, rewards are 0 on average over the set, as InstructGPT's are
    over its demonstrations (arXiv 2203.02155, section 3.5). Tied best replies all count. Exact over ranks, in fp64.
    """
    examples = rows.examples
    best = np.maximum.reduceat(examples.grade, examples.reply_offsets[:-1])
    rewards = score(model, rows).double().numpy()[examples.grade == best.repeat(np.diff(examples.reply_offsets))]
    return {"reward_mean": float(rewards.mean()), "reward_std": float(rewards.std())}


def means(sums: dict[str, float]) -> dict[str, float]:
    """The one division."""
    return {name: value / sums["count"] for name, value in sums.items() if name != "count"}


def _add(total: Sums, sums: Sums) -> None:
    for name, value in sums.items():
        total[name] = total[name] + value.detach() if name in total else value.detach()


def parameters_trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
