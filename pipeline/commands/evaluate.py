"""`evaluate`: let an artifact do the tasks of a folder, by several caches and rules, and count what is right."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from yaml import YAMLError

from pipeline.config import AUTO, explain, load_task, names_of
from pipeline.console import warn_out_of_bounds
from pipeline.decoding import Cache, DecodingConfig, decoding_options
from pipeline.schema import EvaluateConfig
from report.files import check_output, json_numbers, write_json, write_text
from report.page import picture
from report.plots import evaluation_plot
from report.terminal import show, table
from runtime.artifact import ArtifactError, load_manifest
from runtime.errors import BadArtifactError, UsageError
from runtime.infill import DRAWN_BY
from runtime.options import IN_PLACE
from runtime.text import TextArtifact, open_text_artifact
from validation.evaluation import Item, Outcome, Score, are_gaps, items_of, score
from validation.settings import EvaluatedTask

MADE = ("prompts", "checker", "texts")  # keys of a task that are files, beside it


def evaluate(config: EvaluateConfig, console: Console, err: Console) -> None:
    """Raises `PipelineError`. Interrupted, it shows what was done until then."""
    if config.lm_eval is not None:
        by_lm_eval(config, config.lm_eval, console, err)
        return
    if config.tasks is None and config.task.name == AUTO:
        _refuse_without_task(Path(config.artifact))
    if config.n < 1:
        raise UsageError(f"n {config.n}: at least 1 prompt makes a share")
    if not config.caches:
        raise UsageError("caches: name at least one of none, prefix, dual, d2f")
    if not config.rules:
        raise UsageError('rules: name at least one, "" for none')
    for file in filter(None, (config.output, config.plot)):
        check_output(Path(file))
    tasks = [config.task] if config.tasks is None else read_tasks(Path(config.tasks))
    settings = [(cache, rule, with_rule(rule)) for rule in config.rules for cache in config.caches]
    artifact = open_text_artifact(Path(config.artifact), threads=config.threads)
    warn_out_of_bounds(err, artifact.folder, artifact.manifest)
    work = _work(config, artifact, tasks, err)
    scores: list[Score] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=err, transient=True, disable=not err.is_terminal
    ) as progress:
        for task, items in work:
            for cache, rule, chosen in _settings_of(task, items, settings, err):
                said = f"{task.name}, cache {cache.value}{rule and f', {rule}'}"
                bar, outcomes = progress.add_task(escape(said), total=len(items)), list[Outcome]()
                options = _options(config, task, chosen, cache)
                try:
                    for solve in items:
                        outcomes.append(solve(artifact, options))
                        progress.advance(bar)
                except KeyboardInterrupt:
                    last = [score(task, cache.value, rule, outcomes)] if outcomes else []
                    _show(console, [*scores, *last])
                    raise
                scores.append(score(task, cache.value, rule, outcomes))
    _show(console, scores)
    if config.output is not None:
        write_json(Path(config.output), {"artifact": Path(config.artifact).name, "scores": [asdict(s) for s in scores]})
    if config.plot is not None:
        write_text(Path(config.plot), picture([evaluation_plot(task.name, scores) for task, _ in work]))


def by_lm_eval(config: EvaluateConfig, tasks: list[str], console: Console, err: Console) -> None:
    """The tasks of lm-evaluation-harness. Raises `PipelineError`."""
    if find_spec("lm_eval") is None:
        raise UsageError("lm_eval needs lm-evaluation-harness: pip install 'dreamedge[lm-eval]'")
    if config.output is not None:
        check_output(Path(config.output))
    artifact = open_text_artifact(Path(config.artifact), threads=config.threads)
    warn_out_of_bounds(err, artifact.folder, artifact.manifest)
    from pipeline.lm_harness import run_tasks

    folder = None if config.lm_eval_tasks is None else Path(config.lm_eval_tasks)
    options = decoding_options(config, config.caches[0] if config.caches else None)
    found = run_tasks(artifact, options, tasks, folder, config.n)
    listing = table("lm-evaluation-harness", "task", "figure", "value", "standard error", "of")
    for name, figures in found["results"].items():
        for key, value in figures.items():
            figure, _, filtered = key.partition(",")
            if isinstance(value, int | float) and filtered and not figure.endswith("_stderr"):
                error = figures.get(f"{figure}_stderr,{filtered}")
                spread = f"{error:.4f}" if isinstance(error, float) else ""
                of = found["n-samples"].get(name, {}).get("effective", "")
                listing.add_row(escape(name), escape(figure), f"{value:.4f}", spread, str(of))
    show(console, listing)
    if config.output is not None:
        kept = {key: found[key] for key in ("results", "versions", "n-shot", "n-samples")}
        write_json(Path(config.output), {"artifact": Path(config.artifact).name} | json_numbers(kept))


def read_tasks(folder: Path) -> list[EvaluatedTask]:
    """Of each YAML file; the files that it names lie beside it. Raises `UsageError`."""
    try:
        files = sorted(folder.glob("*.yaml"))
    except OSError as error:
        raise UsageError(f"tasks: {folder} cannot be read: {error.strerror or error}") from error
    if not files:
        raise UsageError(f"tasks: {folder} holds no task, a file such as sudoku.yaml")
    tasks = []
    for file in files:
        try:
            merged = OmegaConf.merge(OmegaConf.structured(EvaluatedTask(name=file.stem)), OmegaConf.load(file))
            task = OmegaConf.to_object(merged)
        except OmegaConfBaseException as error:
            raise UsageError(f"{file}: {explain(error, 'evaluate')}") from error
        except (OSError, ValueError, YAMLError) as error:
            raise UsageError(f"{file} is no task: {str(error).splitlines()[0]}") from error
        assert isinstance(task, EvaluatedTask)
        for key in MADE:
            if (value := getattr(task, key)) is not None:
                setattr(task, key, str(file.parent / value))
        tasks.append(task)
    return tasks


def with_rule(rule: str) -> dict[str, Any]:
    """The options that a rule such as "threshold=0.9 alpha=0.3" sets. Raises `UsageError`."""
    words = rule.split()
    if bare := [word for word in words if "=" not in word]:
        raise UsageError(f"rules: {rule!r}: {bare[0]!r} is no key=value")
    try:
        chosen = OmegaConf.merge(OmegaConf.structured(DecodingConfig), OmegaConf.from_dotlist(words))
        typed = OmegaConf.to_object(chosen)
    except OmegaConfBaseException as error:
        raise UsageError(f"rules: {rule!r}: {explain(error, 'evaluate')}") from error
    names = [word.partition("=")[0] for word in words]
    return {name: getattr(typed, name) for name in names}


def _options(config: EvaluateConfig, task: EvaluatedTask, chosen: dict[str, Any], cache: Cache) -> dict[str, Any]:
    """The command's keys, those of a task of a folder, then the rule's: where it says how many tokens a step writes,
    the task's threshold does not.
    """
    own = {f.name: getattr(config, f.name) for f in fields(DecodingConfig)}
    if config.tasks is not None:
        own["threshold"] = task.threshold
    if IN_PLACE & chosen.keys():
        own["threshold"] = None
    return decoding_options(DecodingConfig(**(own | chosen)), cache)


def _settings_of(
    task: EvaluatedTask, items: list[Item], settings: list[tuple[Cache, str, dict[str, Any]]], err: Console
) -> list[tuple[Cache, str, dict[str, Any]]]:
    """Those that make a difference to this task; the others are told."""
    if not are_gaps(items):
        return settings
    kept = [one for one in settings if one[0] is Cache.none and one[2].keys() <= set(DRAWN_BY)]
    others = [f"cache {one[0].value}{one[1] and f', {one[1]}'}" for one in settings if one not in kept]
    if others:
        err.print(f"note: {task.name}: a gap is filled without {'; '.join(others)}", markup=False)
    return kept or [(Cache.none, "", {})]


def _work(
    config: EvaluateConfig, artifact: TextArtifact, tasks: list[EvaluatedTask], err: Console
) -> list[tuple[EvaluatedTask, list[Item]]]:
    """The tasks that this artifact can do; of a folder the others are told. Raises `UsageError` where none is left."""
    if config.tasks is None:
        n_new = config.task.new_tokens if config.max_new_tokens is None else config.max_new_tokens
        task = replace(config.task, new_tokens=n_new)
        items = items_of(task, artifact, config.n)
        if len(items) < config.n and task.texts is None:
            raise UsageError(f"n {config.n}: {task.prompts} has {len(items)} prompts")
        return [(task, items)]
    work = []
    for task in tasks:
        try:
            items = items_of(task, artifact, config.n)
            items[0](artifact, _options(config, task, {"steps": 1, "threshold": None}, Cache.none))
            work.append((task, items))
        except UsageError as error:
            err.print(f"note: {task.name} is left out: {error}", markup=False)
    if not work:
        raise UsageError(f"tasks: {artifact.folder} can do none of those in {config.tasks}")
    return work


def _refuse_without_task(artifact: Path) -> NoReturn:
    """Raises `BadArtifactError` for what is no artifact, else `UsageError`."""
    try:
        load_manifest(artifact)
    except ArtifactError as error:
        raise BadArtifactError(str(error)) from error
    known = [name for name in names_of("task") if load_task(name).prompts is not None]
    raise UsageError(f"{artifact} was validated without a task of conf/task: name one, task=… ({', '.join(known)})")


def _show(console: Console, scores: list[Score]) -> None:
    for name in dict.fromkeys(one.task for one in scores):
        of_task = [one for one in scores if one.task == name]
        is_text = of_task[0].loss is not None
        columns = ["cache", "rule"] if any(one.rule for one in of_task) else ["cache"]
        columns += ["words right" if is_text else "solved", "95% interval", *(["loss, nats"] if is_text else [])]
        columns += ["texts" if is_text else "prompts", "steps", "forward calls", "positions", "seconds"]
        listing = table(escape(f"{name}, per {'text' if is_text else 'prompt'}"), *columns)
        for s in of_task:
            cells = [s.cache, escape(s.rule)] if "rule" in columns else [s.cache]
            cells += [f"{100 * s.solved:.1f} %", f"{100 * s.low:.1f} - {100 * s.high:.1f} %"]
            cells += [] if s.loss is None or s.loss_error is None else [f"{s.loss:.3f} ± {s.loss_error:.3f}"]
            per_item = (s.steps / s.n, s.forward_calls / s.n)
            cells += [str(s.n), *(f"{value:.1f}" for value in per_item), f"{s.positions / s.n:.0f}"]
            listing.add_row(*cells, f"{s.seconds / s.n:.4f}")
        show(console, listing)
