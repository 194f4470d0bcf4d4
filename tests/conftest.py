"""What every test file shares: one thread and fixed examples, so that a run repeats."""

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")
