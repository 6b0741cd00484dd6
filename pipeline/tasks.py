"""Tasks: prompts as JSON lines, and a checker that says whether an answer solves its prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import UsageError


def sudoku(prompt: str, answer: str) -> bool:
    """4x4 sudoku, four lines of digits, 0 = blank: the grid is filled, valid, and keeps the givens."""
    puzzle, grid = prompt.split("\n"), answer.split("\n")
    if [len(row) for row in puzzle] != [4] * 4 or len(grid) != 4 or any(sorted(row) != list("1234") for row in grid):
        return False
    columns = ["".join(row[c] for row in grid) for c in range(4)]
    boxes = [grid[r][c : c + 2] + grid[r + 1][c : c + 2] for r in (0, 2) for c in (0, 2)]
    keeps = all(
        given in ("0", cell)
        for row, filled in zip(puzzle, grid, strict=True)
        for given, cell in zip(row, filled, strict=True)
    )
    return keeps and all(sorted(unit) == list("1234") for unit in columns + boxes)


CHECKERS: dict[str, Callable[[str, str], bool]] = {"sudoku": sudoku}


def read_prompts(file: Path) -> list[str]:
    """Raises `UsageError` that names the line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"task.prompts: {file} cannot be read: {error}") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompts.append(str(json.loads(line)["prompt"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f'{file}, line {number}: expected a JSON object with a "prompt"') from error
    if not any(prompts):
        raise UsageError(f"task.prompts: {file} holds no prompt")
    return prompts
