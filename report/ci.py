"""What a CI shows of a validation: a Markdown summary, and JUnit XML with a test case for each figure."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from report.files import write_text
from report.markdown import LONGEST, code, row
from report.terminal import bound_text
from runtime.errors import PipelineError, one_line
from validation.figure import Figure


def write_reports(
    artifact: Path, summary: Path | None, junit_file: Path | None, figures: list[Figure], error: PipelineError | None
) -> None:
    """summary, junit_file: where to, None for nowhere. error: what ended the validation before there were figures.

    Raises `OutputError`.
    """
    name = artifact.resolve().name
    if summary is not None:
        write_text(summary, markdown(name, figures, error))
    if junit_file is not None:
        write_text(junit_file, junit(name, figures, error))


def markdown(name: str, figures: list[Figure], error: PipelineError | None) -> str:
    wrong = [figure for figure in figures if not figure.ok]
    is_valid = not wrong and error is None
    lines = [f"## {'✅' if is_valid else '❌'} {code(name)} is {'valid' if is_valid else 'not valid'}", ""]
    if error is not None:
        return "\n".join([*lines, f"{code(str(error))} (exit code {error.exit_code})", ""])
    judged = [figure for figure in figures if figure.bound is not None]
    within = sum(figure.ok for figure in judged)
    lines += [f"{within} of {len(judged)} figures are within bounds, {len(figures) - len(judged)} are reported.", ""]
    lines += ["| | | figure | value | bound | where |", "|---|---|---|---|---|---|"]
    for figure in [*wrong, *(figure for figure in figures if figure.ok)]:
        cells = (f"{figure.value:.6g}", bound_text(figure), code(figure.where))
        mark = "❌" if not figure.ok else "✅" if figure.bound is not None else ""
        lines.append(row(mark, figure.group, code(figure.name), *cells))
    return "\n".join([*lines, ""])


def junit(name: str, figures: list[Figure], error: PipelineError | None) -> str:
    wrong = [figure for figure in figures if not figure.ok]
    counts = {"tests": len(figures) or 1, "failures": len(wrong), "errors": int(error is not None), "skipped": 0}
    suite = ElementTree.Element("testsuite", {"name": one_line(name), **{key: str(n) for key, n in counts.items()}})
    for figure in figures:
        case = ElementTree.SubElement(suite, "testcase", classname=f"validate.{figure.group}", name=figure.name)
        if not figure.ok:
            ElementTree.SubElement(case, "failure", message=one_line(str(figure), LONGEST), type="out of bounds")
        ElementTree.SubElement(case, "system-out").text = one_line(str(figure), LONGEST)
    if error is not None:
        case = ElementTree.SubElement(suite, "testcase", classname="validate", name="artifact")
        ElementTree.SubElement(case, "error", message=one_line(str(error), LONGEST), type=type(error).__name__)
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=False) + "\n"
