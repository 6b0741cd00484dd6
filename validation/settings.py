"""What validation is told: the task to solve, and how much to look at."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from runtime.errors import UsageError
from validation.tasks import load_checker, read_prompts


@dataclass
class ValidationConfig:
    seed: int = 0
    n_prompts: int = 32
    prompts: str | None = None


@dataclass
class Budget:
    """What the owner of a checkpoint allows a program to lose. kl, loss: nats. solved: points of 100."""

    kl: float | None = None
    loss: float | None = None
    solved: float | None = None


@dataclass
class TaskConfig:
    name: str = MISSING
    prompts: str | None = None
    checker: str | None = None
    calibration: str | None = None
    new_tokens: int = 32
    threshold: float | None = None
    n_solve: int = 0
    checkpoint: str | None = None


@dataclass
class EvaluatedTask:
    """prompts: JSON lines with a "prompt", and with a "suffix" where the answer stands before it. checker: its
    check(prompt, answer), or check(prompt, answer, suffix), says whether it is right. limit: seconds that a check may
    take, in a process of its own; None for no process. calibration, n_solve, checkpoint: of `run`.

    texts: in place of these a file of texts, of which `hidden`, a share of the tokens, is to be written again.
    """

    name: str = "none"
    prompts: str | None = None
    checker: str | None = None
    limit: float | None = None
    texts: str | None = None
    hidden: float = 0.3
    new_tokens: int = 32
    threshold: float | None = None
    calibration: str | None = None
    n_solve: int = 0
    checkpoint: str | None = None


MIN_PROMPTS = 8


# What a figure can be at its worst and at its best: a bound at the worst or beyond it would never fail.
RANGES = {
    "fidelity_db": (0.0, math.inf),
    "fidelity_exact_db": (0.0, math.inf),
    "native_float16_db": (0.0, math.inf),
    "top1_agreement": (0.0, 1.0),
    "kl_divergence": (math.inf, 0.0),
    "kl_slack": (math.inf, 0.0),
    "kl_beside_plain": (math.inf, 0.0),
    "loss": (math.inf, 0.0),
    "loss_increase": (math.inf, -math.inf),
    "order_agreement": (0.0, 1.0),
    "same_answers": (0.0, 1.0),
    "sqnr_db": (0.0, math.inf),
    "cosine": (-1.0, 1.0),
    "max_abs_diff": (math.inf, 0.0),
    "solved_percent": (0.0, 100.0),
    "solved_drop": (100.0, 0.0),
    "bytes_per_weight": (math.inf, 0.0),
    "planned_memory": (math.inf, 0.0),
}


def check_bounds(prefix: str, bounds: Mapping[str, float | None]) -> None:
    """prefix: of the keys that gave them. Raises `UsageError` for a bound that nothing, or everything, is within."""
    for name, bound in bounds.items():
        worst, best = RANGES[name]
        if bound is not None and not (worst < bound <= best or best <= bound < worst):
            raise UsageError(
                f"{prefix}{name} {bound:g}: no verdict could come of it, a value is from {worst:g} (worst) to {best:g}"
            )


def check_budget(budget: Budget, has_text: bool, has_task: bool) -> None:
    """Before the long work. Raises `UsageError` for a budget that cannot be held against anything, all at once."""
    wrong = []
    if budget.kl is not None and not 0 < budget.kl < math.inf:
        wrong.append(f"budget.kl {budget.kl:g}: is the divergence that is allowed, in nats, above 0")
    if budget.loss is not None and not 0 <= budget.loss < math.inf:
        wrong.append(f"budget.loss {budget.loss:g}: are the nats that a token may lose, at least 0")
    if budget.loss is not None and not has_text:
        wrong.append(
            "budget.loss: is of the tokens of a text, and there is none: it takes a checkpoint with a tokenizer, and "
            "beside a task validation.prompts=FILE"
        )
    if budget.kl is not None and not (has_text or has_task):
        wrong.append("budget.kl: quality is not judged on random tokens: give a checkpoint with a tokenizer")
    if budget.solved is not None and not 0 <= budget.solved < 100:
        wrong.append(f"budget.solved {budget.solved:g}: are the points of 100 that may be lost")
    if budget.solved is not None and not has_task:
        wrong.append("budget.solved: there is no task to solve: give task=NAME")
    if wrong:
        raise UsageError("; ".join(wrong))


def check_settings(task: TaskConfig, settings: ValidationConfig) -> None:
    """Before the long work. Raises `UsageError` for settings that nothing can be validated with."""
    if settings.n_prompts < MIN_PROMPTS:
        raise UsageError(f"validation.n_prompts {settings.n_prompts}: at least {MIN_PROMPTS} make a figure of quality")
    if not 0 <= settings.seed < 2**63:
        raise UsageError(f"validation.seed {settings.seed}: must be from 0 to 2**63 - 1")
    if task.new_tokens < 1:
        raise UsageError(f"task.new_tokens {task.new_tokens}: must be at least 1")
    if task.n_solve < 0:
        raise UsageError(f"task.n_solve {task.n_solve}: must be at least 0")
    if task.threshold is not None and not 0 <= task.threshold <= 1:
        raise UsageError(f"task.threshold {task.threshold}: is a probability, 0 to 1")
    if task.n_solve and (task.prompts is None or task.checker is None):
        raise UsageError(f"task.n_solve {task.n_solve}: solving takes task.prompts and task.checker")
    if task.checker is not None:
        load_checker(Path(task.checker))
    if task.prompts is not None:
        read_prompts(Path(task.prompts))
