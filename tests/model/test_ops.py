"""rm.model.ops: values, gradients and saved activations against autograd of the plain formulas."""

import pytest
import torch
import torch.nn.functional as F

from rm.model.ops import RMSNormFunction, SwiGLUFunction


def rms_norm(x, weight):
    return RMSNormFunction.apply(x, weight, 1e-5)


def plain_rms_norm(x, weight):
    return (x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()) * weight


def plain_swiglu(gate, up):
    return gate * torch.sigmoid(gate) * up


CASES = pytest.mark.parametrize(
    ("lean", "plain", "shapes"),
    [(rms_norm, plain_rms_norm, [(7, 12), (12,)]), (SwiGLUFunction.apply, plain_swiglu, [(7, 12), (7, 12)])],
    ids=["rms_norm", "swiglu"],
)


def run(function, leaves):
    """The output and the gradients of a function, and the number of values that it saves for the backward."""
    for x in leaves:
        x.grad = None
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        out = function(*leaves)
    (out * torch.linspace(-1, 2, out.numel()).view_as(out).to(out.dtype)).sum().backward()
    return [out.detach(), *(x.grad for x in leaves if x.requires_grad)], sum(saved)


@CASES
def test_values_and_gradients_are_those_of_the_plain_formula_and_less_is_saved(lean, plain, shapes):
    torch.manual_seed(0)
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    (results, saved), (expected, saved_by_autograd) = run(lean, leaves), run(plain, leaves)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert saved < saved_by_autograd


@CASES
def test_a_frozen_input_gets_no_gradient(lean, plain, shapes):
    for frozen in (0, 1):
        leaves = [torch.randn(shape, requires_grad=i != frozen) for i, shape in enumerate(shapes)]
        for a, b in zip(run(lean, leaves)[0], run(plain, leaves)[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@CASES
def test_in_bfloat16_results_differ_by_rounding_only(lean, plain, shapes):
    torch.manual_seed(0)
    low = [torch.randn(shape).bfloat16().requires_grad_() for shape in shapes]
    high = [x.detach().float().requires_grad_() for x in low]
    for a, b in zip(run(lean, low)[0], run(plain, high)[0], strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.float() - b).norm() <= 0.01 * b.norm()


def test_rms_norm_computes_what_torch_computes():
    x, weight = torch.randn(5, 8) * 100, torch.randn(8)
    torch.testing.assert_close(rms_norm(x, weight), F.rms_norm(x, (8,), weight, 1e-5))
