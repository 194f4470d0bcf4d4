"""The demo world: reproducible, held out, without a giveaway, in the recipe's format, and readable by transformers."""

import collections
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rm import demo
from tests import tiny  # noqa: F401  (turns off progress bars of transformers where it is there)

DIALOGUE = re.compile(r"(###Human: [^#]+###Assistant: [^#]+){1,3}")
FILES = ["sft.json", "rm_train.jsonl", "rm_test.jsonl"]
