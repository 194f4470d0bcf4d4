"""Activations in host memory between the forward and the backward: `--activation_offloading`.

What a layer saves for its backward is copied to host memory while the next layer computes, and back while the layer
above it computes its backward. So the device holds the activations of two layers at a time. The last layer's stay: its
backward comes next.

Copies have a stream of their own, and the host waits for none of them. The device waits for a copy before it frees or
reads its memory. Nothing changes in what is computed.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

SMALLEST = 2**20  # bytes: a copy of less takes as long to start as to run


class HostCopies:
    """Copies between a device and host memory, which is pinned where the device is a GPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None

    def to_host(self, x: Tensor) -> Tensor:
        """Start a copy of what the device has been given to compute so far."""
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=self.stream is not None)
        with self._beside():
            return host.copy_(x, non_blocking=True)

    def to_device(self, host: Tensor) -> Tensor:
        """Start a copy back. The allocator keeps `host` until it is done, even if it is dropped now."""
        x = torch.empty(host.shape, dtype=host.dtype, device=self.device)  # of the stream that will read and free it
        with self._beside():
            return x.copy_(host, non_blocking=True)

    def started(self) -> "torch.cuda.Event | None":
        """All copies that were started until now, for `wait`."""
        return None if self.stream is None else self.stream.record_event()

    def wait(self, copies: "torch.cuda.Event | None") -> None:
        """Have the device, not the host, wait for copies before it goes on."""
        if copies is not None:
            torch.cuda.current_stream().wait_event(copies)

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """Run on the stream of copies, after what was to be computed until now."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield


class ActivationOffloader:
    """Offloads what the layers of a model save for the backward, whatever else their forward does."""

    def __init__(self, layers: nn.ModuleList, copies: HostCopies):
        self.layers, self.copies = layers, copies
        self.below: _SavedTensors | None = None  # of the layer whose forward was the last
        for layer in layers:
            layer.forward = functools.partial(self._forward, layer, layer.forward)

    def _forward(self, layer: nn.Module, forward: Callable[..., Tensor], x: Tensor, rope, *args) -> Tensor:
        if not torch.is_grad_enabled():
            return forward(x, rope, *args)
        if layer is self.layers[0]:
            self.below = None
        # All layers read the same rotary tables. Parameters are freed and gathered again by FSDP2.
        tables = [tensor for table in rope if table is not None for tensor in table]
        kept = {id(tensor.untyped_storage()) for tensor in (*layer.parameters(), *tables)}
        is_last = layer is self.layers[-1]
        saved = _SavedTensors(self.copies, self.below, kept, stay=is_last)
        with saved_tensors_hooks(saved.pack, saved.unpack):
            output = forward(x, rope, *args)
        saved.copies_started = self.copies.started()
        if self.below is not None:
            self.below.free()
        self.below = None if is_last else saved
        return output


@dataclass(slots=True)
class _Storage:
    """The (N,) elements of a storage: on the device, in host memory, or both."""

    device: Tensor | None
    host: Tensor | None


@dataclass(slots=True)
class _View:
    """A tensor of such a storage."""

    storage: _Storage
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _SavedTensors:
    """What a forward of a layer saves.

    Args:
        below: what the layer below has saved; its backward comes after this one's.
        kept: ids of storages that stay where they are.
        stay: whether all do.
    """

    def __init__(self, copies: HostCopies, below: "_SavedTensors | None", kept: set[int], stay: bool):
        self.copies, self.below, self.kept, self.stay = copies, below, kept, stay
        self.storages: dict[tuple[int, torch.dtype], _Storage] = {}
        self.copies_started: torch.cuda.Event | None = None
        self.is_read = False

    def pack(self, x: Tensor) -> Tensor | _View:
        storage = x.untyped_storage()
        if storage.nbytes() < SMALLEST or id(storage) in self.kept:
            return x
        # Several operations save the same values, such as q_proj, k_proj and v_proj: one copy is for all of them.
        key = id(storage), x.dtype
        if key not in self.storages:
            elements = x.as_strided((storage.nbytes() // x.itemsize,), (1,), 0)
            self.storages[key] = _Storage(elements, None if self.stay else self.copies.to_host(elements))
        return _View(self.storages[key], x.shape, x.stride(), x.storage_offset())

    def unpack(self, packed: Tensor | _View) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if not self.is_read:
            self.is_read = True
            self.restore()
            self.copies.wait(self.copies_started)
            if self.below is not None:
                self.below.restore()
                self.below = None
        return packed.storage.device.as_strided(packed.size, packed.stride, packed.offset)

    def free(self) -> None:
        """Free the device's memory."""
        self.copies.wait(self.copies_started)
        for storage in self.storages.values():
            storage.device = None

    def restore(self) -> None:
        """Start to copy everything back, if that was not done yet."""
        for storage in self.storages.values():
            if storage.device is None:
                storage.device, storage.host = self.copies.to_device(storage.host), None
        self.storages.clear()  # from here on autograd alone refers to each, until it has been used
        self.copies_started = self.copies.started()
