"""`evaluate`: let an artifact solve the prompts of a task, and count."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pipeline.config import AUTO, load_task, names_of
from pipeline.console import warn_out_of_bounds
from pipeline.decoding import Cache, decoding_options
from pipeline.schema import EvaluateConfig
from report.files import check_output, write_json
from report.terminal import show, table
from runtime.artifact import ArtifactError, load_manifest
from runtime.errors import BadArtifactError, UsageError
from runtime.generation import Generation
from runtime.text import TextArtifact, open_text_artifact, write
from runtime.tokenizer import decode, encode
from validation.tasks import Checker, load_checker, read_prompts, wilson_interval


@dataclass(frozen=True)
class Score:
    """Shares (0..1) of n prompts, with the 95% interval; totals over all of them."""

    task: str
    cache: str
    n: int
    solved: float
    low: float
    high: float
    steps: int
    forward_calls: int
    positions: int
    seconds: float


def evaluate(config: EvaluateConfig, console: Console, err: Console) -> list[Score]:
    """Raises `PipelineError`. Interrupted, it shows what was solved until then."""
    task = config.task
    if task.name == AUTO:
        _refuse_without_task(Path(config.artifact))
    if task.prompts is None or task.checker is None:
        raise UsageError(f"task {task.name!r} has no prompts or no checker: nothing to solve")
    if config.n < 1:
        raise UsageError(f"n {config.n}: at least 1 prompt makes a share")
    if not config.caches:
        raise UsageError("caches: name at least one of none, prefix, dual")
    if config.output is not None:
        check_output(Path(config.output))
    check, prompts = load_checker(Path(task.checker)), read_prompts(Path(task.prompts))[: config.n]
    if len(prompts) < config.n:
        raise UsageError(f"n {config.n}: {task.prompts} has {len(prompts)} prompts")
    artifact = open_text_artifact(Path(config.artifact), threads=config.threads)
    warn_out_of_bounds(err, artifact.folder, artifact.manifest)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    scores: list[Score] = []
    with Progress(
        *columns, TimeRemainingColumn(), console=err, transient=True, disable=not err.is_terminal
    ) as progress:
        for cache in config.caches:
            bar = progress.add_task(f"cache {cache.value}", total=len(prompts))
            results = []
            try:
                for prompt in prompts:
                    results.append(_solve(artifact, config, cache, prompt, check))
                    progress.advance(bar)
            except KeyboardInterrupt:
                _show(console, [*scores, *([_score(task.name, cache, results)] if results else [])])
                raise
            scores.append(_score(task.name, cache, results))
    _show(console, scores)
    if config.output is not None:
        write_json(Path(config.output), {"artifact": Path(config.artifact).name, "scores": [asdict(s) for s in scores]})
    return scores


def _refuse_without_task(artifact: Path) -> NoReturn:
    """Raises `BadArtifactError` for what is no artifact, else `UsageError`."""
    try:
        load_manifest(artifact)
    except ArtifactError as error:
        raise BadArtifactError(str(error)) from error
    known = [name for name in names_of("task") if load_task(name).prompts is not None]
    raise UsageError(f"{artifact} was validated without a task of conf/task: name one, task=… ({', '.join(known)})")


def _solve(
    artifact: TextArtifact, config: EvaluateConfig, cache: Cache, prompt: str, check: Checker
) -> tuple[bool, Generation]:
    n_new = config.task.new_tokens if config.max_new_tokens is None else config.max_new_tokens
    written = write(artifact, encode(artifact.tokenizer, prompt), n_new, decoding_options(config, cache))
    return check(prompt, decode(artifact.tokenizer, written.answers[0].tolist())), written


def _score(task: str, cache: Cache, results: list[tuple[bool, Generation]]) -> Score:
    n, k = len(results), sum(is_solved for is_solved, _ in results)
    low, high = wilson_interval(k, n)
    written = [generation for _, generation in results]
    return Score(
        task=task,
        cache=cache.value,
        n=n,
        solved=k / n,
        low=low,
        high=high,
        steps=sum(len(generation.history) - 1 for generation in written),
        forward_calls=sum(generation.forward_calls for generation in written),
        positions=sum(generation.positions for generation in written),
        seconds=sum(generation.seconds for generation in written),
    )


def _show(console: Console, scores: list[Score]) -> None:
    columns = ("cache", "solved", "95% interval", "prompts", "steps", "forward calls", "positions", "seconds")
    listing = table(escape(f"{scores[0].task}, per prompt") if scores else None, *columns)
    for s in scores:
        listing.add_row(
            s.cache,
            f"{100 * s.solved:.1f} %",
            f"{100 * s.low:.1f} - {100 * s.high:.1f} %",
            str(s.n),
            f"{s.steps / s.n:.1f}",
            f"{s.forward_calls / s.n:.1f}",
            f"{s.positions / s.n:.0f}",
            f"{s.seconds / s.n:.4f}",
        )
    show(console, listing)
