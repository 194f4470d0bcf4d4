"""rm.model.attention: the kernels against the mask written out entry by entry."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rm.model import attention, capped_attention
from rm.model.attention import SplitAttention, VarlenAttention
from tests.reference import DenseAttention, attention_mask

segments = st.lists(
    st.tuples(st.integers(0, 9), st.lists(st.integers(1, 9), min_size=1, max_size=4)).map(lambda d: (d[0], *d[1])),
    min_size=1,
    max_size=4,
)


def run(kernel, segments, window, softcap=0.0, seed=0, dtype=torch.float64):
    """Output and gradients of a kernel on random q (4 heads), k, v (2 heads)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(map(sum, segments))
    leaves = [torch.randn(tokens, heads, 8, generator=generator).to(dtype).requires_grad_() for heads in (4, 2, 2)]
    out = kernel(segments, torch.device("cpu"))(*leaves, window=window, scale=0.7, softcap=softcap)
    (out.double() ** 2).sum().backward()
    return [out.detach(), *(x.grad for x in leaves)]


@settings(max_examples=60)
@given(segments, st.sampled_from([0, 1, 3, 7]), st.sampled_from([0.0, 1.5]))
def test_outputs_and_gradients_of_split_attention_follow_the_mask(segments, window, softcap):
    with mock.patch.object(capped_attention, "BLOCK", 4):  # some texts have several
        results = (run(kernel, segments, window, softcap) for kernel in (SplitAttention, DenseAttention))
        for split, dense in zip(*results, strict=True):
            torch.testing.assert_close(split, dense, rtol=1e-9, atol=1e-9)


def test_split_attention_in_bfloat16_differs_by_rounding_only():
    segments = [(6, 5, 9), (0, 8), (3, 2, 2, 4)]
    for window in (0, 4):
        exact = run(DenseAttention, segments, window)
        for split, dense in zip(run(SplitAttention, segments, window, dtype=torch.bfloat16), exact, strict=True):
            assert (split.double() - dense).abs().max() / dense.abs().max() < 0.03


def test_the_mask_of_a_small_pair_is_as_drawn():
    rows = ["x....", "xx...", "xxx..", "xx.x.", "xx.xx"]
    assert attention_mask([(2, 1, 2)], 0).tolist() == [[c == "x" for c in row] for row in rows]


def slow_varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """What FlashAttention documents: causal, aligned bottom-right, at most window_size[0] keys back from there."""
    repeat, left, out = q.shape[1] // k.shape[1], window_size[0], []
    assert window_size[1] == 0 and enable_gqa == (repeat > 1)
    for i in range(len(cu_q) - 1):
        a = q[cu_q[i] : cu_q[i + 1]]
        b, c = (x[cu_k[i] : cu_k[i + 1]].repeat_interleave(repeat, 1) for x in (k, v))
        assert len(a) <= max_q and len(b) <= max_k
        offset = len(b) - len(a)
        back = torch.arange(len(a))[:, None] + offset - torch.arange(len(b))[None]
        mask = back >= 0
        if left >= 0:
            mask &= back <= left
        scores = torch.einsum("qhe,khe->hqk", a, b) * scale
        out.append(torch.einsum("hqk,khe->qhe", scores.masked_fill(~mask, float("-inf")).softmax(-1), c))
    return torch.cat(out)


@settings(max_examples=40)
@given(segments, st.sampled_from([0, 1, 3, 7]))
def test_outputs_and_gradients_of_varlen_attention_follow_the_mask(segments, window):
    class OnCpu(VarlenAttention):  # only CUDA has the kernel itself; the lengths and the gather are tested
        def __init__(self, *args):
            super().__init__(*args)
            self.varlen_attn = slow_varlen_attn

    for varlen, dense in zip(run(OnCpu, segments, window), run(DenseAttention, segments, window), strict=True):
        torch.testing.assert_close(varlen, dense, rtol=1e-9, atol=1e-9)


def test_split_attention_is_chosen_on_a_cpu_and_for_float32():
    for device, dtype in (("cpu", torch.bfloat16), ("cuda", torch.float32)):
        assert attention.choose_kernel(torch.device(device), dtype, 4, 2, 8) is SplitAttention


@pytest.fixture
def on_hopper(monkeypatch):
    """A function that chooses a kernel on a GPU that is not there: (kernel, versions of FlashAttention that ran).

    `gaps` has the difference from split attention for each version, or an exception that it raises.
    """

    def choose(gaps: dict, has_package: bool = False) -> tuple[type, list[int]]:
        ran, active = [], [None]

        def disagreement(*_) -> float:
            version = 3 if active[0] == "FA3" else 2
            ran.append(version)
            if isinstance(gaps[version], Exception):
                raise gaps[version]
            return gaps[version]

        package = object() if has_package else None
        monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: package)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", lambda name: active.insert(0, name))
        monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: active[0])
        monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", lambda: active.insert(0, None))
        monkeypatch.setattr(attention, "_disagreement", disagreement)
        return attention.choose_kernel(torch.device("cuda"), torch.bfloat16, 4, 2, 8), ran

    return choose


@pytest.mark.parametrize(
    ("gap", "kernel"), [(0.005, VarlenAttention), (0.5, SplitAttention), (float("nan"), SplitAttention)]
)
def test_on_cuda_varlen_is_chosen_only_where_it_agrees_with_split(on_hopper, gap, kernel):
    assert on_hopper({2: gap}) == (kernel, [2])


def test_on_cuda_split_is_chosen_where_varlen_cannot_run(on_hopper):
    refusal = RuntimeError("FlashAttention only supports Ampere GPUs or newer")
    assert on_hopper({2: refusal}) == (SplitAttention, [2])


def test_flash_attention_3_is_used_where_it_is_installed_and_right(on_hopper):
    assert on_hopper({3: 0.005, 2: 0.005}, has_package=True) == (VarlenAttention, [3])
    assert on_hopper({3: 0.5, 2: 0.005}, has_package=True) == (VarlenAttention, [3, 2])
    assert on_hopper({3: ImportError("no kernel"), 2: 0.5}, has_package=True) == (SplitAttention, [3, 2])


def test_kernels_can_be_compared_where_gradients_are_off(monkeypatch):
    monkeypatch.setattr(attention, "VarlenAttention", SplitAttention)
    with torch.no_grad():
        assert attention._disagreement(torch.device("cpu"), torch.float32, 4, 2, 8) == 0
