"""python -m rm.serve: a reward model over HTTP, batched over all clients."""
