"""Stage 5: the `.pte` in the ExecuTorch runtime, against eager. Fidelity and quality are never mixed."""

from __future__ import annotations

from pathlib import Path

from pipeline.float32 import float32_of
from pipeline.load import Loaded
from pipeline.lower import Lowered
from pipeline.quantize import Quantized
from recipes.options import Fold, Recipe
from runtime.errors import BadArtifactError, RecipeError
from runtime.program import ProgramError
from validation.expected_format import expected_format
from validation.float32 import Request
from validation.judge import Validated, bounds_of, measure
from validation.overflow import Float16Error
from validation.progress import Report
from validation.recording import make_reference
from validation.reference import Reference, Task, save_reference
from validation.replay import Answers
from validation.settings import Budget, TaskConfig
from validation.solved import Solved, check_fit, share_solved, solved_figure
from validation.tied_calls import with_floors
from validation.verdict import verdict_of
from validation.wrong_layers import name_wrong_layer


def validate(
    lowered: Lowered,
    quantized: Quantized,
    loaded: Loaded,
    request: Request,
    budget: Budget,
    task_config: TaskConfig,
    reference_file: Path,
    cache: Path,
    report: Report,
    threads: int | None = None,
    begun: Reference | None = None,
) -> Validated:
    """Writes `reference_file`. cache: where what float32 gives is kept. threads: as for `runtime.threads.use_threads`.
    begun: what eager gives, where it has been computed.

    Raises `BadArtifactError` if the program does not run, `UsageError` for a task that the checkpoint cannot solve,
    `RecipeError` for activations that float16 does not hold.
    """
    task = request.task
    drop = quantized.recipe.bounds.solved_drop if budget.solved is None else budget.solved
    float32, share = float32_of(loaded, cache, request, report), 0.0
    if task is not None and float32.answers is not None:
        share = _share(loaded, task_config, task, float32.answers)
        check_fit(task_config.name, len(task.prompts), share, drop)
    try:
        reference = begun or make_reference(quantized.weights, float32, quantized.plain, request, report)
    except Float16Error as error:
        refused = f"recipe {quantized.recipe.name} on {loaded.folder}: {error}; {_remedy(quantized.recipe)}"
        raise RecipeError(refused) from error
    save_reference(reference, reference_file)
    lengths = (lowered.max_seq_len, lowered.max_rows)
    expected = expected_format(quantized.weights, quantized.recipe, *lengths, lowered.metadata)
    try:
        bounds = bounds_of(quantized.recipe, budget)
        measured = measure(lowered.pte, reference_file, reference, bounds, expected, threads, report)
    except ProgramError as error:
        raise BadArtifactError(str(error)) from error
    floored = with_floors(reference, measured.replay, quantized.weights, bounds, report)
    if floored is not reference:
        save_reference(floored, reference_file)
        measured = measured.judged_by(floored, bounds)
    figures = name_wrong_layer(
        list(measured.figures), lowered.pte, quantized.weights, reference, quantized.recipe.bounds, report
    )
    solved = None
    if task is not None and measured.replay.answers is not None:
        program = _share(loaded, task_config, task, measured.replay.answers)
        solved = Solved(task_config.name, len(task.prompts), float32=share, program=program)
        figures.append(solved_figure(solved, drop))
    verdict = verdict_of(figures, budget, request.material, loaded.config.vocab_size, quantized.recipe.better)
    return Validated(figures, measured, expected, solved, float32.answers, verdict)


def _remedy(recipe: Recipe) -> str:
    folds = f"recipe.fold=[{','.join(fold.value for fold in Fold)}] or " if set(recipe.fold) != set(Fold) else ""
    return f"give {folds}recipe={recipe.better or 'fp32_xnnpack'}"


def _share(loaded: Loaded, config: TaskConfig, task: Task, answers: Answers) -> float:
    assert config.checker is not None
    assert loaded.tokenizer is not None
    return share_solved(loaded.tokenizer, Path(config.checker), task, answers.tokens)
