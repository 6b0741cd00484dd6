"""The memory of this process, as the kernel counts it."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import sys
import threading
from pathlib import Path

MADV_DONTNEED = 4
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory() -> dict[str, int]:
    """Resident bytes of this process now: anonymous, and pages of mapped files, which the system can drop."""
    return {"anonymous": _status("RssAnon"), "file": _status("RssFile")}


def private() -> int:
    """Bytes that this process may write and shares with no other, resident or not: what RLIMIT_DATA counts."""
    return _status("VmData")


def peak_rss() -> int:
    """The high-water mark of this process since the last reset, bytes."""
    return _status("VmHWM")


def reset_peak_rss() -> None:
    with contextlib.suppress(OSError):  # not Linux, or a container that does not let us
        _CLEAR_REFS.write_text("5")  # see proc(5): resets VmHWM


def collect_seldom() -> None:
    """Of this process: a fifth of the time that torch and executorch take to import goes to Python's collector, which
    looks through their million objects again and again (measured: 1.1 of 4.9 s). So it does at the end, for a second
    (findings/python_ends_slowly_after_torch.sh).
    """
    gc.set_threshold(20_000, 50, 100)
    atexit.register(gc.freeze)


def give_back_from(n_bytes: int) -> None:
    """What was allocated in so many bytes or more goes back to the system when it is freed, from now on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-3, n_bytes)  # M_MMAP_THRESHOLD of mallopt(3)


def mapped(file: Path) -> list[tuple[int, int]]:
    """Where the file is mapped into this process: (address, bytes) of each place."""
    maps = Path("/proc/self/maps")
    if not maps.exists():  # not Linux
        return []
    name = f" {file.resolve()}"
    lines = [line for line in maps.read_text(encoding="utf-8").splitlines() if line.endswith(name)]
    places = [[int(address, 16) for address in line.split()[0].split("-")] for line in lines]
    return [(start, end - start) for start, end in places]


def unpin(places: list[tuple[int, int]]) -> None:
    """Let the system drop the pages of a mapped file, and drop those that are in memory now.

    The runtime locks what it maps, where it may: the whole embedding of a program would stay resident for the few rows
    that a call reads. places: of `mapped`, as long as they are.
    """
    libc = ctypes.CDLL(None)
    for start, n_bytes in places:
        place = (ctypes.c_void_p(start), ctypes.c_size_t(n_bytes))
        libc.munlock(*place)
        libc.madvise(*place, MADV_DONTNEED)


class PeakAnonymous:
    """While open, the most anonymous memory that was seen, bytes: the kernel keeps no high-water mark of it."""

    def __init__(self, every_seconds: float = 0.05) -> None:
        self.bytes = 0
        self._every = every_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakAnonymous:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, memory()["anonymous"])
            if self._ended.wait(self._every):
                return


def _status(name: str) -> int:
    lines = _STATUS.read_text(encoding="utf-8").splitlines() if _STATUS.exists() else []
    for line in lines:
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    import resource  # not Linux, or a kernel that does not say: the most so far is all that the standard library knows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
