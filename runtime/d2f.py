"""Discrete diffusion forcing: several blocks are written at once, each of which sees itself and what stands before it.

For networks that were trained block-causal (D2F adapters of Dream): the prompt is computed once, and a block that is
full and has full ones before it once more, with its final tokens, and never again. Source: zhijie-group's
Discrete-Diffusion-Forcing, whose names the shares have.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from runtime.network import Asked
from runtime.options import RULES, OptionError, Options

if TYPE_CHECKING:
    from runtime.generation import Run

BLOCK_ADD_THRESHOLD = 0.1  # share of a block that is written before the next one is opened
DECODED_TOKEN_THRESHOLD = 0.95  # share of the block before, from which on a block writes its best token whatever it is
THRESHOLD = 0.9  # `skip_threshold`: the probability from which on tokens are written together


def check(options: Options, steps: int | None, prompts: list[Tensor], mask_id: int) -> None:
    """Raises `OptionError` for what does not go with it."""
    given = [name for name in (*RULES, "suffix_window", "alg_temp") if getattr(options, name)]
    given += ["steps"] if steps is not None else []
    given += ["alg=origin"] if options.alg == "origin" else []
    if given:
        raise OptionError(f"cache 'd2f' writes by its threshold alone: it goes without {', '.join(given)}")
    if any((prompt == mask_id).any() for prompt in prompts):
        raise OptionError("cache 'd2f' computes a prompt once: there can be no masks in it")


def fill(run: Run, row: int, block_length: int) -> Generator[Asked, Tensor, None]:
    """Write the answer of a row. Each round computes the open blocks from left to right and then writes in all of them,
    so that a round is one block-causal forward.
    """
    begin, length = run.begin, run.tokens_BL.shape[1]
    blocks = [(s, min(s + block_length, length)) for s in range(begin, length, block_length)]
    # Of the first column that is not final: the last row of what is before it.
    first_1V = yield from run.logits(row, run.lefts[row], begin, begin, torch.tensor([begin - 1]))

    def share(start: int, end: int) -> float:
        """That is written."""
        return 1 - len(run.masked(row, start, end)) / (end - start)

    n_kept, n_open = 0, 1  # blocks whose keys are final, and blocks that were begun
    while len(run.masked(row, begin)):
        known = [first_1V]
        for s, e in blocks[n_kept:n_open]:
            logits_TV = yield from run.logits(row, s, e, e, torch.arange(s, e))
            known[-1] = torch.cat([known[-1], logits_TV[:-1]])
            known.append(logits_TV[-1:])
        shares = [share(*block) for block in blocks[n_kept:n_open]]
        n_full = next((i for i, written in enumerate(shares) if written < 1), len(shares))
        for i, (s, e) in enumerate(blocks[n_kept:n_open]):
            columns_M = run.masked(row, s, e)
            if len(columns_M):
                is_forced = i == 0 or shares[i - 1] >= DECODED_TOKEN_THRESHOLD
                run.choose(row, columns_M, int(is_forced) * len(columns_M), e - s, known[i][columns_M - s])
        # What was full was computed with its final tokens, over the final keys of what is before it.
        first_1V = known[n_full][:1]
        n_kept += n_full
        if n_open < len(blocks) and share(*blocks[n_open - 1]) >= BLOCK_ADD_THRESHOLD:
            n_open += 1
        run.after_step([row])
