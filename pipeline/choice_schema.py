"""The types of the keys of those commands that choose among artifacts, and keep them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from validation.settings import Budget


class Preference(Enum):
    """What `release` chooses by: the names of figures in `report/candidate.py`."""

    kl = "kl"
    bytes = "bytes"
    ms = "ms"
    memory = "memory"
    solved = "solved"
    length = "length"


@dataclass
class CompareConfig:
    artifacts: list[str] = field(default_factory=list)
    json: bool = False
    html: str | None = None
    summary: str | None = None


@dataclass
class ReleaseBudget(Budget):
    """bytes: of model.pte. memory: bytes that it takes in the runtime. ms: of a step."""

    bytes: int | None = None
    memory: int | None = None
    ms: float | None = None


@dataclass
class ReleaseConfig:
    artifacts: list[str] = field(default_factory=list)
    baseline: str | None = None
    budget: ReleaseBudget = field(default_factory=ReleaseBudget)
    prefer: list[Preference] | None = None
    key: str | None = None
    registry: str | None = None
    notes: str = MISSING
    json: bool = False


@dataclass
class PublishConfig:
    artifacts: list[str] = field(default_factory=list)
    registry: str = MISSING


@dataclass
class FetchConfig:
    artifacts: list[str] = field(default_factory=list)
    registry: str = MISSING
    output: str | None = None
    key: str | None = None
    overwrite: bool = False
