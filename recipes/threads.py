"""Work by as many threads as torch has, each of which computes alone: no number of them changes a bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

_n_threads: int | None = None  # of the maps, while torch has one alone


def by_slices(n: int, size: int, fill: Callable[[slice], None]) -> None:
    """Calls `fill` for 0 .. n, so many at a time, by as many threads as torch has."""
    slices = [slice(start, start + size) for start in range(0, n, size)]
    if len(slices) == 1:  # threads would take longer to begin
        fill(slices[0])
        return
    with one_thread_each() as workers:
        list(workers(fill, slices))


@contextmanager
def one_thread_each() -> Iterator[Callable[..., Iterator[Any]]]:
    """Maps a function over parts of the work. torch itself has one thread inside, in maps and beside them.

    It would give each thread a part of a tensor, and what is left of a vector's width at its end another formula: SiLU
    has other bits there, and with another number of threads in other places (findings/torch_silu_follows_threads.sh).
    """
    global _n_threads
    outer, torchs = _n_threads, torch.get_num_threads()
    _n_threads = outer or torchs
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(_n_threads, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            yield threads.map
    finally:
        _n_threads = outer
        torch.set_num_threads(torchs)
