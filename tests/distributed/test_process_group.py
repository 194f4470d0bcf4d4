"""rm.distributed.process_group: memory that glibc keeps between micro-batches."""

import resource
import subprocess
import sys

import pytest

from rm.distributed import process_group as dist


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_memory_freed_after_a_micro_batch_is_kept_for_the_next():
    """Fifty blocks of 8 MiB, freed and allocated again, cost 102,400 page faults by glibc's default, and none here."""
    code = "from tests.distributed.test_process_group import _page_faults as f; print(f())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, returned = map(int, done.stdout.split()[-2:])
    assert kept < 1000 < returned


def _page_faults() -> str:
    """Of a repeated micro-batch: within a session, and before it."""
    import torch

    def micro_batch() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        _ = [torch.ones(2**21) for _ in range(50)]
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    _, returned = micro_batch(), micro_batch()
    with dist.session(0):
        *_, kept = micro_batch(), micro_batch(), micro_batch(), micro_batch()
    return f"{kept} {returned}"
