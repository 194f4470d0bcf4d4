"""rm.plan.plan: what a run needs, said from config.json and lengths, and refused with advice that holds."""

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_rm
import train_sft
from rm.config import parse
from rm.data import batch
from rm.distributed import process_group as dist
from rm.distributed import sharding
from rm.model.attention import SplitAttention, VarlenAttention
from rm.model.heads import LanguageModel, RewardModel
from rm.plan import plan
from tests import made, text_fixtures

pytestmark = pytest.mark.apart

KINDS = ("weights", "gradients", "optimizer", "activations", "gathered")
HF = dict(model_type="llama", vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
          num_attention_heads=4, hidden_act="silu", max_position_embeddings=512)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A config.json and a tokenizer, no weights; pairs and texts."""
    folder = tmp_path_factory.mktemp("plan")
    text_fixtures.byte_level(folder)
    (folder / "config.json").write_text(json.dumps(HF))
    texts = [f"###Human: what is {a} and {b}?###Assistant: it is {a + b}" for a in range(4) for b in range(4)]
    pairs = [{"positive": text + ".", "negative": text + " or no" * (i % 3 + 1)} for i, text in enumerate(texts)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


def settings_of(folder, script=train_rm, **changes):
    data = folder / ("pairs.jsonl" if script is train_rm else "texts.jsonl")
    names = {"model_name_or_path": folder, "dataset_path": data, "output_dir": folder / "out", "dtype": "float32",
             "global_batch_size": 8, "max_tokens": 200} | changes  # fmt: skip
    return parse(script.Settings, "", [word for name, value in names.items() for word in (f"--{name}", str(value))])


def main(script, settings) -> None:
    with dist.session(0):
        script.main(settings)


def planned(settings, processes: int = 2) -> plan.Plan:
    examples = made.pair_examples(made.token_pairs(24, longest=40))
    with dist.fake_process_group(processes):
        return plan.Plan(RewardModel, settings, examples, VarlenAttention)


def test_a_plan_is_said_without_weights_for_any_number_of_processes(folder, capsys):
    for script, cls in ((train_rm, RewardModel), (train_sft, LanguageModel)):
        main(script, settings_of(folder, script, plan="true", world_size=512))
        said = capsys.readouterr().out
        assert "plan for 512 processes" in said and "fits" in said
        assert [file.name for file in (folder / "out").iterdir()] == ["plan.json"]
        for word in ("parameters", "steps", "weights", "optimizer", "largest", "time", "communication"):
            assert word in said, cls


def test_a_run_holds_its_plan_against_what_it_took(folder, tmp_path, capsys, monkeypatch):
    settings = settings_of(folder, output_dir=tmp_path)

    def said(settings) -> str:
        with dist.session(0):
            plan.compare(settings)
        return capsys.readouterr().out

    monkeypatch.setattr(dist, "peak_memory", lambda: 3 * plan.GIB)
    assert said(settings) == "memory: 3.00 GiB at the peak (resident, with Python and libraries)\n"
    main(train_rm, dataclasses.replace(settings, plan=True, world_size=1))
    kept = json.loads((tmp_path / "plan.json").read_text())
    assert kept["peak"] == sum(kept["footprint"][kind] for kind in KINDS)
    capsys.readouterr()
    monkeypatch.setattr(dist, "peak_memory", lambda: int(1.25 * kept["peak"]))
    assert said(settings).endswith(f"planned {kept['peak'] / plan.GIB:.2f}: +25.0%\n")
    other = dataclasses.replace(settings, max_tokens=190, use_lora=True)
    assert said(other).endswith("with another use_lora, max_tokens\n")


def test_what_does_not_fit_is_refused_with_advice_that_fits(folder, monkeypatch):
    monkeypatch.setattr(plan, "LIBRARIES", 0)
    peaks = [planned(settings_of(folder, gradient_checkpointing=how)).heaviest.reserved for how in ("none", "full")]
    tight = {"device_memory_gb": sum(peaks) / 2 / plan.GIB}  # full recomputation fits, none does not
    plan_ = planned(settings_of(folder, **tight))
    with dist.fake_process_group(2):
        assert not plan_.fits(plan_.heaviest) and "Try --gradient_checkpointing full" in plan_.advice()
    again = planned(settings_of(folder, gradient_checkpointing="full", **tight))
    assert again.fits(again.heaviest)

    settings = settings_of(folder, plan="true", world_size=2, device_memory_gb=1e-5)
    with pytest.raises(ValueError, match="does not fit: .* Weights and optimizer alone are too much: .*use_lora"):
        main(train_rm, settings)


def test_the_largest_max_tokens_fits_and_a_little_more_does_not(folder):
    plan_ = planned(settings_of(folder, device_memory_gb=3.0022, global_batch_size=24))
    with dist.fake_process_group(2):
        best = plan_.largest_max_tokens(plan_.heaviest)
        assert plan_.fits(plan_.simulate(max_tokens=best))
        assert not plan_.fits(plan_.simulate(max_tokens=int(best * 1.2)))


def test_the_heaviest_step_is_the_one_with_the_longest_row_of_all_ranks(folder):
    plan_ = planned(settings_of(folder), processes=4)
    sizes = []
    with dist.fake_process_group(4):
        for step in range(plan_.loader.steps_per_epoch):
            sizes += [plan_.loader.lengths[row].sum() for rows in plan_.loader.assign_to_ranks(step) for row in rows]
    assert plan_.heaviest.tokens == max(sizes)


def test_moments_that_lisa_keeps_are_counted_for_every_layer(folder):
    def optimizer(**changes) -> int:
        return planned(
            settings_of(folder, use_lisa="true", lisa_activated_layers=1, **changes)
        ).heaviest.footprint.optimizer

    full, dropped = planned(settings_of(folder)).heaviest.footprint.optimizer, optimizer()
    assert dropped < 0.9 * full and optimizer(lisa_state="keep") == pytest.approx(full, rel=0.01)


@pytest.mark.parametrize(
    ("how", "near"), [("none", 0.001), ("full", 0.1)]
)  # full repeats all but a layer's last product
def test_operations_are_those_that_torch_counts(folder, how, near):
    settings = settings_of(folder, gradient_checkpointing=how)
    examples = made.pair_examples(made.token_pairs(6))
    with dist.fake_process_group(1):
        plan_ = plan.Plan(RewardModel, settings, examples, SplitAttention)
        plan_.loader.costs = plan_.loader.lengths  # torch leaves out attention on CPU
        said = plan.step_flops(plan_.model, plan_.loader, settings)
        model = plan_.model.to_empty(device="cpu")
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            [sharding.local(p).normal_(std=0.02) for p in model.parameters()]
            with torch.enable_grad():
                model(batch.pack(examples, range(6)))["loss"].backward()
    assert said == pytest.approx(counted.get_total_flops(), rel=near)


def test_a_language_model_adds_three_products_with_its_head_and_asks_for_more_tokens(folder):
    settings, examples = settings_of(folder), made.text_examples([a for a, _ in made.token_pairs(8)])
    with dist.fake_process_group(1):
        said = [
            plan.step_flops(p.model, p.loader, settings)
            for p in (plan.Plan(cls, settings, examples, SplitAttention) for cls in (LanguageModel, RewardModel))
        ]
        labels = batch.Loader(examples, settings, 0, 0.0).labels.sum()
    width, behind = HF["hidden_size"], HF["hidden_size"] * (HF["hidden_size"] + 3 * HF["intermediate_size"])
    with_head = labels * HF["vocab_size"] * width
    assert said[0] - said[1] == pytest.approx(3 * 2 * (with_head + (labels - len(examples)) * behind))
