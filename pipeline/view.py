"""An answer as it is filled in, live in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor

from runtime.canvas import runs
from runtime.text import TextArtifact

STYLES = {"mask": "dim", "new": "bold green", "old": ""}


class View:
    """Masks as blocks, what the last step wrote in green."""

    def __init__(self, artifact: TextArtifact, console: Console) -> None:
        self.start = 0  # of what is shown
        self._artifact, self._console = artifact, console
        self._tokens: list[int] = []
        self._live: Live | None = None

    def live(self) -> Live:
        self._live = Live(console=self._console, transient=True, auto_refresh=False)
        return self._live

    def update(self, step: int, tokens: Tensor) -> None:
        self.show(step, tokens[0, self.start :].tolist())

    def show(self, step: int, tokens: list[int]) -> None:
        before, self._tokens = self._tokens, tokens
        if before and len(before) != len(tokens):  # masks went, or became two: nothing was written
            before = tokens
        if self._console.is_terminal and self._live is not None:
            self._live.update(self._text(step, before), refresh=True)

    def plain(self) -> str:
        """What is written so far."""
        return self._text(0, self._tokens, with_step=False).plain

    def _text(self, step: int, before: list[int], with_step: bool = True) -> Text:
        mask_id, text = self._artifact.program.mask_id, Text()
        if with_step:
            text.append(f"step {step + 1}, {self._tokens.count(mask_id)} masks left\n", style="dim")
        for part, kind in runs(self._artifact, self._tokens, before or [mask_id] * len(self._tokens)):
            text.append(part, style=STYLES[kind])
        return text
