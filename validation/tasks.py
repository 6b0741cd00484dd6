"""Tasks: prompts as JSON lines, and a Python file whose `check(prompt, answer)` says whether an answer solves it."""

from __future__ import annotations

import json
import math
import runpy
from collections.abc import Callable
from pathlib import Path

from runtime.errors import UsageError

Checker = Callable[..., bool]  # (prompt, answer), and where there is one the suffix after it


def load_checker(file: Path) -> Checker:
    """Runs the file. Raises `UsageError` if there is no `check` in it; so does the checker if `check` fails."""
    try:
        check = runpy.run_path(str(file)).get("check")
    except (Exception, SystemExit) as error:
        raise UsageError(f"task.checker: {file} cannot be run: {type(error).__name__}: {error}") from error
    if not callable(check):
        raise UsageError(f"task.checker: {file} has no function check(prompt, answer)")

    def checked(*asked: str) -> bool:
        try:
            solves = check(*asked)
        except MemoryError:  # the answer's, where it has a limit
            raise
        except (Exception, SystemExit) as error:
            raise UsageError(f"task.checker: {file}: check failed: {type(error).__name__}: {error}") from error
        if not isinstance(solves, bool):
            raise UsageError(f"task.checker: {file}: check must return True or False, got {solves!r:.60}")
        return solves

    return checked


def read_prompts(file: Path) -> list[str]:
    """Raises `UsageError` that names the line."""
    return [prompt for prompt, _ in read_gaps(file)]


def read_gaps(file: Path) -> list[tuple[str, str | None]]:
    """(prompt, what stands behind the answer, if that is given) of each line. Raises `UsageError` that names it."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise UsageError(f"task.prompts: {file} cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            prompt, suffix = entry["prompt"], entry.get("suffix")
            if not isinstance(prompt, str) or not isinstance(suffix, str | None):
                raise TypeError
            found.append((prompt, suffix))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(f'{file}, line {number}: expected a JSON object with a text as "prompt"') from error
    if not any(prompt for prompt, _ in found):
        raise UsageError(f"task.prompts: {file} holds no prompt")
    return found


def wilson_interval(k: int, n: int) -> tuple[float, float]:
    """The 95% interval (low, high) of a share of which k of n were seen (Wilson, 1927)."""
    z = 1.959964
    middle = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    # The share itself is inside, whatever a float's last bit says.
    return min(k / n, max(0.0, middle - half)), max(k / n, min(1.0, middle + half))
