"""rm.hf.data_files against Hugging Face `datasets`, which reads the same layouts from a folder."""

from pathlib import Path

import pytest
import yaml
from datasets import load_dataset_builder

from rm.hf.data_files import check_configurations, files_of_split


def configs(*entries: dict) -> dict:
    return {"configs": list(entries)}


def split(name: str, path) -> dict:
    return {"split": name, "path": path}


ULTRAFEEDBACK = [f"data/{kind}_{use}-00000-of-00001.parquet" for kind in ("train", "test") for use in ("prefs", "sft")]
HELPSTEER = [f"{part}/{kind}.jsonl.gz" for part in ("edit", "preference") for kind in ("train", "validation")]
HELPSTEER_CARD = configs(*[
    {"config_name": part, "data_files": [split(kind, f"{part}/{kind}.jsonl.gz") for kind in ("train", "validation")]}
    | ({"default": True} if part == "preference" else {})
    for part in ("edit", "preference")
])  # fmt: skip
SHP = [f"ask{topic}/{kind}.json" for topic in ("baking", "science") for kind in ("test", "train", "validation")]
HH = [f"{part}-base/{kind}.jsonl.gz" for part in ("harmless", "helpful") for kind in ("test", "train")] + [
    "red-team-attempts/red_team_attempts.jsonl.gz"
]
SIDE = [".gitattributes", "config.json", "dataset_infos.json", ".hidden/train.json", "__pycache__/train.json"]
ORDER = ["a.jsonl", "b.jsonl", "c/d/e.jsonl", "x1.jsonl", "xy.jsonl"]
DATA_DIR = configs({"config_name": "a", "data_dir": "one/"}, {"config_name": "default", "data_dir": "two"})

# (paths, front matter, split, part, files)
LAYOUTS = {
    "one file": (["train.csv", *SIDE], None, "train", None, ["train.csv"]),
    "any name": (["pairs.json", *SIDE], None, "train", None, ["pairs.json"]),
    "shards": (ULTRAFEEDBACK, None, "test_prefs", None, ["data/test_prefs-00000-of-00001.parquet"]),
    "shards first": (
        ["data/raw-00001-of-00002.parquet", "data/raw-00000-of-00002.parquet", "train/a.parquet"], None, "raw", None,
        ["data/raw-00000-of-00002.parquet", "data/raw-00001-of-00002.parquet"],
    ),
    "configuration of shards": (
        ULTRAFEEDBACK,
        configs({"config_name": "default", "data_files": [split("train_prefs", "data/train_prefs-*")]}),
        "train_prefs", None, ["data/train_prefs-00000-of-00001.parquet"],
    ),
    "default": (HELPSTEER, HELPSTEER_CARD, "train", None, ["preference/train.jsonl.gz"]),
    "named": (HELPSTEER, HELPSTEER_CARD, "validation", "edit", ["edit/validation.jsonl.gz"]),
    "folders of files": (SHP, None, "validation", None, ["askbaking/validation.json", "askscience/validation.json"]),
    "folder": (SHP, None, "test", "askscience", ["askscience/test.json"]),
    "not all is of a split": (HH, None, "train", None, ["harmless-base/train.jsonl.gz", "helpful-base/train.jsonl.gz"]),
    "all in a folder": (HH, None, "train", "red-team-attempts", [HH[-1]]),
    "split folders": (
        ["b/my training/1.jsonl", "train/2/test.jsonl", "eval_1/3.jsonl"], None, "train", None,
        ["b/my training/1.jsonl", "train/2/test.jsonl"],
    ),
    "words within names": (
        ["my-train_0.jsonl", "training1.jsonl", "dev.jsonl", "trainer.jsonl"], None, "train", None,
        ["my-train_0.jsonl", "training1.jsonl"],
    ),
    "synonym": (["x.train.json.gz", "x.dev.json.gz"], None, "validation", None, ["x.dev.json.gz"]),
    "most common format": (["a.csv", "b.parquet", "c.csv", "d.tsv"], None, "train", None, ["a.csv", "c.csv", "d.tsv"]),
    "draw": (["a.csv", "b.parquet"], None, "train", None, ["b.parquet"]),
    "order": (ORDER, configs({"config_name": "x", "data_files": ["b*", "a.jsonl"]}), "train", None, ORDER[1::-1]),
    "one pattern": (ORDER, configs({"config_name": "x", "data_files": "**/e.*"}), "train", None, ["c/d/e.jsonl"]),
    "set": (ORDER, configs({"config_name": "x", "data_files": "x[0-9].jsonl"}), "train", None, ["x1.jsonl"]),
    "no set": (ORDER, configs({"config_name": "x", "data_files": "./x[!0-9].json?"}), "train", None, ["xy.jsonl"]),
    "data_dir": (["one/a.jsonl", "two/b.jsonl"], DATA_DIR, "train", None, ["two/b.jsonl"]),
    "other data_dir": (["one/a.jsonl", "two/b.jsonl"], DATA_DIR, "train", "a", ["one/a.jsonl"]),
}  # fmt: skip


@pytest.mark.parametrize("paths, card, split, part, files", LAYOUTS.values(), ids=LAYOUTS)
def test_a_split_has_the_files_that_datasets_reads(paths, card, split, part, files, tmp_path):
    assert files_of_split(paths, check_configurations(card), split, part) == files
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("{}")
    if card:
        (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")
    of_card = card and part in [entry["config_name"] for entry in card["configs"]]
    how = {"name": part} if of_card else {"data_dir": part}
    builder = load_dataset_builder(str(tmp_path), cache_dir=str(tmp_path / "cache"), **how)
    theirs = [Path(file).resolve().relative_to(tmp_path.resolve()) for file in builder.config.data_files[split]]
    # Words of a split are patterns of datasets, which it goes through one after the other; here names are in order.
    assert [str(path) for path in (theirs if card else sorted(theirs))] == files


@pytest.mark.parametrize(
    "paths, card, part, problem",
    [
        (["test.csv", "dev.csv"], None, None, "no data files of split 'train'; splits: 'validation', 'test'"),
        (HELPSTEER, configs(*[{"config_name": name} for name in "ab"]), None, "several configurations: .*: a, b$"),
        (HELPSTEER, HELPSTEER_CARD, "c", "no file or configuration 'c', and no folder with data.* edit, preference$"),
        (["a.txt", "README.md"], None, None, "has no data files"),
        (["train/data-00000-of-00001.arrow", "train/state.json"], None, None, "data-00000-of-00001.arrow: only"),
        (["train.jsonl.zst"], None, None, "train.jsonl.zst: only .parquet"),
        (["a.csv"], configs({"config_name": "x", "data_files": "b*"}), None, "splits: none.* files: a.csv"),
        (["a.csv"], {"configs": {"a": 1}}, None, "configs in README.md must be a list"),
        (["a.csv"], configs({"config_name": "x", "data_files": [{"split": "train"}]}), None, "data_files in README.md"),
        (["a.csv"], configs({"config_name": "x", "data_dir": 1}), None, "data_dir of configuration x"),
    ],
)
def test_what_means_no_files_says_what_there_is(paths, card, part, problem):
    with pytest.raises(ValueError, match=problem):
        files_of_split(paths, check_configurations(card), "train", part)
