"""python -m rm.serve under 64 clients: throughput and latency, and a transformers pipeline behind the same server.

    python -m tests.benchmarks.serving --model MODEL --data PAIRS

Each client posts one text at a time, as OpenRLHF's and verl's workers do; --replies texts belong to one prompt. The
pipeline's server has the same HTTP side and the same dynamic batching: what it gets is what waits, sorted by length.
The servers take turns: while one is asked, the other has nothing to do. Every answer is compared with Scorer's reward.
"""

import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from rm.data.records import read_records
from rm.scoring import Scorer
from tests.benchmarks import training
from tests.benchmarks.common import Page, flags, table
from tests.benchmarks.turns import in_child


def main() -> None:
    args = arguments()
    if args.pipeline:
        return serve_pipeline(args)
    page = Page("Serving: ours against a transformers pipeline behind the same server", args)
    folder = Path(tempfile.mkdtemp())
    try:
        base, model = training.first_layers(args.model, args.layers, folder / "layers"), folder / "model"
        in_child(training.export_reward_model, base, str(model), args.seed)
        for file in Path(model).glob("chat_template*"):  # plain texts, which both sides write in the same way
            file.unlink()
        texts = chosen_texts(args, model)
        (folder / "texts.json").write_text(json.dumps(texts))
        expected = np.array(Scorer(model, max_length=args.max_length).score(texts))
        servers = [Server(name, args, model, folder / "texts.json") for name in ("ours", "pipeline")]
        turns = {server.name: [] for server in servers}
        for turn in range(args.warmup + args.steps):
            for server in servers:
                measured = server.turn(texts, expected, args.clients)
                if turn >= args.warmup:
                    turns[server.name].append(measured)
        for server in servers:
            server.process.terminate()
            assert server.process.wait(60) == 0
    finally:
        shutil.rmtree(folder)
    page.add(*described(args, len(texts), turns))
    page.finish()


def chosen_texts(args: Namespace, model: Path) -> list[str]:
    """`--replies` texts for each of `--prompts` prompts: those of the prompt's own record and of the next ones."""
    tokenizer, parts = Scorer(model).encoder.tokenizer, []
    for path in args.data:
        for _, record in itertools.islice(read_records(path), args.records):
            for side in ("chosen", "rejected"):
                prompt, mark, reply = record[side].rpartition("\n\nAssistant:")
                parts.append((prompt + mark, reply))
    random, texts = np.random.default_rng(args.seed), []
    for i in random.permutation(len(parts) // 2):
        replies = [parts[(2 * i + k) % len(parts)][1] for k in range(args.replies)]
        full = [parts[2 * i][0] + reply for reply in dict.fromkeys(replies)]
        if len(full) == args.replies and max(map(len, tokenizer.encode_batch(full))) < args.max_length - 2:
            texts += full
        if len(texts) == args.prompts * args.replies:
            return texts
    raise SystemExit("too few prompts fit: raise --records")


class Server:
    """A server in a process of its own, and what its clients measure."""

    def __init__(self, name: str, args: Namespace, model: Path, texts: Path):
        self.name = name
        command = [sys.executable, "-m", "rm.serve", model, "--port", "0", "--max_length", args.max_length]
        command += ["--max_tokens", args.max_tokens, "--request_timeout", "600"]
        if name == "pipeline":
            command = [sys.executable, "-m", "tests.benchmarks.serving", *sys.argv[1:]]
            command += ["--pipeline", model, "--texts", texts]
        environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        self.process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, env=environment)
        self.url = next(match[1] for line in self.process.stdout if (match := re.search(r"at (http:\S+)$", line)))

    def turn(self, texts: list[str], expected: np.ndarray, clients: int) -> dict:
        """Post each text once, `clients` at a time."""
        tokens, computed = self.tokens()
        cpu, began = self.cpu_seconds(), time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            answers = list(pool.map(self.ask, texts))
        wall, rewards = time.perf_counter() - began, np.array([reward for reward, _ in answers])
        latency = np.array([seconds for _, seconds in answers])
        now = self.tokens()
        return {
            "wall": wall,
            "cpu": self.cpu_seconds() - cpu,
            "p50": np.quantile(latency, 0.5),
            "p99": np.quantile(latency, 0.99),
            "gap": abs(rewards - expected).max(),
            "lost": len(texts) - len(answers),
            "computed": (now[1] - computed) / (now[0] - tokens),
        }

    def ask(self, text: str) -> tuple[float, float]:
        """(reward, seconds)"""
        began, body = time.perf_counter(), json.dumps({"conversations": [text]}).encode()
        request = urllib.request.Request(f"{self.url}/score", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as response:
            (reward,) = json.loads(response.read())["rewards"]
        return reward, time.perf_counter() - began

    def tokens(self) -> tuple[int, int]:
        """(tokens of the texts scored so far, tokens computed for them)"""
        with urllib.request.urlopen(f"{self.url}/metrics") as response:
            counted = dict(re.findall(r"^(rm_\w+) (\d+)$", response.read().decode(), flags=re.M))
        return tuple(int(counted.get(f"rm_{name}_total", 0)) for name in ("tokens", "computed_tokens"))

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def serve_pipeline(args: Namespace) -> None:
    """The same server, whose micro-batches go through a text-classification pipeline."""
    import transformers

    from rm.serve import __main__ as serve
    from rm.serve import app

    torch.set_num_threads(args.threads)
    scorer = Scorer(args.pipeline, max_length=args.max_length)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.pipeline)
    pipe = transformers.pipeline("text-classification", model=args.pipeline, tokenizer=tokenizer, dtype=torch.float32)
    ends = scorer.encoder.tokenizer
    bos, eos = ("" if i is None else ends.string_of(i) for i in (ends.bos_id, ends.eos_id))
    texts = json.loads(Path(args.texts).read_text())
    ids = scorer.encoder.examples([[text] for text in texts])
    text_of = {one.replies[0].tobytes(): text for one, text in zip(ids, texts, strict=True)}
    lock = threading.Lock()

    def rewards(examples) -> torch.Tensor:
        waiting = [text_of[np.concatenate([one.prefix, reply]).tobytes()] for one in examples for reply in one.replies]
        order = sorted(range(len(waiting)), key=lambda i: len(waiting[i]))  # little padding
        with lock:
            strings = [bos + waiting[i] + eos for i in order]
            scores = pipe(strings, add_special_tokens=False, batch_size=args.batch_texts)
        answer = torch.empty(len(waiting))
        answer[order] = torch.tensor([score["score"] for score in scores])
        return answer

    class PipelineApp(app.App):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.batcher.rewards_of = rewards

    app.App = PipelineApp
    serve.Scorer = lambda *_, **__: scorer
    scorer.max_tokens = args.max_tokens
    words = [args.pipeline, "--port", "0", "--max_length", str(args.max_length), "--request_timeout", "600"]
    serve.main(serve.parse(serve.Settings, "", serve.arguments(words)))


def described(args: Namespace, n: int, turns: dict[str, list[dict]]) -> list[str]:
    rows = []
    for name, measured in turns.items():
        middle = {key: statistics.median(turn[key] for turn in measured) for key in measured[0]}
        shared = f"{middle['computed']:.2f}" if name == "ours" else "–"  # the pipeline computes each text whole
        lost, gap = (max(turn[key] for turn in measured) for key in ("lost", "gap"))
        rows.append([name, f"{n / middle['wall']:.1f}", f"{middle['wall']:.2f}", f"{middle['cpu']:.2f}",
                     f"{middle['p50']:.3f}", f"{middle['p99']:.3f}", shared, lost,
                     f"{gap:.1e}"])  # fmt: skip
    head = ["server", "texts/s", "wall s a turn", "CPU s of the server a turn", "p50 latency, s", "p99 latency, s",
            "tokens computed / tokens", "answers lost", "largest difference from Scorer"]  # fmt: skip
    ratios = []
    for clock in ("wall", "cpu", "p99"):
        each = [b[clock] / a[clock] for a, b in zip(turns["ours"], turns["pipeline"], strict=True)]
        ratios.append([clock, f"**{statistics.median(each):.2f}**", f"{min(each):.2f} to {max(each):.2f}"])
    return [
        f"{n} texts, {args.replies} replies to each of {args.prompts} prompts, posted one at a time by {args.clients} "
        f"clients; fp32; micro-batches of at most {args.max_tokens} tokens, the pipeline in batches of at most "
        f"{args.batch_texts} texts sorted by length. {args.steps} turns each, alternating; {args.warmup} warm-up. "
        "Medians of the turns. The clients run on the same cores.\n",
        table(head, rows),
        table(["pipeline / ours", "median of the turns", "min to max"], ratios),
    ]


def arguments() -> Namespace:
    parser = flags(__doc__, steps=3)
    add = parser.add_argument
    add("--clients", type=int, default=64, help="requests at a time (default: 64)")
    add("--prompts", type=int, default=32, help="prompts a turn (default: 32)")
    add("--replies", type=int, default=8, help="texts of each prompt (default: 8)")
    add("--max_tokens", type=int, default=4096, help="tokens a micro-batch (default: 4096)")
    add("--batch_texts", type=int, default=16, help="of the pipeline: texts a batch (default: 16)")
    add("--pipeline", help="serve this model by the pipeline; for the command itself")
    add("--texts", help="the texts that will be posted; for the command itself")
    return parser.parse_args()


if __name__ == "__main__":
    main()
