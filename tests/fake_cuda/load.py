"""Build the fake device and load it below torch: `load()` before torch is imported, `install()` after."""

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SOURCE = HERE / "device.cpp"
TORCH = Path(importlib.util.find_spec("torch").origin).parent  # found, but not imported


class CannotBuild(Exception):
    """There is no compiler, or it does not accept the source; the message says which."""


def library() -> Path:
    """The compiled library for the installed torch, built if there is none yet; takes seconds."""
    digest = hashlib.sha256(importlib.metadata.version("torch").encode() + SOURCE.read_bytes())
    file = HERE / "build" / f"fake_cuda_{digest.hexdigest()[:16]}.so"
    if not file.exists():
        compiler = shutil.which("g++")
        if compiler is None:
            raise CannotBuild("there is no g++, with which the fake device is compiled")
        file.parent.mkdir(exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")  # several test runs may build at a time
        options = ["-shared", "-fPIC", "-O0", "-std=c++20", f"-I{TORCH / 'include'}", "-o", unfinished]
        done = subprocess.run([compiler, *options, SOURCE], capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
            raise CannotBuild(f"g++ cannot compile the fake device: {errors[0]}")
        unfinished.replace(file)
    return file


def load() -> None:
    """Load torch's libraries, then the fake device: its hooks have to be registered before torch looks for any."""
    assert "torch" not in sys.modules, "the fake device has to be loaded before torch"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a real device is left alone
    file = library()
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(TORCH / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)


def install() -> None:
    """Register the device guard; in a build with CUDA, whose import registers its own, it takes that one's place."""
    ctypes.CDLL(str(library())).install_fake_cuda()
