"""Stage 5: the `.pte` in the ExecuTorch runtime, against eager. Fidelity and quality are never mixed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from model import load_hf_model
from pipeline.load import Loaded
from pipeline.lower import Lowered
from pipeline.quantize import Quantized
from recipes.stored import Weights
from runtime.errors import BadArtifactError
from runtime.program import ProgramError
from validation.expected_format import expected_format
from validation.judge import Validated, bounds_of, measure
from validation.recording import make_reference, prompts_of, task_of
from validation.reference import save_reference
from validation.replay import solve
from validation.settings import TaskConfig, ValidationConfig
from validation.solved import Solved, share_solved, solved_figure
from validation.wrong_layers import name_wrong_layer


def validate(
    lowered: Lowered,
    quantized: Quantized,
    loaded: Loaded,
    task_config: TaskConfig,
    settings: ValidationConfig,
    reference_file: Path,
    report: Callable[[str], None],
    threads: int | None = None,
) -> Validated:
    """Writes `reference_file`. threads: as for `runtime.threads.use_threads`.

    Raises `BadArtifactError` if the program does not run.
    """
    S, max_rows = lowered.max_seq_len, lowered.max_rows
    prompts = prompts_of(loaded.tokenizer, loaded.config, task_config, settings, S)
    task = task_of(loaded.tokenizer, prompts, task_config, S)
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
    expected = expected_format(quantized.weights, quantized.recipe, S, max_rows, lowered.metadata)
    try:
        measured = measure(lowered.pte, reference_file, reference, bounds_of(quantized.recipe), expected, threads)
    except ProgramError as error:
        raise BadArtifactError(str(error)) from error
    figures = name_wrong_layer(
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
