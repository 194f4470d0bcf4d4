"""What every test file shares: one thread, fixed examples and a cache of its own, so that a run repeats."""

import multiprocessing
import os
import tempfile
import traceback

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="rm-tests-")  # the scripts' own cache stays as it is
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Run a test that is marked `apart` in a forked process of its own.

    torch caches where a tensor's parts lie by group, and takes a group on paper, of rank 0, for a real one of the same
    size: ranks that other tests fork off would inherit what is right for rank 0 alone.
    """
    if pyfuncitem.get_closest_marker("apart") is None:
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
    with tempfile.NamedTemporaryFile("w+") as told:

        def run() -> None:
            try:
                pyfuncitem.obj(**arguments)
            except BaseException:
                told.write(traceback.format_exc())
                told.flush()
                os._exit(1)
            os._exit(0)

        process = multiprocessing.get_context("fork").Process(target=run)
        process.start()
        process.join()
        assert process.exitcode == 0, f"in a process of its own:\n{told.seek(0) or told.read()}"
    return True
