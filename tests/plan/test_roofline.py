"""rm.plan.roofline: what operations compute and move, and the seconds that follow, worked out by hand."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rm.hf import families
from rm.model.attention import SplitAttention
from rm.plan import roofline
from rm.plan.roofline import CountWork, Work
from tests import tiny


def test_products_and_bytes_are_those_of_the_formulas():
    with FakeTensorMode(), CountWork() as counter:
        a, b = (torch.empty(*shape, dtype=torch.bfloat16) for shape in ((64, 32), (32, 16)))
        product = a @ b
        product.view(-1).t()  # views have no kernel
        product + product
    moved = 2 * (64 * 32 + 32 * 16 + 64 * 16)
    assert counter.work.kernels == {(2 * 64 * 32 * 16, moved): 1, (0, 2 * 3 * 64 * 16): 1}
    assert counter.work.count == 2


def test_a_product_of_a_linear_layer_is_counted_three_times_and_a_broadcast_dimension_is_read_once():
    with FakeTensorMode():
        weight = torch.empty(8, 4, requires_grad=True)
        x = torch.empty(16, 4, requires_grad=True)
        with CountWork() as counter:
            torch.nn.functional.linear(x, weight).backward(torch.empty(1, 1).expand(16, 8))
    flops = [f for (f, _), count in counter.work.kernels.items() for _ in range(count) if f]
    assert flops == [2 * 16 * 4 * 8] * 3
    assert min(moved for f, moved in counter.work.kernels if f) == 4 * (16 * 4 + 1 + 8 * 4)  # x or weight, 1, gradient


def test_the_slowest_of_arithmetic_memory_and_a_kernel_decides():
    peak, memory = 0.66 * 312e12, 0.8 * 2.0e12  # A100
    work = Work({(10**12, 1): 1, (0, 10**9): 2, (0, 8): 3})
    assert work.seconds("A100") == pytest.approx(1e12 / peak + 2e9 / memory + 3 * 2.5e-6)


def test_a_step_overlaps_its_parts_and_says_which_one_limits_it():
    work = Work({(0, 8 * 10**9): 1})  # 5 ms on an A100
    arguments = dict(work=work, scale=2, launches=0, attention=0, trained=0, traffic=0)
    assert roofline.step("A100", **arguments).total == pytest.approx(0.01)
    by_host = roofline.step("A100", **(arguments | {"launches": 10_000}))
    assert by_host.total == pytest.approx(0.09) and by_host.limit == "launches"
    by_link = roofline.step("A100", **(arguments | {"traffic": 0.8 * 300e9}))
    assert by_link.total == pytest.approx(1) and by_link.limit == "communication"
    more = roofline.step("A100", **(arguments | {"attention": 0.3 * 312e12, "trained": int(1.6e12 / 36)}))
    assert more.total == pytest.approx(2.01) and more.limit == "the device"


@pytest.mark.parametrize("recompute", [False, True])
def test_the_work_of_capped_attention_is_that_of_running_it_layer_by_layer(recompute):
    """By mean blocks: prompts with replies, texts of one and of several blocks, layers with and without a window."""
    hf = tiny.SETTINGS["gemma2"] | {"model_type": "gemma2", "sliding_window": 700, "num_hidden_layers": 4}
    config = families.find(hf).read(hf)
    segments = [(100, 300, 200), (0, 1200), (600, 500, 400, 90)]
    heads = config.n_heads, config.n_kv_heads, config.n_kv_heads
    q, k, v = (
        torch.empty(sum(map(sum, segments)), n, config.head_dim, dtype=torch.bfloat16, device="meta").requires_grad_()
        for n in heads
    )
    attend = SplitAttention(segments, q.device)
    with CountWork() as counter:
        for window in config.windows:
            for _ in range(1 + recompute):
                out = attend(q, k, v, window, config.attn_scale, config.attn_softcap)
            out.backward(torch.empty_like(out))

    def totals(work: Work) -> torch.Tensor:
        flops, moved = (sum(kernel[i] * count for kernel, count in work.kernels.items()) for i in (0, 1))
        return torch.tensor([flops, moved, work.count], dtype=torch.float64)

    estimated = roofline.capped_attention(config, segments, torch.bfloat16, recompute)
    torch.testing.assert_close(totals(estimated), totals(counter.work), rtol=0.1, atol=0)


def test_every_gpu_has_a_peak():
    assert set(roofline.GPUS) <= set(roofline.PEAKS)
