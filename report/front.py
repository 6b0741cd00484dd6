"""Plots to choose by: what is smaller, or faster, against what it loses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from report.chart import Axis, Series, chart
from report.plots import Plot

Sizes = Mapping[str, tuple[float, float]]  # by name, bytes and nats


def tuned_plot(single: Sizes, chosen: Sizes) -> Plot:
    """Bytes of all weights, and nats from float32: of one format for all matrices, and of one for each."""

    title = "Size against divergence"
    every = [_by_size("a format for each", chosen, "line"), _by_size("one for all", single, "dots")]
    limits = (0.0, max(kl for _, kl in [*single.values(), *chosen.values()]))
    picture = chart(title, Axis("weights, MiB"), Axis("KL, nats", limits), every, legend="inside")
    return Plot(title, picture, "Lower and further left is better.")


@dataclass(frozen=True)
class Point:
    """An artifact of a search. bytes: of the program. kl: nats. seconds: of the calls that validated it."""

    name: str
    bytes: float
    kl: float
    seconds: float

    @property
    def objectives(self) -> tuple[float, float, float]:
        return self.bytes, self.kl, self.seconds


def front_plots(points: Sequence[Point], front: Sequence[Point], best: Point) -> list[Plot]:
    """Size and time of what a search made, each against the divergence."""

    def series(name: str, shown: Sequence[Point], of: Callable[[Point], float]) -> Series:
        tips = tuple(f"{p.name}: {p.bytes / 2**20:.2f} MiB, {p.kl:.5f} nats, {p.seconds:.2f} s" for p in shown)
        return Series(name, [(of(point), point.kl) for point in shown], "dots", tips)

    def plot(title: str, axis: str, of: Callable[[Point], float]) -> Plot:
        others = [point for point in points if point not in front]
        kinds = {"beaten": others, "on the front": [one for one in front if one != best], "best": [best]}
        every = [series(name, shown, of) for name, shown in kinds.items() if shown]
        return Plot(title, chart(title, Axis(axis), Axis("KL, nats"), every), "Lower and further left is better.")

    return [
        plot("Size against divergence", "program, MiB", lambda point: point.bytes / 2**20),
        plot("Time against divergence", "validating calls, seconds", lambda point: point.seconds),
    ]


def choice_plot(group: str, front: Sizes, beaten: Sizes) -> Plot:
    """Bytes of the program, and nats from float32. group: of several, else empty."""

    every = [_by_size("the front", front, "line"), _by_size("beaten", beaten, "dots")]
    is_log = all(kl > 0 for _, kl in [*front.values(), *beaten.values()])
    title = f"Size against divergence{': ' * bool(group)}{group}"
    picture = chart(
        title, Axis("model.pte, MiB"), Axis("KL, nats", log=is_log), [one for one in every if one.points],
        legend="inside",
    )  # fmt: skip
    return Plot(title, picture, "Lower and further left is better. An artifact may be ahead in time or memory instead.")


def _by_size(name: str, found: Sizes, draw: Literal["line", "dots"]) -> Series:
    points = sorted((n_bytes / 2**20, kl, what) for what, (n_bytes, kl) in found.items())
    tips = tuple(f"{what}: {x:.2f} MiB, {kl:.5f} nats" for x, kl, what in points)
    return Series(name, [(x, kl) for x, kl, _ in points], draw, tips)
