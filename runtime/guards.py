"""What is not to be written: logits of masked positions, changed before tokens are chosen.

Shapes: L positions of a row, M masked ones that are asked, V vocabulary. Source of `eos_penalty`: Dream-Coder's demos.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BANNED = torch.finfo(torch.float32).min


def end_later(logits_MV: Tensor, eos_ids: tuple[int, ...], penalty: float, share_masked: float) -> None:
    """Lower end tokens in place: by 6.9 times the penalty while all of the answer is masked, by none at the end."""
    lowered_ME = logits_MV[:, list(eos_ids)] + penalty * math.log(1 - share_masked + 1e-3)
    logits_MV[:, list(eos_ids)] = lowered_ME.clamp_min(BANNED)


def ban_ends(logits_MV: Tensor, columns_M: Tensor, first: int, eos_ids: tuple[int, ...]) -> None:
    """Ban end tokens in place, in the columns before `first`."""
    for eos in eos_ids:
        logits_MV[columns_M < first, eos] = BANNED


def ban_repetitions(logits_MV: Tensor, tokens_L: Tensor, columns_M: Tensor, n: int, mask_id: int) -> None:
    """Ban in place each token that would complete n tokens in a row which stand elsewhere in the row already.

    Wherever in the n the position is, if the others are written. Positions that are written in one step do not know
    of each other.
    """
    if len(tokens_L) < n:
        return
    windows_GN = tokens_L.unfold(0, n, 1)
    known_GN = windows_GN[(windows_GN != mask_id).all(1)]
    for i, column in enumerate(columns_M.tolist()):
        for start in range(max(0, column - n + 1), min(column, len(tokens_L) - n) + 1):
            at = column - start
            others = [k for k in range(n) if k != at]
            context = windows_GN[start, others]
            if not (context == mask_id).any():
                logits_MV[i, known_GN[(known_GN[:, others] == context).all(1), at]] = BANNED
