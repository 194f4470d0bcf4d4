"""What a training script's loop calls: optimizer, evaluation, checkpoints and resume, signals, logs."""
