"""A dispatch mode that notes what the device is given to do, and where the host waits for it."""

import functools
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor

from rm.distributed.torch_private import TorchDispatchMode
from tests.fake_cuda.device import on_device

ROOT = Path(__file__).parents[2]
CODE = tuple(f"{ROOT}/{path}" for path in ("rm/", "train_", "tests/fake_cuda/faults.py"))  # where a wait may come from

# Ops whose result, or its shape, depends on values: the host waits until the device has computed them.
VALUE_DEPENDENT = {
    "_local_scalar_dense", "_unique", "_unique2", "bincount", "equal", "is_nonzero", "masked_select", "nonzero",
    "unique_consecutive", "unique_dim",
}  # fmt: skip
INDEXING = {"_index_put_impl_", "index", "index_put", "index_put_"}
COLLECTIVES = {
    "_allgather_base_": "all-gather", "all_gather_into_tensor": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter", "reduce_scatter_tensor": "reduce-scatter",
    "allreduce_": "all-reduce", "all_reduce": "all-reduce",
}  # fmt: skip
NO_KERNEL = {"_unsafe_view", "is_pinned", "lift_fresh", "record_stream", "resize_", "set_", "wait_tensor"}


class Watch(TorchDispatchMode):
    """Leaves each op as it is, and notes it.

    Attributes:
        kernels: the number of ops that start kernels or a copy on the device.
        collectives: kind -> number.
        waits: "what the host waits for at which line" -> number.
    """

    def __init__(self):
        super().__init__()
        self.clear()

    def clear(self) -> None:
        self.kernels, self.collectives, self.waits = 0, Counter(), Counter()

    def note_wait(self, what: str) -> None:
        self.waits[f"{what} at {_line_of_code()}"] += 1

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # DTensor runs the op on this rank's part, and that comes here again
        if op is torch.ops.prim.device.default:
            return args[0].fake_device  # asked as often as anything is computed
        is_fake = any(issubclass(t, FakeTensor) for t in types)
        name = _name(op)
        if is_fake:  # before the op is run: what fake tensors cannot do raises an error
            self._note_waits(name, args, kwargs)
        output = op(*args, **kwargs)
        if is_fake or on_device(output):
            if name in ("_to_copy", "copy_"):
                self._note_copy(name, args, kwargs, output)
            if name in COLLECTIVES:
                self.collectives[COLLECTIVES[name]] += 1
            else:
                self.kernels += _starts_a_kernel(op)
        return output

    def _note_waits(self, name: str, args: tuple, kwargs: dict) -> None:
        if name in VALUE_DEPENDENT or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.note_wait(name)
        for index in args[1] if name in INDEXING else []:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                self.note_wait(f"{name} by a mask")  # its non-zeros have to be counted
            elif index is not None and not on_device(index):
                self.note_wait(f"{name} by indices on the CPU")  # they are copied, without non_blocking

    def _note_copy(self, name: str, args: tuple, kwargs: dict, output: Tensor) -> None:
        source, positional = (args[0], ()) if name == "_to_copy" else (args[1], args[2:])
        non_blocking = kwargs.get("non_blocking", positional == (True,))
        if on_device(source) != on_device(output) and not non_blocking:
            self.note_wait("copy to the CPU" if on_device(source) else "copy to the device without non_blocking")


@functools.cache
def _starts_a_kernel(op) -> bool:
    """Whether an op computes something: it is not a view, and does more than allocate."""
    writes = any(a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments)
    is_view = not writes and any(r.alias_info is not None for r in op._schema.returns)
    name = _name(op)
    return not is_view and name not in NO_KERNEL and "empty" not in name


def _name(op) -> str:
    """add, of the op aten::add.Tensor."""
    return op.name().partition("::")[2].partition(".")[0]


def _line_of_code() -> str:
    """The innermost line of the product that is being executed, as "rm/model/heads.py:36"."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename.startswith(CODE):
            return f"{frame.f_code.co_filename.removeprefix(f'{ROOT}/')}:{frame.f_lineno}"
        frame = frame.f_back
    return "the backward of an op of torch"
