"""Regression on attributes: loss, gradients and outputs are those of transformers' problem_type "regression"."""

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification

from rm.data.batch import pack
from rm.data.examples import Example, Examples
from rm.distributed import process_group as dist
from rm.distributed.sharding import ParallelSettings
from rm.hf import build, saving, weights
from rm.model.heads import RegressionModel
from rm.model.losses import LossSettings, regression
from tests import made, tiny
from tests.family_cases import gap

NAMES = ("helpfulness", "correctness", "verbosity")
FP32 = ParallelSettings(dtype="float32")
TEXTS = [text for pair in made.token_pairs(4, longest=30) for text in pair]
KNOWN = np.random.default_rng(0).uniform(0, 4, (len(TEXTS), len(NAMES))).astype(np.float32)


def examples() -> Examples:
    return Examples.build(
        Example(np.zeros(0, np.int32), (np.array(text),), (np.zeros(len(text), bool),), attributes=numbers)
        for text, numbers in zip(TEXTS, KNOWN, strict=True)
    )


def test_loss_gradients_and_the_saved_model_are_those_of_transformers(tmp_path):
    theirs = tiny.reward_model("llama", num_labels=3, id2label=dict(enumerate(NAMES)), problem_type="regression")
    source, loss = tiny.save_with(theirs, tmp_path / "m"), LossSettings.of_outputs(NAMES)
    with dist.session(seed=0):
        model = build.load(build.build(RegressionModel, source, FP32, sharded=False, loss=loss), source)
    sums = model(pack(examples(), range(len(TEXTS))))
    (sums["loss"] / sums["count"]).backward()
    outputs, losses = [], []
    for text, numbers in zip(TEXTS, KNOWN, strict=True):
        answer = theirs(torch.tensor(text)[None], labels=torch.tensor(numbers)[None])
        outputs.append(answer.logits[0])
        losses.append(answer.loss)
    loss = torch.stack(losses).mean()
    loss.backward()
    assert (sums["loss"] / sums["count"] - loss).abs() <= 1e-5
    ours_by_name, (_, family, _) = dict(model.named_parameters()), weights.read_config(source)
    for hf_name, parameter in theirs.named_parameters():
        (name,) = family.parameter_names(hf_name)
        assert gap(ours_by_name[name].grad, parameter.grad) <= 1e-5, name
    with dist.session(seed=0):
        saving.save(model, tmp_path / "out", source, torch.float32)
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert saved.config.id2label == dict(enumerate(NAMES)) and saved.config.problem_type == "regression"
    with torch.no_grad():
        logits = torch.stack([saved(torch.tensor(text)[None]).logits[0] for text in TEXTS])
    assert gap(logits, torch.stack(outputs)) <= 1e-5


def test_unknown_attributes_have_no_part_in_the_loss():
    outputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    known = torch.tensor([[1, float("nan"), 2], [0, 1, 2], [float("nan"), float("nan"), 3], [4, 4, 4]])
    loss = regression(outputs, known)
    expected = []
    for output, numbers in zip(outputs.tolist(), known.tolist(), strict=True):
        errors = [(x - y) ** 2 for x, y in zip(output, numbers, strict=True) if y == y]
        expected.append(sum(errors) / len(errors))
    torch.testing.assert_close(loss, torch.tensor(expected))
    loss.sum().backward()
    assert outputs.grad.isfinite().all() and (outputs.grad == 0).tolist()[0] == [False, True, False]
