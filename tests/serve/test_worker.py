"""Work is done in its order; nothing is kept alive by it, and no thread is left."""

import gc
import subprocess
import sys
import threading
import weakref

import pytest

from dvi_jax.serve.worker import Worker
from tests.serve.server.live import until


def test_work_is_done_in_its_order():
    worker, done = Worker("orderly"), []
    futures = [worker.submit(lambda number=number: done.append(number) or number) for number in range(50)]
    assert [future.result(10) for future in futures] == done == list(range(50))


def test_a_fault_is_whose_work_it_is():
    worker = Worker("faulty")
    first, second = worker.submit(lambda: 1 // 0), worker.submit(lambda: 2)
    assert second.result(10) == 2
    with pytest.raises(ZeroDivisionError):
        first.result(10)


def test_what_is_done_is_let_go_and_the_thread_ends():
    class Work:
        def do(self):
            return "done"

    worker, work = Worker("ending"), Work()
    assert worker.submit(work.do).result(10) == "done"
    gone = weakref.ref(work)
    del work
    gc.collect()
    until(lambda: gone() is None)
    del worker
    gc.collect()
    until(lambda: all(thread.name != "ending" for thread in threading.enumerate()))


def test_the_end_of_the_program_waits_for_nothing():
    """Nor is work refused then, while an engine is still to be closed."""
    program = """
import atexit, time
from dvi_jax.serve.worker import Worker
worker = Worker("busy")
atexit.register(lambda: (worker.submit(lambda: time.sleep(60)), print("asked", flush=True)))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, "asked\n", "")
