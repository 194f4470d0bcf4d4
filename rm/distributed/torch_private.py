"""Every private name of torch that this package uses, in one place, imported only where it is needed.

A torch release may rename them. Then the feature that needs one fails with a message that names it, and nothing else
does: it is imported inside functions, or by `rm.plan.memory`, which only a plan imports.
"""

import datetime
import importlib

import torch
from torch.distributed.fsdp import FSDPModule

_WHERE = {  # name -> (module, what needs it)
    "FakeStore": ("torch.testing._internal.distributed.fake_pg", "--plan true"),
    "FakeTensorMode": ("torch._subclasses.fake_tensor", "--plan true"),
    "FSDPMemTracker": ("torch.distributed._tools.fsdp2_mem_tracker", "--plan true"),
    "MemTracker": ("torch.distributed._tools.mem_tracker", "--plan true"),
    "TorchDispatchMode": ("torch.utils._python_dispatch", "--plan true"),
    "compute_local_shape_and_global_offset": ("torch.distributed.tensor._utils", "a sharded model"),
}


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"{__name__} has no attribute {name}")
    module, feature = _WHERE[name]
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise _missing(f"{module}.{name}", feature) from error


def reset_mixed_precision_dtypes(module: FSDPModule) -> None:
    """Have an FSDP2 unit settle anew in which dtype it gathers parameters and reduces gradients."""
    try:
        state = module._get_fsdp_state()
        if hasattr(state, "_fsdp_param_groups"):  # since torch 2.13 a unit may have several groups
            groups = state._fsdp_param_groups
        else:
            groups = [state._fsdp_param_group] if state._fsdp_param_group else []
        for group in groups:
            group._init_mp_dtypes()
    except AttributeError as error:
        raise _missing("FSDPModule._get_fsdp_state", "--use_lisa true on a sharded model") from error


def specialize_floats() -> None:
    """Let torch.compile take numbers in modules, such as an adapter's scale, for constants.

    By default it makes tensors on the CPU of them where lengths are dynamic, and compiles kernels for the CPU.
    """
    import torch._dynamo  # only here: its import takes a second

    torch._dynamo.config.specialize_float = True


def allow_blocks_to_grow() -> None:
    """Let the memory blocks of CUDA's caching allocator grow; where torch lacks the name, they do not."""
    set_allocator = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if set_allocator is not None:
        set_allocator("expandable_segments:True")


def set_gloo_timeout(timeout: datetime.timedelta) -> None:
    """Set how long gloo waits for another rank; `init_process_group` has one timeout for all backends.

    Afterwards, not before: then the timeout of connecting is that of `init_process_group`.
    """
    try:
        gloo = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
        gloo._set_default_timeout(timeout)
    except AttributeError as error:
        raise _missing(
            "ProcessGroup._get_backend or Backend._set_default_timeout", "a run of several processes"
        ) from error


def _missing(name: str, feature: str) -> ValueError:
    return ValueError(
        f"torch {torch.__version__} has no {name}, which {feature} needs; use a torch release that setup.py allows"
    )
