"""Which files of a dataset's repository are a split: the rules of Hugging Face `datasets`.

Configurations in the front matter of README.md say it. Where there are none, the names of folders and files do. Source:
`data_files.py`, `utils/metadata.py` and `load.infer_module_for_data_files_list` of datasets 5.2.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

SHARD = re.compile(r"data/([^/]+)-\d{5}-of-\d{5}[^/]*")  # data/train-00000-of-00002.parquet
SEPARATOR = "[-._ 0-9]"
IN_FOLDER = rf"(.*/)?([^/]*{SEPARATOR})?(%s)({SEPARATOR}[^/]*)?/.*"  # train/a.jsonl, base/my-train-2/a.jsonl
IN_FILE = rf"(.*/)?([^/]*{SEPARATOR})?(%s){SEPARATOR}[^/]*"  # train.jsonl, base/my-train-2.jsonl
KEYWORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
# Of each extension; the first wins a draw. Arrow files are known, so that their side files are not taken for the data.
FORMATS = {"parquet": "parquet", "arrow": "arrow", "jsonl": "json", "json": "json", "ndjson": "json", "csv": "csv",
           "tsv": "csv"}  # fmt: skip
READ_HERE = re.compile(r".*\.(parquet|(jsonl?|ndjson|csv|tsv)(\.gz)?)")
NOT_DATA = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
SHOWN = 12  # names in an error


def files_of_split(
    paths: Sequence[str], configurations: Sequence[dict], split: str, part: str | None = None
) -> list[str]:
    """The files of a split, in the order in which they are read.

    Args:
        paths: all files of the repository.
        configurations: `configs` in the front matter of its README.md, see `check_configurations`.
        part: the name of a configuration, or a folder; None: the default configuration, or the whole repository.

    Raises:
        ValueError: nothing or no one thing is meant, or the files are not of a format that is read here.
    """
    named = {configuration["config_name"]: configuration for configuration in configurations}
    if part in named:
        configuration = named[part]
    elif part is not None:
        configuration = {"data_dir": part}
    else:
        configuration = _default(named)

    # Patterns and names count from the configuration's folder.
    folder = str(PurePosixPath(configuration.get("data_dir") or "."))
    prefix = "" if folder == "." else f"{folder}/"
    inside = sorted(path.removeprefix(prefix) for path in paths if path.startswith(prefix) and _is_data(path))
    if part is not None and not inside:
        others = f", but the configurations {_shown(named)}" if named else ""
        raise ValueError(f"has no file or configuration {part!r}, and no folder with data{others}")
    if not inside:
        raise ValueError("has no data files (.parquet, .json, .jsonl, .csv, .tsv)")

    splits = _splits(inside, configuration.get("data_files"))
    if not splits.get(split):
        others = ", ".join(repr(name) for name, files in splits.items() if files) or "none"
        raise ValueError(
            f"has no data files of split {split!r}; splits: {others}: name one as hub:org/name:SPLIT, or a file as "
            f"hub:org/name/FILE; files: {_shown([prefix + path for path in inside])}"
        )
    files = [prefix + path for path in _of_one_format(splits[split])]
    if unread := [file for file in files if not READ_HERE.fullmatch(file)]:
        raise ValueError(
            f"split {split!r} has {_shown(unread)}: only .parquet, .json, .jsonl, .csv and .tsv are read, all but the "
            "first also gzipped: convert the files, or name another as hub:org/name/FILE"
        )
    return files


def check_configurations(card: dict | None) -> list[dict]:
    """`configs` of the front matter of a README.md, [] if there are none.

    Raises:
        ValueError: it has another form than datasets allows.
    """
    configurations = (card or {}).get("configs") or []
    forms = isinstance(configurations, list) and all(isinstance(entry, dict) for entry in configurations)
    if not forms or not all(isinstance(entry.get("config_name"), str) for entry in configurations):
        raise ValueError("configs in README.md must be a list of objects with a config_name")
    for entry in configurations:
        if not isinstance(entry.get("data_dir", ""), str | None):
            raise ValueError(f"data_dir of configuration {entry['config_name']} in README.md must be a string")
        if entry.get("data_files") is not None:
            _patterns(entry["data_files"])
    return configurations


def _default(named: dict[str, dict]) -> dict:
    """The only configuration, the one that says `default: true`, or the one of that name. {}: there are none."""
    if len(named) < 2:
        return next(iter(named.values()), {})
    defaults = [name for name, entry in named.items() if name == "default" or entry.get("default")]
    if len(defaults) != 1:
        raise ValueError(f"has several configurations: name one as hub:org/name/CONFIGURATION: {_shown(named)}")
    return named[defaults[0]]


def _is_data(path: str) -> bool:
    *folders, file = path.split("/")
    hidden = any(name.startswith(("__", ".")) for name in folders) or file.startswith(".")
    return not hidden and file not in NOT_DATA and bool(_extensions(path))


def _extensions(path: str) -> list[str]:
    """Extensions in a file's name that are a format's: "jsonl" of a.jsonl.gz."""
    return [word for word in PurePosixPath(path).name.lower().split(".")[1:] if word in FORMATS]


def _splits(paths: list[str], data_files) -> dict[str, list[str]]:
    """{split: its files}, by the first rule that finds any."""
    # What the configuration says.
    if data_files is not None:
        return {split: _matching(paths, patterns) for split, patterns in _patterns(data_files).items()}
    # Shards: the split may have any name.
    sharded: dict[str, list[str]] = {}
    for path in paths:
        if match := SHARD.fullmatch(path):
            sharded.setdefault(match[1], []).append(path)
    if sharded:
        return sharded
    # A keyword in the name of a folder, else of a file.
    for rule in (IN_FOLDER, IN_FILE):
        found = {name: [p for p in paths if re.fullmatch(rule % words, p)] for name, words in KEYWORDS.items()}
        if any(found.values()):
            return found
    return {"train": paths}


def _patterns(data_files) -> dict[str, list[str]]:
    """{split: glob patterns} of a configuration: `train.csv`, a list of such, [{split:, path:}] or {split: path}."""
    if isinstance(data_files, list) and all(isinstance(entry, dict) for entry in data_files):
        data_files = {entry.get("split"): entry.get("path") for entry in data_files}
    if not isinstance(data_files, dict):
        data_files = {"train": data_files}
    patterns = {str(split): [path] if isinstance(path, str) else path for split, path in data_files.items()}
    if not all(isinstance(p, list) and all(isinstance(path, str) for path in p) for p in patterns.values()):
        raise ValueError(f"data_files in README.md must have a split and a path or a list of paths, got {data_files}")
    return patterns


def _matching(paths: list[str], patterns: list[str]) -> list[str]:
    """The paths that match, in the order of the patterns, each once."""
    found = [path for pattern in map(_glob, patterns) for path in paths if pattern.fullmatch(path)]
    return list(dict.fromkeys(found))


def _glob(pattern: str) -> re.Pattern:
    """A glob pattern in which ** stands for any number of folders."""
    wildcards = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    regex = ""
    for word in re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern.removeprefix("./")):
        is_set = word.startswith("[") and word.endswith("]")
        regex += word.replace("[!", "[^", 1) if is_set else wildcards.get(word, re.escape(word))
    return re.compile(regex)


def _of_one_format(paths: list[str]) -> list[str]:
    """The files of the format whose extension is the most common."""
    count = Counter(extension for path in paths for extension in _extensions(path))
    best = FORMATS[max(FORMATS, key=lambda extension: count[extension])]
    return [path for path in paths if any(FORMATS[extension] == best for extension in _extensions(path))]


def _shown(names) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
