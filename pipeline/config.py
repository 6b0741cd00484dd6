"""The typed schema of the configuration, and what is said when a key or value is not of it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.errors import UsageError
from recipes.blocks import Recipe

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"


@dataclass
class ExportConfig:
    max_seq_len: int | None = None
    max_rows: int | None = None


@dataclass
class ValidationConfig:
    seed: int = 0
    n_prompts: int = 32


@dataclass
class TaskConfig:
    name: str = MISSING
    prompts: str | None = None
    new_tokens: int = 32
    n_solve: int = 0


@dataclass
class RunConfig:
    checkpoint: str = MISSING
    output: str = MISSING
    overwrite: bool = False
    recipe: Recipe = field(default_factory=Recipe)
    task: TaskConfig = field(default_factory=TaskConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


@dataclass
class ValidateConfig:
    artifact: str = MISSING
    checkpoint: str | None = None


SCHEMAS = {"run": RunConfig, "validate": ValidateConfig}


def register() -> None:
    """Make the schema and the resolvers known to Hydra."""
    for command, schema in SCHEMAS.items():
        ConfigStore.instance().store(name=f"{command}_schema", node=schema)
    # A path of this repository, wherever the command is run.
    OmegaConf.register_new_resolver("root", lambda path: str(ROOT / path), replace=True)
    OmegaConf.register_new_resolver("basename", lambda path: Path(path).resolve().name, replace=True)


def recipe_names() -> list[str]:
    return sorted(file.stem for file in (CONF / "recipe").glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """The recipe of `conf/recipe/NAME.yaml`, checked. Raises `UsageError`."""
    if name not in recipe_names():
        raise UsageError(f"no recipe {name!r}{_nearest(name, recipe_names())}; there are {', '.join(recipe_names())}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.load(CONF / "recipe" / f"{name}.yaml"))
        recipe = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UsageError(f"conf/recipe/{name}.yaml: {explain(error, 'run')}") from error
    assert isinstance(recipe, Recipe)
    return recipe


def explain(error: Exception, command: str) -> str:
    """One line for an error of Hydra or OmegaConf: what is wrong, and the nearest right key or value."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, value = str(error.missing_cfg_file).rpartition("/")
        options = [option for option in error.options or [] if option]
        return f"no {group} {value!r}{_nearest(value, options)}; there are {', '.join(options)}"
    cause = error.__cause__
    key = str(getattr(cause, "full_key", None) or getattr(error, "full_key", None) or "")
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if first.startswith("Could not override '"):
        key = first.split("'")[1]
        detail = str(cause).strip().splitlines()[0] if cause is not None else ""
        if not detail or "is not in struct" in detail or "not in '" in detail or "No match" in str(error):
            return f"no key {key!r}{_nearest(key, _keys(command))}"
        return f"{key}: {detail}"
    if "is not in struct" in first or "not in '" in first:
        return f"no key {key!r}{_nearest(key, _keys(command))}"
    return f"{key}: {first}" if key and not first.startswith(key) else first


def is_config_error(error: Exception) -> bool:
    return isinstance(error, HydraException | OmegaConfBaseException)


def _nearest(word: str, words: list[str]) -> str:
    by_leaf = {w.rpartition(".")[2]: w for w in reversed(words)}
    close = difflib.get_close_matches(word, words, n=1) or [
        by_leaf[leaf] for leaf in difflib.get_close_matches(word.rpartition(".")[2], list(by_leaf), n=1)
    ]
    return f"; did you mean {close[0]!r}?" if close else ""


def _keys(command: str) -> list[str]:
    """Every key that can be set, groups included, with dots."""

    def walk(node: Any, prefix: str) -> list[str]:
        keys: list[str] = []
        for key in node:
            path = f"{prefix}{key}"
            keys.append(path)
            child = node._get_node(key)
            if OmegaConf.is_dict(child) and not child._is_missing() and not child._is_none():
                keys += walk(child, path + ".")
        return keys

    return walk(OmegaConf.structured(SCHEMAS[command]), "")
