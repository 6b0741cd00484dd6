"""The typed schema of the configuration, and what is said when a key or value is not of it."""

from __future__ import annotations

import difflib
import re
import tempfile
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from pathlib import Path
from typing import TypeVar, get_args, get_type_hints

from hydra.core.config_store import ConfigStore
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.errors import UsageError
from recipes.blocks import Recipe
from runtime.processor import native_float16

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
T = TypeVar("T")


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
    checker: str | None = None
    new_tokens: int = 32
    threshold: float | None = None
    n_solve: int = 0


@dataclass
class RunConfig:
    checkpoint: str = MISSING
    output: str = MISSING
    force: bool = False
    overwrite: bool = False
    cache: str = MISSING
    recipe: Recipe = field(default_factory=Recipe)
    task: TaskConfig = field(default_factory=TaskConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


@dataclass
class PinnedBounds:
    """By the names of the figures; None: as the artifact says."""

    fidelity_db: float | None = None
    fidelity_exact_db: float | None = None
    top1_agreement: float | None = None
    kl_divergence: float | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    max_abs_diff: float | None = None
    solved_percent: float | None = None
    bytes_per_weight: float | None = None
    planned_memory: float | None = None


@dataclass
class Margins:
    """How much worse than the baseline's: quality in the figure's own unit, size and seconds as a share."""

    top1_agreement: float = 0.0
    kl_divergence: float = 0.0
    sqnr_db: float = 0.0
    cosine: float = 0.0
    max_abs_diff: float = 0.0
    solved_percent: float = 0.0
    size: float = 0.0
    seconds: float = 0.0


@dataclass
class ValidateConfig:
    artifact: str = MISSING
    checkpoint: str | None = None
    prompts: str | None = None
    checker: str | None = None
    summary: str | None = None
    junit: str | None = None
    bounds: PinnedBounds = field(default_factory=PinnedBounds)
    baseline: str | None = None
    margins: Margins = field(default_factory=Margins)


@dataclass
class InspectConfig:
    artifact: str = MISSING
    json: bool = False


@dataclass
class SignConfig:
    artifact: str = MISSING
    key: str = MISSING


@dataclass
class VerifyConfig:
    artifact: str = MISSING
    key: str | None = None


class Algorithm(Enum):
    origin = "origin"
    maskgit_plus = "maskgit_plus"
    topk_margin = "topk_margin"
    entropy = "entropy"


class Cache(Enum):
    none = "none"
    prefix = "prefix"
    dual = "dual"


@dataclass
class DecodingConfig:
    """The options of `runtime.generate`, by their names there."""

    max_new_tokens: int | None = None
    steps: int | None = None
    alg: Algorithm = Algorithm.entropy
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    alg_temp: float | None = None
    eps: float = 1e-3
    block_length: int | None = None
    threshold: float | None = None
    seed: int | None = None
    stop_at_eos: bool = True


@dataclass
class GenerateConfig(DecodingConfig):
    artifact: str = MISSING
    prompt: str | None = None
    prompts: str | None = None
    chat: bool = False
    cache: Cache = Cache.none
    packed_cache: str | None = None


@dataclass
class EvaluateConfig(DecodingConfig):
    artifact: str = MISSING
    task: TaskConfig = field(default_factory=TaskConfig)
    n: int = 1000
    caches: list[Cache] = field(default_factory=lambda: [Cache.none])
    output: str | None = None


@dataclass
class BenchConfig:
    artifact: str = MISSING
    lengths: list[int] = field(default_factory=list)
    kv_len: int = 0
    prompt_len: int = 128
    new_tokens: int = 256
    block_length: int = 32
    steps: int | None = None
    threshold: float = 0.9
    repeats: int = 3
    seed: int = 0
    packed_cache: str | None = None
    output: str | None = None


@dataclass
class CompareConfig:
    a: str = MISSING
    b: str = MISSING
    json: bool = False
    html: str | None = None


@dataclass
class ExplainConfig:
    artifact: str = MISSING
    checkpoint: str = MISSING
    cache: str = MISSING
    output: str | None = None


@dataclass
class CleanConfig:
    cache: str = MISSING


SCHEMAS = {
    "run": RunConfig,
    "validate": ValidateConfig,
    "inspect": InspectConfig,
    "sign": SignConfig,
    "verify": VerifyConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "bench": BenchConfig,
    "compare": CompareConfig,
    "explain": ExplainConfig,
    "clean": CleanConfig,
}


def register() -> None:
    """Make the schema and the resolvers known to Hydra."""
    for command, schema in SCHEMAS.items():
        ConfigStore.instance().store(name=f"{command}_schema", node=schema)
    # A path of this repository, wherever the command is run.
    OmegaConf.register_new_resolver("root", lambda path: str(ROOT / path), replace=True)
    OmegaConf.register_new_resolver("tmp", tempfile.gettempdir, replace=True)
    OmegaConf.register_new_resolver("native_float16", lambda yes, no: yes if native_float16() else no, replace=True)
    OmegaConf.register_new_resolver("basename", lambda path: Path(path).resolve().name, replace=True)


def names_of(group: str) -> list[str]:
    """The choices of `conf/GROUP/`."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def names_of_keys(command: str) -> list[str]:
    """Every key of a command, with dots."""
    return _keys(SCHEMAS[command])


def load_recipe(name: str) -> Recipe:
    """The recipe of `conf/recipe/NAME.yaml`, checked. Raises `UsageError`."""
    return _choice("recipe", name, Recipe)


def load_task(name: str) -> TaskConfig:
    """The task of `conf/task/NAME.yaml`, checked. Raises `UsageError`."""
    return _choice("task", name, TaskConfig)


def _choice(group: str, name: str, schema: type[T]) -> T:
    names = names_of(group)
    if name not in names:
        raise UsageError(f"no {group} {name!r}{_nearest(name, names)}; there are {', '.join(names)}")
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
        return f"no {group} {value!r}{_nearest(value, options)}; there are {', '.join(options)}"
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
        return f"{key}: no value {value!r}{_nearest(value, options)}; there are {', '.join(options)}"
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
    return f"no key {key!r}{_nearest(key, names_of_keys(command))}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _nearest(word: str, words: list[str]) -> str:
    by_leaf = {w.rpartition(".")[2]: w for w in reversed(words)}
    close = difflib.get_close_matches(word, words, n=1) or [
        by_leaf[leaf] for leaf in difflib.get_close_matches(word.rpartition(".")[2], list(by_leaf), n=1)
    ]
    return f"; did you mean {close[0]!r}?" if close else ""


def _keys(schema: type) -> list[str]:
    """Every key that can be set, groups included, with dots."""
    keys = []
    for name, hint in get_type_hints(schema).items():
        keys.append(name)
        for inner in (hint, *get_args(hint)):
            if isinstance(inner, type) and is_dataclass(inner):
                keys += [f"{name}.{key}" for key in _keys(inner)]
    return keys


def _set_keys(config: DictConfig) -> list[str]:
    keys = []
    for name in map(str, config):
        keys.append(name)
        child = config._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            keys += [f"{name}.{key}" for key in _set_keys(child)]
    return keys
