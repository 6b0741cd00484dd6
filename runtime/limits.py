"""Work on foreign bytes in a process of its own, with limits on time and memory: what it breaks, it breaks there."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, ParamSpec, TypeVar

from runtime.memory import private

P = ParamSpec("P")
T = TypeVar("T")


class LimitError(RuntimeError):
    """Work that crashed, or took more time or memory than it was given."""


def limited(seconds: int, n_bytes: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`work(…)` in a copy of this process that may take so much more memory, and may write files of so many bytes.

    Raises what it raises, and `LimitError`.
    """
    context = multiprocessing.get_context("fork")  # what is imported here is there, and need not be imported again
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, n_bytes, work, args, kwargs))
    child.start()
    assert child.pid is not None
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise LimitError(f"it took longer than {seconds} s")
        is_result, outcome = receiver.recv()
    except EOFError:
        child.join()
        raise LimitError(f"it crashed ({died_of(child.exitcode or 0)})") from None
    finally:
        receiver.close()
        with contextlib.suppress(ProcessLookupError):  # it may not have a group of its own yet
            os.killpg(child.pid, signal.SIGKILL)  # and what it has started
        child.kill()
        child.join()
    if is_result:
        return outcome
    raise LimitError(f"it took more than {n_bytes >> 20} MiB") if isinstance(outcome, MemoryError) else outcome


def _child(sender: Connection, n_bytes: int, work: Callable[..., Any], args: Any, kwargs: Any) -> None:
    os.setpgid(0, 0)  # Ctrl-C is for the parent, which ends this group
    alone_in_a_copy()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    faulthandler.disable()  # the parent says that it crashed
    restrict(n_bytes)
    try:
        outcome: tuple[bool, Any] = True, work(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 (all of them are the parent's to judge)
        outcome = False, error
    sender.send(outcome)


def alone_in_a_copy() -> None:
    """In a process that was forked: torch's other threads are not in it, and OpenMP would wait for them for ever."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def restrict(n_bytes: int) -> None:
    """From now on this process may take so much more memory, and write files of so many bytes.

    A crash of it leaves no core file.
    """
    for limit, value in (
        (resource.RLIMIT_DATA, private() + n_bytes),
        (resource.RLIMIT_FSIZE, n_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(limit)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def restrict_to_program(n_bytes: int, planned_memory: float, longest: int, more: int = 0) -> None:
    """To what a program of so many bytes may take, twice over, but never to more than this machine has.

    That is its weights, packed for the processor, its arenas, the scores of its longest call, in tokens, and `more`.
    """
    scores = 64 * 4 * longest**2  # of 64 heads
    needed = 2**29 + 2 * n_bytes + max(0, int(planned_memory)) + scores + more
    restrict(min(2 * needed, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))


def end_if_loading_hangs(n_bytes: int) -> None:
    """The kernel ends this process if nothing else is allowed within two minutes, and what so many bytes explain."""
    signal.setitimer(signal.ITIMER_REAL, 120 + n_bytes // 2**24)


def end_if_call_hangs(T: int, n_bytes: int) -> None:
    """Likewise, after a minute more than a slow processor would take for T tokens."""
    signal.setitimer(signal.ITIMER_REAL, 60 + T * n_bytes / 2**30)


def how_it_ended(child: subprocess.CompletedProcess[str], doing: str) -> str:
    """In one line, why a process that was running a program ended with something else than 0."""
    lines = [line for line in child.stderr.strip().splitlines() if "cpuinfo" not in line]
    if child.returncode == -signal.SIGALRM:
        return "the runtime hung: a call took longer than a minute and what its size explains"
    if child.returncode < 0:
        words = f": {lines[-1]}" if lines else ""
        return f"the runtime crashed ({died_of(child.returncode)}) while {doing} it{words}"
    return lines[-1] if lines else f"exit code {child.returncode}"


def died_of(exitcode: int) -> str:
    """The name of the signal, for the exit code of a process that one ended."""
    return signal.Signals(-exitcode).name if exitcode < 0 else f"exit code {exitcode}"
