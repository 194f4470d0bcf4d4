"""rm.distributed.offload: what is saved for the backward moves to host memory and back in order, and stays the same."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from rm.data import batch
from rm.distributed import offload, sharding
from rm.distributed.offload import ActivationOffloader, HostCopies
from rm.distributed.sharding import MemorySettings, ParallelSettings
from rm.model import nf4
from rm.model.heads import LanguageModel, RewardModel
from rm.model.lora import LoraSettings
from rm.model.rotary import Tables
from tests import made
from tests.ranks import run_ranks
from tests.training_runs import sharded

LAYERS = 4
CONFIG = replace(made.LLAMA, n_layers=LAYERS, ropes=made.LLAMA.ropes[:1] * LAYERS, windows=(0,) * LAYERS)
LORA = LoraSettings(use_lora=True, lora_r=4, lora_target_modules=("all-linear",))


class Log(HostCopies):
    """A device whose copies are done when it waits for them, as late as a GPU's may be."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.events: list[str] = []
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.done = self.moved = 0

    def to_host(self, x: Tensor) -> Tensor:
        self.moved += x.numel()
        return self._start("save", torch.full_like(x, torch.nan), x)

    def to_device(self, host: Tensor) -> Tensor:
        return self._start("restore", torch.full_like(host, torch.nan), host)

    def _start(self, name: str, target: Tensor, source: Tensor) -> Tensor:
        if self.events[-1:] != [name]:
            self.events.append(name)
        self.copies.append((target, source))
        return target

    def started(self) -> int:
        return len(self.copies)

    def wait(self, copies: int) -> None:
        self.events.append("wait")
        for target, source in self.copies[self.done : copies]:
            target.copy_(source)
        self.done = max(self.done, copies)


def gradients(cls, parallel: ParallelSettings, recompute: str, lora: LoraSettings | None, is_offloaded: bool):
    """Loss, gradients, what happened in which order, and the number of values that were moved."""
    offload.SMALLEST = 1
    plain = made.model(cls, CONFIG)
    model = sharded(plain, parallel, recompute, lora, is_offloaded)
    for layer in nf4.quantized_layers(model).values():
        layer.fill(torch.randn(layer.out_features, layer.in_features, generator=torch.Generator().manual_seed(0)))
    log = Log(torch.device("cpu"))
    if is_offloaded:
        model.offloader.copies = log
    for i, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda *_, i=i: log.events.append(f"forward {i}"))
        layer.register_full_backward_pre_hook(lambda *_, i=i: log.events.append(f"backward {i}"))
    pairs = made.token_pairs(4)
    is_reward_model = cls is RewardModel
    examples = made.pair_examples(pairs) if is_reward_model else made.text_examples([a for a, _ in pairs])
    torch.manual_seed(0)  # of dropout
    for indices in (range(2), range(2, 4)):
        loss = model(batch.pack(examples, indices))["loss"]
        loss.backward()
    grads = [sharding.full_tensor(p.grad) for p in model.parameters() if p.grad is not None]
    return loss.item(), grads, log.events, log.moved


@pytest.mark.parametrize(
    ("cls", "world_size", "dtype", "recompute", "lora"),
    [
        (LanguageModel, 2, "bfloat16", "none", None),
        (RewardModel, 2, "float32", "full", LORA),
        (RewardModel, 1, "float32", "none", replace(LORA, load_in_4bit=True)),
    ],
)
def test_losses_and_gradients_are_bit_equal(cls, world_size, dtype, recompute, lora):
    def without_and_with():
        return [gradients(cls, ParallelSettings(dtype=dtype), recompute, lora, how) for how in (False, True)]

    (loss, grads, _, none), (other_loss, other_grads, _, moved) = run_ranks(world_size, without_and_with)[0]
    assert none == 0 < moved
    assert other_loss == loss and all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True))


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_copies_are_started_a_layer_ahead_and_waited_for_a_layer_later(recompute):
    _, _, events, _ = run_ranks(1, gradients, RewardModel, ParallelSettings(), recompute, None, True)[0]
    forward = "forward 0, save, forward 1, save, wait, forward 2, save, wait, forward 3, wait"
    # The last layer's values have stayed. The first one read starts the copies of the layer below.
    backward = "backward 3, wait, restore, backward 2, wait, restore, backward 1, wait, restore, backward 0, wait"
    assert events == 2 * f"{forward}, {backward}".split(", ")


class TwoLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(3, 3)

    def forward(self, x: Tensor, rope: Tables) -> Tensor:
        h = x.sin()  # saves x; the products save h, in two shapes, and weights
        return self.a(h) + self.b(h.view(10, 3)).view(5, 6) * rope.q[0]  # the last one saves the table, and b(h)


def test_parameters_and_rotary_tables_stay_and_equal_values_are_moved_once(monkeypatch):
    monkeypatch.setattr(offload, "SMALLEST", 1)
    layers, log, table = nn.ModuleList(TwoLinear() for _ in range(3)), Log(torch.device("cpu")), torch.rand(5, 6)
    ActivationOffloader(layers, log)
    x = torch.rand(5, 6, requires_grad=True)
    for layer in layers:
        x = layer(x, Tables((table, table), None))
    x.sum().backward()
    assert log.moved == 2 * 2 * 30  # of two layers: x and h


def test_small_tensors_stay():
    layers, log = nn.ModuleList(nn.ModuleList() for _ in range(2)), Log(torch.device("cpu"))
    for layer in layers:
        layer.forward = lambda x, rope: x.sin()
    ActivationOffloader(layers, log)
    for size in (offload.SMALLEST // 4 - 1, offload.SMALLEST // 4):
        layers[0](torch.rand(size, requires_grad=True), Tables(None, None))
    assert log.moved == size


def test_without_gradients_nothing_is_moved():
    def scored():
        offload.SMALLEST = 1
        model = sharded(made.model(RewardModel), offload_activations=True)
        model.offloader.copies = log = Log(torch.device("cpu"))
        with torch.no_grad():
            model.rewards(batch.pack(made.pair_examples(made.token_pairs(2)), range(2)))
        return log.moved

    assert run_ranks(1, scored)[0] == 0


def test_selective_recomputation_is_refused():
    memory = MemorySettings(activation_offloading=True, gradient_checkpointing="selective")
    with pytest.raises(ValueError, match="--activation_offloading true works with --gradient_checkpointing none"):
        sharding.check_memory(ParallelSettings(), memory)
