"""Memory of what is only mapped: give it back, or have it read while something else is done. And of what is large."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MADV_WILLNEED, MADV_DONTNEED = 3, 4
ALIGNMENT = 64  # bytes, as torch's own
WORTH = 2**20  # bytes of all tensors: to look where they are mapped takes a millisecond


def large(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As `torch.empty`, in pages of 2 MiB where the system gives them to who asks: numpy does, torch does not.

    A matrix of 7B's in float32 has 66,000 pages of 4 KiB, whose faults take three times what it takes to fill it. To
    have torch ask for all its memory (THP_MEM_ALLOC_ENABLE) makes quantization slower, whose pieces are small.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(n_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return torch.from_numpy(memory[start : start + n_bytes]).view(dtype).view(tuple(shape))


def release(*tensors: Tensor) -> None:
    """Drop the pages of tensors that are mappings of safetensors files; others, and little, are left as they are.

    The system would drop them only when it is short of memory, and until then counts them as this process's. They
    stay in its file cache: to read them again is cheap.
    """
    _advise(tensors, MADV_DONTNEED)


def read_ahead(*tensors: Tensor) -> None:
    """Have the system read, on the side, the pages of tensors that are mappings of safetensors files."""
    _advise(tensors, MADV_WILLNEED)


def _advise(tensors: tuple[Tensor, ...], advice: int) -> None:
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors) < WORTH:
        return
    mapped = _mapped()
    for tensor in tensors:
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
        # Anonymous memory must not be dropped: it would be lost.
        if any(low <= start and end <= high for low, high in mapped):
            # Pages at the ends may be another tensor's too: those are read again.
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            _libc().madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), advice)


def _mapped() -> list[tuple[int, int]]:
    maps = Path("/proc/self/maps")
    if not maps.exists():  # not Linux
        return []
    lines = (line.split() for line in maps.read_text().splitlines() if line.endswith(".safetensors"))
    ends = (line[0].split("-") for line in lines)
    return [(int(low, 16), int(high, 16)) for low, high in ends]


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
