"""The model card: README.md beside a reward model's weights, from the files of its training and of an evaluation.

It says what the model was trained on and how, how texts have to be written, how good it is, and how to score with it.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from rm.evaluation.stats import wilson_interval
from rm.files import read_json, write_atomically
from rm.report.evaluation import accuracy_interval, attribute_table, benchmark_table
from rm.report.html import format_value, markdown_table
from rm.run_files import read_evaluation, read_metrics, read_run
from rm.terminal import printable

FILE = "README.md"
RECIPE = {  # setting of run.json -> how the card calls it
    "loss": "loss",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "global_batch_size": "prompts a step",
    "learning_rate": "learning rate",
    "lr_scheduler_type": "schedule",
    "warmup_ratio": "warm-up, share of the steps",
    "weight_decay": "weight decay",
    "label_smoothing": "label smoothing",
    "center_rewards_coefficient": "coefficient of centring",
    "max_length": "longest text, in tokens",
    "dtype": "precision",
    "seed": "seed",
}
OF_LORA = {"lora_r": "rank", "lora_alpha": "alpha", "lora_target_modules": "modules"}
OF_LISA = {"lisa_activated_layers": "layers at a time", "lisa_interval_steps": "steps for each choice"}

TRANSFORMERS = """import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "."  # of this model, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
"""
TRANSFORMERS_DIALOGUES = """
dialogues = [[{"role": "user", "content": "Is 7 prime?"}, {"role": "assistant", "content": "Yes."}]]
batch = tokenizer.apply_chat_template(dialogues, padding=True, return_dict=True, return_tensors="pt")
with torch.no_grad():
    rewards = model(**batch).logits[:, 0]
"""
TRANSFORMERS_TEXTS = """
texts = ["###Human: Is 7 prime?###Assistant: Yes."]
batch = tokenizer([text + tokenizer.eos_token for text in texts], padding=True, return_tensors="pt")
with torch.no_grad():
    rewards = model(**batch).logits[:, 0]
"""
TRL = """from rm.scoring import reward_function

trainer = GRPOTrainer(model=policy, reward_funcs=reward_function("."), args=arguments, train_dataset=prompts)
"""
VLLM_DIALOGUES = """import requests

messages = [{"role": "user", "content": "Is 7 prime?"}, {"role": "assistant", "content": "Yes."}]
body = {"messages": messages, "use_activation": False}
answer = requests.post("http://localhost:8000/classify", json=body).json()
reward = answer["data"][0]["probs"][0]
"""
VLLM_TEXTS = """import requests

text = "###Human: Is 7 prime?###Assistant: Yes."
body = {"input": text + EOS, "use_activation": False}  # EOS: the tokenizer's eos_token
answer = requests.post("http://localhost:8000/classify", json=body).json()
reward = answer["data"][0]["probs"][0]
"""


def of_training(run: Path, evaluation: Path | None = None) -> str:
    """The card of the model that a training run left.

    Args:
        run: its output_dir.
        evaluation: output_dir of an evaluation (eval_rm.py) of that model.

    Raises:
        ValueError: the evaluation is of another model.
    """
    description, contract = read_run(run), read_json(run / "model" / "scoring.json")
    settings, lines = description.get("settings", {}), read_metrics(run / "metrics.jsonl")
    base, link = _base(settings.get("model_name_or_path", ""))
    what = (
        f"A reward model: {base} with a linear head, trained on preferences. It gives a text one number, higher for a "
        "reply that people would prefer. Only differences of rewards to one prompt have a meaning."
    )
    if labels := contract.get("labels"):
        what = (
            f"A reward model of attributes: {base} with a linear head, trained by mean squared error on numbers that "
            f"were given to replies. It gives a text one number for each of {', '.join(map(_code, labels))}, in this "
            f"order."
        )
    parts = [
        what,
        "## Data\n",
        _data(description, settings),
        "## Training\n",
        _recipe(description, settings, contract),
        "## Evaluation\n",
        _held_out(description, lines),
    ]
    if evaluation is not None:
        parts.append(_evaluation(evaluation, [run / "model", run / "adapter"]))
    return _card(link, [*parts, *_use(contract)])


def of_mean(models: list[str], contract: dict, accuracies: list[dict], sets: str) -> str:
    """The card of a model whose weights are the mean of others.

    Args:
        models: what they are called.
        contract: scoring.json of the mean, {} where it has none.
        accuracies: of each model and at last of the mean, as `rm.evaluation.metrics.summary` gives them; or [].
        sets: what they were evaluated on.
    """
    names = ", ".join(_code(f"{Path(model).parent.name}/{Path(model).name}") for model in models)
    parts = [f"A reward model whose weights are the mean of {len(models)} models' (WARM, arXiv 2401.12187): {names}."]
    if accuracies:
        rows = zip([*(f"model {n}" for n in range(1, len(models) + 1)), "the mean"], accuracies, strict=True)
        parts += ["## Evaluation\n", f"Of {_code(sets)}:\n", _accuracies(rows)]
    return _card(None, [*parts, *_use(contract)])


def write(folder: Path, text: str) -> Path:
    """Write a card beside the weights in `folder`."""
    write_atomically(folder / FILE, text)
    return folder / FILE


def _card(base_model: str | None, parts: list[str]) -> str:
    """The parts below the lines that the hub reads."""
    facts = ["library_name: transformers", "pipeline_tag: text-classification", "tags:", "- reward-model"]
    if base_model:
        facts.append(f"base_model: {base_model}")
    return "\n".join(["---", *facts, "---", "", "# Reward model", "", *(f"{part.rstrip()}\n" for part in parts)])


def _base(path: str) -> tuple[str, str | None]:
    """(what a model is called, its name on the hub): a path in the hub's cache has the name and the commit."""
    found = re.search(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{7,40})", path)
    if found:
        name = f"{found[1]}/{found[2]}"
        return f"[{name}](https://huggingface.co/{name}) (commit `{found[3][:12]}`)", name
    return _code("/".join(Path(path).parts[-2:])), None


def _data(description: dict, settings: dict) -> str:
    data = description.get("data", {})
    train, held_out = data.get("train", {}), data.get("held_out", {})
    files = " ".join(_code(Path(path).name) for path in settings.get("dataset_path", []))
    lines = [f"- {files}: {train.get('kept', 0):,} records" + _in_words(train.get("formats", {}))]
    if train.get("dropped"):
        lines.append(f"- left out{_in_words(train['dropped'])}")
    if train.get("shortened"):
        lines.append(f"- shortened: {train['shortened']:,}")
    if held_out.get("kept"):
        held = "from other files" if settings.get("eval_dataset_path") else "of these"
        lines.append(f"- held out: {held_out['kept']:,} records {held}")
    return "\n".join(lines)


def _in_words(counts: dict[str, int]) -> str:
    return " (" + ", ".join(f"{count:,} {name}" for name, count in counts.items()) + ")" if counts else ""


def _recipe(description: dict, settings: dict, contract: dict) -> str:
    """What the training did, and where; all settings but paths of the machine."""
    method = "all weights"
    if settings.get("use_lora"):
        method = "LoRA, merged: " + _listed(settings, OF_LORA)
    elif settings.get("use_lisa"):
        method = "LISA: " + _listed(settings, OF_LISA)
    rows = [("trained", method)]
    for name, title in RECIPE.items():
        value = contract.get(name) if name == "dtype" else settings.get(name)  # a run's dtype may be "auto"
        if value is not None:
            rows.append((title, f"{value:g}" if isinstance(value, float) else value))
    made = [description[name] for name in ("device", "started") if description.get(name)]
    if versions := description.get("versions"):
        made.append(f"torch {versions['torch']}")
    if processes := description.get("processes"):
        made.append(f"{processes} process{'es' if processes > 1 else ''}")
    no_paths = {name: value for name, value in settings.items() if not name.endswith(("_dir", "_path", "_checkpoint"))}
    details = f"```json\n{json.dumps(no_paths, indent=2)}\n```"
    everything = f"<details><summary>All settings</summary>\n\n{details}\n\n</details>"
    return "\n".join([markdown_table(["setting", "value"], rows), ", ".join(made) + "\n", everything])


def _listed(settings: dict, titles: dict[str, str]) -> str:
    shown = ((title, settings.get(name)) for name, title in titles.items())
    return ", ".join(f"{title} {' '.join(value) if isinstance(value, list) else value}" for title, value in shown)


def _held_out(description: dict, lines: list[dict]) -> str:
    """The evaluation of the step whose weights were saved: the last one, or the best (--load_best_model_at_end)."""
    step = description.get("model_step")
    evaluations = [line for line in lines if "eval_loss" in line and step in (None, line["step"])]
    last = evaluations[-1] if evaluations else None
    if last is None:
        return "Nothing was held out from the training."
    data = description.get("data", {})
    n, formats = data.get("held_out", {}).get("kept", 0), data.get("train", {}).get("formats", {})
    when = "At the end of the training" if last["step"] == lines[-1]["step"] else f"After {step:,} steps, the best"
    if "eval_accuracy" not in last:
        errors = {name.removeprefix("eval_mse_"): value for name, value in last.items() if name.startswith("eval_mse_")}
        listed = ", ".join(f"{_code(name)} {format_value(error)}" for name, error in errors.items())
        return f"{when}, on {n:,} held-out records, mean squared errors: {listed}."
    text = f"{when}, on {n:,} held-out records: accuracy {format_value(last['eval_accuracy'])}"
    # An accuracy of rankings is a mean of shares, which Wilson's interval is not for.
    if n and not any("responses" in name for name in formats):
        text += f" (95 % interval {format_value(wilson_interval(last['eval_accuracy'], n))})"
    return f"{text}, loss {format_value(last['eval_loss'])}."


def _evaluation(folder: Path, models: list[Path]) -> str:
    """The table of an evaluation."""
    report = read_evaluation(folder)
    if not report:
        raise ValueError(f"{folder} holds no report.json: give the output_dir of an evaluation with eval_rm.py")
    of = report.get("settings", {}).get("model_name_or_path")
    of = of if isinstance(of, list) else [of]
    if len(of) != 1 or Path(of[0]).resolve() not in [model.resolve() for model in models]:
        raise ValueError(f"{folder / 'report.json'} is of {' '.join(map(str, of))}, and not of {models[0]}")
    if not report["sets"]:
        raise ValueError(f"{folder / 'report.json'} compares no replies (--score_only): give another evaluation")
    if any("attributes" in one for one in report["sets"].values()):
        return markdown_table(*attribute_table(report))
    parts = [_accuracies(report["sets"].items())]
    headers, rows = benchmark_table(report)
    if rows:
        parts.append("Benchmarks, by their published rules:\n")
        parts.append(markdown_table(headers, rows))
    return "\n".join(parts)


def _accuracies(summaries: Iterable[tuple[str, dict]]) -> str:
    rows = []
    for name, one in summaries:
        length = one.get("length", {})
        rows.append([name, one["n"], one.get("accuracy"), accuracy_interval(one),
                     length.get("longest_accuracy"), length.get("controlled_accuracy")])  # fmt: skip
    head = ["set", "pairs", "accuracy", "95 % interval", "of preferring the longer reply", "length-controlled"]
    kept = [i for i in range(len(head)) if any(row[i] is not None for row in rows)]
    return markdown_table([head[i] for i in kept], [[row[i] for i in kept] for row in rows])


def _code(text: str) -> str:
    """A name of a file as code, which it cannot end."""
    return "`" + printable(text).replace("`", "'") + "`"


def _use(contract: dict) -> list[str]:
    """How texts are written, and how to score."""
    if not contract:
        return []
    dialogues = contract["chat_template"] is not None
    texts = not contract["template_explicit"]
    transformers = TRANSFORMERS + TRANSFORMERS_DIALOGUES * dialogues + TRANSFORMERS_TEXTS * texts
    vllm, trl = VLLM_DIALOGUES if dialogues else VLLM_TEXTS, TRL
    if labels := contract.get("labels"):
        transformers = transformers.replace("rewards = ", "attributes = ").replace(".logits[:, 0]", ".logits")
        trl = trl.replace('(".")', f'(".", reward_label={labels[0]!r})')
    parts = [
        "## How texts are written\n",
        _contract(contract, dialogues, texts),
        "## Scoring\n",
        "With transformers:\n",
        f"```python\n{transformers}```",
        "As a reward function of TRL, by the code that trained this model (it checks the probe texts first):\n",
        f"```python\n{trl}```",
    ]
    if labels:
        return parts
    return [
        *parts,
        "With a server, `vllm serve . --runner pooling`, or `python -m rm.serve .` of the code that trained it:\n",
        f"```python\n{vllm}```",
    ]


def _contract(contract: dict, dialogues: bool, texts: bool) -> str:
    lines = []
    if dialogues:
        lines.append("- A dialogue is what `apply_chat_template` gives, with nothing appended and nothing cut off.")
        bare = {
            "dialogue": "are a dialogue of one user and one assistant message",
            "plain": "are joined as they stand",
        }[contract["bare_text"]]
        lines.append(f"- A prompt and a reply that are plain strings {bare}.")
    if texts:
        bos = "" if contract["bos_token_id"] is None else f"begins with BOS (id {contract['bos_token_id']}) and "
        lines.append(f"- A text that is one string {bos}ends in EOS (id {contract['eos_token_id']}).")
    lines.append("- The reward is read at the last token.")
    longer = "left out"
    if contract["overlong"] == "truncate":
        longer = f"shortened on the {contract['truncation_side']}"
    lines.append(f"- In training, texts of more than {contract['max_length']:,} tokens were {longer}.")
    if contract.get("reward_std") is not None:
        mean, deviation = format_value(contract["reward_mean"]), format_value(contract["reward_std"])
        of = re.sub(r"\S*/", "", contract["reward_set"] or "a set")  # without the folders of its files
        lines.append(f"- Rewards of the better replies of {of} have mean {mean}, deviation {deviation}.")
    lines.append(f"- `scoring.json` has all of this, and {len(contract['golden'])} probe texts with their scores.")
    return "\n".join(lines)
