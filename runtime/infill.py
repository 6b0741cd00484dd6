"""Filling a gap whose length nobody knows: masks are written, become two, or go. Source: DreamOn, `eval/generator.py`.

The network was trained to write two tokens that are no text: expand, where a mask stands for more than one token, and
delete, where it stands for none. Shapes: L positions of the canvas, which changes from step to step, M masked ones,
V vocabulary. Where the public code leaves something open, docs/infill.md says what is done.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from runtime.guards import BANNED
from runtime.network import INTEGERS, Forward, Network, check_ids
from runtime.options import OptionError, Options, check_whole
from runtime.sample import most_confident, sample

# (step, canvas int64 [L]): sees what a step left.
OnCanvas = Callable[[int, Tensor], None]

# Options of `generate` that a gap is drawn by, too; rules of how many tokens a step writes are not among them.
DRAWN_BY = ("steps", "alg", "temperature", "top_p", "top_k", "alg_temp", "seed")
MAX_MASKS = 64  # how long a middle may become, if nothing is said; DreamOn's own
EXPANDS = 2  # so many times the longest middle may masks become two


@dataclass(frozen=True)
class Infilled:
    """What was written, and what it took.

    tokens: the middle, int64 [N], without prefix and suffix.
    history: the canvas before the first step and after each, int64 [L] each, of its length then.
    forward_calls, positions: calls of `forward`, and the tokens that they computed in all.
    expanded, budget: how many masks became two, and how many might have.
    """

    tokens: Tensor
    history: tuple[Tensor, ...]
    forward_calls: int
    positions: int
    seconds: float
    expanded: int
    budget: int

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds


@torch.no_grad()
def infill(
    network: Network,
    prefix_ids: Tensor | Sequence[int],
    suffix_ids: Tensor | Sequence[int],
    *,
    bos_id: int,
    expand_id: int,
    delete_id: int,
    n_masks: int = 8,
    max_masks: int | None = None,
    steps: int | None = None,
    alg: str = "entropy",
    temperature: float = 0.2,
    top_p: float | None = 0.9,
    top_k: int | None = None,
    alg_temp: float | None = None,
    cache: Literal["prefix"] | None = None,
    seed: int | None = None,
    on_step: OnCanvas | None = None,
) -> Infilled:
    """Write what stands between a prefix and a suffix, in a canvas of bos, prefix, masks, suffix and end.

    Each step writes one token, at the position that is surest by `alg`. Where it is `delete_id`, which is also the
    end of the canvas, that mask and all masks behind it go. Where it is `expand_id`, two masks take its place.

    prefix_ids, suffix_ids: token ids, also none. n_masks: that the middle starts with. max_masks: tokens and masks
        that it may have, by default 64 or what fits. expand is banned while it has as many, and once masks have
        become two 2 * max_masks times.
    steps: at most so many; the last one writes all masks that are left, and does not expand. None: as many as it takes.
    alg, temperature, top_p, top_k, alg_temp, seed: as for `generate`, but for `origin`.
    cache: `prefix` computes only from the first mask on. What stands before it keeps what it knew of masks behind it.

    Raises `OptionError` for what cannot be, `FloatingPointError` for logits that are not finite.
    """
    started = time.perf_counter()
    options = Options(
        alg=alg,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        alg_temp=alg_temp,
        eps=0.5,  # of a schedule, which there is not
        block_length=None,
        cache=cache,
        threshold=None,
        stop_at_eos=False,
    )
    _check(options, n_masks, max_masks, steps, seed)
    _check_tokens(network, bos_id, expand_id, delete_id)
    before = [bos_id, *_ids(network, "prefix_ids", prefix_ids)]
    after = [*_ids(network, "suffix_ids", suffix_ids), delete_id]
    longest = _longest_middle(network, len(before) + len(after), n_masks, max_masks)
    run = _Run(
        network=network,
        forward=network.start(),
        options=options,
        generator=None if seed is None else torch.Generator().manual_seed(seed),
        expand_id=expand_id,
        delete_id=delete_id,
        longest=len(before) + longest + len(after),
        budget=EXPANDS * longest,
        canvas_L=torch.tensor([*before, *[network.mask_id] * n_masks, *after]),
    )
    history = [run.canvas_L]
    while len(masks_M := run.masks()):
        is_last = len(history) == steps
        run.write(masks_M, len(masks_M) if is_last else 1, may_expand=not is_last)
        if on_step is not None:
            on_step(len(history) - 1, run.canvas_L.clone())
        history.append(run.canvas_L)
    return Infilled(
        tokens=run.canvas_L[len(before) : len(run.canvas_L) - len(after)],
        history=tuple(history),
        forward_calls=run.forward_calls,
        positions=run.positions,
        seconds=time.perf_counter() - started,
        expanded=run.expanded,
        budget=run.budget,
    )


@dataclass
class _Run:
    """The canvas as it is filled in. Each edit makes a new one: the history keeps them."""

    network: Network
    forward: Forward
    options: Options
    generator: torch.Generator | None
    expand_id: int
    delete_id: int
    longest: int  # positions that the canvas may have
    budget: int
    canvas_L: Tensor
    expanded: int = 0
    kept: int = 0  # positions at the start that are in the cache with the tokens that they have
    forward_calls: int = 0
    positions: int = 0

    def masks(self) -> Tensor:
        """Positions [M]."""
        return (self.canvas_L == self.network.mask_id).nonzero()[:, 0]

    def write(self, masks_M: Tensor, n: int, may_expand: bool) -> None:
        """Write the n surest of these masks, then delete and expand as what was written says."""
        logits_MV = self._logits(masks_M)
        if not may_expand or self.expanded == self.budget or len(self.canvas_L) == self.longest:
            logits_MV = logits_MV.clone()  # they are the network's
            logits_MV[:, self.expand_id] = BANNED
        options, mask_id = self.options, self.network.mask_id
        tokens_M, confidence_M = sample(
            logits_MV, mask_id, options.alg, options.temperature, options.top_p, options.top_k, self.generator
        )
        best_n = most_confident(confidence_M, n, options.alg_temp, self.generator)
        canvas_L = self.canvas_L.clone()
        canvas_L[masks_M[best_n]] = tokens_M[best_n]
        self.canvas_L = self._edited(canvas_L, masks_M)

    def _logits(self, masks_M: Tensor) -> Tensor:
        """Raw logits [M, V] of these positions; several calls if one may not ask for so many at once."""
        # Logits are read shifted: a token comes from the row before it. The canvas never begins with a mask.
        sources_M, L = masks_M - 1, len(self.canvas_L)
        first = min(self.kept, int(sources_M[0])) if self.options.cache else 0
        tokens_T, logits = self.canvas_L[first:], []
        for sources_K in sources_M.split(self.network.max_rows):
            logits.append(self.forward(tokens_T, first, L, sources_K - first)[0])
            self.forward_calls += 1
            self.positions += len(tokens_T)
        self.kept = int(masks_M[0])
        return torch.cat(logits)

    def _edited(self, canvas_L: Tensor, masks_M: Tensor) -> Tensor:
        """Of the positions that were masks: from the first one to delete on without all, with two for one to expand."""
        copies_L = torch.ones_like(canvas_L)
        deleted_N = masks_M[canvas_L[masks_M] == self.delete_id]
        if len(deleted_N):
            copies_L[masks_M[masks_M >= deleted_N[0]]] = 0
        expanded_N = masks_M[canvas_L[masks_M] == self.expand_id]
        copies_L[expanded_N] *= 2
        canvas_L[expanded_N] = self.network.mask_id
        self.expanded += len(expanded_N)
        return canvas_L.repeat_interleave(copies_L)


def _check(options: Options, n_masks: int, max_masks: int | None, steps: int | None, seed: int | None) -> None:
    options.check()
    _check_given(n_masks=n_masks)
    check_whole(max_masks=max_masks, steps=steps, seed=seed)
    if options.alg == "origin":
        raise OptionError("alg 'origin' follows a schedule, and a gap of unknown length has none: give another")
    if options.cache not in (None, "prefix"):
        raise OptionError(
            f"cache {options.cache!r} is of blocks, and a gap of unknown length has none: there is prefix, and None"
        )
    if n_masks < 1:
        raise OptionError(f"n_masks {n_masks}: a gap starts with at least 1")
    if max_masks is not None and max_masks < n_masks:
        raise OptionError(f"max_masks {max_masks}: the gap starts with {n_masks}")
    if steps is not None and steps < 1:
        raise OptionError(f"steps {steps}: must be at least 1")


def _check_tokens(network: Network, bos_id: int, expand_id: int, delete_id: int) -> None:
    tokens = {"bos_id": bos_id, "expand_id": expand_id, "delete_id": delete_id}
    _check_given(**tokens)
    for name, token in tokens.items():
        check_ids(network, torch.tensor([token]))
        if token == network.mask_id:
            raise OptionError(f"{name} {token}: is the mask, which is never written")
    if expand_id == delete_id:
        raise OptionError(f"expand_id and delete_id are both {expand_id}")


def _check_given(**values: int | None) -> None:
    check_whole(**values)
    for name, value in values.items():
        if value is None:
            raise OptionError(f"{name} None: must be a whole number")


def _ids(network: Network, name: str, ids: Tensor | Sequence[int]) -> list[int]:
    """Raises `OptionError` for what is no row of token ids, or holds a mask."""
    try:
        ids_P = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"{name} must be token ids: {error}") from error
    if ids_P.dim() != 1 or (ids_P.numel() and ids_P.dtype not in INTEGERS):
        raise OptionError(f"{name} must be integers, [P], got {ids_P.dtype} {list(ids_P.shape)}")
    if ids_P.numel():
        check_ids(network, ids_P)
    tokens = [int(token) for token in ids_P]
    if network.mask_id in tokens:
        raise OptionError(f"{name}: holds a mask; masks stand between prefix and suffix")
    return tokens


def _longest_middle(network: Network, n_around: int, n_masks: int, max_masks: int | None) -> int:
    """Raises `OptionError` where not even the first masks fit."""
    fits = network.max_seq_len - n_around
    if n_masks > fits:
        raise OptionError(
            f"prefix and suffix have {n_around} tokens with bos and end, max_seq_len is {network.max_seq_len}: "
            f"{n_masks} masks do not fit between them{f', at most {fits} do' if fits > 0 else ''}"
        )
    return min(max(MAX_MASKS, n_masks) if max_masks is None else max_masks, fits)
