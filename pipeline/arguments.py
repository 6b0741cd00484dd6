"""What a user gives on the command line, as Hydra is to read it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pipeline.config import (
    BUNDLED,
    RECIPE_FILES,
    explain,
    first_line,
    hints_of,
    names_of,
    nearest,
    task_of_artifact,
    task_of_checkpoint,
)
from pipeline.schema import POSITIONAL, SCHEMAS, TEXTS
from recipes.options import Recipe
from runtime.errors import UsageError


def as_it_stands(argument: str, command: str, is_sweep: bool) -> str:
    """`KEY=VALUE` of a path or a text in quotes, so that Hydra reads nothing into it; any other as it is.

    A `~` or `~user` that a path begins with is expanded, and a sweep tries each path between commas; one that is part
    of a path is `\\,` there. `null` is none, where there may be none. Raises `UsageError` for a path that is empty.
    """
    key, is_given, value = argument.partition("=")
    hints = hints_of(SCHEMAS[command])
    hint = hints.get(key.lstrip("+"))
    if is_given and dict[str, str] in (hint, hints.get(key.rpartition(".")[0])):
        return f"++{argument.lstrip('+')}"  # whose keys are the user's own; Hydra would take them for wrong ones
    if not is_given or hint not in (str, str | None) or (value == "null" and hint is not str):
        return argument
    if key.lstrip("+").rpartition(".")[2] in TEXTS:
        return f"{key}={quoted(value)}"
    paths = _paths(value) if is_sweep else [value]
    if not all(paths):
        raise UsageError(f"{key} is empty: a path is expected")
    return f"{key}={','.join(quoted(os.path.expanduser(path)) for path in paths)}"  # noqa: PTH111 (~x may be no user)


def with_positional(command: str, arguments: list[str]) -> list[str]:
    """The arguments, with those that are no `key=value` and no flag as the value of the key that takes them.

    A path with a `=` is one where a `/` is before it. Raises `UsageError` for that key beside them.
    """
    key = POSITIONAL.get(command)
    given = [a for a in arguments if a and not a.startswith("-") and ("=" not in a or "/" in a.partition("=")[0])]
    if key is None or not given:
        return arguments
    if any(argument.partition("=")[0] == key for argument in arguments):
        raise UsageError(f"{key} is given twice: as {key}=... and by itself, {given[0]!r}")
    paths = ",".join(quoted(os.path.expanduser(path)) for path in given)  # noqa: PTH111 (~x may be no user)
    return [*(argument for argument in arguments if argument not in given), f"{key}=[{paths}]"]


def _paths(swept: str) -> list[str]:
    return [path.replace("\\,", ",") for path in re.split(r"(?<!\\),", swept)]


def quoted(text: str) -> str:
    """For Hydra's parser, and then for OmegaConf, which would resolve `${…}`."""
    literal = re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", text)
    return QuotedString(literal, Quote.single).with_quotes()


def with_recipe_files(arguments: list[str], is_sweep: bool) -> list[str]:
    """The arguments, with the name that Hydra then knows a recipe by in place of `recipe=FILE.yaml`.

    Raises `UsageError` for a file that is no recipe.
    """
    store = ConfigStore.instance()
    store.repo.pop("recipe", None)  # those of a call before

    def known(choice: str) -> str:
        if not choice.endswith(RECIPE_FILES):
            return choice
        name = f"file_{len(store.repo.get('recipe', {}))}"
        store.store(name=name, node=_read_recipe(Path(choice).expanduser()), group="recipe")
        return name

    def replaced(argument: str) -> str:
        key, is_given, value = argument.partition("=")
        if key != "recipe" or not is_given:
            return argument
        return f"recipe={','.join(known(choice) for choice in (_paths(value) if is_sweep else [value]))}"

    return [replaced(argument) for argument in arguments]


def _read_recipe(file: Path) -> dict[str, Any]:
    """Checked against the types of a recipe."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(file))
        if not isinstance(content, dict):
            raise UsageError(f"recipe {file} holds no keys and values")
        known = OmegaConf.merge({"recipe": OmegaConf.structured(Recipe)}, {"recipe": content})
        if missing := sorted(str(key) for key in OmegaConf.missing_keys(known)):
            raise UsageError(f"recipe {file}: {missing[0]} is not given")
        OmegaConf.to_object(known)
    except OSError as error:
        hint = nearest(file.stem, names_of("recipe"))
        raise UsageError(f"recipe {file} cannot be read: {error.strerror or error}{hint}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"recipe {file} is not UTF-8") from error
    except YAMLError as error:
        raise UsageError(f"recipe {file} is not YAML: {first_line(error)}") from error
    except OmegaConfBaseException as error:
        raise UsageError(f"recipe {file}: {explain(error, 'run')}") from error
    return {str(key): value for key, value in content.items()}


def with_task(command: str, arguments: list[str], is_sweep: bool) -> list[str]:
    """The arguments with `task=`, where they name none: what the checkpoint, or the artifact, brings."""
    key = {"run": "checkpoint", "tune": "checkpoint", "evaluate": "artifact"}.get(command)
    if key is None or any(argument.partition("=")[0].lstrip("+~") == "task" for argument in arguments):
        return arguments
    given = next((a.partition("=")[2] for a in reversed(arguments) if a.partition("=")[0] == key), str(BUNDLED))
    paths = given.split(",") if is_sweep else [given]
    name_of = task_of_artifact if command == "evaluate" else task_of_checkpoint
    names = {name_of(Path(path).expanduser()) for path in paths}
    # Checkpoints of one sweep may differ: then each job finds its own.
    return [*arguments, f"task={names.pop()}"] if len(names) == 1 else arguments
