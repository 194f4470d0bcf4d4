"""Supervised fine-tuning and reward modelling in plain PyTorch. The scripts own *when*; this package owns *how*."""

import os

LAUNCHER = os.getppid()  # asked before torch is imported, which takes seconds in which torchrun may die

__version__ = "0.1.0"
