"""A device without values: tensors on "cuda" are fake, and all others are real, as they are beside a real GPU."""

import torch
from torch._subclasses import FakeTensor, FakeTensorMode


class FakeDevice(FakeTensorMode):
    """A dispatch mode that runs an op on fake tensors where one of them, or the result, is on "cuda"."""

    avoid_device_init = True  # although `torch.cuda` says that it is available

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)  # real tensors are copied to the device

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_fake = any(issubclass(t, FakeTensor) for t in types)
        if not is_fake and getattr(kwargs.get("device"), "type", None) != "cuda":
            return op(*args, **kwargs)
        if op is torch.ops.aten._local_scalar_dense.default:
            return zero(args[0].dtype)
        if op is torch.ops.aten.record_stream.default:  # there is no memory that a stream could still be using
            return None
        return super().__torch_dispatch__(op, types, args, kwargs)


def zero(dtype: torch.dtype) -> float | int | bool:
    """What every fake tensor's value is to Python."""
    if dtype == torch.bool:
        return False
    return 0.0 if dtype.is_floating_point else 0


def on_device(x: object) -> bool:
    """Whether `x` is a tensor on the device: `x.is_cuda`, without an op that asks for it."""
    return isinstance(x, FakeTensor) and x.fake_device.type == "cuda"
