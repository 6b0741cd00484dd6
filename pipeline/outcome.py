"""How work ends: a line for each error and warning, and an exit code."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline import interrupt
from pipeline.config import ROOMS
from pipeline.console import err
from runtime.errors import INTERNAL_ERROR, PipelineError, one_line

HEARD = {*ROOMS, "serving"}  # whose warnings are ours


def outcome(work: Callable[[], None]) -> tuple[int, str]:
    """(0, nothing), or (what is documented for the error, what is said of it); that line is on stderr then."""
    try:
        work()
    except Exception as error:  # the last resort: a line, not a traceback
        if interrupt.seen.is_set():
            raise KeyboardInterrupt from error
        if isinstance(error, PipelineError):
            return fail(str(error), error.exit_code), str(error)
        if os.environ.get("DREAMEDGE_TRACEBACK"):
            raise
        said = f"internal error: {type(error).__name__}: {error}"
        return fail(f"{said} (please report it; DREAMEDGE_TRACEBACK=1 shows where)", INTERNAL_ERROR), said
    return 0, ""


def fail(message: str, exit_code: int) -> int:
    err.print(f"error: {one_line(message)}", markup=False)
    return exit_code


def be_heard() -> None:
    """Our warnings are lines as all others. At each job Hydra removes handlers, silences loggers, raises the level."""
    if not any(isinstance(handler, _Lines) for handler in logging.root.handlers):
        logging.root.addHandler(_Lines())
    logging.root.setLevel(logging.WARNING)
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and name.partition(".")[0] in HEARD:
            logger.disabled = False


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] in HEARD:  # a library's are nothing that a user can act on
            err.print(one_line(f"{record.levelname.lower()}: {record.getMessage()}"), markup=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Torch, torchao and executorch warn about each other and about absent GPUs: nothing that a user can act on."""
    be_heard()
    for name in ("torchao", "torch.utils._pytree", "executorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
