"""A training step on a GPU, on paper: the host never waits, everything is where it belongs, and nothing is done twice.

Each check is shown to fail on a mistake that `faults.py` makes.
"""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.fake_cuda.cases import STEPS

ROOT = Path(__file__).parents[2]

# Kernels of a layer's forward and backward in a micro-batch of 24 pairs or texts, with FSDP2's own: the ops that builds
# of torch for CPUs and for CUDA give the device, without views and allocations. The former take apart a few for which a
# GPU has one kernel (RMSNorm, the backward of SiLU), so their numbers are higher.
KERNELS = {
    "CPU": {"RM, full": 154, "RM, LoRA": 229, "RM, selective recomputation": 181, "SFT, full": 146},
    "CUDA": {"RM, full": 103, "RM, LoRA": 188, "RM, selective recomputation": 116, "SFT, full": 95},
}
MARGIN = 1.3  # torch releases differ a little


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    """What `run.py` found in each case: the fields of its `Found`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-m", "tests.fake_cuda.run"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    if "skipped" in results:
        pytest.skip(results["skipped"])
    return results


in_every_case = pytest.mark.parametrize("name", STEPS)


@in_every_case
def test_a_step_runs_on_one_device_and_the_host_never_waits_for_it(found, name):
    assert not found[name]["error"], found[name]["error"]
    assert found[name]["waits"] == {}


@in_every_case
def test_trained_parameters_and_their_optimizer_states_are_on_the_device(found, name):
    assert found[name]["misplaced"] == []


@in_every_case
def test_attention_is_varlen_in_bfloat16_and_split_in_float32(found, name):
    assert found[name]["kernel"] == ("SplitAttention" if "float32" in name else "VarlenAttention")


def test_with_lisa_a_layer_trains_again_after_it_was_frozen(found):
    """Otherwise the cases above would not see its optimizer state come back."""
    assert found["RM, LISA, cpu"]["active_layers"] == [[1], [0], [1]]


def per_layer(found: dict[str, dict], name: str) -> Counter:
    """What a layer costs in a micro-batch: kernels, and collectives by kind."""
    one, two = (found[f"{name}, {layers} layers"] for layers in (1, 2))
    assert not one["error"] and not two["error"]
    costs = Counter(two["collectives"], kernels=two["kernels"])
    costs.subtract(one["collectives"], kernels=one["kernels"])
    return costs


def budget(found: dict[str, dict], name: str) -> float:
    """The kernels that a layer may start."""
    return MARGIN * KERNELS[found[f"{name}, 1 layers"]["build"]][name]


@pytest.mark.parametrize("name", KERNELS["CPU"])
def test_a_layer_starts_about_as_many_kernels_as_measured(found, name):
    assert per_layer(found, name)["kernels"] <= budget(found, name)


@pytest.mark.parametrize("name", KERNELS["CPU"])
def test_a_layer_is_gathered_twice_and_its_gradient_reduced_once(found, name):
    costs = per_layer(found, name)
    assert costs["all-gather"] <= 2  # forward, backward
    assert costs["reduce-scatter"] <= 1
    assert costs["all-reduce"] == 0


UNITS = {"RM": 4, "SFT": 3}  # of FSDP2: two layers, the rest of the model, and a reward model's score head


def test_gradients_are_reduced_once_a_step_where_they_wait_for_the_last_micro_batch(found):
    assert found["RM, HSDP"]["collectives"]["reduce-scatter"] == 2 * UNITS["RM"]  # the default: in two micro-batches
    waiting = found["RM, gradients wait"]["collectives"]
    assert waiting["reduce-scatter"] == UNITS["RM"] and waiting["all-reduce"] <= UNITS["RM"] + 1


@pytest.mark.parametrize("task", UNITS)
def test_gradients_are_summed_over_shard_groups_once_a_step(found, task):
    assert found[f"{task}, HSDP"]["collectives"]["all-reduce"] <= UNITS[task] + 1  # and the gradient norm


in_compiled_cases = pytest.mark.parametrize("name", ["compiled", "compiled LoRA"])


@in_compiled_cases
def test_a_compiled_layer_is_not_compiled_again_for_other_lengths(found, name):
    compiled = found[name]
    assert not compiled["error"], compiled["error"]
    first, *later = compiled["graphs"]
    assert set(later) == {first}  # no step compiles anything that the first has not


@in_compiled_cases
def test_a_compiled_layer_has_no_graph_break_and_takes_nothing_from_the_cpu(found, name):
    assert found[name]["graph_breaks"] == []
    assert found[name]["cpu_inputs"] == 0  # an adapter's scale, say, for which kernels of the CPU would be compiled


def test_waits_are_reported_with_their_lines(found):
    waits = found["fault: waits"]["waits"]
    assert all(re.search(r" at tests/fake_cuda/faults\.py:\d+$", wait) for wait in waits)
    assert {wait.rpartition(" at ")[0] for wait in waits} == {
        "_local_scalar_dense",
        "copy to the CPU",
        "copy to the device without non_blocking",
        "index by a mask",
        "index by indices on the CPU",
        "nonzero",
        "torch.cuda.synchronize",
    }


def test_tensors_on_two_devices_are_an_error(found):
    error = found["fault: mixed_devices"]["error"]
    assert re.search(r"found (at least two|two different) devices,? cuda:0(,| and) cpu", error)


def test_an_optimizer_state_on_the_cpu_is_reported(found):
    assert found["fault: state_on_cpu"]["misplaced"] == ["norm.weight: step is on cpu"]


def test_another_attention_kernel_is_reported(found):
    assert found["fault: split_attention"]["kernel"] == "SplitAttention"


def test_work_that_is_done_twice_exceeds_every_budget(found):
    costs = per_layer(found, "fault: twice")
    assert costs["kernels"] > budget(found, "RM, full")
    assert costs["all-gather"] > 2 and costs["reduce-scatter"] > 1


def test_gradients_that_are_summed_over_shard_groups_in_every_micro_batch_exceed_the_budget(found):
    assert found["fault: all_reduce_always"]["collectives"]["all-reduce"] > UNITS["RM"] + 1


def test_a_graph_break_and_another_compilation_are_reported(found):
    broken = found["fault: graph_break"]
    assert broken["graph_breaks"] and broken["graphs"][1] > broken["graphs"][0]
