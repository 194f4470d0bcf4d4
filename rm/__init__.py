"""Supervised fine-tuning and reward modelling in plain PyTorch. The scripts own *when*; this package owns *how*."""

__version__ = "0.1.0"
