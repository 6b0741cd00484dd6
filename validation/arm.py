"""The recorded calls on Arm cores that QEMU emulates, in the native runner: the same reference and bounds as here."""

from __future__ import annotations

import difflib
import json
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runtime.errors import BadArtifactError, ResourceError, UsageError
from validation.child import HOME
from validation.figure import Figure
from validation.progress import Report, silent

QEMU = "qemu-aarch64-static"
LIBRARIES = Path("/usr/aarch64-linux-gnu")  # of Debian's cross compiler: glibc and libstdc++ for Arm
RUNNER = Path("build/runner-aarch64/dreamedge-run")


@dataclass(frozen=True)
class OnCore:
    """What the runner found on one core. figures: their group is its name. features: that it has, as Linux names them.

    seconds: of the recorded calls, emulated.
    """

    core: str
    features: tuple[str, ...]
    figures: tuple[Figure, ...]
    seconds: float


def replay_on_cores(artifact: Path, cores: list[str], runner: str | None, report: Report = silent) -> list[OnCore]:
    """The runner's figures; and in how many calls a core's bits are not the first core's.

    Bits of Arm are held against Arm alone: with x86-64 few calls share them, and both are right.

    Raises `UsageError` for a core that QEMU does not know, or where something is not installed; `BadArtifactError`,
    `ResourceError` with the runner's words.
    """
    file = checked_tools(cores, runner)
    found: list[OnCore] = []
    first: list[str] = []
    for n, core in enumerate(cores):
        report(core, n, len(cores))
        said = _on_core(core, file, "--self-test", "--json", f"artifact={artifact}")
        digests = [str(call["sha256"]) for call in said["calls"]]
        first = first or digests
        differ = sum(mine != theirs for mine, theirs in zip(digests, first, strict=True))
        bits = Figure(core, "other_bits", differ, None, False, f"of {len(digests)} calls, from {cores[0]}")
        figures = (*(_figure(core, entry) for entry in said["figures"]), bits)
        features = tuple(str(feature) for feature in said["features"])
        found.append(OnCore(core, features, figures, float(said["run_seconds"])))
    return found


def figures_of(cores: list[OnCore]) -> list[Figure]:
    """Of all of them; beside the bits, what QEMU took for the calls."""
    return [
        replace(figure, where=f"{figure.where}; {one.seconds:.1f} s emulated") if figure.bound is None else figure
        for one in cores
        for figure in one.figures
    ]


def checked_tools(cores: list[str], runner: str | None) -> Path:
    """The runner's file. Raises `UsageError` before anything is run."""
    file = HOME / RUNNER if runner is None else Path(runner)
    if not cores or len(set(cores)) < len(cores):
        raise UsageError(f"cores [{', '.join(cores)}]: give one or more, each once")
    if shutil.which(QEMU) is None:
        raise UsageError(f"target arm64: {QEMU} is not installed; Debian has it in qemu-user-static")
    if not (LIBRARIES / "lib").is_dir():
        raise UsageError(f"target arm64: no {LIBRARIES}; Debian has it in g++-aarch64-linux-gnu")
    if not file.is_file():
        raise UsageError(f"target arm64: no native runner {file}: `make runner ARCH=aarch64` builds it, or runner=FILE")
    known = _qemu("-cpu", "help").split()
    for core in cores:
        name = core.partition(",")[0]
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"`{QEMU} -cpu help` lists them"
            raise UsageError(f"cores: this QEMU knows no {name!r}; {hint}")
        try:
            multiplies_right = _on_core(core, file, "--processor")["multiplies_right"]
        except (BadArtifactError, KeyError) as error:
            raise UsageError(f"target arm64: {file} does not run: {error}") from error
        if not multiplies_right:
            raise UsageError(
                f"cores: this QEMU multiplies integers wrong on a core with SME, which {name} has: "
                f"give '{name},sme=off', or install QEMU 10 or later"
            )
    return file


def _qemu(*words: str) -> str:
    done = subprocess.run([QEMU, *words], capture_output=True, text=True, check=False)
    return done.stdout


def _on_core(core: str, runner: Path, *words: str) -> dict[str, Any]:
    """What the runner answers on a core."""
    # Debian's own libraries for Arm may be there as well: the loader of one glibc hangs with the other.
    emulated = [QEMU, "-cpu", core, "-L", str(LIBRARIES), "-E", f"LD_LIBRARY_PATH={LIBRARIES / 'lib'}"]
    command = [*emulated, str(runner), *words]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    try:
        said: dict[str, Any] = json.loads(done.stdout)
        assert said["features"] is not None
        return said
    except (ValueError, KeyError, TypeError, AssertionError):
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}, and it says nothing"]
        failed = ResourceError if done.returncode == ResourceError.exit_code else BadArtifactError
        raise failed(f"{core}: {lines[-1].removeprefix('error: ')}") from None


def _figure(core: str, entry: dict[str, Any]) -> Figure:
    value, bound = float(entry["value"]), float(entry["bound"])  # also "nan", which JSON has no number for
    return Figure(core, str(entry["name"]), value, bound, bool(entry["at_least"]), str(entry["where"]))
