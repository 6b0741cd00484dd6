"""What is written so far, in runs that look alike: masks, what the last step wrote, and the rest."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from runtime.text import TextArtifact
from runtime.tokenizer import decode

MASK = "░"


def runs(artifact: TextArtifact, tokens: list[int], before: list[int]) -> Iterator[tuple[str, str]]:
    """(text, "mask" | "new" | "old"), in order. before: the tokens a step ago, as many.

    Neighbours that look alike come together: a character may be made of several tokens.
    """
    mask_id = artifact.program.mask_id
    pairs = zip(tokens, before, strict=True)
    for (is_mask, is_new), run in groupby(pairs, key=lambda pair: (pair[0] == mask_id, pair[0] != pair[1])):
        ids = [token for token, _ in run]
        kind = "mask" if is_mask else "new" if is_new else "old"
        yield MASK * len(ids) if is_mask else decode(artifact.tokenizer, ids), kind
