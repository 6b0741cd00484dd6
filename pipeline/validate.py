"""Stage 5: the `.pte` in the ExecuTorch runtime, against eager. Fidelity and quality are never mixed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model import DreamEdge, load_hf_model
from pipeline.config import TaskConfig, ValidationConfig
from pipeline.errors import BadArtifactError
from pipeline.load import Loaded
from pipeline.lower import Lowered
from pipeline.quantize import Quantized
from pipeline.record import (
    contract_sequences,
    prompts_of,
    record,
    short_sequences,
    task_of,
    whole_sequences,
)
from pipeline.tasks import load_checker
from pipeline.tokenizer import decode
from recipes.blocks import Attention, Backend, LinearQuant, Recipe
from recipes.packing import packed_digests
from runtime.artifact import Measured, measure
from runtime.figures import ExpectedFormat, Figure
from runtime.program import ProgramError
from runtime.reference import Reference, Task, save_reference
from runtime.replay import solve

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Solved:
    """Shares (0..1) of n task prompts: by the float32 model in eager, and by the program."""

    task: str
    n: int
    float32: float
    program: float


@dataclass(frozen=True)
class Validated:
    figures: list[Figure]
    measured: Measured
    expected_format: ExpectedFormat
    solved: Solved | None

    @property
    def ok(self) -> bool:
        return all(figure.ok for figure in self.figures)


def validate(
    lowered: Lowered,
    quantized: Quantized,
    loaded: Loaded,
    task_config: TaskConfig,
    settings: ValidationConfig,
    reference_file: Path,
    report: Callable[[str], None],
) -> Validated:
    """Writes `reference_file`. Raises `BadArtifactError` if the program does not run."""
    report("float32 reference")
    float32, _, _ = load_hf_model(loaded.folder, dtype=torch.float32)
    reference, float32_answers = make_reference(
        quantized.model, float32, loaded, task_config, settings, lowered.max_seq_len, lowered.max_rows
    )
    save_reference(reference, reference_file)
    report("model.pte in the ExecuTorch runtime, twice")
    expected = expected_format(quantized.model, quantized.recipe, lowered)
    try:
        measured = measure(lowered.pte, reference_file, reference, bounds_of(quantized.recipe), expected)
    except ProgramError as error:
        raise BadArtifactError(str(error)) from error
    figures = list(measured.figures)
    solved = None
    if reference.task is not None and float32_answers is not None and measured.replay.answers is not None:
        assert task_config.checker is not None
        assert loaded.tokenizer is not None
        checker = Path(task_config.checker)
        solved = Solved(
            task_config.name,
            len(reference.task.prompts),
            float32=share_solved(loaded.tokenizer, checker, reference.task, float32_answers),
            program=share_solved(loaded.tokenizer, checker, reference.task, measured.replay.answers),
        )
        figures.append(solved_figure(solved, quantized.recipe.bounds.solved_drop))
    return Validated(figures, measured, expected, solved)


def make_reference(
    model: DreamEdge,
    float32: DreamEdge,
    loaded: Loaded,
    task_config: TaskConfig,
    settings: ValidationConfig,
    max_seq_len: int,
    max_rows: int,
) -> tuple[Reference, Tensor | None]:
    """The recorded calls with what eager gives, and the float32 model's answers to the task."""
    prompts = prompts_of(loaded, task_config, settings, max_seq_len)
    sequences = (
        *whole_sequences(float32, prompts, task_config.new_tokens, settings, max_seq_len, max_rows),
        *contract_sequences(prompts, float32.config.mask_token_id, max_seq_len, max_rows),
        *short_sequences(model, prompts),
    )
    task = task_of(loaded, prompts, task_config, max_seq_len)
    answers = solve(float32, task) if task is not None else None
    return record(model, float32, sequences, task, max_seq_len), answers


def share_solved(tokenizer: Tokenizer, checker: Path, task: Task, answers: Tensor) -> float:
    check = load_checker(checker)
    solved = [
        check(decode(tokenizer, prompt.tolist()), decode(tokenizer, answer.tolist()))
        for prompt, answer in zip(task.prompts, answers, strict=True)
    ]
    return sum(solved) / len(solved)


def solved_figure(solved: Solved, drop: float) -> Figure:
    bound = 100 * solved.float32 - drop
    where = f"{solved.n} prompts of {solved.task}; the float32 model solves {100 * solved.float32:.1f}"
    return Figure("quality", "solved_percent", 100 * solved.program, bound, True, where)


def bounds_of(recipe: Recipe) -> dict[str, float]:
    return {name: float(value) for name, value in vars(recipe.bounds).items()}


def expected_format(model: DreamEdge, recipe: Recipe, lowered: Lowered) -> ExpectedFormat:
    """What the bytes of the program must show for this recipe and this quantized model."""
    config = model.config
    with torch.device("meta"):
        shapes = [(m.out_features, m.in_features) for m in DreamEdge(config).modules() if isinstance(m, nn.Linear)]
    D, S, d = config.hidden_size, lowered.max_seq_len, config.head_dim
    itemsize = getattr(torch, recipe.dtype.value).itemsize
    caches = 2 * config.num_hidden_layers * S * config.num_key_value_heads * d * itemsize
    # What lives at once between two delegates: x, q, k, v, the attention's output, positions; and the logits.
    activations = 6 * S * D * itemsize + 4 * lowered.max_rows * config.vocab_size
    if recipe.attention is Attention.delegated:
        # A delegate is given copies of the keys and values of one layer, while it makes those of the next.
        activations += 4 * S * config.num_key_value_heads * d * itemsize
    return ExpectedFormat(
        weight_types=tuple(recipe.weight_types),
        outside_ops=tuple(recipe.outside_ops),
        linear_shapes=tuple(shapes),
        helper_shapes=((1, D), (d, d)) if recipe.backend is Backend.xnnpack else (),
        weights=packed_digests(model),
        bytes_per_weight=ideal_bytes_per_weight(shapes, recipe.linear, itemsize),
        planned_memory=recipe.bounds.planned_memory * (caches + activations),
        metadata=lowered.metadata,
    )


def ideal_bytes_per_weight(shapes: list[tuple[int, int]], quant: LinearQuant | None, itemsize: int) -> float:
    """Of the linear layers: weights, and their scales (bfloat16 for groups, float32 for channels)."""
    if quant is None:
        return float(itemsize)
    weights = sum(rows * columns for rows, columns in shapes)
    if quant.group_size:
        scales = sum(rows * columns // quant.group_size * 2 for rows, columns in shapes)
    else:
        scales = sum(rows * 4 for rows, _ in shapes)
    return quant.weight_bits / 8 + scales / weights
