"""Where the configuration lies, how it is read, and what is said when a key or value is not of `pipeline/schema.py`."""

from __future__ import annotations

import difflib
import re
import tempfile
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from hydra.core.config_store import ConfigStore
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.schema import SCHEMAS
from pipeline.synonyms import SYNONYMS
from recipes.options import Recipe
from runtime.artifact import ArtifactError, load_manifest
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
    _store_schemas()


@cache
def _store_schemas() -> None:
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


def load_recipe(name: str) -> Recipe:
    """The recipe of `conf/recipe/NAME.yaml`, checked. Raises `UsageError`."""
    return _choice("recipe", name, Recipe)


def load_task(name: str) -> TaskConfig:
    """The task of `conf/task/NAME.yaml`, checked. Raises `UsageError`."""
    return _choice("task", name, TaskConfig)


def task_of_checkpoint(checkpoint: Path) -> str:
    tasks = {name: load_task(name).checkpoint for name in names_of("task")}
    return next((n for n, owner in tasks.items() if owner and Path(owner).resolve() == checkpoint.resolve()), "none")


def task_of_artifact(artifact: Path) -> str:
    """What it was validated with, if that is one of `conf/task/`; nothing else of the manifest is looked at."""
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
    first, cause = first_line(error), error.__cause__
    key = str(getattr(cause, "full_key", None) or getattr(error, "full_key", None) or "")
    if first.startswith("Could not override '"):
        key = first.split("'")[1]
    detail = first_line(cause) if cause is not None else first
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
    plugins = PLUGINS.get("/".join(key.split(".")[:2]))
    if plugins is not None:
        return f"no key {key!r} of what is in use; {key.split('.')[1]}s with keys of their own are {', '.join(plugins)}"
    return f"no key {key!r}{nearest(key, names_of_keys(command))}"


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def nearest(word: str, words: list[str]) -> str:
    by_leaf = {w.rpartition(".")[2]: w for w in reversed(words)}
    close = [w for w in SYNONYMS.get(word, ()) if w in words] or difflib.get_close_matches(word, words, n=1)
    close = close or [by_leaf[leaf] for leaf in difflib.get_close_matches(word.rpartition(".")[2], list(by_leaf), n=1)]
    return f"; did you mean {close[0]!r}?" if close else ""


def _keys(schema: type) -> list[str]:
    """Every key that can be set, groups included, with dots."""
    return list(hints_of(schema))


def hints_of(schema: type) -> dict[str, Any]:
    """The type of each key, groups included, by its name with dots."""
    hints = {}
    for name, hint in get_type_hints(schema).items():
        hints[name] = hint
        for inner in (hint, *get_args(hint)):
            if isinstance(inner, type) and is_dataclass(inner):
                hints |= {f"{name}.{key}": type_ for key, type_ in hints_of(inner).items()}
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
