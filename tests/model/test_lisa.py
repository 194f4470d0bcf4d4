"""rm.model.lisa: the layers of a step, what is frozen and forgotten, and the same training as a slow twin's."""

from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch

from rm.data import batch
from rm.distributed import sharding
from rm.model import lisa
from rm.model.heads import LanguageModel, RewardModel
from rm.training import optim, step
from tests import made, reference
from tests.ranks import run_ranks
from tests.training.test_step import examples_of, sharded

STEPS = 7


@dataclass(frozen=True, kw_only=True)
class Settings(
    batch.BatchSettings, batch.PackingSettings, optim.OptimSettings, lisa.LisaSettings, sharding.ParallelSettings
):
    seed: int = 3
    use_lisa: bool = True
    lisa_activated_layers: int = 1
    lisa_interval_steps: int = 2
    learning_rate: float = 1e-2
    global_batch_size: int = 5
    max_tokens: int = 60
    num_train_epochs: float = 3


SETTINGS = Settings()


def test_a_steps_layers_depend_on_seed_and_interval_alone_and_all_get_their_turn():
    def of(s, seed=0):
        return lisa.active_layers(s, 30, seed, Settings(lisa_activated_layers=2, lisa_interval_steps=20))

    assert of(0) == of(19) and of(40) == of(59) and len(set(of(7))) == 2
    assert [of(20 * i) for i in range(30)] != [of(20 * i, seed=1) for i in range(30)]
    turns = Counter(layer for i in range(1500) for layer in of(20 * i))
    assert turns.keys() == set(range(30)) and min(turns.values()) > 60 and max(turns.values()) < 140


def train(cls, config, settings: Settings):
    """Losses and gradient norms, the weights, and after each step who holds a gradient and who holds moments."""
    model = sharded(cls, config, settings)
    loader = batch.Loader(examples_of(cls, 12), settings, settings.seed, attention_cost=0.01)
    optimizer = optim.adamw(model, settings)
    lines, live = [], []
    for s in range(STEPS):
        lisa.switch(model, optimizer, s, settings)
        work = loader.at(s)
        sums = step.train_step(model, optimizer, work, settings.max_grad_norm)
        loss = step.dist.sum_over_ranks(sums["loss"].clone()) / model.count(work)
        lines.append((loss.item(), sums["grad_norm"].item()))
        live.append({name for name, p in model.named_parameters() if p in optimizer.state})
    return lines, [sharding.full_tensor(p) for p in model.parameters()], live


def train_slowly(cls, config, settings: Settings):
    """The same with plain modules: text by text, and a new AdamW for whatever begins to train."""
    model = made.model(cls, config)
    data = made.token_pairs(12, seed=1)
    loader = batch.Loader(examples_of(cls, 12), settings, settings.seed, attention_cost=0.01)
    optimizers, lines = {}, []
    for s in range(STEPS):
        layers = lisa.active_layers(s, config.n_layers, settings.seed, settings)
        for name, p in model.named_parameters():
            part = name.split(".")
            if part[0] == "layers":
                trains = int(part[1]) in layers
            else:
                trains = settings.lisa_train_embeddings if part[0].startswith("embed") else settings.lisa_train_head
            p.requires_grad_(trains or part[0] == "score")
            if not p.requires_grad:
                optimizers.pop(name, None)
            elif name not in optimizers:
                optimizers[name] = torch.optim.AdamW([p], lr=settings.learning_rate, weight_decay=0.0)
        mine = [data[i] for i in loader.indices(s)]
        if cls is RewardModel:
            loss = reference.pair_loss_sum(model, mine) / len(mine)
        else:
            texts = [a for a, _ in mine]
            loss = reference.text_loss_sum(model, texts) / sum(len(t) - 1 for t in texts)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in model.parameters() if p.requires_grad], settings.max_grad_norm
        )
        for optimizer in optimizers.values():
            optimizer.step()
        model.zero_grad()
        lines.append((loss.item(), norm.item()))
    return lines, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("config", made.CONFIGS.values(), ids=made.CONFIGS.keys())
@pytest.mark.parametrize("cls", [RewardModel, LanguageModel])
def test_any_number_of_ranks_trains_as_the_slow_twin_does(cls, config, world):
    settings = replace(SETTINGS, lisa_train_embeddings=world != 2, lisa_train_head=world != 1)
    slow, slow_weights = train_slowly(cls, config, settings)
    for lines, weights, _ in run_ranks(world, train, cls, config, settings):
        torch.testing.assert_close(torch.tensor(lines), torch.tensor(slow), rtol=1e-4, atol=1e-5)
        for p, q in zip(weights, slow_weights, strict=True):
            assert (p - q).norm() <= 1e-3 * q.norm()


def test_in_bfloat16_a_layer_that_was_frozen_at_first_trains_later():
    exact, *_ = run_ranks(1, train, RewardModel, made.LLAMA, SETTINGS)[0]
    low, *_ = run_ranks(2, train, RewardModel, made.LLAMA, replace(SETTINGS, dtype="bfloat16"))[0]
    torch.testing.assert_close(torch.tensor(low), torch.tensor(exact), rtol=0.1, atol=0.05)


def test_moments_are_forgotten_kept_or_parked_and_kept_ones_are_used_again():
    settings = replace(SETTINGS, lisa_interval_steps=1)
    dropped, kept, parked = (
        run_ranks(2, train, RewardModel, made.LLAMA, replace(settings, lisa_state=how))[0]
        for how in ("drop", "keep", "cpu")
    )
    layers = [{name.split(".")[1] for name in live if name.startswith("layers.")} for live in dropped[2]]
    assert layers == [{str(i) for i in lisa.active_layers(s, 3, settings.seed, settings)} for s in range(STEPS)]
    assert len(kept[2][-1]) > len(dropped[2][-1]) and kept[0] == parked[0] != dropped[0]
    assert all(torch.equal(a, b) for a, b in zip(kept[1], parked[1], strict=True))


def state_bytes(intervals: int):
    """Bytes of Adam's moments after each step."""
    settings = replace(SETTINGS, lisa_interval_steps=1, num_train_epochs=100)
    model = sharded(
        RewardModel, replace(made.LLAMA, n_layers=6, windows=(0,) * 6, ropes=made.LLAMA.ropes * 2), settings
    )
    loader = batch.Loader(examples_of(RewardModel, 12), settings, settings.seed, attention_cost=0.01)
    optimizer, found = optim.adamw(model, settings), []
    for s in range(intervals):
        lisa.switch(model, optimizer, s, settings)
        step.train_step(model, optimizer, loader.at(s), 1.0)
        held = [sharding.local(x) for state in optimizer.state.values() for x in state.values() if x.ndim]
        found.append(sum(x.nbytes for x in held))
        assert all(p.grad is None for p in model.parameters())
    return found, 8 * sum(p.numel() for p in model.parameters())


def test_the_moments_of_ten_intervals_take_no_more_memory_than_those_of_one():
    ((found, of_all),) = run_ranks(1, state_bytes, 10)
    assert len(set(found)) == 1 and found[0] < of_all / 2


def products(cls, step_: int, settings: Settings) -> int:
    """Matrix products of one forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            Count.products += op.name() in ("aten::mm", "aten::addmm")
            return op(*args, **(kwargs or {}))

    model = sharded(cls, made.LLAMA, settings)
    lisa.switch(model, optim.adamw(model, settings), step_, settings)
    row = batch.pack(examples_of(cls, 3), range(3))
    with Count():
        model(row)["loss"].backward()
    return Count.products


def test_a_frozen_layer_costs_no_weight_product_and_below_the_lowest_trained_one_the_backward_stops():
    settings = replace(SETTINGS, lisa_interval_steps=1, lisa_train_embeddings=False)
    steps = {lisa.active_layers(s, 3, settings.seed, settings)[0]: s for s in range(20)}
    linears, score = 7, 3  # products of a layer's forward; of the score head's forward and backward
    for layer, s in steps.items():
        (counted,) = run_ranks(1, products, RewardModel, s, settings)
        forward, trained, passed = 3 * linears, 2 * linears, (2 - layer) * linears
        assert counted - score - forward - trained - passed in (-3, -2, -1, 0)  # q, k, v of the lowest need no dgrad
    (everything,) = run_ranks(1, products, RewardModel, 0, replace(settings, use_lisa=False))
    assert everything >= 9 * linears


def test_lora_and_lisa_exclude_each_other_and_there_must_be_enough_layers():
    from rm.config import parse
    from train_rm import Settings as Script

    words = ["--model_name_or_path", "m", "--dataset_path", "d", "--output_dir", "o", "--use_lisa", "true"]
    with pytest.raises(SystemExit):
        parse(Script, "", [*words, "--use_lora", "true"])
    with pytest.raises(ValueError, match="--lisa_activated_layers 9 is more than the model's 3"):
        lisa.check_depth(3, replace(SETTINGS, lisa_activated_layers=9))
