"""The types of all keys, one dataclass a command; `conf/COMMAND.yaml` holds their values."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from pipeline.choice_schema import CompareConfig, FetchConfig, PublishConfig, ReleaseConfig
from pipeline.decoding import Cache, DecodingConfig
from recipes.options import Recipe
from validation.settings import Budget, EvaluatedTask, TaskConfig, ValidationConfig

CORES = ("cortex-a53", "cortex-a76", "neoverse-n1")  # in order; with dot products; a server's


class Target(Enum):
    host = "host"
    arm64 = "arm64"


@dataclass
class ExportConfig:
    max_seq_len: int | None = None
    max_rows: int | None = None


@dataclass
class RunConfig:
    checkpoint: str = MISSING
    lora: str | None = None
    calibration: str | None = None
    output: str = MISSING
    force: bool = False
    memory: int | None = None
    overwrite: bool = False
    cache: str = MISSING
    targets: list[Target] = field(default_factory=lambda: [Target.host])
    cores: list[str] = field(default_factory=lambda: list(CORES))
    runner: str | None = None
    packed_cache: str | None = None
    recipe: Recipe = field(default_factory=Recipe)
    task: TaskConfig = field(default_factory=TaskConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    budget: Budget = field(default_factory=Budget)


@dataclass
class TuneBudget:
    """One of them. kl: nats. bytes: of all weights in a program."""

    kl: float | None = None
    bytes: int | None = None


@dataclass
class TuneConfig:
    checkpoint: str = MISSING
    lora: str | None = None
    calibration: str | None = None
    output: str = MISSING
    plot: str | None = None
    cache: str = MISSING
    recipe: Recipe = field(default_factory=Recipe)
    task: TaskConfig = field(default_factory=TaskConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    budget: TuneBudget = field(default_factory=TuneBudget)


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
    loss: float | None = None
    loss_increase: float | None = None
    order_agreement: float | None = None
    same_answers: float | None = None
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
    lora: str | None = None
    calibration: str | None = None
    prompts: str | None = None
    checker: str | None = None
    texts: str | None = None
    target: Target = Target.host
    cores: list[str] = field(default_factory=lambda: list(CORES))
    runner: str | None = None
    summary: str | None = None
    junit: str | None = None
    bounds: PinnedBounds = field(default_factory=PinnedBounds)
    baseline: str | None = None
    margins: Margins = field(default_factory=Margins)
    threads: int | None = None


@dataclass
class InspectConfig:
    artifact: str = MISSING
    device: bool = False
    json: bool = False


@dataclass
class SignConfig:
    artifact: str = MISSING
    key: str = MISSING


@dataclass
class VerifyConfig:
    artifact: str | None = None
    registry: str | None = None
    key: str | None = None


@dataclass
class GenerateConfig(DecodingConfig):
    artifact: str = MISSING
    prompt: str | None = None
    prompts: str | None = None
    prefix: str | None = None
    suffix: str | None = None
    masks: int | None = None
    max_masks: int | None = None
    chat: bool = False
    stop: list[str] | None = None
    n: int = 1
    best_of: int | None = None
    cache: Cache | None = None
    packed_cache: str | None = None
    threads: int | None = None


@dataclass
class ChatConfig(DecodingConfig):
    artifact: str = MISSING
    system: str | None = None
    save: str | None = None
    stop: list[str] | None = None
    cache: Cache | None = None
    packed_cache: str | None = None
    threads: int | None = None


@dataclass
class ServeConfig(DecodingConfig):
    artifact: str = MISSING
    host: str = MISSING
    port: int = MISSING
    max_queue: int = MISSING
    timeout: float = MISSING
    cache: Cache | None = None
    packed_cache: str | None = None
    threads: int | None = None


@dataclass
class EvaluateConfig(DecodingConfig):
    artifact: str = MISSING
    task: EvaluatedTask = field(default_factory=EvaluatedTask)
    tasks: str | None = None
    lm_eval: list[str] | None = None
    lm_eval_tasks: str | None = None
    n: int = 1000
    caches: list[Cache] = field(default_factory=lambda: [Cache.none])
    rules: list[str] = field(default_factory=lambda: [""])
    output: str | None = None
    plot: str | None = None
    threads: int | None = None


@dataclass
class BenchConfig:
    artifact: str = MISSING
    lengths: list[int] | None = None
    kv_len: int = 0
    prompt_len: int | None = None
    new_tokens: int | None = None
    block_length: int = 32
    steps: int | None = None
    threshold: float = 0.9
    repeats: int = 3
    seed: int = 0
    packed_cache: str | None = None
    output: str | None = None
    threads: int | None = None


@dataclass
class ExplainConfig:
    artifact: str = MISSING
    checkpoint: str = MISSING
    lora: str | None = None
    calibration: str | None = None
    cache: str = MISSING
    output: str | None = None


@dataclass
class CleanConfig:
    cache: str = MISSING


# Keys of type `str`, by their last names: those that are paths, whose `~` is expanded, and other text.
PATHS = {
    "artifact",
    "baseline",
    "cache",
    "checker",
    "checkpoint",
    "html",
    "junit",
    "key",
    "output",
}
PATHS |= {
    "calibration",
    "lm_eval_tasks",
    "lora",
    "notes",
    "packed_cache",
    "plot",
    "prompts",
    "registry",
    "runner",
    "save",
    "summary",
    "tasks",
    "texts",
}
TEXTS = {"better", "description", "host", "name", "prefix", "prompt", "suffix", "system"}

# The key of a command that takes what is given without one.
POSITIONAL = dict.fromkeys(("compare", "release", "publish", "fetch"), "artifacts")

SCHEMAS = {
    "run": RunConfig,
    "validate": ValidateConfig,
    "inspect": InspectConfig,
    "sign": SignConfig,
    "verify": VerifyConfig,
    "generate": GenerateConfig,
    "chat": ChatConfig,
    "serve": ServeConfig,
    "evaluate": EvaluateConfig,
    "bench": BenchConfig,
    "compare": CompareConfig,
    "release": ReleaseConfig,
    "publish": PublishConfig,
    "fetch": FetchConfig,
    "explain": ExplainConfig,
    "tune": TuneConfig,
    "clean": CleanConfig,
}
