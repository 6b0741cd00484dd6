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

from pipeline import interrupt
from pipeline.arguments import as_it_stands, with_positional, with_recipe_files, with_task
from pipeline.commands import COMMANDS, list_recipes
from pipeline.config import (
    CONF,
    ROOMS,
    check_keys,
    explain,
    names_of_keys,
    register,
)
from pipeline.console import err
from runtime.errors import INTERNAL_ERROR, INTERRUPTED, PipelineError, UsageError, one_line

# Hydra's flags that make sense here; its others change which files are the configuration.
FLAGS = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--package", "-p", "--resolve", "--multirun", "-m"}
# Keys that Hydra does not get to see: their text may also be `???` or `null`, and long.
TEXT_KEYS = {"prompt", "system", "prefix", "suffix"}
FLAGS |= {"--shell-completion", "-sc"}
SWEEPS = {"--multirun", "-m"}
HEARD = {*ROOMS, "serving"}  # whose warnings are ours
# Flags of ours, and the key that each sets.
JSON = {"--json": "json=true"}
OUR_FLAGS = {"inspect": JSON | {"--device": "device=true"}, "compare": JSON, "release": JSON}


def dispatch(command: str, arguments: list[str]) -> int:
    """The exit code. With --multirun, that of the first job that failed."""
    try:
        if command in ("-sc", "--shell-completion"):
            return _complete([command, *arguments])
        if command == "recipes":
            if arguments:
                raise UsageError(f"recipes takes no arguments, got {arguments[0]!r}")
            return list_recipes()
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
    arguments = with_positional(command, arguments)
    for argument in arguments:
        if argument.startswith("-") and argument.partition("=")[0] not in FLAGS:
            key = argument.partition("=")[0].lstrip("-")
            hint = (
                f"did you mean {key}=...?" if key in names_of_keys(command) else f"there are {', '.join(sorted(FLAGS))}"
            )
            raise UsageError(f"no flag {argument!r}; {hint}")
    # Text and paths are the user's, not Hydra's: they may hold commas, braces and quotes.
    keys = TEXT_KEYS & set(names_of_keys(command))
    texts = {key: text for key, _, text in (argument.partition("=") for argument in arguments) if key in keys}
    arguments = [argument for argument in arguments if argument.partition("=")[0] not in keys]
    is_sweep = not SWEEPS.isdisjoint(arguments)
    arguments = with_recipe_files(arguments, is_sweep)
    arguments = with_task(command, arguments, is_sweep)
    arguments = [as_it_stands(argument, command, is_sweep) for argument in arguments]
    register()
    # Hydra then raises what it would print; `explain` says it in one line.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [program, *arguments]
    codes: list[int] = []

    def job(config: DictConfig) -> None:
        _be_heard()

        def work() -> None:
            check_keys(config, command)
            task(replace(_typed(config, command), **texts))

        codes.append(exit_code(work))

    try:
        with quiet():
            hydra.main(config_path=str(CONF), config_name=command, version_base="1.3")(job)()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 2
    except PipelineError:
        raise
    except Exception as error:
        # Outside the job there is only Hydra, reading what the user wrote.
        raise UsageError(_in_no_group(error, arguments) or explain(error, command)) from error
    return next((code for code in codes if code), 0)


# Groups that a recipe may do without.
NULLABLE = ("recipe.linear", "recipe.embedding")


def _in_no_group(error: Exception, arguments: list[str]) -> str:
    """For a key of a group that is null, of which OmegaConf says "Unexpected type for root" and no name."""
    given = [argument.partition("=")[0].lstrip("+") for argument in arguments]
    keys = [key for key in given if key.rpartition(".")[0] in NULLABLE]
    if not keys or not str(error).startswith("Unexpected type for root"):
        return ""
    return f"{', '.join(keys)}: there is nothing to set it in, for its group is null in this recipe"


def exit_code(work: Callable[[], None]) -> int:
    """0, or what is documented for the error, which is said in one line."""
    try:
        work()
    except Exception as error:  # the last resort: a line, not a traceback
        if interrupt.seen.is_set():
            raise KeyboardInterrupt from error
        return _fail(str(error), error.exit_code) if isinstance(error, PipelineError) else _internal(error)
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


def _be_heard() -> None:
    """Our warnings are lines as all others. At each job Hydra removes handlers, silences loggers, raises the level."""
    if not any(isinstance(handler, _Lines) for handler in logging.root.handlers):
        logging.root.addHandler(_Lines())
    logging.root.setLevel(logging.WARNING)
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and name.partition(".")[0] in HEARD:
            logger.disabled = False


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] in HEARD:  # a library's are nothing that a user can act on
            err.print(one_line(f"{record.levelname.lower()}: {record.getMessage()}"), markup=False)


@contextmanager
def quiet() -> Iterator[None]:
    """Torch, torchao and executorch warn about each other and about absent GPUs: nothing that a user can act on."""
    _be_heard()
    for name in ("torchao", "torch.utils._pytree", "executorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
