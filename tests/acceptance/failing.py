"""train_rm.py whose last process runs out of memory in the third step, while the others wait in a collective."""

import os
import sys

import torch

import train_rm
from rm import cli
from rm.config import parse
from rm.distributed import process_group as dist

FAILS_AT = 3
train_step, calls = train_rm.train_step, 0


def failing_step(*args):
    global calls
    calls += 1
    if calls == FAILS_AT and dist.rank() == dist.world_size() - 1:
        print("this process fails now", flush=True)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    return train_step(*args)


def run_train_rm() -> None:
    """What train_rm.py does as a program."""
    sys.argv[0] = os.path.join(os.path.dirname(train_rm.__file__), "train_rm.py")
    with cli.one_line_errors():
        settings = parse(train_rm.Settings, train_rm.__doc__)
        with dist.session(settings.run.seed):
            train_rm.main(settings)


if __name__ == "__main__":
    train_rm.train_step = failing_step
    run_train_rm()
