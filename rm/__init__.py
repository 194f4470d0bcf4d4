"""Supervised fine-tuning and reward modelling in plain PyTorch. The scripts say *when* things happen, this package
*how*."""

import os

# Read before torch is imported, which takes seconds in which torchrun may die (`rm.distributed.process_group`).
LAUNCHER = os.getppid()

__version__ = "0.2.0.dev0"
