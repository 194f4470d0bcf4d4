"""The steps that a GPU would run, run without one: on fake tensors of the device "cuda", in torch's build for CPUs.

A fake tensor has a shape, a dtype and a device, but no values. `guard.cpp` and `hooks.cpp` make torch accept the device,
`world.py` supplies what `torch.cuda` and the other ranks would, and `watch.py` notes each op that the device is given
and each time the host waits for it. `run.py` runs `cases.py` in a process of its own, since the device has to be there
before torch is; `test_step.py` starts it once and checks what it found.

What this does not see: values, real kernels, NCCL, and memory.
"""
