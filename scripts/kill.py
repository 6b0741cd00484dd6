"""`kill -9` a run at random moments, and look what is left: docs/hostile.md shows the figures.

python -m scripts.kill N OUTPUT.json [--seed N]

One run makes the earlier artifact, and shows how long the stages take. A second one is to take its place: before each
stage it stops as often as moments fall into it. Each time a copy of the process goes on as the run that it is, is
killed, and what it did to the folder is looked at and undone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.console import Console

from evidence.integrity import as_it_stands, check_whole
from pipeline import road
from pipeline.display import Display, Report
from pipeline.staging import place
from runtime.errors import BadArtifactError
from runtime.limits import alone_in_a_copy
from tests.checkpoints import GOLDEN
from tests.fuzz import config_of

PLACE, PLACE_SECONDS = "place", 0.01  # when two folders change places, and the old one is removed
STAGES = ("load", "quantize", "export", "lower", "validate", "package", PLACE, "end")
EARLIER, NEW = 32, 64  # max_seq_len of the two artifacts
WHOLE: dict[int | None, str] = {EARLIER: "the earlier one", NEW: "the new one"}


class Killed(Display):
    """Of a run that is killed in copies: when `moments[stage]`, parts of 1, of the seconds of a stage are over."""

    def __init__(self, moments: dict[str, list[float]], seconds: dict[str, float], folder: Path) -> None:
        super().__init__(Console(quiet=True))
        self.is_copy = False
        self.in_stage: Counter[str] = Counter()
        self.found: Counter[str] = Counter()
        self.seconds = dict(seconds)
        self._moments, self._folder = moments, folder
        self._entered, self._enters = os.pipe()  # a byte for each stage that a copy enters

    @contextmanager
    def stage(self, name: str) -> Iterator[Report]:
        self.enter(name)
        with super().stage(name) as report:
            yield report

    def enter(self, stage: str) -> None:
        if stage == "package" and not self.is_copy:
            self._kill_a_copy(stage, None)
        for part in self._moments.get(stage, ()):
            if not self.is_copy:
                self._kill_a_copy(stage, part * self.seconds[stage])
        if self.is_copy:
            os.write(self._enters, bytes([STAGES.index(stage)]))

    def _kill_a_copy(self, stage: str, seconds: float | None) -> None:
        """seconds: None to see how long it goes on, as the first run had more to import for its end."""
        aside = self._folder.with_name("aside")
        shutil.copytree(self._folder, aside)
        os.write(self._enters, bytes([STAGES.index(stage)]))
        copy = os.fork()
        if copy == 0:
            os.setpgid(0, 0)
            alone_in_a_copy()
            self.is_copy = True
            return
        started = time.monotonic()
        if seconds is None:
            while os.read(self._entered, 1)[0] != STAGES.index("end"):
                pass
            self.seconds[stage] = time.monotonic() - started
        else:
            time.sleep(seconds)
        os.kill(copy, signal.SIGKILL)
        os.waitpid(copy, 0)
        if seconds is not None:
            self.in_stage[STAGES[os.read(self._entered, 100)[-1]]] += 1
            self._look()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(copy, signal.SIGKILL)  # what it has started goes on for a while
        shutil.rmtree(self._folder)
        aside.rename(self._folder)

    def _look(self) -> None:
        self.found[WHOLE.get(_max_seq_len(self._folder / "out"), "LOST")] += 1
        aside = self._folder / ".out.partial"
        if aside.exists():
            self.found["a folder aside, whole" if _max_seq_len(aside) else "a folder aside, refused"] += 1
        others = {path.name for path in self._folder.iterdir()} - {"out", ".out.partial", ".out.lock", "cache"}
        self.found["other folders left"] += bool(others)


def main() -> None:
    parser = argparse.ArgumentParser(description="`kill -9` a run at random moments, and look what is left.")
    parser.add_argument("n", type=int, help="how many moments")
    parser.add_argument("output", type=Path, help="a JSON file for the figures")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "artifacts"
        display = Display(Console(quiet=True))
        road.run(config_of("run", *_arguments(folder, EARLIER)), display)
        seconds = {stage.name: stage.seconds for stage in display.stages} | {PLACE: PLACE_SECONDS}
        killed = Killed(_moments(args.n, seconds, random.Random(args.seed)), seconds, folder)

        def placed(staged: Path, output: Path) -> Path:
            killed.enter(PLACE)
            return place(staged, output)

        try:
            with patch.object(road, "place", placed):
                road.run(config_of("run", *_arguments(folder, NEW)), killed)
            killed.enter("end")
        finally:
            if killed.is_copy:
                signal.pause()  # it is killed also when all is done
    result = {
        "kills": killed.in_stage.total(),
        "seed": args.seed,
        "stage_seconds": {stage: round(taken, 2) for stage, taken in killed.seconds.items()},
        "killed_in": {stage: killed.in_stage[stage] for stage in STAGES},
        "found": dict(sorted(killed.found.items())),
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def table(result: dict[str, Any]) -> str:
    """For docs/hostile.md."""
    killed_in = {stage: times for stage, times in result["killed_in"].items() if times}
    names = {PLACE: "change of places", "end": "just done"}
    heads = ["killed in", *(names.get(stage, f"`{stage}`") for stage in killed_in)]
    rows = (heads, ["---"] * len(heads), ["times", *map(str, killed_in.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows).replace(" --- ", "---")


def _moments(n: int, seconds: dict[str, float], chance: random.Random) -> dict[str, list[float]]:
    """Half of them anywhere in the run, the others in its last two parts, where the artifact is made of its files."""
    moments: dict[str, list[float]] = {stage: [] for stage in seconds}
    for i in range(n):
        anywhere = chance.choices(list(seconds), list(seconds.values()))[0]
        stage = (anywhere, "package", anywhere, PLACE)[i % 4]
        moments[stage].append(chance.random())
    return moments


def _arguments(folder: Path, max_seq_len: int) -> list[str]:
    arguments = ["recipe=fp32_portable", f"checkpoint={GOLDEN / 'gqa2'}", f"output={folder / 'out'}", "overwrite=true"]
    return [*arguments, f"cache={folder / 'cache'}", f"export.max_seq_len={max_seq_len}", "validation.n_prompts=8"]


def _max_seq_len(artifact: Path) -> int | None:
    """None for what `verify` does not take for whole."""
    try:
        manifest, provenance = as_it_stands(artifact)
        check_whole(artifact, manifest, provenance)
    except BadArtifactError:
        return None
    length: int = manifest["export"]["max_seq_len"]
    return length


if __name__ == "__main__":
    main()
