"""How many prompts of a task a model solves, as a figure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from runtime.errors import UsageError
from runtime.tokenizer import decode
from validation.figure import Figure
from validation.reference import Task
from validation.tasks import load_checker

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Solved:
    """Shares (0..1) of n task prompts: by the float32 model in eager, and by the program."""

    task: str
    n: int
    float32: float
    program: float


def share_solved(tokenizer: Tokenizer, checker: Path, task: Task, answers: Tensor) -> float:
    check = load_checker(checker)
    solved = [
        check(decode(tokenizer, prompt.tolist()), decode(tokenizer, answer.tolist()))
        for prompt, answer in zip(task.prompts, answers, strict=True)
    ]
    return sum(solved) / len(solved)


def check_fit(task: str, n: int, float32: float, drop: float) -> None:
    """float32: the share that the float32 model solves. Raises `UsageError` where no program could be out of bounds."""
    if 100 * float32 - drop <= 0:
        raise UsageError(
            f"task {task!r} does not fit the checkpoint: its float32 model solves {100 * float32:.1f}% of {n} prompts, "
            f"so a program may lose {drop:g} points and solve none: give task=none, or a task that it was trained for"
        )


def solved_figure(solved: Solved, drop: float) -> Figure:
    bound = 100 * solved.float32 - drop
    where = f"{solved.n} prompts of {solved.task}; the float32 model solves {100 * solved.float32:.1f}"
    return Figure("quality", "solved_percent", 100 * solved.program, bound, True, where)
