"""rm.model.lisa: which layers train in a step, what frozen ones cost, and training against a slow, plain loop."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from rm.config import compose, updated
from rm.data.batch import Loader, pack
from rm.distributed import sharding
from rm.model import lisa
from rm.model.heads import LanguageModel, RewardModel
from rm.model.lisa import LisaSettings
from rm.training import optim
from tests import made, reference
from tests.ranks import run_ranks
from tests.training_runs import ATTENTION_COST, Settings, examples_of, run_step, sharded

STEPS, SEED = 7, 3
SETTINGS = compose(
    Settings, use_lisa=True, lisa_activated_layers=1, lisa_interval_steps=2, learning_rate=1e-2,
    global_batch_size=5, max_tokens=60, num_train_epochs=3,
)  # fmt: skip


def test_active_layers_depend_on_seed_and_interval_alone_and_are_uniform():
    def layers(step, seed=0):
        return lisa.active_layers(step, 30, seed, LisaSettings(lisa_activated_layers=2, lisa_interval_steps=20))

    assert layers(0) == layers(19) and layers(40) == layers(59) and len(set(layers(7))) == 2
    assert [layers(20 * i) for i in range(30)] != [layers(20 * i, seed=1) for i in range(30)]
    counts = Counter(layer for i in range(1500) for layer in layers(20 * i))
    assert counts.keys() == set(range(30)) and min(counts.values()) > 60 and max(counts.values()) < 140


def make_loader(cls, settings: Settings) -> Loader:
    return Loader(examples_of(cls, 12), settings.batch, settings.packing, SEED, ATTENTION_COST)


def train(cls, config, settings: Settings):
    """(loss, gradient norm) of every step; the final weights; the parameters with Adam moments after every step."""
    model = sharded(made.model(cls, config), settings.parallel)
    loader = make_loader(cls, settings)
    optimizer = optim.adamw(model, settings.optim)
    lines, with_moments = [], []
    for s in range(STEPS):
        lisa.activate_layers(model, optimizer, s, settings.lisa, SEED)
        lines.append(run_step(model, optimizer, loader.at(s), settings.optim.max_grad_norm))
        with_moments.append({name for name, p in model.named_parameters() if p in optimizer.state})
    return lines, [sharding.full_tensor(p) for p in model.parameters()], with_moments


def train_slowly(cls, config, settings: Settings):
    """The same with plain modules: text by text, and a new AdamW for each parameter that begins to train."""
    model = made.model(cls, config)
    pairs = made.token_pairs(12, seed=1)
    loader = make_loader(cls, settings)
    optimizers, lines = {}, []
    for s in range(STEPS):
        layers = lisa.active_layers(s, config.n_layers, SEED, settings.lisa)
        for name, p in model.named_parameters():
            unit, *rest = name.split(".")
            if unit == "layers":
                trains = int(rest[0]) in layers
            elif unit.startswith("embed"):
                trains = settings.lisa.lisa_train_embeddings
            else:
                trains = settings.lisa.lisa_train_head
            p.requires_grad_(trains or unit == "score")
            if not p.requires_grad:
                optimizers.pop(name, None)
            elif name not in optimizers:
                optimizers[name] = torch.optim.AdamW([p], lr=settings.optim.learning_rate, weight_decay=0.0)
        batch = [pairs[i] for i in loader.indices(s)]
        if cls is RewardModel:
            loss = reference.pair_loss_sum(model, batch) / len(batch)
        else:
            texts = [chosen for chosen, _ in batch]
            loss = reference.text_loss_sum(model, texts) / sum(len(text) - 1 for text in texts)
        loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trained, settings.optim.max_grad_norm)
        for optimizer in optimizers.values():
            optimizer.step()
        model.zero_grad()
        lines.append((loss.item(), norm.item()))
    return lines, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize(
    ("cls", "family", "world"),
    [
        (RewardModel, "llama", 1),
        (RewardModel, "llama", 2),
        (RewardModel, "gpt_neo", 4),
        (LanguageModel, "gpt_neo", 1),
        (LanguageModel, "llama", 2),
    ],
)
def test_lisa_on_any_number_of_ranks_trains_as_the_slow_loop_does(cls, family, world):
    config = made.CONFIGS[family]
    settings = updated(SETTINGS, lisa_train_embeddings=world != 2, lisa_train_head=world != 1)
    slow_lines, slow_weights = train_slowly(cls, config, settings)
    for lines, weights, _ in run_ranks(world, train, cls, config, settings):
        torch.testing.assert_close(torch.tensor(lines), torch.tensor(slow_lines), rtol=1e-4, atol=1e-5)
        for p, q in zip(weights, slow_weights, strict=True):
            assert (p - q).norm() <= 1e-3 * q.norm()


def test_in_bfloat16_a_layer_that_was_frozen_at_first_trains_later():
    exact, *_ = run_ranks(1, train, RewardModel, made.LLAMA, SETTINGS)[0]
    low, *_ = run_ranks(2, train, RewardModel, made.LLAMA, updated(SETTINGS, dtype="bfloat16"))[0]
    torch.testing.assert_close(torch.tensor(low), torch.tensor(exact), rtol=0.1, atol=0.05)


def test_moments_are_dropped_or_kept_or_moved_and_kept_ones_are_used_again():
    settings = updated(SETTINGS, lisa_interval_steps=1)
    dropped, kept, moved = (
        run_ranks(2, train, RewardModel, made.LLAMA, updated(settings, lisa_state=policy))[0]
        for policy in ("drop", "keep", "cpu")
    )
    layers = [{name.split(".")[1] for name in names if name.startswith("layers.")} for names in dropped[2]]
    assert layers == [{str(i) for i in lisa.active_layers(s, 3, SEED, settings.lisa)} for s in range(STEPS)]
    assert len(kept[2][-1]) > len(dropped[2][-1]) and kept[0] == moved[0] != dropped[0]
    assert all(torch.equal(a, b) for a, b in zip(kept[1], moved[1], strict=True))


def moment_bytes(intervals: int) -> tuple[list[int], int]:
    """Bytes of Adam's moments after each step, and those that training all layers would need."""
    settings = updated(SETTINGS, lisa_interval_steps=1, num_train_epochs=100)
    config = replace(made.LLAMA, n_layers=6, windows=(0,) * 6, ropes=made.LLAMA.ropes * 2)
    model = sharded(made.model(RewardModel, config), settings.parallel)
    loader = make_loader(RewardModel, settings)
    optimizer, sizes = optim.adamw(model, settings.optim), []
    for s in range(intervals):
        lisa.activate_layers(model, optimizer, s, settings.lisa, SEED)
        run_step(model, optimizer, loader.at(s))
        moments = [sharding.local(x) for state in optimizer.state.values() for x in state.values() if x.ndim]
        sizes.append(sum(x.nbytes for x in moments))
        assert all(p.grad is None for p in model.parameters())
    return sizes, 8 * sum(p.numel() for p in model.parameters())


def test_the_moments_of_ten_intervals_take_no_more_memory_than_those_of_one():
    ((sizes, of_all_layers),) = run_ranks(1, moment_bytes, 10)
    assert len(set(sizes)) == 1 and sizes[0] < of_all_layers / 2


def count_products(cls, step: int, settings: Settings) -> int:
    """The number of matrix products in one forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class ProductCounter(TorchDispatchMode):
        products = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.name() in ("aten::mm", "aten::addmm"):
                ProductCounter.products += 1
            return op(*args, **(kwargs or {}))

    model = sharded(made.model(cls), settings.parallel)
    lisa.activate_layers(model, optim.adamw(model, settings.optim), step, settings.lisa, SEED)
    batch = pack(examples_of(cls, 3), range(3))
    with ProductCounter():
        model(batch)["loss"].backward()
    return ProductCounter.products


def test_frozen_layers_cost_no_weight_products_and_lower_ones_no_backward():
    settings = updated(SETTINGS, lisa_interval_steps=1, lisa_train_embeddings=False)
    step_of_layer = {lisa.active_layers(s, 3, SEED, settings.lisa)[0]: s for s in range(20)}
    linears, score = 7, 3  # products of a layer's forward; of the score head's forward and backward
    for layer, s in step_of_layer.items():
        (products,) = run_ranks(1, count_products, RewardModel, s, settings)
        forward, trained, passed_through = 3 * linears, 2 * linears, (2 - layer) * linears
        # q, k, v of the lowest trained layer need no gradient of their input.
        assert products - score - forward - trained - passed_through in (-3, -2, -1, 0)
    (of_all,) = run_ranks(1, count_products, RewardModel, 0, updated(settings, use_lisa=False))
    assert of_all >= 9 * linears


def test_lisa_with_lora_or_with_too_few_layers_is_refused():
    import train_rm

    required = dict(model_name_or_path="m", dataset_path=("d",), output_dir="o")
    compose(train_rm.Settings, **required, use_lisa=True)
    with pytest.raises(ValueError, match="--use_lora and --use_lisa exclude each other"):
        compose(train_rm.Settings, **required, use_lisa=True, use_lora=True)
    with pytest.raises(ValueError, match="--lisa_activated_layers 9 is more than the model's 3"):
        lisa.check_depth(3, updated(SETTINGS, lisa_activated_layers=9).lisa)
