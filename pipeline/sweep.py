"""`run --multirun`: outputs that no two jobs share, jobs on whatever launcher, and at the end what became of each."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from pipeline.config import CONF
from pipeline.console import err, out
from pipeline.job import ELSEWHERE, Record, Sweep, read_record, result_file
from pipeline.regularly import regularly
from pipeline.search import write_found
from report.terminal import mib, show, table
from runtime.errors import LostError, OutputError, UsageError, one_line

ATTEMPTS = 3  # of a job whose process is killed
LOOK = 0.5  # seconds between two looks at the records
NAMED = ("checkpoint", "lora", "recipe", "export.max_seq_len")  # which the default output names already


def begin(arguments: Sequence[str]) -> Sweep:
    """Before any work. Raises `UsageError` where two jobs would write to one output, and Hydra's own errors."""
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        given = [argument for argument in arguments if argument not in ("-m", "--multirun")]
        overrides = OverridesParser.create().parse_overrides(given)
        config = compose("run", [str(one.input_line) for one in overrides if _is_hydras(one)], return_hydra_config=True)
        folder = Path(str(config.hydra.sweep.dir)).absolute()
        is_search = not str(config.hydra.sweeper._target_).endswith(".BasicSweeper")
        outputs = {} if is_search else _outputs([one for one in overrides if not _is_hydras(one)])
    if is_search and any(_key(one) == "output" for one in overrides):
        raise UsageError("output: a search makes many artifacts, each with a name of its own: leave it out")
    return Sweep(uuid.uuid4().hex, folder, Path.cwd(), socket.gethostname(), os.getpid(), outputs)


def _outputs(overrides: list[Override]) -> dict[tuple[str, ...], str]:
    """By the overrides of each job. Where two default names are the same, the values that differ come into them."""
    (jobs,) = BasicSweeper.split_arguments(overrides, None)
    named = {tuple(job): str(compose("run", list(job)).output) for job in jobs}
    swept = [_key(one) for one in overrides if one.is_sweep_override() and _key(one) not in (*NAMED, *ELSEWHERE)]
    is_default = all(_key(one) != "output" for one in overrides)
    if is_default and _shared(named):
        named = {job: output + _values(job, swept) for job, output in named.items()}
    if shared := _shared(named):
        first, second = [" ".join(job) for job, output in named.items() if Path(output).resolve() == shared][:2]
        raise UsageError(
            f"output {shared}: two jobs would write to it, [{first}] and [{second}]: "
            f"{'give them in sweeps of their own, each with output=DIR' if is_default else 'leave output out'}"
        )
    return named


def _shared(named: dict[tuple[str, ...], str]) -> Path | None:
    counted = Counter(Path(output).resolve() for output in named.values())
    return next((output for output, n in counted.items() if n > 1), None)


def _values(job: tuple[str, ...], swept: list[str]) -> str:
    given = (one.partition("=") for one in job)
    return "".join(
        f"-{key.rpartition('.')[2]}={re.sub(r'[^A-Za-z0-9_.+-]', '_', value)}"
        for key, _, value in given
        if key in swept
    )


def _key(override: Override) -> str:
    return str(override.key_or_group).lstrip("+~")


def _is_hydras(override: Override) -> bool:
    return _key(override).replace("/", ".").partition(".")[0] == "hydra"


def launch(sweep: Sweep, hydra: Callable[[], object]) -> int:
    """Let Hydra run the jobs, once more those whose process was killed. The exit code: of the first job that failed.

    Raises what Hydra raises before any job has begun, `OutputError`.
    """
    started = time.perf_counter()
    try:
        sweep.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"sweep {sweep.folder} cannot be written: {error.strerror or error}") from error
    try:
        with _told(sweep):
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    hydra()
                except Exception as error:  # a launcher's own: a process of its was killed, a machine is gone
                    if not _records(sweep):
                        raise
                    _say(f"warning: {type(error).__name__}: {error}")
                if attempt == ATTEMPTS or not (lost := _lost(sweep)):
                    break
                _say(f"warning: {len(lost)} jobs have come to no end, and are begun again: {', '.join(lost)}")
    except KeyboardInterrupt:
        _stop(sweep)
        raise
    return _show(sweep, time.perf_counter() - started)


def _records(sweep: Sweep) -> list[Record]:
    """Of this sweep, in the order of its jobs."""
    try:
        files = [result_file(sweep, output) for output in sweep.outputs.values()]
        found = map(read_record, files or (sweep.folder / sweep.id).glob("*.json"))
        return sorted((one for one in found if one is not None and one.sweep == sweep.id), key=lambda one: one.number)
    except OSError as error:
        raise OutputError(f"sweep {sweep.folder} cannot be read: {error.strerror or error}") from error


def _lost(sweep: Sweep) -> list[str]:
    """Outputs of the jobs that have come to no end."""
    records = _records(sweep)
    begun = {record.output for record in records}
    return [output for output in sweep.outputs.values() if output not in begun] + [
        record.output for record in records if record.code is None
    ]


@contextmanager
def _told(sweep: Sweep) -> Iterator[None]:
    """A line for each job that has ended in another process: what it says itself is in a file."""
    told = set[str]()

    def look() -> None:
        try:
            records = _records(sweep)
        except OutputError:  # said at the end
            return
        for record in records:
            is_elsewhere = (record.host, record.process) != (sweep.host, sweep.process)
            if record.code is not None and is_elsewhere and not record.earlier and record.output not in told:
                told.add(record.output)
                _say(f"{record.output}: {_result(record)}, {record.seconds:.1f} s on {record.host}")

    try:
        with regularly(LOOK, look):
            yield
    finally:
        look()


def _stop(sweep: Sweep) -> None:
    """The jobs of an interrupted sweep that go on in other processes of this machine."""
    for record in _records(sweep):
        is_mine = record.host == sweep.host and record.process != sweep.process and record.code is None
        if is_mine:
            with contextlib.suppress(psutil.Error):  # it has just ended
                psutil.Process(record.process).terminate()


def _show(sweep: Sweep, seconds: float) -> int:
    records, console = _records(sweep), out()
    listing = table("the sweep", "job", "result", "seconds", "peak memory", "read", "written")
    for record in records:
        disk = ["" if n is None else mib(n) for n in (record.read, record.written)]
        took = (f"{record.seconds:.1f}", mib(record.peak_memory), *disk)
        listing.add_row(Path(record.output).name, _result(record), *took)
    lost = [record.output for record in records if record.code is None]
    codes = [LostError.exit_code if record.code is None else record.code for record in records]
    begun = {record.output for record in records}
    for output in sweep.outputs.values():
        if output not in begun:
            listing.add_row(Path(output).name, "not begun", "", "", "", "")
            lost.append(output)
            codes.append(LostError.exit_code)
    show(console, listing)
    for record in records:
        if record.error:
            said = f"{record.output}: {one_line(record.error)}"
            console.print(said, highlight=False, markup=False, soft_wrap=True)
    made, earlier = (sum(r.code == 0 and r.earlier is then for r in records) for then in (False, True))
    said = f"{len(codes)} jobs in {seconds:.1f} s: {made} done, {earlier} done before, {sum(map(bool, codes))} failed"
    console.print(said, highlight=False, markup=False, soft_wrap=True)
    if not sweep.outputs:
        console.print(write_found(sweep.folder, records), highlight=False, markup=False, soft_wrap=True)
    if lost:
        _say(f"error: {LostError(', '.join(lost))}")
    return next((code for code in codes if code), 0)


def _result(record: Record) -> str:
    if record.code is None:
        return "lost"
    return f"failed, {record.code}" if record.code else "done before" if record.earlier else "done"


def _say(line: str) -> None:
    err.print(one_line(line), markup=False)
