"""Loading a Hugging Face folder: peak memory of each process, and speed beside a plain read of the same files.

    python -m tests.benchmarks.loading --model llama-1.3b --folder /tmp/random --out docs/benchmarks/loading.md

The folder is written first: random bfloat16 in files of at most --shard_gb. Every reading is a start of its own, and
drops the files from the page cache before. Memory is that of the whole process (VmHWM, with what is mapped of files),
above what it held before the model was allocated. `--first_step` also loads the model for a training with LoRA and
takes one step, of two pairs of 16 tokens.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MIB, GIB = 2**20, 2**30
# Nothing else is imported here: a child's time from its start is part of what is measured.


def main() -> None:
    from tests.benchmarks.common import Page, table

    args = arguments()
    page, folder = Page("Loading a folder", args), Path(args.folder or tempfile.mkdtemp())
    try:
        files = write(args.model, folder, int(args.shard_gb * GIB))
        size = sum(file.stat().st_size for file in files)
        page.add(f"{args.model}: {size / GIB:.2f} GiB in {len(files)} files.\n")
        rows = []
        for processes, dtype in ((1, args.dtype), (2, args.dtype)):
            read = start("read", processes, folder)
            loaded = start("load", processes, folder, dtype)
            for rank, (plain, facts) in enumerate(zip(read, loaded, strict=True)):
                rows.append([f"{rank + 1} of {processes}", *(f"{facts[name] / GIB:.2f}" for name in ("local", "peak")),
                             f"{facts['peak'] / facts['local']:.3f}", f"{facts['seconds']:.1f}",
                             f"{plain['bytes'] / MIB / facts['seconds']:,.0f}",
                             f"{plain['bytes'] / MIB / plain['seconds']:,.0f}"])  # fmt: skip
        head = ["process", "its part, GiB", "peak above start, GiB", "peak / part", "seconds", "MiB/s of the files",
                "MiB/s of a plain read"]  # fmt: skip
        page.add(f"A language model in {args.dtype}, as it is loaded to be evaluated:\n", table(head, rows))
        if args.first_step:
            (facts,) = start("step", 1, folder, args.dtype)
            names = ["import", "build", "load", "optimizer", "step"]
            rows = [[name, f"{facts[name]:.1f}"] for name in (*names, "total")]
            page.add(
                f"From the start of Python to the end of the first step, with LoRA of rank 16 in all linear layers, in "
                f"{args.dtype}. Its part {facts['local'] / GIB:.2f} GiB, peak above start {facts['peak'] / GIB:.2f} GiB"
                f" while loading, {facts['peak of step'] / GIB:.2f} GiB in all.\n",
                table(["", "seconds"], rows),
            )
    finally:
        if args.folder is None:
            shutil.rmtree(folder)
    page.finish()


def write(name: str, folder: Path, shard: int) -> list[Path]:
    """The files of a random model of `tests.benchmarks.scale.MODELS`, written where they are not there yet."""
    import torch

    from rm.hf.families import find
    from rm.model.heads import LanguageModel
    from tests.benchmarks.scale import MODELS

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return sorted(folder.glob("*.safetensors"))
    folder.mkdir(parents=True, exist_ok=True)
    hf = MODELS[name] | {"architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(hf))
    family = find(hf)
    with torch.device("meta"):
        model = LanguageModel(family.read(hf), None)
    shapes = {family.checkpoint_name(key): list(p.shape) for key, p in model.named_parameters()}
    files: list[dict] = [{}]  # file -> header
    for key, shape in shapes.items():
        first = max((entry["data_offsets"][1] for entry in files[-1].values()), default=0)
        size = 2 * torch.Size(shape).numel()
        if first and first + size > shard:
            files.append({})
            first = 0
        files[-1][key] = {"dtype": "BF16", "shape": shape, "data_offsets": [first, first + size]}
    noise = (0.02 * torch.randn(2**24)).bfloat16().view(torch.uint8).numpy().data
    for n, header in enumerate(files, start=1):
        with open(folder / f"model-{n:05d}.safetensors", "wb") as file:
            text = json.dumps(header).encode()
            file.write(len(text).to_bytes(8, "little") + text)
            left = max(entry["data_offsets"][1] for entry in header.values())
            while left > 0:
                left -= file.write(noise[: min(left, len(noise))])
    of_tensor = {key: f"model-{n:05d}.safetensors" for n, header in enumerate(files, start=1) for key in header}
    index.write_text(json.dumps({"weight_map": of_tensor}))
    return sorted(folder.glob("*.safetensors"))


def start(what: str, processes: int, *args) -> list[dict]:
    """What `child` finds in each of some processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        code = f"from tests.benchmarks.loading import child; child({time.time()!r}, {what!r}, *{[*map(str, args)]!r})"
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"}
        children.append(subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE))
    printed = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise SystemExit(f"{what} failed with {processes} processes")
    return [json.loads(text.splitlines()[-1]) for text in printed]


def child(began: float, what: str, folder: str, dtype: str = "bfloat16") -> None:
    """One process: prints a JSON object."""
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    files = sorted(Path(folder).glob("*.safetensors"))
    if what == "read":
        forget(files)
        print(json.dumps(read(files, rank, processes)))
        return
    from rm.distributed import process_group as dist
    from rm.distributed import sharding
    from rm.distributed.sharding import ParallelSettings
    from rm.hf import build
    from rm.model.heads import LanguageModel, RewardModel
    from rm.model.lora import LoraSettings

    clock = {"import": time.time() - began}
    with dist.session(seed=0):
        lora = LoraSettings(use_lora=True, lora_r=16, lora_target_modules=("all-linear",))
        training, cls = (build.Training(lora=lora), RewardModel) if what == "step" else (None, LanguageModel)
        clock["build"], model = timed(
            lambda: build.build(cls, folder, ParallelSettings(dtype=dtype), training=training)
        )
        forget(files)
        dist.barrier()
        before = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        clock["load"], _ = timed(lambda: build.load(model, folder, seed=0))
        facts = {"peak": memory("VmHWM") - before, "seconds": clock["load"]}
        facts["local"] = sum(sharding.local(p).nbytes for p in model.parameters())
        if what == "step":
            take_step(model, clock)
            facts["peak of step"] = memory("VmHWM") - before
    print(json.dumps(facts | clock | {"total": time.time() - began}))


def take_step(model, clock: dict[str, float]) -> None:
    import numpy as np

    from rm.data.batch import StepBatches, pack
    from rm.training import optim
    from rm.training.optim import OptimSettings
    from tests import made
    from train_rm import train_step

    clock["optimizer"], optimizer = timed(lambda: optim.adamw(model, OptimSettings()))
    ids = np.random.default_rng(0).integers(0, 1000, (2, 2, 16)).tolist()
    batch = pack(made.pair_examples(ids), [0, 1])
    batches = StepBatches([batch], num_examples=2, num_labels=0, num_tokens=1, seed=0)
    clock["step"], _ = timed(lambda: train_step(model, optimizer, batches, 1.0))


def timed(call):
    start = time.time()
    result = call()
    return time.time() - start, result


def memory(name: str) -> int:
    """Bytes, by a line of /proc/self/status."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith(name + ":"))


def forget(files: list[Path]) -> None:
    """Drop files from the page cache."""
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(files: list[Path], rank: int, processes: int) -> dict:
    """Read this process's share of each file, from its start to its end, 8 MiB at a time."""
    buffer, total, began = bytearray(8 * MIB), 0, time.time()
    for file in files:
        size = file.stat().st_size
        with open(file, "rb", buffering=0) as opened:
            opened.seek(size * rank // processes)
            left = size * (rank + 1) // processes - opened.tell()
            while left > 0:
                n = opened.readinto(memoryview(buffer)[: min(left, len(buffer))])
                left, total = left - n, total + n
    return {"bytes": total, "seconds": time.time() - began}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="llama-1.3b", help="a name of tests.benchmarks.scale (default: llama-1.3b)")
    add("--folder", help="where it is written, and stays; default: in the temporary folder")
    add("--shard_gb", type=float, default=5, help="GiB of a file (default: 5)")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    add("--first_step", action="store_true")
    add("--out", help="also write the page to this file")
    return argparse.Namespace(**vars(parser.parse_args()), threads=os.environ.get("OMP_NUM_THREADS", "all"))


if __name__ == "__main__":
    main()
