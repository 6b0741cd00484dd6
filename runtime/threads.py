"""The threads that the runtime computes in: one pool for all programs of a process.

The runtime makes as many as the machine has processors, whatever OMP_NUM_THREADS, an affinity (`taskset`) or a
container's limit say. How many processors the last two leave is in `runtime/processor.py`.
"""

from __future__ import annotations

import gc

from runtime.errors import UsageError
from runtime.processor import available
from runtime.program import captured_stderr, executorch_runtime, open_programs

MOST = 1024


def thread_count() -> int:
    executorch_runtime()
    from executorch.extension.pybindings import portable_lib

    with captured_stderr():  # the first time it looks at the processor, and says so
        return int(portable_lib._threadpool_get_thread_count())


def use_threads(threads: int | None = None) -> int:
    """Set how many, before any program is opened. Returns how many there are.

    threads: None for the runtime's own choice, but no more than there are processors for this process.

    Raises `UsageError` for a number that cannot be, or while a program is open, which computes in the pool there is.
    """
    check_threads(threads)
    now = thread_count()
    wanted = min(now, available()) if threads is None else threads
    if wanted == now:
        return now
    gc.collect()  # a program that nobody holds any more
    if open_programs:
        if threads is None:
            return now
        raise UsageError(f"threads {threads}: a program is open, which computes in {now}: set them before it is opened")
    from executorch.extension.pybindings import portable_lib

    with captured_stderr():
        portable_lib._unsafe_reset_threadpool(wanted)
    return thread_count()


def check_threads(threads: int | None) -> None:
    """Raises `UsageError`."""
    if threads is not None and not 1 <= threads <= MOST:
        raise UsageError(f"threads {threads}: must be from 1 to {MOST}")


def warning(threads: int | None) -> str | None:
    """A line for more threads than processors: they wait for each other."""
    n = available()
    if threads is None or threads <= n:
        return None
    processors = f"{n} processor{'s' * (n > 1)}"
    return f"threads {threads}: this process may use {processors}, and more threads than that slow each other down"
