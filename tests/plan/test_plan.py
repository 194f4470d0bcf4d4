"""rm.plan.plan: what a run needs, from config.json and lengths; what does not fit is refused with advice that fits."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_rm
import train_sft
from rm.config import parse, updated
from rm.data.batch import Loader, pack
from rm.distributed import process_group as dist
from rm.distributed import sharding
from rm.model.attention import SplitAttention, VarlenAttention
from rm.model.heads import LanguageModel, RewardModel
from rm.plan import plan
from rm.plan.memory import Footprint
from rm.plan.plan import Plan
from rm.plan.roofline import Work, capped_attention
from rm.plan.settings import GIB, PlanSettings, compare_with_plan
from tests import made, text_fixtures, tiny

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


def plan_of(settings, processes: int = 2) -> Plan:
    examples = made.pair_examples(made.token_pairs(24, longest=40))
    with dist.fake_process_group(processes):
        return Plan(RewardModel, settings, settings.plan, examples, VarlenAttention, settings.loss)


def test_a_plan_needs_no_weights_and_is_for_any_number_of_processes(folder, capsys):
    for script, cls in ((train_rm, RewardModel), (train_sft, LanguageModel)):
        main(script, settings_of(folder, script, plan="true", world_size=512))
        printed = capsys.readouterr().out
        assert "plan for 512 processes" in printed and "fits" in printed
        assert [file.name for file in (folder / "out").iterdir()] == ["plan.json"]
        for word in ("parameters", "steps", "weights", "optimizer", "largest", "time", "communication"):
            assert word in printed, cls


def test_a_plan_counts_the_rows_of_new_tokens(folder):
    settings, weights = settings_of(folder), []
    for new_ids in ((), (400, 401)):
        with dist.fake_process_group(1):
            examples = made.pair_examples(made.token_pairs(8, longest=40))
            plan = Plan(RewardModel, settings, settings.plan, examples, VarlenAttention, settings.loss, new_ids)
        weights.append(plan.heaviest.footprint.weights)
    assert weights[1] - weights[0] == 2 * 64 * 4  # two rows, 64 wide, in float32


def test_a_run_compares_its_plan_with_what_it_took(folder, tmp_path, capsys, monkeypatch):
    settings = settings_of(folder, output_dir=tmp_path)

    def printed(settings) -> str:
        with dist.session(0):
            compare_with_plan(settings)
        return capsys.readouterr().out

    monkeypatch.setattr(dist, "peak_memory", lambda: 3 * GIB)
    assert printed(settings) == "memory: 3.00 GiB at the peak (resident, including Python and libraries)\n"
    main(train_rm, updated(settings, plan=True, world_size=1))
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert saved["peak"] == sum(saved["footprint"][kind] for kind in KINDS)
    capsys.readouterr()
    monkeypatch.setattr(dist, "peak_memory", lambda: int(1.25 * saved["peak"]))
    assert printed(settings).endswith(f"planned {saved['peak'] / GIB:.2f}: +25.0%\n")
    other = updated(settings, max_tokens=190, use_lora=True)
    assert printed(other).endswith("with another use_lora, max_tokens\n")
    (tmp_path / "plan.json").write_text("{")  # of a run whose model is saved
    assert "GiB at the peak" in printed(settings) and "plan.json is not JSON" in printed(settings)


def test_what_does_not_fit_is_refused_with_advice_that_fits(folder, monkeypatch):
    monkeypatch.setattr(plan, "LIBRARIES", 0)
    monkeypatch.setattr(plan, "SAVING", ())  # each is another simulation, see the test below
    monkeypatch.setattr(Plan, "largest_max_tokens", lambda *args, **kwargs: 0)
    peaks = [plan_of(settings_of(folder, gradient_checkpointing=how)).heaviest.reserved for how in ("none", "full")]
    tight = {"device_memory_gb": sum(peaks) / 2 / GIB}  # full recomputation fits, none does not
    simulated = plan_of(settings_of(folder, **tight))
    with dist.fake_process_group(2):
        assert not simulated.fits(simulated.heaviest) and "Try --gradient_checkpointing full" in simulated.advice()
    again = plan_of(settings_of(folder, gradient_checkpointing="full", **tight))
    assert again.fits(again.heaviest)

    settings = settings_of(folder, plan="true", world_size=2, device_memory_gb=1e-5)
    with pytest.raises(ValueError, match="does not fit: .* Weights and optimizer alone are too much: .*use_lora"):
        main(train_rm, settings)


def test_states_that_do_not_fit_are_advised_to_go_to_the_host_and_then_only_what_is_computed_counts(
    folder, monkeypatch
):
    monkeypatch.setattr(plan, "LIBRARIES", 0)
    monkeypatch.setattr(plan, "SAVING", ({"cpu_offload": True},))
    monkeypatch.setattr(Plan, "largest_max_tokens", lambda *args, **kwargs: 0)
    offload = {"gradient_checkpointing": "full", "cpu_offload": "true"}
    kept, offloaded = (plan_of(settings_of(folder, **how)).heaviest.reserved / GIB for how in ({}, offload))
    assert offloaded < kept
    simulated = plan_of(settings_of(folder, device_memory_gb=1.01 * offloaded))
    with dist.fake_process_group(2):
        assert "or --gradient_checkpointing full --cpu_offload true, which fits" in simulated.advice()
    simulated = plan_of(settings_of(folder, device_memory_gb=0.2 * offloaded, **offload))
    with dist.fake_process_group(2):
        advice = simulated.advice()
    assert "What is computed at a time is too much: use devices with more memory, or --use_lora true" in advice


def test_the_largest_max_tokens_fits_and_a_little_more_does_not(folder):
    simulated = plan_of(settings_of(folder, device_memory_gb=3.0022, global_batch_size=24))
    with dist.fake_process_group(2):
        best = simulated.largest_max_tokens(simulated.heaviest)
        assert simulated.fits(simulated.simulate(max_tokens=best))
        assert not simulated.fits(simulated.simulate(max_tokens=int(best * 1.2)))


def test_the_heaviest_step_has_the_longest_micro_batch_of_all_ranks(folder):
    simulated = plan_of(settings_of(folder), processes=4)
    sizes = []
    with dist.fake_process_group(4):
        for step in range(simulated.loader.steps_per_epoch):
            for assigned in simulated.loader.assign_to_ranks(step):
                sizes += [simulated.loader.lengths[indices].sum() for indices in assigned]
    assert simulated.heaviest.tokens == max(sizes)


def test_a_plan_in_bfloat16_has_speeds_on_paper_for_what_lisa_trains(folder):
    mfu = {}
    for name, changes in {"full": {}, "lisa": {"use_lisa": "true", "lisa_activated_layers": 1}}.items():
        simulated = plan_of(settings_of(folder, dtype="bfloat16", **changes))
        with dist.fake_process_group(2):
            step, tokens_per_second, utilization = simulated.on_paper("H100")
            printed = "\n".join(simulated.lines())
        tokens = float(simulated.loader.lengths.sum()) / simulated.loader.steps_per_epoch / 2
        assert tokens_per_second == pytest.approx(tokens / step.total)
        assert all(f"{gpu}: " in printed for gpu in plan.roofline.GPUS)
        mfu[name] = utilization * step.total
    # Of three products of a matrix, a frozen one leaves out the last; one of two layers is frozen.
    assert 2 / 3 < mfu["lisa"] / mfu["full"] < 1


def test_the_time_of_capped_attention_is_that_of_plain_operations(folder, tmp_path, monkeypatch):
    hf = tiny.SETTINGS["gemma2"] | {"model_type": "gemma2"}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    settings = settings_of(folder, dtype="bfloat16", model_name_or_path=tmp_path, gradient_checkpointing="full")
    examples, of_everything_else = made.pair_examples(made.token_pairs(24, longest=40)), Work({(8, 8): 1})
    monkeypatch.setattr(plan.memory, "simulate", lambda *args, **_: (Footprint(*[1] * 10), of_everything_else))
    monkeypatch.setattr(plan, "attention_flops", lambda *args: pytest.fail("attention's products are counted twice"))
    with dist.fake_process_group(1):
        simulated = Plan(RewardModel, settings, settings.plan, examples, plan.PlannedCappedAttention, settings.loss)
        simulated.on_paper("H100")
        longest = plan._longest_micro_batch(simulated.loader)
        batches = simulated.loader.step_batches(longest.step, longest.assigned[-2:]).micro_batches
    expected = of_everything_else
    for batch in batches:
        expected += capped_attention(simulated.model.config, batch.segments, torch.bfloat16, recompute=True)
    assert simulated.heaviest.work == expected != of_everything_else


def test_a_time_is_either_by_the_users_throughput_or_on_paper(folder):
    def printed(**changes) -> str:
        simulated = plan_of(settings_of(folder, dtype="bfloat16", **changes))
        with dist.fake_process_group(2):
            return "\n".join(simulated.lines())

    by_user = printed(device_tflops=1e-3, device_utilization=0.5)
    assert "at 50% of 0.001 TFLOP/s" in by_user and "H100" not in by_user
    assert "H100: " in (on_paper := printed()) and "TFLOP/s" not in on_paper
    for alone in ({"device_tflops": 312}, {"device_utilization": 0.4}):
        with pytest.raises(ValueError, match="--device_tflops and --device_utilization give a time together"):
            PlanSettings(**alone)


def test_moments_that_lisa_keeps_are_counted_for_every_layer(folder):
    def optimizer(**changes) -> int:
        settings = settings_of(folder, use_lisa="true", lisa_activated_layers=1, **changes)
        return plan_of(settings).heaviest.footprint.optimizer

    full, dropped = plan_of(settings_of(folder)).heaviest.footprint.optimizer, optimizer()
    assert dropped < 0.9 * full and optimizer(lisa_state="keep") == pytest.approx(full, rel=0.01)


@pytest.mark.parametrize(
    ("recompute", "tolerance"), [("none", 0.001), ("full", 0.1)]
)  # full repeats all but a layer's last product
def test_the_operations_are_those_that_torch_counts(folder, recompute, tolerance):
    settings = settings_of(folder, gradient_checkpointing=recompute)
    examples = made.pair_examples(made.token_pairs(6))
    with dist.fake_process_group(1):
        simulated = Plan(RewardModel, settings, settings.plan, examples, SplitAttention)
        simulated.loader.costs = simulated.loader.lengths  # without attention: torch counts it on the CPU since 2.15
        flops = plan.step_flops(simulated.model, simulated.loader, recompute)
        model = simulated.model.to_empty(device="cpu")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            for p in model.parameters():
                sharding.local(p).normal_(std=0.02)
            with torch.enable_grad():
                model(pack(examples, range(6)))["loss"].backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    assert flops == pytest.approx(counted, rel=tolerance)


def test_a_language_model_adds_its_heads_products_and_reads_more_positions(folder):
    settings, examples = settings_of(folder), made.text_examples([a for a, _ in made.token_pairs(8)])

    def flops(cls) -> float:
        simulated = Plan(cls, settings, settings.plan, examples, SplitAttention)
        return plan.step_flops(simulated.model, simulated.loader, "none")

    with dist.fake_process_group(1):
        of_lm, of_reward_model = flops(LanguageModel), flops(RewardModel)
        labels = Loader(examples, settings.batch, settings.packing, seed=0, attention_cost=0.0).labels.sum()
    width = HF["hidden_size"]
    after_attention = width * (width + 3 * HF["intermediate_size"])  # o_proj and the MLP of the last layer
    head = labels * HF["vocab_size"] * width
    # Three products of 2 operations each: forward, gradient of the input, gradient of the matrix.
    assert of_lm - of_reward_model == pytest.approx(3 * 2 * (head + (labels - len(examples)) * after_attention))
