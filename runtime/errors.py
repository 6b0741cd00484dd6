"""What a user can cause, and the exit code that says so. docs/exit-codes.md lists them."""

from __future__ import annotations


class PipelineError(Exception):
    """Ends the run with one line and `exit_code`."""

    exit_code = 1


class UsageError(PipelineError):
    """A command, key or value that does not exist."""

    exit_code = 2


class InputError(PipelineError):
    """A checkpoint that cannot be used."""

    exit_code = 3


class RecipeError(PipelineError):
    """A recipe that cannot be applied to this checkpoint."""

    exit_code = 4


class ValidationError(PipelineError):
    """A figure out of its bounds."""

    exit_code = 5


class BadArtifactError(PipelineError):
    """An artifact or program that is damaged, or of another version."""

    exit_code = 6


class OutputError(PipelineError):
    """The artifact cannot be written."""

    exit_code = 7


class ResourceError(PipelineError):
    """Too little memory or disk for what is asked."""

    exit_code = 8


class LostError(PipelineError):
    """A job of a sweep that came to no end: its process was killed, or its machine is gone."""

    exit_code = 9

    def __init__(self, jobs: str) -> None:
        super().__init__(f"came to no end, its process was killed or its machine is gone: {jobs}")


def one_line(text: str, longest: int = 2000) -> str:
    """Text that an artifact may have brought: no line breaks, and nothing that a terminal obeys."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
    return line if len(line) <= longest else f"{line[:longest]}…"


INTERNAL_ERROR = 1
INTERRUPTED = 130
