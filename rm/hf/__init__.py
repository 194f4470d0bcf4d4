"""Hugging Face folders: model families, weights, adapters, tokenizers' files, the hub, and how a model is built."""
