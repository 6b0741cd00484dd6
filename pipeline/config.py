"""Where the configuration lies, how it is read, and what is said when a key or value is not of `pipeline/schema.py`."""

from __future__ import annotations

import difflib
import os
import re
import tempfile
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pipeline.schema import SCHEMAS, TEXTS
from pipeline.synonyms import SYNONYMS
from recipes.options import Recipe
from runtime.errors import UsageError
from validation.settings import TaskConfig

ROOT = Path(__file__).resolve().parent.parent  # where the rooms lie
PACKAGE = ROOT / "pipeline"
# conf/ and assets/ lie beside the rooms in a checkout; in an installed package, whose neighbours are others', in here.
HOME = PACKAGE if (PACKAGE / "conf").is_dir() else ROOT
CONF, ASSETS = HOME / "conf", HOME / "assets"
# Rooms whose files decide what an artifact is.
ROOMS = ("conf", "model", "recipes", "pipeline", "validation", "report", "evidence", "runtime")
DEFAULT_TEXT = ASSETS / "text" / "default.jsonl"  # that quality is measured on where none is given
CALIBRATION_TEXT = ASSETS / "text" / "calibration.jsonl"  # that rounding goes by where none is given
BUNDLED = ASSETS / "dream_sudoku"  # the checkpoint of `conf/run.yaml`
RECIPE_FILES = (".yaml", ".yml")  # `recipe=` with such an end is a file of the user's own
AUTO = "auto"  # the task that stands for the checkpoint's own
# Choices of Hydra's groups that a package brings, and the extra that brings it.
PLUGINS = {
    "hydra/launcher": {"joblib": "joblib", "submitit_local": "slurm", "submitit_slurm": "slurm", "ray": "ray"},
    "hydra/sweeper": {"optuna": "search"},
}
T = TypeVar("T")


def register() -> None:
    """Make the schema known to Hydra. Raises `UsageError` where there is no configuration."""
    names_of("recipe")
    for command, schema in SCHEMAS.items():
        ConfigStore.instance().store(name=f"{command}_schema", node=schema)


# At the import, for a job's process reads its configuration before it calls anything of ours.
# A path of DreamEdge's own, wherever the command is run.
OmegaConf.register_new_resolver("root", lambda path: str(HOME / path), replace=True)
OmegaConf.register_new_resolver("tmp", tempfile.gettempdir, replace=True)
OmegaConf.register_new_resolver("dashed", lambda path: f"-{Path(path).resolve().name}" if path else "", replace=True)
OmegaConf.register_new_resolver("length", lambda length: "" if length is None else f"-{length}", replace=True)
OmegaConf.register_new_resolver("basename", lambda path: Path(path).resolve().name, replace=True)


def source_files() -> dict[str, Path]:
    """DreamEdge's own code and configuration, by name: the same names in a checkout and in an installed package."""
    files = {}
    for room in ROOMS:
        folder = CONF if room == "conf" else ROOT / room
        others = {CONF, ASSETS} - {folder}
        for file in folder.rglob("*"):
            if file.suffix in (".py", ".yaml") and others.isdisjoint(file.parents):
                files[f"{room}/{file.relative_to(folder).as_posix()}"] = file
    return files


def names_of(group: str) -> list[str]:
    """The choices of `conf/GROUP/`. Raises `UsageError` where there are none."""
    names = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
    if not names:
        raise UsageError(f"no {group} in {CONF / group}: DreamEdge is not installed whole; install it again")
    return names


def names_of_keys(command: str) -> list[str]:
    """Every key of a command, with dots."""
    return _keys(SCHEMAS[command])


def as_it_stands(argument: str, command: str, is_sweep: bool) -> str:
    """`KEY=VALUE` of a path or a text in quotes, so that Hydra reads nothing into it; any other as it is.

    A `~` or `~user` that a path begins with is expanded, and a sweep tries each path between commas; one that is part
    of a path is `\\,` there. `null` is none, where there may be none. Raises `UsageError` for a path that is empty.
    """
    key, is_given, value = argument.partition("=")
    hints = _hints(SCHEMAS[command])
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


def _paths(swept: str) -> list[str]:
    return [path.replace("\\,", ",") for path in re.split(r"(?<!\\),", swept)]


def quoted(text: str) -> str:
    """For Hydra's parser, and then for OmegaConf, which would resolve `${…}`."""
    literal = re.sub(r"(\\*)\$\{", lambda found: 2 * found[1] + r"\${", text)
    return QuotedString(literal, Quote.single).with_quotes()


def load_recipe(name: str) -> Recipe:
    """The recipe of `conf/recipe/NAME.yaml`, checked. Raises `UsageError`."""
    return _choice("recipe", name, Recipe)


def load_task(name: str) -> TaskConfig:
    """The task of `conf/task/NAME.yaml`, checked. Raises `UsageError`."""
    return _choice("task", name, TaskConfig)


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
        raise UsageError(f"recipe {file} is not YAML: {_first_line(error)}") from error
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


def task_of_checkpoint(checkpoint: Path) -> str:
    tasks = {name: load_task(name).checkpoint for name in names_of("task")}
    return next((n for n, owner in tasks.items() if owner and Path(owner).resolve() == checkpoint.resolve()), "none")


def task_of_artifact(artifact: Path) -> str:
    """What it was validated with, if that is one of `conf/task/`; nothing else of the manifest is looked at."""
    from runtime.artifact import ArtifactError, load_manifest  # takes torch

    try:
        name = load_manifest(artifact)["task"]["name"]
    except (ArtifactError, KeyError, TypeError):
        return AUTO  # `evaluate` says what is wrong with it
    return name if name in names_of("task") else AUTO


def _choice(group: str, name: str, schema: type[T]) -> T:
    names = names_of(group)
    if name not in names:
        raise UsageError(f"no {group} {name!r}{nearest(name, names)}; there are {', '.join(names)}")
    register()
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(CONF / group / f"{name}.yaml"))
        chosen = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UsageError(f"conf/{group}/{name}.yaml: {explain(error, 'run')}") from error
    assert isinstance(chosen, schema)
    return chosen


def explain(error: Exception, command: str) -> str:
    """One line for an error of Hydra or OmegaConf: what is wrong, and the nearest right key or value."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, value = str(error.missing_cfg_file).rpartition("/")
        options = [option for option in error.options or [] if option]
        if group in PLUGINS and value in PLUGINS[group]:
            return f"{group}={value} is not installed: pip install 'dreamedge[{PLUGINS[group][value]}]' (docs/sweep.md)"
        return f"no {group} {value!r}{nearest(value, options)}; there are {', '.join(options)}"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: key=value is expected"
    first, cause = _first_line(error), error.__cause__
    key = str(getattr(cause, "full_key", None) or getattr(error, "full_key", None) or "")
    if first.startswith("Could not override '"):
        key = first.split("'")[1]
    detail = _first_line(cause) if cause is not None else first
    if key and (first.startswith("Could not override '") or "is not in struct" in detail or "not in '" in detail):
        return _no_key(key, command)
    expected = re.search(r"Invalid value '(.*)', expected one of \[(.*)\]", detail)
    if expected:
        value, options = expected[1], expected[2].split(", ")
        return f"{key}: no value {value!r}{nearest(value, options)}; there are {', '.join(options)}"
    return f"{key}: {detail}" if key else first


def check_keys(config: DictConfig, command: str) -> None:
    """Hydra lets a user add (`+key=value`) and delete (`~key`) keys: raises `UsageError` for either."""
    known = names_of_keys(command)
    given = _set_keys(config)
    for key in given:
        if key not in known:
            raise UsageError(_no_key(key, command))
    for key in known:
        if "." not in key and key not in given:
            raise UsageError(f"{key} is not given: {key}=...")


def _no_key(key: str, command: str) -> str:
    return f"no key {key!r}{nearest(key, names_of_keys(command))}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def nearest(word: str, words: list[str]) -> str:
    by_leaf = {w.rpartition(".")[2]: w for w in reversed(words)}
    close = [w for w in SYNONYMS.get(word, ()) if w in words] or difflib.get_close_matches(word, words, n=1)
    close = close or [by_leaf[leaf] for leaf in difflib.get_close_matches(word.rpartition(".")[2], list(by_leaf), n=1)]
    return f"; did you mean {close[0]!r}?" if close else ""


def _keys(schema: type) -> list[str]:
    """Every key that can be set, groups included, with dots."""
    return list(_hints(schema))


def _hints(schema: type) -> dict[str, Any]:
    """The type of each key, groups included, by its name with dots."""
    hints = {}
    for name, hint in get_type_hints(schema).items():
        hints[name] = hint
        for inner in (hint, *get_args(hint)):
            if isinstance(inner, type) and is_dataclass(inner):
                hints |= {f"{name}.{key}": type_ for key, type_ in _hints(inner).items()}
    return hints


def _set_keys(config: DictConfig) -> list[str]:
    keys = []
    for name in map(str, config):
        keys.append(name)
        child = config._get_node(name)
        is_typed = isinstance(child, DictConfig) and child._metadata.object_type not in (dict, None)  # else: any keys
        if isinstance(child, DictConfig) and is_typed and not child._is_none() and not child._is_missing():
            keys += [f"{name}.{key}" for key in _set_keys(child)]
    return keys
