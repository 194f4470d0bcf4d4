"""The rest of a world with GPUs: what `torch.cuda` says, and a process group of which rank 0 alone exists."""

import contextlib
import os
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as torch_dist

from rm.distributed.torch_private import FakeStore
from tests.fake_cuda.device import FakeDevice
from tests.fake_cuda.watch import Watch

H100 = SimpleNamespace(name="NVIDIA H100", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132)


@contextlib.contextmanager
def gpus(world_size: int, watched: bool = True) -> Iterator[Watch]:
    """This process is rank 0 of `world_size` and has a GPU. Yields what watches the ops.

    Args:
        watched: False where something is compiled: torch.compile does nothing below a mode such as Watch.
    """
    watch = Watch()
    # torch 2.11 makes a real tensor beside the first fake one, unless CUDA is not available, as it is here still.
    with FakeDevice():
        torch.empty(1, device="cuda"), torch.empty(1, device="cuda:0")
    with (
        mock.patch.multiple(torch.cuda, **_torch_cuda(watch)),
        mock.patch.dict(os.environ, LOCAL_RANK="0"),
        mock.patch.object(sys, "excepthook"),  # init_process_group adds another one each time
    ):
        # Not "fake": with that name alone, `dist.device` says CPU, as it has to in a plan.
        torch_dist.init_process_group("cpu:fake,cuda:fake", store=FakeStore(), rank=0, world_size=world_size)
        try:
            with FakeDevice(), watch if watched else contextlib.nullcontext():
                yield watch
        finally:
            torch_dist.destroy_process_group()


def _torch_cuda(watch: Watch) -> dict:
    """What of `torch.cuda` training and FSDP2 use, on a device that has done everything as soon as it is asked to."""

    class Event:
        def __init__(self, *args, **kwargs): ...

        def record(self, stream=None): ...

        def wait(self, stream=None): ...

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            watch.note_wait("Event.synchronize")

    class Stream:
        device = torch.device("cuda", 0)
        stream_id, device_index, device_type = 0, 0, 1

        def __init__(self, *args, **kwargs): ...

        def wait_stream(self, stream): ...

        def wait_event(self, event): ...

        def record_event(self, event=None) -> Event:
            return event or Event()

        def synchronize(self) -> None:
            watch.note_wait("Stream.synchronize")

    the_stream = Stream()
    return dict(
        is_available=lambda: True,
        is_initialized=lambda: True,
        is_bf16_supported=lambda including_emulation=True: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda device: None,
        get_device_name=lambda device=None: H100.name,
        get_device_capability=lambda device=None: (H100.major, H100.minor),
        get_device_properties=lambda device=None: H100,
        is_current_stream_capturing=lambda: False,
        max_memory_allocated=lambda device=None: 0,
        manual_seed_all=lambda seed: None,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: None,
        synchronize=lambda device=None: watch.note_wait("torch.cuda.synchronize"),
        current_stream=lambda device=None: the_stream,
        stream=lambda stream: contextlib.nullcontext(),
        Event=Event,
        Stream=Stream,
    )
