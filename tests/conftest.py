"""What all tests share: one thread, fixed random examples and a cache of their own, so that a run is repeatable."""

import inspect
import multiprocessing
import os
import tempfile
import traceback

os.environ["CUDA_VISIBLE_DEVICES"] = (
    ""  # tests run on the CPU, also where there are GPUs: launch/accept.sh is for those
)

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="rm-tests-")  # the user's own cache is left alone
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run a test that is marked `apart` in a forked process of its own.

    torch caches the local shape of a DTensor by process group, and does not distinguish a fake group, which has rank 0
    only, from a real one of the same size: ranks that later tests fork would inherit what is right for rank 0 alone.
    """
    if pyfuncitem.get_closest_marker("apart") is None:
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    with tempfile.NamedTemporaryFile("w+") as failure:

        def run() -> None:
            try:
                pyfuncitem.obj(**arguments)
            except BaseException:
                failure.write(traceback.format_exc())
                failure.flush()
                os._exit(1)
            os._exit(0)

        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        process.join()
        assert process.exitcode == 0, f"in a process of its own:\n{failure.seek(0) or failure.read()}"
    return True
