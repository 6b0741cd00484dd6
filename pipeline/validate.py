"""Stage 5: the `.pte` in the ExecuTorch runtime, against eager. Fidelity and quality are never mixed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from model import DreamEdge, DreamEdgeConfig, load_hf_model
from model.dream import rope_cos_sin
from pipeline.config import TaskConfig, ValidationConfig
from pipeline.errors import BadArtifactError
from pipeline.load import Loaded
from pipeline.locate import locate
from pipeline.lower import Lowered
from pipeline.quantize import Quantized
from pipeline.record import make_reference, prompts_of, task_of
from pipeline.tasks import load_checker
from pipeline.tokenizer import decode
from recipes.blocks import Attention, Backend, Bounds, LinearQuant, Recipe
from recipes.packing import tensor_sha256
from recipes.stored import Weights
from runtime.artifact import Measured, measure
from runtime.figures import ExpectedFormat, Figure
from runtime.program import ProgramError
from runtime.reference import Reference, Task, save_reference
from runtime.replay import Answers, solve

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
    """float32_answers: the float32 model's, to the task that the program solved, if any."""

    figures: list[Figure]
    measured: Measured
    expected_format: ExpectedFormat
    solved: Solved | None
    float32_answers: Answers | None

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
    S, max_rows = lowered.max_seq_len, lowered.max_rows
    prompts = prompts_of(loaded, task_config, settings, S)
    task = task_of(loaded, prompts, task_config, S)
    float32 = Weights(loaded.model, {})
    reference = make_reference(
        quantized.weights, float32, prompts, task, task_config.new_tokens, settings, S, max_rows, report
    )
    float32_answers = None
    if task is not None:
        report(f"{len(task.prompts)} prompts solved in float32")
        float32_answers = solve(load_hf_model(loaded.folder, dtype=torch.float32)[0], task)
    save_reference(reference, reference_file)
    report("model.pte in the ExecuTorch runtime, twice")
    expected = expected_format(quantized.weights, quantized.recipe, lowered)
    try:
        measured = measure(lowered.pte, reference_file, reference, bounds_of(quantized.recipe), expected)
    except ProgramError as error:
        raise BadArtifactError(str(error)) from error
    figures = with_layer(
        list(measured.figures), lowered.pte, quantized.weights, reference, quantized.recipe.bounds, report
    )
    solved = None
    if reference.task is not None and float32_answers is not None and measured.replay.answers is not None:
        assert task_config.checker is not None
        assert loaded.tokenizer is not None
        checker = Path(task_config.checker)
        solved = Solved(
            task_config.name,
            len(reference.task.prompts),
            float32=share_solved(loaded.tokenizer, checker, reference.task, float32_answers.tokens),
            program=share_solved(loaded.tokenizer, checker, reference.task, measured.replay.answers.tokens),
        )
        figures.append(solved_figure(solved, quantized.recipe.bounds.solved_drop))
    return Validated(figures, measured, expected, solved, float32_answers)


def with_layer(
    figures: list[Figure],
    pte: Path,
    weights: Weights,
    reference: Reference,
    bounds: Bounds,
    report: Callable[[str], None] = lambda _: None,
) -> list[Figure]:
    """The first figure of fidelity that failed says in which layer of the program the fault is."""
    failed = next((i for i, f in enumerate(figures) if f.group == "fidelity" and not f.ok), None)
    if failed is None:
        return figures
    try:
        said = locate(pte, weights, reference.sequences, bounds, report).message
    except ProgramError as error:
        said = str(error)
    where = f"{figures[failed].where}; {said or 'in short calls no layer is wrong'}"
    return [replace(f, where=where) if i == failed else f for i, f in enumerate(figures)]


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


def expected_format(weights: Weights, recipe: Recipe, lowered: Lowered) -> ExpectedFormat:
    """What the bytes of the program must show for this recipe and this quantized model."""
    config = weights.model.config
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
        weights=weights.digests | constant_digests(config, S, recipe),
        bytes_per_weight=ideal_bytes_per_weight(shapes, recipe.linear, itemsize),
        planned_memory=recipe.bounds.planned_memory * (caches + activations),
        metadata=lowered.metadata,
    )


def constant_digests(config: DreamEdgeConfig, max_seq_len: int, recipe: Recipe) -> dict[str, list[str]]:
    """sha256 of what no checkpoint file holds: the tables that turn queries and keys, and the norms' eps."""
    dtype = getattr(torch, recipe.dtype.value)
    cos_1S1d, sin_1S1d = rope_cos_sin(config, torch.arange(max_seq_len)[None], dtype)
    constants = {"rope.cos": cos_1S1d, "rope.sin": sin_1S1d}
    if recipe.backend is Backend.xnnpack:  # elsewhere it is no constant, but an argument
        constants["norms.eps"] = torch.tensor(config.rms_norm_eps, dtype=torch.float32)
    return {name: [tensor_sha256(constant)] for name, constant in constants.items()}


def ideal_bytes_per_weight(shapes: list[tuple[int, int]], quant: LinearQuant | None, itemsize: int) -> float:
    """Of the linear layers: weights, and their scales (bfloat16 of int4, float32 of int8)."""
    if quant is None:
        return float(itemsize)
    weights = sum(rows * columns for rows, columns in shapes)
    groups = sum(rows * (columns // quant.group_size if quant.group_size else 1) for rows, columns in shapes)
    scales = groups * (2 if quant.weight_bits == 4 else 4)
    return quant.weight_bits / 8 + scales / weights
