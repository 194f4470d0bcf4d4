"""rm.training.summary: what a training says before its first step."""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_rm
from rm.data.batch import Loader
from rm.data.dataset import TrainingData
from rm.data.examples import Example, Examples
from rm.distributed import process_group as dist
from rm.model.heads import RewardModel
from rm.training import summary
from rm.training.run_log import Start
from tests import made, runs
from tests.ranks import run_ranks

LARGE = 7_000_000_000  # parameters


def test_the_summary_counts_records_steps_and_parameters_in_80_columns(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    folder = runs.world()
    held_out = tmp_path / "odd.json"
    held_out.write_text(json.dumps(json.loads((folder / "pairs.json").read_text())[:7]))
    out = tmp_path / ("a-long-name-" * 8)
    config = runs.settings(
        out, validation_split_percentage=0.0, eval_dataset_path=(f"odd={held_out}",), max_train_samples=20, max_steps=4,
        use_lora=True, lora_r=2,
    )  # fmt: skip

    def lines() -> list[str]:
        said = []
        dist.tqdm.write = said.append  # in this forked process only
        train_rm.show.say_example = lambda *_: said.append("example")
        train_rm.RunLog.__enter__ = lambda _: 1 / 0  # before the first step
        with pytest.raises(ZeroDivisionError):
            runs.main(config)
        first = next(i for i, line in enumerate(said) if line.startswith("data   "))
        return said[first:]

    (said,) = run_ranks(1, lines)
    assert all(len(line) <= 80 for line in said)
    facts, name = {}, ""
    for line in said[:-1]:
        name = line[: summary.NAMES].strip() or name  # of a long text the other lines have none
        facts[name] = facts.get(name, "") + line[summary.NAMES :]
    assert facts["data"] == "30 records read, 30 kept; trained on 20 pairs"
    assert facts["held out"] == "odd 7 pairs"
    assert facts["steps"].startswith("4, each of 8 pairs, ") and facts["steps"].endswith(" tokens; epochs: 1.33")
    # Adapters of rank 2 on q_proj and v_proj of two layers, 32 to 32, and the score head.
    assert facts["parameters"].startswith(f"{2 * 2 * 2 * (32 + 32) + 32:,} of ")
    assert facts["parameters"].endswith(" train (LoRA, rank 2)")
    assert facts["runs on"].startswith("1 x cpu (") and facts["runs on"].endswith("), float32, SplitAttention")
    assert facts["output"] == str(out)
    assert said[-1] == "example"


def test_a_run_that_is_resumed_says_what_is_left_to_do(tmp_path):
    settings = runs.settings(tmp_path, early_stopping_patience=2)
    data = SimpleNamespace(facts={"held_out": {"kept": 6}})
    state = {"patience_counter": 1, "held_out": {"kept": 6}}
    resumed = partial(summary._resumed, settings, data, 9)
    assert resumed(Start()) == "" and resumed(Start(9)) == "; all are done"
    assert resumed(Start(6, best=state)) == "; the next is step 7"
    assert resumed(Start(6, best=state | {"patience_counter": 2})) == "; stopped early at step 6"


def test_tokens_are_those_of_whole_steps_where_pairs_of_a_prompt_share_them():
    prompt = np.array([1, 2, 3])
    examples = Examples.build(
        Example(prompt, (np.array([4, n]), np.array([5])), (np.ones(2, bool), np.ones(1, bool)), prompt=7)
        for n in range(3)
    )
    config = runs.settings("out", group_by_prompt=True, global_batch_size=5)  # more than there are
    loader = Loader(examples, config.batch, config.packing, seed=0, attention_cost=0.1)
    data = TrainingData(examples, {}, {"train": {"kept": 3, "dropped": {}}})
    model = made.model(RewardModel)
    model.compute_dtype = torch.float32
    facts = dict(summary._facts(config, model, data, loader, Start(), "pairs"))
    assert facts["steps"] == "3, each of 3 pairs or more, 10 tokens; epochs: 3"  # 3 of the prompt, 3 * 2 + 1


def said_of(dtype: str, *capabilities: str) -> list[str]:
    """What is printed of a model, on a CPU with these capabilities."""
    model = made.model(RewardModel)
    model.compute_dtype = getattr(torch, dtype)
    torch.cpu.get_capabilities = lambda: dict.fromkeys(capabilities, True)  # in this forked process only
    lines = []
    summary.dist.say = lines.append
    summary.say_what_runs(model)
    return lines


def test_one_line_says_what_runs_and_a_slow_dtype_is_warned_of():
    size = sum(p.numel() for p in made.model(RewardModel).parameters())
    ((line,),) = run_ranks(1, said_of, "float32")
    assert line.startswith("1 x cpu (") and line.endswith(f", float32, SplitAttention; {size:,} parameters")
    ((line, warning),) = run_ranks(1, said_of, "bfloat16", "avx2")
    assert ", bfloat16, " in line and "no bfloat16 units" in warning and "--dtype float32" in warning
    for unit in ("avx512_bf16", "amx_bf16", "bf16"):
        assert len(run_ranks(1, said_of, "bfloat16", unit)[0]) == 1


def warnings(parameters: int = 1000, **changes) -> list[str]:
    quiet = dict(validation_split_percentage=20, learning_rate=1e-5)
    return list(summary.warnings(runs.settings("out", **quiet | changes), parameters, records=30))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": 8, "lora_alpha": 8.0}, "without --use_lora true this has no effect: --lora_r, --lora_alpha"),
        ({"lisa_interval_steps": 5}, "without --use_lisa true this has no effect: --lisa_interval_steps"),
        ({"loraplus_lr_ratio": 16.0}, "--loraplus_lr_ratio has no effect without --use_lora true"),
        ({"min_lr_ratio": 0.1, "lr_scheduler_type": "constant"}, "--min_lr_ratio has no effect on a constant learning"),
        ({"truncation_side": "right"}, "--truncation_side has no effect without --overlong truncate"),
        ({"validation_split_percentage": 0.1}, "0.1 is 0.1 % of 30 records; 10 would be 0.1 of them"),
    ],
)
def test_a_setting_without_effect_has_one_line(changes, message):
    (warning,) = warnings(**changes)
    assert message in warning


def test_settings_that_evaluate_have_no_effect_without_held_out_data():
    without, by = warnings(validation_split_percentage=0.0, validation_split_by="order")[::-1]
    assert without.startswith("--eval_steps 3 has no effect: nothing is held out; --eval_dataset_path or")
    assert by.startswith("--validation_split_by has no effect without")


def test_settings_that_have_an_effect_have_no_line():
    assert warnings() == []
    assert warnings(use_lora=True, lora_r=8, loraplus_lr_ratio=16.0, min_lr_ratio=0.1) == []


def test_a_learning_rate_that_is_ten_times_off_has_a_line():
    """The rule: 1e-5 for all weights of a reward model, ten times that for adapters (docs/recipes.md)."""
    for rate in (2e-6, 1e-5, 5e-5):
        assert warnings(LARGE, learning_rate=rate) == []
        assert warnings(LARGE, learning_rate=10 * rate, use_lora=True) == []
    for rate in (1e-6, 1e-4):
        (of_all,), (of_adapters,) = (
            warnings(LARGE, learning_rate=rate), warnings(LARGE, learning_rate=10 * rate, use_lora=True)
        )  # fmt: skip
        assert of_all.startswith(f"--learning_rate {rate:g} is far from what is usual for all weights, about 1e-05")
        assert "usual for adapters, about 0.0001" in of_adapters
    assert warnings(LARGE // 1000, learning_rate=1e-3) == []  # small models take more
