"""An answer as it is filled in, live in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor

from runtime.text import TextArtifact
from runtime.tokenizer import decode

MASK = "░"


class View:
    """The answer as it is filled in: masks as blocks, what the last step wrote in green."""

    def __init__(self, artifact: TextArtifact, console: Console) -> None:
        self.start = 0  # of what is shown
        self._artifact, self._console = artifact, console
        self._tokens: list[int] = []
        self._live: Live | None = None

    def live(self) -> Live:
        self._live = Live(console=self._console, transient=True, auto_refresh=False)
        return self._live

    def update(self, step: int, tokens: Tensor) -> None:
        before, self._tokens = self._tokens, tokens[0, self.start :].tolist()
        if self._console.is_terminal and self._live is not None:
            self._live.update(self._text(step, before), refresh=True)

    def plain(self) -> str:
        """What is written so far."""
        return self._text(0, self._tokens, with_step=False).plain

    def _text(self, step: int, before: list[int], with_step: bool = True) -> Text:
        mask_id, text = self._artifact.program.mask_id, Text()
        left = self._tokens.count(mask_id)
        if with_step:
            text.append(f"step {step + 1}, {left} masks left\n", style="dim")
        before = before or [mask_id] * len(self._tokens)
        for is_mask, is_new, ids in _runs(self._tokens, before, mask_id):
            style = "dim" if is_mask else "bold green" if is_new else ""
            text.append(MASK * len(ids) if is_mask else decode(self._artifact.tokenizer, ids), style=style)
        return text


def _runs(tokens: list[int], before: list[int], mask_id: int) -> Iterator[tuple[bool, bool, list[int]]]:
    """Neighbours that look alike, together: a character may be made of several tokens."""
    pairs = zip(tokens, before, strict=True)
    for (is_mask, is_new), run in groupby(pairs, key=lambda pair: (pair[0] == mask_id, pair[0] != pair[1])):
        yield is_mask, is_new, [token for token, _ in run]
