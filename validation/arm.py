"""The recorded calls on Arm cores that QEMU emulates, in the native runner: the same reference and bounds as here."""

from __future__ import annotations

import difflib
import json
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from runtime.errors import BadArtifactError, ResourceError, UsageError
from validation.child import HOME
from validation.figures import Figure
from validation.progress import Report, silent

QEMU = "qemu-aarch64-static"
LIBRARIES = Path("/usr/aarch64-linux-gnu")  # of Debian's cross compiler: glibc and libstdc++ for Arm
RUNNER = Path("build/runner-aarch64/dreamedge-run")
SME_RIGHT = 10  # QEMU's first version that multiplies integers right with SME (7.2: -3 dB)


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
        said = _self_test(artifact, core, file)
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
    known = _ask("-cpu", "help").split()
    for core in cores:
        name, *features = core.split(",")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"`{QEMU} -cpu help` lists them"
            raise UsageError(f"cores: this QEMU knows no {name!r}; {hint}")
        if name == "max" and "sme=off" not in features and (version := qemu_version()) < (SME_RIGHT, 0):
            raise UsageError(
                f"cores: QEMU {version[0]}.{version[1]} multiplies integers wrong on a core with SME, which max has: "
                f"give 'max,sme=off', or install QEMU {SME_RIGHT} or later"
            )
    return file


def qemu_version() -> tuple[int, int]:
    found = re.search(r"version (\d+)\.(\d+)", _ask("--version"))
    if found is None:
        raise UsageError(f"target arm64: {QEMU} --version says no version")
    return int(found[1]), int(found[2])


def _ask(*words: str) -> str:
    done = subprocess.run([QEMU, *words], capture_output=True, text=True, check=False)
    return done.stdout


def _self_test(artifact: Path, core: str, runner: Path) -> dict[str, Any]:
    # Debian's own libraries for Arm may be there as well: the loader of one glibc hangs with the other.
    emulated = [QEMU, "-cpu", core, "-L", str(LIBRARIES), "-E", f"LD_LIBRARY_PATH={LIBRARIES / 'lib'}"]
    command = [*emulated, str(runner), "--self-test", "--json", f"artifact={artifact}"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    try:
        said: dict[str, Any] = json.loads(done.stdout)
        assert said["figures"]
        return said
    except (ValueError, KeyError, TypeError, AssertionError):
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}, and it says nothing"]
        words = f"{core}: {lines[-1].removeprefix('error: ')}"
        failed = ResourceError if done.returncode == ResourceError.exit_code else BadArtifactError
        raise failed(words) from None


def _figure(core: str, entry: dict[str, Any]) -> Figure:
    value, bound = float(entry["value"]), float(entry["bound"])  # also "nan", which JSON has no number for
    return Figure(core, str(entry["name"]), value, bound, bool(entry["at_least"]), str(entry["where"]))
