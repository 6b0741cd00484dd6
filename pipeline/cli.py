"""The commands, under Hydra: each error of a user ends in one line and its exit code."""

from __future__ import annotations

import difflib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from pipeline.config import CONF, check_keys, explain, load_recipe, names_of, names_of_keys, register
from pipeline.errors import INTERNAL_ERROR, INTERRUPTED, OutputError, PipelineError, UsageError, one_line

err = Console(stderr=True, soft_wrap=True, highlight=False)


# Hydra's flags that make sense here; its others change which files are the configuration.
FLAGS = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--package", "-p", "--resolve", "--multirun", "-m"}
# Keys whose value is taken as it stands.
TEXT_KEYS = {"prompt"}
FLAGS |= {"--shell-completion", "-sc"}
# Flags of ours, and the key that each sets.
OUR_FLAGS = {"inspect": {"--json": "json=true"}, "compare": {"--json": "json=true"}}


def dispatch(command: str, arguments: list[str]) -> int:
    """The exit code. With --multirun, that of the first job that failed."""
    try:
        if command in ("-sc", "--shell-completion"):
            return _complete([command, *arguments])
        if command == "recipes":
            if arguments:
                raise UsageError(f"recipes takes no arguments, got {arguments[0]!r}")
            return _recipes()
        task = COMMANDS.get(command)
        if task is None:
            close = difflib.get_close_matches(command, [*COMMANDS, "recipes"], n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UsageError(f"no command {command!r}{hint} (see python -m pipeline --help)")
        return _under_hydra(command, arguments, task)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except PipelineError as error:
        return _fail(str(error), error.exit_code)


def _under_hydra(
    command: str, arguments: list[str], task: Callable[[Any], None], program: str = "python -m pipeline"
) -> int:
    arguments = [OUR_FLAGS.get(command, {}).get(argument, argument) for argument in arguments]
    for argument in arguments:
        if argument.startswith("-") and argument.partition("=")[0] not in FLAGS:
            key = argument.partition("=")[0].lstrip("-")
            hint = (
                f"did you mean {key}=...?" if key in names_of_keys(command) else f"there are {', '.join(sorted(FLAGS))}"
            )
            raise UsageError(f"no flag {argument!r}; {hint}")
    # Text is the user's, not Hydra's: it may hold commas, braces and quotes.
    texts = {key: text for key, _, text in (argument.partition("=") for argument in arguments) if key in TEXT_KEYS}
    arguments = [argument for argument in arguments if argument.partition("=")[0] not in TEXT_KEYS]
    register()
    # Hydra then raises what it would print; `explain` says it in one line.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [program, *arguments]
    codes: list[int] = []

    def job(config: DictConfig) -> None:
        def work() -> None:
            check_keys(config, command)
            task(replace(_typed(config, command), **texts))

        codes.append(exit_code(work))

    try:
        with quiet():
            hydra.main(config_path=str(CONF), config_name=command, version_base="1.3")(job)()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 2
    except Exception as error:
        # Outside the job there is only Hydra, reading what the user wrote.
        raise UsageError(explain(error, command)) from error
    return next((code for code in codes if code), 0)


def exit_code(work: Callable[[], None]) -> int:
    """0, or what is documented for the error, which is said in one line."""
    try:
        work()
    except PipelineError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        # Whoever reads the answers has closed the pipe, as head does: nothing is left to be said, and to no one.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OutputError.exit_code
    except Exception as error:  # noqa: BLE001 (the last resort: a line, not a traceback)
        return _internal(error)
    return 0


def _typed(config: DictConfig, command: str) -> Any:
    """The dataclass of the command. Raises `UsageError` for a key that is missing or was deleted."""
    try:
        missing = sorted(str(key) for key in OmegaConf.missing_keys(config))
        if missing:
            raise UsageError(f"{missing[0]} is not given: {missing[0]}=...")
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise UsageError(explain(error, command)) from error


def _run(config: Any) -> None:
    from pipeline.display import Display
    from pipeline.road import run
    from pipeline.summary import show_run

    console = _console()
    display = Display(console)
    with display.live():
        packaged, validated = run(config, display)
    show_run(console, packaged, validated, display.stages)


def _validate(config: Any) -> None:
    from pipeline.ci import check_reports, write_reports
    from pipeline.display import Display
    from pipeline.revalidate import revalidate
    from pipeline.summary import show_figures

    check_reports(config)
    console = _console()
    display = Display(console)
    try:
        with display.live():
            figures = revalidate(config, display)
    except PipelineError as error:
        write_reports(config, [], error)
        raise
    write_reports(config, figures, None)
    show_figures(console, figures)


def _inspect(config: Any) -> None:
    from pipeline.inspect import inspect

    inspect(config, _console())


def _sign(config: Any) -> None:
    from pipeline.sign import sign

    sign(config, _console())


def _verify(config: Any) -> None:
    from pipeline.verify import verify

    verify(config, _console())


def _generate(config: Any) -> None:
    from pipeline.generate import answer_lines, answer_prompt

    if sys.stdout is None:
        raise OutputError("the answer cannot be written: stdout is closed")
    (answer_prompt if config.prompts is None else answer_lines)(config, err)


def _evaluate(config: Any) -> None:
    from pipeline.evaluate import evaluate

    evaluate(config, _console(), err)


def _bench(config: Any) -> None:
    from pipeline.bench import bench

    bench(config, _console(), err)


def _compare(config: Any) -> None:
    from pipeline.compare import compare

    compare(config, _console())


def _explain(config: Any) -> None:
    from pipeline.display import Display
    from pipeline.explain import explain_artifact, show

    console = _console()
    display = Display(console)
    with display.live():
        explained = explain_artifact(config, display)
    show(console, explained)


def _clean(config: Any) -> None:
    from pipeline.clean import clean

    clean(config, _console())


def _complete(arguments: list[str]) -> int:
    """Hydra's completion knows one program with one config: hand it the line without our command."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if arguments[-1].startswith("query=") and len(words) + line.endswith(" ") < 3:
        sys.stdout.write("\n".join([*COMMANDS, "recipes"]) + "\n")
        return 0
    command = words[1] if len(words) > 1 and words[1] in COMMANDS else "run"
    os.environ["COMP_LINE"] = " ".join([*words[:1], *words[2:]]) + " " * line.endswith(" ")
    return _under_hydra(command, arguments, COMMANDS[command], program="dreamedge")


def _recipes() -> int:
    from pipeline.display import table

    listing = table(None, "recipe", "what it makes")
    for name in names_of("recipe"):
        listing.add_row(name, load_recipe(name).description)
    _console().print(listing)
    return 0


def _console() -> Console:
    """As wide as the terminal; a log has no width of its own."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


COMMANDS: dict[str, Callable[[Any], None]] = {
    "run": _run,
    "validate": _validate,
    "inspect": _inspect,
    "sign": _sign,
    "verify": _verify,
    "generate": _generate,
    "evaluate": _evaluate,
    "bench": _bench,
    "compare": _compare,
    "explain": _explain,
    "clean": _clean,
}


def _fail(message: str, exit_code: int) -> int:
    err.print(f"error: {one_line(message)}", markup=False)
    return exit_code


def _internal(error: Exception) -> int:
    if os.environ.get("DREAMEDGE_TRACEBACK"):
        raise error
    return _fail(
        f"internal error: {type(error).__name__}: {error} (please report it; DREAMEDGE_TRACEBACK=1 shows where)",
        INTERNAL_ERROR,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Torch, torchao and executorch warn about each other and about absent GPUs: nothing that a user can act on."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    for name in ("torchao", "torch.utils._pytree", "executorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
