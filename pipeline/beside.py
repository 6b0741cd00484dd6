"""What eager gives needs no program: of a small network it is computed while that is made.

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
from pipeline.quantize import Quantized
from runtime.limits import alone_in_a_copy
from validation.effort import layer_weights
from validation.float32 import Request
from validation.recording import make_reference
from validation.reference import Reference, load_reference, save_reference

SMALL = 5e7  # weights of the models that are computed, up to which one processor has done before the other has lowered
LOOK = 0.2  # seconds
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


@contextmanager
def float32_begun(loaded: Loaded, cache: Path, request: Request) -> Iterator[Callable[[Report], None]]:
    """What `float32_of` gives, in a copy of this process, which leaves it in `cache` and is ended with this context.

    Yields what waits for it. If it fails, or is killed, `float32_of` computes it when it is asked, and says what is
    wrong. Of a large network nothing is begun.
    """
    with _begun(loaded, lambda: float32_of(loaded, cache, request, silent), "float32") as wait:
        yield wait


@contextmanager
def reference_begun(
    loaded: Loaded, quantized: Quantized, cache: Path, request: Request, folder: Path
) -> Iterator[Callable[[Report], Reference | None]]:
    """What `make_reference` gives, in the same way. Yields what waits for it: None where it is to be computed yet.

    folder: where it lies until it is taken.
    """
    half, file = (folder / f"begun.{name}" for name in ("partial", "safetensors"))

    def leave() -> None:
        found = float32_of(loaded, cache, request, silent)
        save_reference(make_reference(quantized.weights, found, quantized.plain, request, silent), half)
        half.rename(file)

    with _begun(loaded, leave, "calls in eager", models=3) as wait:

        def take(report: Report) -> Reference | None:
            wait(report)
            reference = load_reference(file) if file.exists() else None
            for left in (half, file):  # what is mapped stays
                left.unlink(missing_ok=True)
            return reference

        yield take


@contextmanager
def _begun(
    loaded: Loaded, work: Callable[[], object], what: str, models: int = 1
) -> Iterator[Callable[[Report], None]]:
    if torch.get_num_threads() == 1 or models * layer_weights(loaded.config) > SMALL:
        yield lambda _: None
        return
    copy = multiprocessing.get_context("fork").Process(target=_work, args=(work, os.getpid()))
    copy.start()
    try:
        yield partial(_wait, copy, what)
    finally:
        copy.kill()
        copy.join()


def _wait(copy: BaseProcess, what: str, report: Report) -> None:
    while copy.is_alive():
        report(f"{what}, begun beside lowering")
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
