"""Runs of one machine share its memory: one begins when what it needs fits beside what the others were estimated at."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from rich.console import Console

from pipeline.estimate import available_memory
from pipeline.lock import AGAIN, in_turn
from report.terminal import mib
from runtime.errors import OutputError, ResourceError, UsageError


@contextmanager
def admitted(needed: int, limit: int | None, console: Console) -> Iterator[None]:
    """Waits, and says so, until so many bytes fit. limit: bytes of all runs together; None for what is free.

    Where no other run is, nobody waits. Raises `ResourceError` for what never fits, and `OutputError`.
    """
    if limit is not None and limit <= 0:
        raise UsageError(f"memory {limit}: bytes, above 0")
    if limit is not None and needed > limit:
        raise ResourceError(f"{mib(needed)} of memory are needed, memory={limit} allows {mib(limit)}")
    folder = Path(tempfile.gettempdir()) / f"dreamedge-memory-{os.getuid()}"
    share = folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.share"  # in containers two may have one number
    is_told = False
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        while True:
            with in_turn(folder / ".lock"):
                others = _others(folder)
                if not others or _fits(needed, limit, others):
                    descriptor = os.open(share, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.write(descriptor, json.dumps(needed).encode())
                    break
            if not is_told:
                took = f"{len(others)} other runs take up to {mib(sum(others.values()))}"
                said = f"waits for memory: {mib(needed)} are needed, {took}"
                console.print(said, highlight=False, markup=False, soft_wrap=True)
                is_told = True
            time.sleep(AGAIN)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        share.unlink(missing_ok=True)
        os.close(descriptor)


def _others(folder: Path) -> dict[int, int]:
    """Bytes by process. What a killed one has left is nobody's: the kernel let its lock go."""
    found = {}
    for file in folder.glob("*.share"):
        process = int(file.stem.partition("-")[0])
        with file.open("rb") as opened:
            try:
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found[process] = int(json.load(opened))
            else:
                file.unlink()
    return found


def _fits(needed: int, limit: int | None, others: dict[int, int]) -> bool:
    """Beside what the others may still take: what they have taken is not free any more."""
    if limit is not None and needed + sum(others.values()) > limit:
        return False
    coming = sum(max(0, most - _taken(process)) for process, most in others.items())
    return needed + coming <= available_memory()


def _taken(process: int) -> int:
    """Bytes that are not pages of files, with those of the processes that it has started."""
    try:
        first = psutil.Process(process)
        infos = [one.memory_info() for one in (first, *first.children(recursive=True))]
    except psutil.Error:
        return 0
    return sum(info.rss - info.shared for info in infos)
