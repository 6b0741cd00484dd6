"""A job of a sweep, in whichever process and on whichever machine: what is made already is not made again, and what
became of it is noted beside the sweep.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from pipeline.config import source_files
from pipeline.console import out
from pipeline.lock import in_turn
from pipeline.outcome import be_heard, fail, outcome, quiet
from pipeline.schema import RunConfig
from runtime.artifact import ArtifactError, read_manifest
from runtime.errors import OutputError, UsageError, one_line

BEGUN = ".begun"  # the note of an artifact that is being made
# Keys that change where an artifact lies and when it is made, and nothing of what is in it.
ELSEWHERE = ("output", "cache", "force", "overwrite", "memory", "packed_cache")


@dataclass(frozen=True)
class Sweep:
    """What a job knows of the sweep that it is one of. folder: for the records.

    home, host, process: the command's working folder, machine and process. outputs: by the overrides of a job; of one
    that is not among them, which a search has asked for, it is the config's own and a digest.
    """

    id: str
    folder: Path
    home: Path
    host: str
    process: int
    outputs: dict[tuple[str, ...], str]


@dataclass(frozen=True)
class Record:
    """What became of a job. sweep: that asked for it. number: its place in there. code: None while it runs.

    made_of: digest of all that decides what is made. manifest: sha256 of the artifact's, which names all its files;
    while it runs, of the one that was there before.
    seconds: all that it took. peak_memory: bytes, of the process. read, written: bytes from and to disks; None where
    the system does not count them. objectives: bytes of the program, nats, and seconds of the calls that validated it.
    earlier: it was made for a sweep before.
    """

    sweep: str
    number: int
    output: str
    overrides: list[str]
    made_of: str
    host: str
    process: int
    code: int | None = None
    error: str = ""
    manifest: str = ""
    seconds: float = 0.0
    peak_memory: int = 0
    read: int | None = None
    written: int | None = None
    objectives: list[float] | None = None
    earlier: bool = False


def run_job(
    asked: Callable[[], RunConfig],
    default: str,
    sweep: Sweep,
    number: int,
    overrides: list[str],
    run: Callable[[RunConfig], None],
) -> list[float] | None:
    """The objectives of what was made; None where nothing was. Raises nothing that a user can cause.

    asked: raises `UsageError` for keys and values that there are not. default: the output that the config names.
    """
    output = sweep.outputs.get(tuple(overrides)) or f"{default}-{_digest(overrides)[:8]}"
    objectives: list[float] | None = None

    def work() -> None:
        nonlocal objectives
        try:
            sweep.folder.mkdir(parents=True, exist_ok=True)
            lock = note_file(sweep.folder, output).with_suffix(".lock")
            begun = Record(sweep.id, number, output, overrides, "", socket.gethostname(), os.getpid())
            with in_turn(lock, lambda holder: _say(f"{output}: waits for {holder}")):
                result_file(sweep, output).parent.mkdir(exist_ok=True)
                objectives = _turn(asked, begun, sweep, run).objectives
        except OSError as error:
            raise OutputError(f"sweep {sweep.folder} cannot be written: {error.strerror or error}") from error

    with _heard(sweep, note_file(sweep.folder, output).with_suffix(".log")):
        outcome(work)
    return objectives


def note_file(folder: Path, output: str) -> Path:
    """Of what was made, whatever sweep asked for it."""
    return folder / f"{Path(output).name[:100]}-{_digest(str(Path(output).resolve()))[:8]}.json"


def result_file(sweep: Sweep, output: str) -> Path:
    """Of what became of it in this sweep."""
    return sweep.folder / sweep.id / note_file(sweep.folder, output).name


def read_record(file: Path) -> Record | None:
    """None for one that is not there, or is another version's. Raises `OSError`."""
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
        return Record(**json.loads(file.read_text(encoding="utf-8")))
    return None


def _turn(asked: Callable[[], RunConfig], begun: Record, sweep: Sweep, run: Callable[[RunConfig], None]) -> Record:
    note, result = note_file(sweep.folder, begun.output), result_file(sweep, begun.output)
    before = read_record(result)
    if before is not None and before.code is not None:
        return before  # the launcher asks again
    try:
        config = replace(asked(), output=begun.output)
        begun = replace(begun, made_of=_made_of(config), manifest=_manifest(begun.output))
    except OSError as error:
        return _refused(result, begun, UsageError(f"{error.filename}: {error.strerror or error}"))
    except UsageError as error:
        return _refused(result, begun, error)
    if not config.overwrite and (made := _made(note, begun.made_of)) is not None:
        _say(f"{begun.output}: is there")
        if config.packed_cache is not None:
            outcome(lambda: _pack(config))
        made = replace(made, sweep=begun.sweep, number=begun.number, overrides=begun.overrides, earlier=True)
        return _write(result, made)
    _write(result, begun)
    _write(note.with_suffix(BEGUN), begun)
    _say(f"{begun.output}: begun")
    disk, started = _disk(), time.perf_counter()
    code, said = outcome(lambda: run(config))
    ended, now = time.perf_counter(), _disk()
    record = replace(begun, code=code, error=one_line(said), seconds=round(ended - started, 3), peak_memory=_peak())
    if disk is not None and now is not None:
        record = replace(record, read=now[0] - disk[0], written=now[1] - disk[1])
    if code == 0:
        record = _write(note, _with_made(record))
    note.with_suffix(BEGUN).unlink(missing_ok=True)
    return _write(result, record)


def _refused(result: Path, begun: Record, error: UsageError) -> Record:
    code = fail(str(error), error.exit_code)
    return _write(result, replace(begun, code=code, error=one_line(str(error))))


def _made(note: Path, made_of: str) -> Record | None:
    """Of an artifact that is there and whole, made of the same; also of one whose process was killed before it was
    noted: it was placed since that began.
    """
    record = read_record(note)
    if record is not None and (record.code, record.made_of) == (0, made_of) and _is_whole(record, record.manifest):
        return record
    begun = read_record(note.with_suffix(BEGUN))
    if begun is None or begun.made_of != made_of or _manifest(begun.output) in ("", begun.manifest):
        return None
    return _write(note, _with_made(replace(begun, code=0))) if _is_whole(begun, _manifest(begun.output)) else None


def _is_whole(record: Record, manifest: str) -> bool:
    try:
        return _manifest(record.output) == manifest and bool(read_manifest(Path(record.output)))
    except (ArtifactError, OSError):
        return False


def _manifest(output: str) -> str:
    """The sha256 of an artifact's; empty where there is none."""
    try:
        return hashlib.sha256((Path(output) / "manifest.json").read_bytes()).hexdigest()
    except OSError:
        return ""


def _pack(config: RunConfig) -> None:
    from pipeline.pack import pack  # takes torch

    assert config.packed_cache is not None
    pack(Path(config.output), Path(config.packed_cache))


def _with_made(record: Record) -> Record:
    from report.page import REPORT_FILE
    from runtime.artifact import MANIFEST_FILE

    folder = Path(record.output)
    if not (folder / MANIFEST_FILE).is_file():
        return record
    manifest, report = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in (MANIFEST_FILE, REPORT_FILE)
    )
    kl = next(float(figure["value"]) for figure in manifest["figures"] if figure["name"] == "kl_divergence")
    objectives = [float(manifest["sizes"]["program"]), kl, float(report["program"]["run_seconds"])]
    peak = max(stage["peak_rss"] for stage in report["stages"])
    return replace(record, manifest=_manifest(record.output), peak_memory=peak, objectives=objectives)


def _made_of(config: RunConfig) -> str:
    """Files of the user's by name, size and time of change: a checkpoint is not read for it."""
    named = [config.checkpoint, config.lora, config.calibration, config.validation.prompts]
    named += [config.task.prompts, config.task.checker, config.task.calibration]
    files = [file for name in named if name is not None for file in _files(Path(name))]
    content: dict[str, Any] = {
        "config": {key: value for key, value in asdict(config).items() if key not in ELSEWHERE},
        "files": [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        "code": {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in source_files().items()},
        "versions": {name: version(name) for name in ("torch", "executorch", "torchao")},
    }
    return _digest(json.dumps(content, sort_keys=True, default=str))


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path] * path.is_file()


def _digest(content: str | list[str]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _write(file: Path, record: Record) -> Record:
    half = file.with_suffix(f".{os.getpid()}.partial")
    try:
        half.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
        half.rename(file)
    finally:
        half.unlink(missing_ok=True)
    return record


def _peak() -> int:
    from runtime.memory import peak_rss

    return peak_rss()


def _disk() -> tuple[int, int] | None:
    """Bytes that this process, and those that it has waited for, read and wrote."""
    try:
        counted = psutil.Process().io_counters()
    except (AttributeError, OSError, psutil.Error):
        return None
    return counted.read_bytes, counted.write_bytes


def _say(line: str) -> None:
    out().print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def _heard(sweep: Sweep, log: Path) -> Iterator[None]:
    """In another process than the command's, what a job says goes to a file: others speak at the same time."""
    with quiet():
        be_heard()
        if (socket.gethostname(), os.getpid()) == (sweep.host, sweep.process):
            yield
            return
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # the job itself will say that nothing can be written there
                os.chdir(sweep.home)  # that paths are relative to
                sweep.folder.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(log.open("a", encoding="utf-8", buffering=1))
                stack.enter_context(contextlib.redirect_stdout(file))
                stack.enter_context(contextlib.redirect_stderr(file))
            yield
