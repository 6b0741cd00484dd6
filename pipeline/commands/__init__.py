"""One file a command. Heavy imports wait until it runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.console import err, out
from runtime.errors import PipelineError


def _run(config: Any) -> None:
    from pipeline.commands.run import run

    run(config, out())


def _check_threads(config: Any) -> None:
    """Raises `UsageError`; more than there are processors for is a line."""
    from runtime.threads import check_threads, warning

    check_threads(config.threads)
    if said := warning(config.threads):
        err.print(f"warning: {said}", markup=False)


def _validate(config: Any) -> None:
    from pipeline.commands.validate import revalidate
    from pipeline.display import Display
    from report.ci import write_reports
    from report.files import check_output
    from report.summary import show_again

    _check_threads(config)
    summary, junit = (None if file is None else Path(file) for file in (config.summary, config.junit))
    for file in filter(None, (summary, junit)):
        check_output(file)  # before the long work
    write = partial(write_reports, Path(config.artifact), summary, junit)
    console = out()
    display = Display(console)
    try:
        with display.live():
            figures = revalidate(config, display)
    except PipelineError as error:
        write([], error)
        raise
    write(figures, None)
    show_again(console, figures)


def _inspect(config: Any) -> None:
    from pipeline.commands.inspect import inspect

    inspect(config, out())


def _sign(config: Any) -> None:
    from pipeline.commands.sign import sign

    sign(config, out())


def _verify(config: Any) -> None:
    from pipeline.commands.verify import verify

    verify(config, out())


def _generate(config: Any) -> None:
    from pipeline.commands.generate import answer_lines, answer_prompt
    from pipeline.commands.infill import fill_gap, is_gap

    _check_threads(config)
    if is_gap(config):
        fill_gap(config, err)
        return
    (answer_prompt if config.prompts is None else answer_lines)(config, err)


def _chat(config: Any) -> None:
    from pipeline.commands.chat import chat

    _check_threads(config)
    chat(config, err)


def _serve(config: Any) -> None:
    from pipeline.commands.serve import serve

    _check_threads(config)
    serve(config, err)


def _evaluate(config: Any) -> None:
    from pipeline.commands.evaluate import evaluate

    _check_threads(config)
    evaluate(config, out(), err)


def _bench(config: Any) -> None:
    from pipeline.commands.bench import bench

    _check_threads(config)
    bench(config, out(), err)


def _compare(config: Any) -> None:
    from pipeline.commands.compare import compare

    compare(config, out())


def _release(config: Any) -> None:
    from pipeline.commands.release import release

    release(config, out())


def _publish(config: Any) -> None:
    from pipeline.commands.publish import publish_all

    publish_all(config, out())


def _fetch(config: Any) -> None:
    from pipeline.commands.fetch import fetch

    fetch(config, out())


def _explain(config: Any) -> None:
    from pipeline.commands.explain import explain_artifact, show
    from pipeline.display import Display

    console = out()
    display = Display(console)
    with display.live():
        explained = explain_artifact(config, display)
    show(console, explained)


def _tune(config: Any) -> None:
    from pipeline.commands.tune import show_tuned, tune
    from pipeline.display import Display

    console = out()
    display = Display(console)
    with display.live():
        measured, chosen = tune(config, display)
    show_tuned(console, measured, chosen, config)


def _clean(config: Any) -> None:
    from pipeline.commands.clean import clean

    clean(config, out())


def list_recipes() -> int:
    from pipeline.commands.recipes import recipes

    recipes(out())
    return 0


COMMANDS: dict[str, Callable[[Any], None]] = {
    "run": _run,
    "validate": _validate,
    "inspect": _inspect,
    "sign": _sign,
    "verify": _verify,
    "generate": _generate,
    "chat": _chat,
    "serve": _serve,
    "evaluate": _evaluate,
    "bench": _bench,
    "compare": _compare,
    "release": _release,
    "publish": _publish,
    "fetch": _fetch,
    "explain": _explain,
    "tune": _tune,
    "clean": _clean,
}
