"""The end of a training: what is in memory while the model is exported, and while its files are scored."""

import gc
import json

import pytest
import torch
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensor

from rm.distributed import sharding
from rm.hf import safetensors_file
from rm.scoring import contract
from rm.scoring.scorer import Scorer
from tests import runs
from tests.ranks import run_ranks


def bytes_alive() -> int:
    """Of all tensors of numbers with a fraction in this process: weights, gradients, optimizer state."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor) and x.is_floating_point()]
    has_memory = [x for x in tensors if not x.is_meta and not isinstance(x, FakeTensor)]  # other tests may leave some
    storages = [sharding.local(x.detach()).untyped_storage() for x in has_memory]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def run_and_count(config) -> dict[str, list[int]]:
    """The bytes of the run's tensors whenever a file of weights is written, and whenever it is scored."""
    counted = {"saved": [], "scored": []}
    of_other_tests = bytes_alive()

    def counting(function, moment: str):
        def count_and_call(*args, **kwargs):
            counted[moment].append(bytes_alive() - of_other_tests)
            return function(*args, **kwargs)

        return count_and_call

    # Only in this forked process.
    safetensors_file.save_file = counting(safetensors_file.save_file, "saved")
    contract.score_examples = counting(contract.score_examples, "scored")
    runs.main(config)
    return counted


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("use_lora", [False, True])
def test_no_second_model_is_held_beside_model_and_optimizer(use_lora, processes, tmp_path):
    config = runs.settings(tmp_path / "out", use_lora=use_lora, max_steps=2, save_steps=0)
    for counted in run_ranks(processes, run_and_count, config):
        with safe_open(tmp_path / "out" / "model" / "model.safetensors", "pt") as tensors:
            model = sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # float32
        share, adapters = model / processes, 20_000
        assert len(counted["scored"]) == (2 if use_lora else 1)  # model and adapter
        assert all(size < 1.1 * share + adapters for size in counted["scored"])  # one model
        assert all(size < 1.1 * share + adapters + model for size in counted["saved"])  # and the file's content
    golden = json.loads((tmp_path / "out" / "model" / "scoring.json").read_text())["golden"]
    assert Scorer(tmp_path / "out" / "model").score([entry["text"] for entry in golden]) == pytest.approx(
        [entry["score"] for entry in golden], abs=1e-4
    )
