"""The packed weights of a program, kept in a file: what opens it again maps them, and packs nothing.

XNNPACK packs all weights whenever a program is loaded, on one thread. executorch 1.5.1 can pack into a file
(XNNWeightsCache.cpp), but takes its path only from C++ that loads a method. So this gives the path to the cache that
methods loaded from Python share: four functions of executorch's libraries, called by their C++ names. The layouts are
those of the pinned version, and of libstdc++; tests/test_packed.py sees whether they hold.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.metadata
import mmap
import os
import re
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.delegates import BACKEND, delegates, matrices, named_data, segments
from runtime.processor import features

VERSION = "1.5.1"
MAGIC = b"CWPX"  # before the last four bytes of a complete file: what a killed process left has none
BY_CONTENT = re.compile("(scale_)?[0-9a-f]{64}")  # the names of an exporter that names constants by their sha256
_SET_OPTION = "_ZN10executorch7runtime10set_optionEPKcNS0_4SpanINS0_13BackendOptionEEE"
_GET_BACKEND = "_ZN10executorch7runtime17get_backend_classEPKc"
_STRING = "RKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE"
_GET_CACHE = f"_ZN10executorch8backends7xnnpack21XnnpackBackendOptions27get_or_create_weights_cacheE{_STRING}"
_SET_PATH = f"_ZN10executorch8backends7xnnpack8delegate15XNNWeightsCache21set_packed_cache_pathE{_STRING}"

_used: Path | None = None


class PackedError(RuntimeError):
    """Packed weights cannot be kept there, or by this runtime."""


class _Option(ctypes.Structure):
    """`BackendOption`: a key, and a variant of bool, int and text."""

    _fields_ = (("key", ctypes.c_char * 64), ("value", ctypes.c_int32 * 64), ("kind", ctypes.c_uint8))


class _Options(ctypes.Structure):
    _fields_ = (("data", ctypes.POINTER(_Option)), ("size", ctypes.c_size_t))


class _String(ctypes.Structure):
    _fields_ = (("data", ctypes.c_char_p), ("size", ctypes.c_size_t), ("short", ctypes.c_char * 16))


class _Cache(ctypes.Structure):
    """`Result<std::shared_ptr<XNNWeightsCache>>`: never freed, so the backend hands out the same one from now on."""

    _fields_ = (("pointer", ctypes.c_void_p), ("count", ctypes.c_void_p), ("ok", ctypes.c_bool))


@contextmanager
def packed_weights(program: Path, folder: Path, libraries: Path) -> Iterator[None]:
    """While inside, `program` is loaded with what `folder` has of it, or leaves it there.

    libraries: the folder of executorch's. A process can do so for one program; for others it raises `PackedError`.
    While one process has the file open, another one packs for itself.
    """
    global _used
    if (version := importlib.metadata.version("executorch")) != VERSION:
        raise PackedError(f"packed weights can be kept by executorch {VERSION}, this is {version}")
    packed = folder / f"{identity(program)}.packed"
    if _used is not None and _used != packed:
        raise PackedError(f"{program}: this process already keeps the packed weights of another program, {_used}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(folder)
        if packed.exists() and not _complete(packed):
            packed.unlink()
    except OSError as error:
        raise PackedError(f"{folder}: packed weights cannot be kept there: {error.strerror}") from error
    written = packed
    if not packed.exists():
        written = folder / f".{packed.name}.{os.getpid()}.partial"
        _check_room(program, folder)
        _check_constants(program)
    if _used is None:
        _set_path(libraries, written)
    _used = packed
    _enable(libraries, True)
    try:
        yield
        if written != packed and written.exists():
            if not _complete(written):
                raise PackedError(
                    f"{folder}: packed weights cannot be kept there: the runtime did not write all of them"
                )
            written.replace(packed)
    finally:
        _enable(libraries, False)
        if written != packed:
            written.unlink(missing_ok=True)


def identity(program: Path) -> str:
    """Of a `.pte`, by its header and its delegates, which have the sha256 of all constants; version and processor.

    Raises `PackedError` for a program of which that does not say how each matrix is packed.
    """
    digest = hashlib.sha256(VERSION.encode())
    with program.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            _check_names(program, data)
            digest.update(data[: int.from_bytes(data[16:24], "little")])  # the flatbuffer; the segments follow it
            for delegate in delegates(data):
                digest.update(data[delegate.start : delegate.start + delegate.size])
        except (struct.error, LookupError, ValueError) as error:
            raise PackedError(f"{program}: damaged: {error}") from error
    digest.update(" ".join(sorted(features())).encode())
    return digest.hexdigest()[:32]


def _check_names(program: Path, data: mmap.mmap) -> None:
    """The runtime keeps what it packed by the names of weights and bias: other scales under them are not seen."""
    if other := [name for name in named_data(data) if not BY_CONTENT.fullmatch(name)]:
        raise PackedError(
            f"{program}: packed weights cannot be kept: {other[0]!r} does not name a constant by its sha256"
        )
    packed_by: dict[tuple[object, ...], tuple[object, ...]] = {}
    for matrix in matrices(data):
        if packed_by.setdefault(matrix.name, matrix.packed_by) != matrix.packed_by:
            raise PackedError(
                f"{program}: packed weights cannot be kept: two matrices, one of {' x '.join(map(str, matrix.shape))}, "
                "have the same numbers but other scales or shapes, and the runtime would take one for the other: "
                "open it without packed_cache"
            )


def _check_constants(program: Path) -> None:
    """What is kept is used later without a look at the constants themselves. Reads all of the program."""
    with program.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        places = segments(data)
        for name, i in named_data(data).items():
            start, size = places[i]
            if hashlib.sha256(memoryview(data)[start : start + size]).hexdigest() != name[-64:]:
                raise PackedError(f"{program}: damaged: its constant {name} is not what it was made with")


def _remove_left_behind(folder: Path) -> None:
    """Files of killed processes: the runtime holds a lock on what it is writing."""
    for file in folder.glob(".*.packed.*.partial"):
        with contextlib.suppress(OSError), file.open("rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()


def _complete(packed: Path) -> bool:
    with packed.open("rb") as opened:
        opened.seek(max(0, packed.stat().st_size - 8))
        return opened.read(4) == MAGIC


def _check_room(program: Path, folder: Path) -> None:
    """A full disk would end the process: the runtime writes through a map."""
    needed, free = 2 * program.stat().st_size, shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        raise PackedError(f"{folder}: packed weights cannot be kept there: it is not writable")
    if free < needed:
        raise PackedError(f"{folder}: packed weights may take {needed >> 20:,} MiB, {free >> 20:,} are free")


def _enable(libraries: Path, enabled: bool) -> None:
    option = _Option(b"weight_cache_enabled")
    option.value[0] = enabled
    set_option = getattr(ctypes.CDLL(str(libraries / "libexecutorch.so")), _SET_OPTION)
    set_option.argtypes = (ctypes.c_char_p, _Options)
    if error := set_option(BACKEND.encode(), _Options(ctypes.pointer(option), 1)):
        raise PackedError(f"the runtime refuses to keep packed weights: its error {error:#x}")


def _set_path(libraries: Path, file: Path) -> None:
    get_backend = getattr(ctypes.CDLL(str(libraries / "libexecutorch.so")), _GET_BACKEND)
    get_backend.argtypes, get_backend.restype = (ctypes.c_char_p,), ctypes.c_void_p
    xnnpack = ctypes.CDLL(str(libraries / "libexecutorch_backend_xnnpack.so"))
    get_cache, set_path = (getattr(xnnpack, name) for name in (_GET_CACHE, _SET_PATH))
    get_cache.argtypes, get_cache.restype = (ctypes.c_void_p, ctypes.POINTER(_String)), _Cache
    set_path.argtypes, set_path.restype = (ctypes.c_void_p, ctypes.POINTER(_String)), None
    options = get_backend(BACKEND.encode()) + ctypes.sizeof(ctypes.c_void_p)  # its first member
    cache = get_cache(options, _string(b""))  # of methods that were loaded without a path
    if not cache.ok:
        raise PackedError("the runtime has no cache of packed weights")
    set_path(cache.pointer, _string(os.fsencode(file.absolute())))


def _string(text: bytes) -> ctypes._Pointer[_String]:
    return ctypes.pointer(_String(text, len(text)))
