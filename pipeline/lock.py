"""One writer at a time: a second one is told of the first, and a killed one is in nobody's way."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import OutputError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)  # some network file systems
AGAIN = 0.2  # seconds between two looks at whose turn it is


@contextmanager
def locked(file: Path, what: str) -> Iterator[bool]:
    """Holds the lock of `file`, which is gone at the end; that of a killed process the kernel lets go.

    Yields whether nobody else can be in here: not so where the file system has no locks. Raises `OutputError`, which
    says who is writing to `what`, and `OSError`.
    """

    def refuse(holder: str) -> None:
        raise OutputError(f"{what} cannot be written: another run is writing to it, {holder}")

    with _held(file, refuse) as is_alone:
        yield is_alone


@contextmanager
def in_turn(file: Path, waiting: Callable[[str], object] = lambda _: None) -> Iterator[bool]:
    """As `locked`, when it is this process's turn. waiting: is told for whom, once. Raises `OSError`."""
    told: list[str] = []

    def wait(holder: str) -> None:
        if not told:
            waiting(holder)
        told.append(holder)
        time.sleep(AGAIN)

    with _held(file, wait) as is_alone:
        yield is_alone


@contextmanager
def _held(file: Path, busy: Callable[[str], None]) -> Iterator[bool]:
    """busy: is told who has the lock, again and again until nobody has, unless it raises."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            is_alone = _lock(descriptor)
            if is_alone is None:
                busy(os.pread(descriptor, 200, 0).decode(errors="replace") or "a process that has just begun")
                continue
            if not _is_still(descriptor, file):
                continue
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            try:
                yield is_alone
            finally:
                file.unlink(missing_ok=True)  # before the lock goes: who has opened the file by now finds it gone
            return
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool | None:
    """None: another has it. False: there are no locks here."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _is_still(descriptor: int, file: Path) -> bool:
    """Whether it was not removed between its opening and its lock, by the process that had the lock then."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
