"""A folder that is written aside, and takes its name when it is whole."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.lock import locked
from runtime.artifact import MANIFEST_FILE
from runtime.errors import OutputError


@contextmanager
def staging(output: Path, overwrite: bool) -> Iterator[Path]:
    """A folder beside `output` to write into; gone at the end, unless `place` renamed it.

    Raises `OutputError`, also while another run has one there.
    """
    if not output.name:
        raise OutputError(f"output {output} is already there: choose another")
    folder = output.with_name(f".{output.name}.partial")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with locked(output.with_name(f".{output.name}.lock"), f"output {output}") as is_alone:
            _check_place(output, overwrite)
            if is_alone:
                shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
            elif folder.exists():
                raise OutputError(f"{folder} is there: of another run, or of one that was killed; if so, remove it")
            folder.mkdir()
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"output {output} cannot be written: {error.strerror or error}") from error


def _check_place(output: Path, overwrite: bool) -> None:
    if _old(output).exists() and not output.exists():  # a run was killed between the two renames of `place`
        _old(output).rename(output)
    if output.exists() and not overwrite:
        raise OutputError(f"output {output} is already there: choose another, or give overwrite=true")
    if output.exists() and not (output / MANIFEST_FILE).is_file():
        raise OutputError(f"output {output} is there and is no artifact: it is not overwritten")


def place(folder: Path, output: Path) -> Path:
    """Rename the staging folder to `output`; what was there goes only once the new one is in place."""
    if not output.exists():
        folder.rename(output)
    elif not _exchange(folder, output):
        old = _old(output)
        shutil.rmtree(old, ignore_errors=True)
        output.rename(old)
        folder.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    return output


def _exchange(one: Path, other: Path) -> bool:
    """Two folders take each other's name in one step, so that at no moment one is missing. False where none can."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "renameat2"):  # not Linux
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE: see renameat2(2)
    return bool(libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _old(output: Path) -> Path:
    return output.with_name(f".{output.name}.old")


def place_failed(folder: Path, output: Path) -> Path:
    """Keep what is out of bounds under another name, that nobody takes for an artifact."""
    failed = output.with_name(f"{output.name}.failed")
    shutil.rmtree(failed, ignore_errors=True)
    folder.rename(failed)
    return failed
