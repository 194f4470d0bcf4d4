"""rm.model.nf4: a base in four bits, against bitsandbytes' numbers, plain formulas, and the base that it stands for."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch._dynamo.backends.debugging import aot_eager

from rm.config import compose
from rm.distributed import checkpoint
from rm.model import nf4
from rm.model.lora import LoraSettings
from tests import text_fixtures, tiny
from tests.ranks import run_ranks
from tests.runs import assert_same, main, outcome, undisturbed
from tests.training.test_resume import interrupted
from tests.training_runs import load_reward_model, lora_settings, train_lora

IN_4BIT = lora_settings(load_in_4bit=True, lora_dropout=0.1)


# quantize_4bit(wave(4, 64), blocksize=64, quant_type="nf4", compress_statistics=True) of bitsandbytes 0.50.2
PACKED = "7ceda42137ceda41127deea41128deea"
SCALE_CODES = [0, 46, 208, 254]
SCALE_SCALE, MEAN = 0.9661886692047119, 2.5223782062530518
BACK = [1.9589048624038696, 0.0, -1.8281853199005127, -2.423985481262207]  # the first values of the last row


@pytest.fixture
def folder(tmp_path):
    text_fixtures.byte_level(tmp_path / "base")
    tiny.llama(vocab_size=400).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def wave(rows: int, columns: int) -> torch.Tensor:
    """Values that are the same everywhere."""
    numbers = torch.arange(rows * columns, dtype=torch.float64)
    return ((numbers * 0.7).sin() * (1 + numbers / 100)).float().view(rows, columns)


def test_a_matrix_has_the_bits_that_bitsandbytes_gives_it():
    found = nf4.quantize(wave(4, 64))
    assert bytes(found.packed[:16].tolist()).hex() == PACKED
    assert found.scale_codes.tolist() == SCALE_CODES
    assert (found.scale_scales.item(), found.mean.item()) == pytest.approx((SCALE_SCALE, MEAN), rel=1e-7)
    back = nf4.dequantize(found, (4, 64), torch.float32)
    torch.testing.assert_close(back[3, :4], torch.tensor(BACK), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "shape", [(5, 50), (64, 300)]
)  # blocks that cross rows, a last one that is not full; 300 of them
def test_a_round_trip_equals_the_plain_formula(shape, monkeypatch):
    monkeypatch.setattr(nf4, "AT_ONCE", 128)  # in several parts
    weight = wave(*shape).to(torch.bfloat16)
    flat, values = weight.float().flatten().tolist(), nf4.VALUES
    blocks = [flat[i : i + 64] for i in range(0, len(flat), 64)]
    scales = [max(map(abs, block)) for block in blocks]
    mean = sum(scales) / len(scales)
    kept = []
    for start in range(0, len(scales), 256):
        part = [scale - mean for scale in scales[start : start + 256]]
        largest = max(map(abs, part))
        kept += [
            mean + largest * min(nf4._scale_values().tolist(), key=lambda v, x=x: abs(v - x / largest)) for x in part
        ]
    expected = [
        min(values, key=lambda v, x=x, s=s: abs(v - x / s)) * k
        for block, s, k in zip(blocks, scales, kept, strict=True)
        for x in block
    ]
    back = nf4.dequantize(nf4.quantize(weight), shape, torch.float32)
    torch.testing.assert_close(back.flatten(), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert torch.equal(nf4.dequantize(nf4.quantize(weight), shape, torch.bfloat16), back.bfloat16())
    assert not nf4.dequantize(nf4.quantize(0 * weight), shape, torch.float32).any()


def test_a_product_is_that_of_the_dequantized_matrix_and_keeps_nothing_for_the_backward():
    layer = nf4.NF4Linear(torch.nn.Linear(48, 20))
    layer.fill(wave(20, 48))
    x, saved = torch.randn(7, 48, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        y = layer(x)
    assert not saved
    torch.testing.assert_close(y, F.linear(x, layer.weight, layer.bias))
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * y @ layer.weight)


def test_a_compiled_layer_computes_the_same():
    layer = nf4.NF4Linear(torch.nn.Linear(48, 20))
    layer.fill(wave(20, 48))
    results, x = [], wave(7, 48)
    for forward in (layer, torch.compile(layer, backend=aot_eager, dynamic=True, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def without_4bit(folder, out):
    """A copy of the base whose matrices have the values that are kept in four bits."""
    text_fixtures.byte_level(out)
    (out / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    for name, x in tensors.items():
        if x.ndim == 2 and ".layers." in name:
            tensors[name] = nf4.dequantize(nf4.quantize(x), x.shape, torch.float32)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def bits(folder, settings) -> list[torch.Tensor]:
    """All that is kept in four bits."""
    return [x.clone() for x in load_reward_model(folder, settings).buffers()]


def test_the_training_is_that_of_the_base_that_four_bits_stand_for_and_the_export_that_of_the_original(
    folder, tmp_path
):
    twin = without_4bit(folder, tmp_path / "twin")
    settings = lora_settings(load_in_4bit=True)
    (ours,) = run_ranks(1, train_lora, folder, tmp_path, settings)
    (expected,) = run_ranks(1, train_lora, twin, None, lora_settings())
    torch.testing.assert_close(torch.tensor(ours.lines), torch.tensor(expected.lines), rtol=1e-5, atol=1e-6)

    base, merged = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "model"))
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    scale = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["lora_alpha"] / 4
    for name, x in base.items():
        a, b = (adapter.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{k}.weight") for k in "AB")
        if name in merged:
            torch.testing.assert_close(merged[name], x if a is None else x + scale * b @ a, rtol=1e-5, atol=1e-6)
    assert sum(a.endswith("lora_A.weight") for a in adapter) == 14


@pytest.mark.parametrize("shard_base", [True, False])
def test_ranks_have_the_same_bits_and_train_the_same(folder, tmp_path, shard_base):
    settings = lora_settings(load_in_4bit=True, gradient_checkpointing="full", shard_base=shard_base)
    (one,) = run_ranks(1, bits, folder, settings)
    for rank in run_ranks(2, bits, folder, settings):
        assert all(torch.equal(x, y) for x, y in zip(rank, one, strict=True)) and len(rank) == 6 * 14
    (alone,) = run_ranks(1, train_lora, folder, None, lora_settings(load_in_4bit=True))
    for rank in run_ranks(2, train_lora, folder, tmp_path, settings):
        torch.testing.assert_close(torch.tensor(rank.lines), torch.tensor(alone.lines), rtol=1e-5, atol=1e-5)


def test_a_run_resumes_bit_equal_and_its_checkpoints_hold_no_base(tmp_path):
    config = interrupted(tmp_path / "out", processes=2, use_lora=True, load_in_4bit=True)
    newest = checkpoint.list_checkpoints(tmp_path / "out" / "checkpoints")[-1]
    names = json.loads((newest / "state.json").read_text())["parameters"]
    assert all(name.endswith((".lora_A", ".lora_B")) or name == "score.weight" for name in names)
    run_ranks(2, main, config)
    assert_same(outcome(config), undisturbed(2, use_lora=True, load_in_4bit=True))


def test_without_adapters_or_on_an_adapter_it_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="--load_in_4bit true needs --use_lora true"):
        compose(LoraSettings, load_in_4bit=True)
    run_ranks(1, train_lora, folder, tmp_path)
    with pytest.raises(RuntimeError, match="is an adapter, and --load_in_4bit needs the folder of a full model"):
        run_ranks(1, train_lora, tmp_path / "adapter", None, IN_4BIT)
