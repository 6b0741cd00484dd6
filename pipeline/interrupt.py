"""Ctrl-C and SIGTERM, by which schedulers end a run: what they break off is no error, whatever a library says."""

from __future__ import annotations

import signal
import threading
from types import FrameType

seen = threading.Event()


def listen() -> None:
    """From now on both raise `KeyboardInterrupt`; a Ctrl-C that is ignored (`nohup`) stays so."""
    seen.clear()
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _stop)


def _stop(_: int, __: FrameType | None) -> None:
    seen.set()
    raise KeyboardInterrupt
