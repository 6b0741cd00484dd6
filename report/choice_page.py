"""The choice for people: a page that opens offline, and Markdown for a pull request."""

from __future__ import annotations

from collections.abc import Iterator

from report.candidate import MEASURES, Candidate
from report.comparison import Comparison, cell_text
from report.front import choice_plot
from report.markdown import code, row
from report.overview import Overview, cell, header, on_arm
from report.page import page
from report.plots import Plot, agreement_plot, difference_plot, speed_plot


def compare_page(overview: Overview) -> str:
    """As HTML: the table of all, size against KL, and in detail what differs from the first."""
    details = overview.details
    return page(
        "compare.html.j2",
        overview=overview,
        names=[one.name for one in overview.candidates],
        measures={name: header(name) for name in MEASURES},
        cell=cell,
        on_arm=on_arm,
        text=cell_text,
        choices=list(_choices(overview)),
        plots=_plots(details[0]) if len(details) == 1 else [],
    )


def _choices(overview: Overview) -> Iterator[Plot]:
    for title, group in overview.groups.items():
        found = [one for one in group if "kl" in one.values and not one.wrong]
        front = [one for one in found if not overview.beaten[one.name]]
        if len(found) > 1:
            beaten = [one for one in found if one not in front]
            yield choice_plot(title if len(overview.groups) > 1 else "", _points(front), _points(beaten))


def _points(candidates: list[Candidate]) -> dict[str, tuple[float, float]]:
    return {one.name: (one.values["bytes"], one.values["kl"]) for one in candidates}


def _plots(compared: Comparison) -> list[Plot]:
    reports = {f"a: {compared.a.name}": compared.a.report, f"b: {compared.b.name}": compared.b.report}
    return [
        difference_plot({name: report["differences"] for name, report in reports.items()}),
        agreement_plot(reports, "masks"),
        agreement_plot(reports, "position"),
        speed_plot({name: report["calls"] for name, report in reports.items()}),
    ]


def compare_markdown(overview: Overview) -> str:
    """What a pull request shows: the front in bold."""
    lines = []
    for title, group in overview.groups.items():
        lines += [f"### {code(title)}", "", *markdown_table(group, overview), ""]
    lines += [f"- {code(one.name)} cannot be compared: {code(one.why)}" for one in overview.unusable]
    lines += [f"- {code(note)}" for note in overview.notes]
    return "\n".join([*lines, ""])


def markdown_table(group: list[Candidate], overview: Overview) -> Iterator[str]:
    yield row("artifact", *map(header, MEASURES), "Arm", "")
    yield row("---", *["---:"] * len(MEASURES), "---", "---")
    for one in group:
        place = overview.place(one)
        is_front = place == "front"
        cells = (cell(one, name) for name in MEASURES)
        name = f"**{code(one.name)}**" if is_front else code(one.name)
        yield row(
            name, *cells, code(arm) if (arm := on_arm(one)) != "-" else arm, "**front**" if is_front else code(place)
        )
