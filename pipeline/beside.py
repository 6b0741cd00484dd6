"""What float32 gives needs nothing that the recipe makes: of a small network it is computed while that is made.

Lowering is one thread of Python, so a second processor has nothing to do meanwhile. A large network's products take all
processors as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from pipeline.display import Report, silent
from pipeline.float32 import float32_of
from pipeline.load import Loaded
from runtime.limits import alone_in_a_copy
from validation.effort import layer_weights
from validation.float32 import Request

SMALL = 5e7  # weights, up to which one processor has done before the other has lowered
LOOK = 0.2  # seconds
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


@contextmanager
def begun(loaded: Loaded, cache: Path, request: Request) -> Iterator[Callable[[Report], None]]:
    """What `float32_of` gives, in a copy of this process, which leaves it in `cache` and is ended with this context.

    Yields what waits for it. If it fails, or is killed, `float32_of` computes it when it is asked, and says what is
    wrong. Of a large network nothing is begun.
    """
    if torch.get_num_threads() == 1 or layer_weights(loaded.config) > SMALL:
        yield lambda _: None
        return
    work = partial(float32_of, loaded, cache, request, silent)
    copy = multiprocessing.get_context("fork").Process(target=_work, args=(work, os.getpid()))
    copy.start()
    try:
        yield partial(_wait, copy)
    finally:
        copy.kill()
        copy.join()


def _wait(copy: BaseProcess, report: Report) -> None:
    while copy.is_alive():
        report("float32, begun beside lowering")
        copy.join(LOOK)


def _work(work: Callable[[], object], parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):  # Linux's
        libc.prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    alone_in_a_copy()
    # Nothing of it is for the user's eyes: what it could say, the parent says when it asks for the same.
    with contextlib.suppress(Exception), Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        sys.stdout = sys.stderr = nowhere
        work()
