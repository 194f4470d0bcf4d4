"""Stages in this process: the environment, the attention kernels, single steps, and compiled layers."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

from rm.distributed import process_group as dist
from rm.distributed.sharding import ParallelSettings, compute_dtype
from rm.hf import build
from rm.model.attention import NO_WINDOW, SplitAttention, VarlenAttention
from rm.model.heads import RewardModel
from tests.acceptance import short_training
from tests.acceptance.report import Report
from tests.reference import DenseAttention

BF16_CAPABILITY = (8, 0)  # Ampere: bfloat16 products and FlashAttention
CONFIG = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=512, hidden_size=256, intermediate_size=512,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, hidden_act="silu",
    max_position_embeddings=512, tie_word_embeddings=False, rope_theta=1e4,
)  # fmt: skip


def device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def has_flash() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= BF16_CAPABILITY


def environment(report: Report) -> None:
    """torch sees every GPU that the driver has, and --dtype auto is what they compute in"""
    in_driver = len(dist.gpus_of_the_driver()) + report.has_fault()
    in_torch = torch.cuda.device_count()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    report.check(
        "GPUs that torch sees",
        in_torch,
        f"{in_driver} of the driver" + (f", CUDA_VISIBLE_DEVICES={chosen}" if chosen is not None else ""),
        in_torch == in_driver or (chosen is not None and not report.has_fault()),
    )
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        chosen, expected = compute_dtype("auto"), torch.bfloat16 if has_flash() else torch.float32
        report.check("--dtype auto", str(chosen), f"{expected} of compute capability {capability}", chosen == expected)


def kernel(report: Report) -> None:
    """the attention kernel that a bfloat16 model gets where it is really built"""
    expected = VarlenAttention if has_flash() else SplitAttention
    with tempfile.TemporaryDirectory() as folder, dist.session(0):
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        forced = DenseAttention if report.has_fault() else None
        model = build.build(RewardModel, folder, ParallelSettings(dtype="bfloat16"), kernel=forced)
    report.check("kernel", model.kernel.__name__, expected.__name__, model.kernel is expected)


HEAD_SHAPES = (  # (heads, kv heads, head width) of the families
    (32, 8, 128), (32, 32, 128), (28, 4, 128), (9, 3, 64), (32, 32, 80), (32, 32, 96), (8, 1, 256), (4, 1, 256),
)  # fmt: skip
SEGMENTS = [(7, 5, 9), (0, 33), (40, 4, 6, 11), (1, 1), (0, 1, 1)]


def attention(report: Report) -> None:
    """outputs and gradients of the kernels in bfloat16 against a mask written out, in float32"""
    for kernel in [SplitAttention, *([VarlenAttention] if has_flash() else [])]:
        differences = []
        for heads, kv_heads, width in HEAD_SHAPES:
            generator = torch.Generator().manual_seed(width)
            tokens = sum(map(sum, SEGMENTS))
            inputs = [
                torch.randn(tokens, n, width, generator=generator).to(torch.bfloat16)
                for n in (heads, kv_heads, kv_heads)
            ]
            for window in (NO_WINDOW, 3, 8):
                exact = _attend(DenseAttention, inputs, window, torch.float32, torch.device("cpu"))
                used = NO_WINDOW if report.has_fault() else window
                results = _attend(kernel, inputs, used, torch.bfloat16, device())
                differences += [
                    ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(results, exact, strict=True)
                ]
        report.check(f"{kernel.__name__}, largest relative difference", max(differences), 0.02)


def _attend(kernel: type, inputs: list, window: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    leaves = [x.to(device, dtype, copy=True).requires_grad_() for x in inputs]
    out = kernel(SEGMENTS, device)(*leaves, window=window, scale=inputs[0].shape[-1] ** -0.5)
    out.float().square().sum().backward()
    return [out.detach().float().cpu(), *(x.grad.float().cpu() for x in leaves)]


def steps(report: Report) -> None:
    """six steps of every method: float32 as on the CPU, bfloat16 near it, and no wait for the device"""
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "cpu.safetensors"
        on_cpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([sys.executable, "-m", "tests.acceptance.short_training", reference], env=on_cpu, check=True)
        exact = load_file(reference)
    with dist.session(0):
        for name in short_training.RUNS:
            norms, weights = exact[f"{name}.norms"], exact[f"{name}.weights"]
            found_norms, found_weights = short_training.train(name, "float32", forbid_waits=torch.cuda.is_available())
            if report.has_fault():
                found_norms = found_norms * 1.01
            report.check(f"{name}: gradient norms", _relative(found_norms, norms), 1e-3)
            report.check(f"{name}: weights", (found_weights - weights).abs().max().item(), 2e-3)
            if has_flash() or (name.endswith(" full") and not torch.cuda.is_available()):
                found_norms, _ = short_training.train(name, "bfloat16", forbid_waits=torch.cuda.is_available())
                report.check(f"{name}: gradient norms in bfloat16", _relative(found_norms, norms), 0.1)


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.max()).item()


def compile(report: Report) -> None:
    """compiled layers are as near to float32 as plain ones, and are not compiled again for new lengths"""
    if not torch.cuda.is_available() and shutil.which("g++") is None:
        return report.skip("compile", "no GPU, and no compiler (g++) for the CPU")
    with dist.session(0):
        exact, _ = short_training.rewards_of_lengths("float32", torch_compile=False)
        dtype = "bfloat16" if has_flash() else "float32"
        plain, _ = short_training.rewards_of_lengths(dtype, torch_compile=False)
        compiled, recompiled = short_training.rewards_of_lengths(dtype, torch_compile=True)
    if report.has_fault():
        compiled = compiled * 1.1
    largest = exact.abs().max()
    error_of_plain = ((plain - exact).abs().max() / largest).item()
    error = ((compiled - exact).abs().max() / largest).item()
    report.check("difference from float32, relative", error, max(2 * error_of_plain, 1e-4))
    report.check("compilations after the third length", recompiled, 0)
