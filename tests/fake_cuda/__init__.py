"""The steps that a GPU would run, run without one: on fake tensors of the device "cuda", in torch's build for CPUs.

A fake tensor has a shape, a dtype and a device, but no values. `device.cpp` has torch accept the device, `device.py`
makes its tensors fake, `world.py` supplies what `torch.cuda` and the other ranks would, and `watch.py` notes what the
device is given to do and where the host waits for it. `run.py` runs `cases.py` in a process of its own, since the
device has to be there before torch is; `test_step.py` starts it once and checks what was found.

What this does not see: values, real kernels, NCCL, and memory.
"""
