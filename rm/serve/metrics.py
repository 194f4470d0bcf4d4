"""What GET /metrics shows, in the text format of Prometheus."""

import threading
from collections import Counter

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)  # upper bounds of the histogram's buckets
HELP = {
    "rm_requests_total": "Requests answered, by path and status.",
    "rm_texts_total": "Texts scored.",
    "rm_tokens_total": "Tokens of the texts scored.",
    "rm_computed_tokens_total": "Tokens computed for them: a prefix that texts share is computed once.",
    "rm_micro_batches_total": "Micro-batches computed.",
    "rm_requests_in_progress": "Requests that are not answered yet.",
    "rm_request_seconds": "Seconds from a request's header to its answer, of the requests that were scored.",
}


class Metrics:
    """Counters that threads may change at the same time."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counters: Counter[tuple[str, str]] = Counter()  # (name, labels) -> value
        self._buckets: Counter[float] = Counter()
        self._seconds = 0.0

    def count(self, name: str, labels: str = "", by: int = 1) -> None:
        with self._lock:
            self._counters[name, labels] += by

    def computed(self, texts: int, tokens: int, computed_tokens: int) -> None:
        """Count a micro-batch."""
        self.count("rm_texts_total", by=texts)
        self.count("rm_tokens_total", by=tokens)
        self.count("rm_computed_tokens_total", by=computed_tokens)
        self.count("rm_micro_batches_total")

    def answered(self, seconds: float) -> None:
        """Count a request that was scored."""
        with self._lock:
            self._buckets[next((bound for bound in SECONDS if seconds <= bound), float("inf"))] += 1
            self._seconds += seconds

    def text(self, in_progress: int) -> str:
        with self._lock:
            counters, buckets, seconds = sorted(self._counters.items()), Counter(self._buckets), self._seconds
        samples: dict[str, list[str]] = {name: [] for name in HELP}
        for (name, labels), value in counters:
            samples[name].append(f"{name}{labels} {value}")
        samples["rm_requests_in_progress"].append(f"rm_requests_in_progress {in_progress}")
        below = 0
        for bound in (*SECONDS, float("inf")):
            below += buckets[bound]
            label = "+Inf" if bound == float("inf") else f"{bound:g}"
            samples["rm_request_seconds"].append(f'rm_request_seconds_bucket{{le="{label}"}} {below}')
        samples["rm_request_seconds"] += [f"rm_request_seconds_sum {seconds:.6f}", f"rm_request_seconds_count {below}"]
        lines = []
        for name, help in HELP.items():
            kind = {"rm_request_seconds": "histogram", "rm_requests_in_progress": "gauge"}.get(name, "counter")
            lines += [f"# HELP {name} {help}", f"# TYPE {name} {kind}", *samples[name]]
        return "\n".join(lines) + "\n"
