"""What every test file shares: one thread, fixed examples and a cache of its own, so that a run repeats."""

import os
import tempfile

import hypothesis
import torch

torch.set_num_threads(1)
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="rm-tests-")  # the scripts' own cache stays as it is
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")
