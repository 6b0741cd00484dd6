"""The commands, under Hydra: each error of a user ends in one line and its exit code."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, cast

import hydra
from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.arguments import as_it_stands, quoted, with_positional, with_recipe_files, with_task
from pipeline.commands import COMMANDS, list_recipes
from pipeline.config import (
    CONF,
    check_keys,
    explain,
    names_of_keys,
    register,
)
from pipeline.outcome import be_heard, fail, outcome, quiet
from runtime.errors import INTERRUPTED, PipelineError, UsageError

# Hydra's flags that make sense here; its others change which files are the configuration.
FLAGS = {"--help", "-h", "--hydra-help", "--cfg", "-c", "--package", "-p", "--resolve", "--multirun", "-m"}
# Keys that Hydra does not get to see: their text may also be `???` or `null`, and long.
TEXT_KEYS = {"prompt", "system", "prefix", "suffix"}
FLAGS |= {"--shell-completion", "-sc"}
SWEEPS = {"--multirun", "-m"}
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
        return fail("interrupted", INTERRUPTED)
    except PipelineError as error:
        return fail(str(error), error.exit_code)


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
    arguments.sort(key=lambda argument: argument not in SWEEPS)  # Hydra's parser knows no flag between two keys
    arguments = with_recipe_files(arguments, is_sweep)
    arguments = with_task(command, arguments, is_sweep)
    arguments = [as_it_stands(argument, command, is_sweep) for argument in arguments]
    register()
    # Hydra then raises what it would print; `explain` says it in one line.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [program, *arguments]
    codes: list[int] = []

    def typed(config: DictConfig) -> Any:
        check_keys(config, command)
        return replace(_typed(config, command), **texts)

    def job(config: DictConfig) -> None:
        be_heard()
        code, _ = outcome(lambda: task(typed(config)))
        codes.append(code)

    def start(job: Callable[[DictConfig], Any]) -> None:
        asks = any(argument.lstrip("+~").partition("=")[0] in ("hydra", "hydra.mode") for argument in arguments)
        with nullcontext() if asks else composed_once():
            hydra.main(config_path=str(CONF), config_name=command, version_base="1.3")(job)()

    try:
        with quiet():
            if is_sweep and command == "run":
                return _sweep(arguments, typed, task, start)
            if is_sweep and any(argument.startswith("hydra/launcher=") for argument in arguments):
                raise UsageError(f"{command} does its jobs one after another: hydra/launcher is of run alone")
            start(job)
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 2
    except PipelineError:
        raise
    except Exception as error:
        # Outside the job there is only Hydra, reading what the user wrote.
        raise UsageError(_in_no_group(error, arguments) or explain(error, command)) from error
    return next((code for code in codes if code), 0)


@contextmanager
def composed_once() -> Iterator[None]:
    """Hydra composes all of it once more, to look for a mode (findings/hydra_composes_twice.sh): flags ask for it."""
    get_mode = Hydra.get_mode
    Hydra.get_mode = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_mode = get_mode  # type: ignore[method-assign]


def _sweep(
    arguments: list[str],
    typed: Callable[[DictConfig], Any],
    task: Callable[[Any], None],
    start: Callable[[Callable[[DictConfig], Any]], None],
) -> int:
    """Jobs may be run by other processes, on other machines: what they need goes with them."""
    from pipeline.job import run_job
    from pipeline.sweep import begin, launch

    sweep = begin(arguments)
    sys.argv.append(f"hydra.sweep.dir={quoted(str(sweep.folder))}")  # wherever a job's process was started

    def job(config: DictConfig) -> list[float] | None:
        hydras = HydraConfig.get()
        given = cast(list[str], OmegaConf.to_container(hydras.overrides.task, resolve=False))  # as they were planned
        asked = (sweep, int(hydras.job.num), given, task)
        return run_job(lambda: typed(config), str(config.output), *asked)

    return launch(sweep, lambda: start(job))


# Groups that a recipe may do without.
NULLABLE = ("recipe.linear", "recipe.embedding")


def _in_no_group(error: Exception, arguments: list[str]) -> str:
    """For a key of a group that is null, of which OmegaConf says "Unexpected type for root" and no name."""
    given = [argument.partition("=")[0].lstrip("+") for argument in arguments]
    keys = [key for key in given if key.rpartition(".")[0] in NULLABLE]
    if not keys or not str(error).startswith("Unexpected type for root"):
        return ""
    return f"{', '.join(keys)}: there is nothing to set it in, for its group is null in this recipe"


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
