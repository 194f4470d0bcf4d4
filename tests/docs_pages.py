"""The pages of the documentation, the commands on them, and the flags that these commands may have."""

import re
from dataclasses import dataclass
from pathlib import Path

import eval_rm
import train_rm
import train_sft
from rm import export, preview
from rm.config import flags
from rm.serve import __main__ as serve

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "train_sft.py": train_sft,
    "train_rm.py": train_rm,
    "eval_rm.py": eval_rm,
    "rm.export": export,
    "rm.preview": preview,
    "rm.serve": serve,
}
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("launch/*.md")])
LAUNCHERS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.slurm")])
# Each page is about one commit: its links have to work, its commands and paths are those of that commit.
DATED_PAGES = sorted(page for page in ROOT.glob("docs/benchmarks/*.md") if page.name != "README.md")
INDEXES = [ROOT / "docs" / "benchmarks" / "README.md", *sorted(ROOT.glob("tests/*/README.md"))]

FLAGS_OF_OTHERS = {  # program -> its options that the pages mention
    "torchrun": "nproc_per_node nproc-per-node nnodes standalone max-restarts signals-to-handle "
    "rdzv-backend rdzv-endpoint rdzv-id",
    "sbatch": "nodes gpus-per-node cpus-per-task ntasks-per-node partition time job-name "
    "signal requeue open-mode output",
    "srun": "label wait kill-on-bad-exit",
    "scancel": "signal",
    "scontrol": "oneliner",
    "pip": "quiet editable disable-pip-version-check",
    "apt-get": "no-install-recommends",
    "hf download": "include revision repo-type",
    "vllm": "runner",
    "sglang": "model-path is-embedding",
    "rewardbench": "model not_quantized torch_dtype max_length",
    "OpenRLHF": "reward ds",  # the first part of dotted names
    "TRL": "gradient_accumulation_steps lora_task_type",
}


def commands(text: str) -> list[str]:
    """The indented commands of a page or of a launcher's comments, each on one line, with the remark behind it."""
    joined = re.sub(r"\s*\\\n[#\s]*", " ", text)
    found = (re.match(r"#? {4,}((?:python|torchrun|sbatch|bash) .*)", line) for line in joined.splitlines())
    return [match[1].strip() for match in found if match]


def without_remark(command: str) -> str:
    """A command without the explanation that is set off from it by two spaces or more."""
    return re.split(r"  +(?=[a-z#])", command)[0]


def flags_in(text: str) -> set[str]:
    """The names of all flags in a text, with underscores: settings may be written with either."""
    return {name.replace("-", "_") for name in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)}


def known_flags() -> set[str]:
    """The flags of everything that can be started here, and those of other programs that the pages mention."""
    known = {"config", "help"}
    for script in SCRIPTS.values():
        known |= flags(script.Settings).keys()
    for file in (*ROOT.glob("rm/*.py"), ROOT / "rm/audit/__main__.py"):  # tools with a parser of their own
        known |= set(re.findall(r"add(?:_argument)?\(\s*\"--(\w+)\"", file.read_text()))
    for file in LAUNCHERS:
        known |= set(re.findall(r"--(\w+)\)", file.read_text()))  # case --name)
    for options in FLAGS_OF_OTHERS.values():
        known |= set(options.replace("-", "_").split())
    return known


def flags_of_test_commands() -> set[str]:
    """The flags of the benchmarks, of the tests with clusters and of the acceptance of a machine."""
    files = (file for folder in ("benchmarks", "cluster", "acceptance") for file in ROOT.glob(f"tests/{folder}/*.py"))
    return {name for file in files for name in re.findall(r"add(?:_argument)?\(\s*\"--(\w+)\"", file.read_text())}


@dataclass(frozen=True)
class Cell:
    """A cell of a Markdown table."""

    column: int
    columns: int
    text: str


def table_cells(text: str) -> list[Cell]:
    """All cells of all tables of a page, without their code's vertical bars being mistaken for borders."""
    cells = []
    for line in text.splitlines():
        if line.startswith("|") and not re.fullmatch(r"[|\s:-]+", line):
            parts = [part.strip() for part in re.split(r"(?<!\\)\|", line.strip().strip("|"))]
            cells += [Cell(column, len(parts), part) for column, part in enumerate(parts)]
    return cells


def headings(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", without_code, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
