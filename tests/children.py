"""What tests run in a child in place of a program, by its first argument."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable

from runtime.limits import restrict
from validation import trace

been_here: list[int] = []


def main() -> None:
    ways: dict[str, Callable[[], object]] = {
        "complains": complains,
        "counts": counts,
        "crashes": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "ends": lambda: say("ends"),
        "environment": lambda: say(os.environ["DREAMEDGE_TEST"]),
        "exits": lambda: sys.exit(3),
        "hangs": lambda: os.kill(os.getpid(), signal.SIGALRM),
        "raises": lambda: 1 / 0,
        "records-in-too-little": lambda: record("restrict_to_program", lambda *_: restrict(0), 2**30),
        "records-too-long": lambda: record("end_if_call_hangs", never_ends),
        "sleeps": lambda: say("a", 60),
        "speaks": lambda: say("a", 1),
        "tells": lambda: say(f"{os.getpid()} {os.getppid()}", 60),
    }
    ways[sys.argv[1]]()


def say(what: str, seconds: float = 0) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()
    time.sleep(seconds)


def complains() -> None:
    say("a")
    sys.stderr.write("x" * 2**20 + "\n")
    say("b")
    sys.exit("at last")


def counts() -> None:
    been_here.append(1)
    os.chdir("/")
    signal.setitimer(signal.ITIMER_REAL, 60)
    say(f"{len(been_here)} {'torch' in sys.modules}")


def record(name: str, limit: Callable[..., None], n_bytes: int | None = None) -> None:
    """As `validation.trace` does, with another limit, and a record of so many bytes: more than the heap has free."""
    setattr(trace, name, limit)
    sys.argv = sys.argv[1:]
    sys.argv[3] = str(n_bytes or sys.argv[3])
    trace.main()


def never_ends(*_: object) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    time.sleep(60)
