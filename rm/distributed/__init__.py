"""Several processes: the process group and its collectives, sharding, and checkpoints of a sharded training."""
