"""What writing needs of a network, and what that may be given: prompts, and what hooks return, checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from runtime.options import OptionError

# (tokens int64 [T], start_pos, kv_len, rows int64 [K]) -> raw logits float32 [1, K, V]: the program's contract.
Forward = Callable[[Tensor, int, int, Tensor], Tensor]


class Asked(NamedTuple):
    """The arguments of one call."""

    tokens_T: Tensor
    start_pos: int
    kv_len: int
    rows_K: Tensor


# One call of each of several sequences, all whole, to what `Forward` gives for each.
ForwardAll = Callable[[list[Asked]], list[Tensor]]


Prompts = Tensor | Sequence[int] | Sequence[Sequence[int]] | Sequence[Tensor]

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Network(Protocol):
    """What writing needs of a network: `Program` and an eager `DreamEdge` have it."""

    @property
    def max_seq_len(self) -> int: ...
    @property
    def max_rows(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def mask_id(self) -> int: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def eos_ids(self) -> tuple[int, ...]: ...
    @property
    def block_length(self) -> int: ...

    def start(self) -> Forward:
        """`forward` for one new sequence, over a cache that nothing else uses meanwhile."""
        ...


def prompt_rows(prompt_ids: Prompts) -> list[Tensor]:
    """One or several prompts, as int64 [P] each."""
    try:
        if isinstance(prompt_ids, Tensor):
            rows = list(prompt_ids) if prompt_ids.dim() == 2 else [prompt_ids]
        elif len(prompt_ids) and isinstance(prompt_ids[0], Integral):
            rows = [torch.as_tensor(prompt_ids)]
        else:
            rows = [torch.as_tensor(row) for row in prompt_ids]
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        raise OptionError(f"prompt_ids must be token ids, of one prompt or of several: {error}") from error
    for row in rows:
        if row.dim() != 1 or (row.numel() and row.dtype not in INTEGERS):
            raise OptionError(f"prompt_ids must be integers, [P] or [B, P], got {row.dtype} {list(row.shape)}")
    return [row.to(torch.int64) for row in rows]


def check_prompts(network: Network, prompts: list[Tensor], max_new_tokens: int) -> None:
    if not prompts or not all(map(len, prompts)):
        raise OptionError("a prompt is empty: the first token is predicted from one before it")
    if max_new_tokens < 0:
        raise OptionError(f"max_new_tokens {max_new_tokens}: must be at least 0")
    for prompt in prompts:
        check_ids(network, prompt)
        if len(prompt) > network.max_seq_len:
            raise OptionError(f"the prompt has {len(prompt)} tokens, max_seq_len is {network.max_seq_len}")
        if len(prompt) + max_new_tokens > network.max_seq_len:
            raise OptionError(
                f"the prompt's {len(prompt)} tokens and {max_new_tokens} new ones are more than max_seq_len "
                f"{network.max_seq_len}: at most {network.max_seq_len - len(prompt)} new tokens fit"
            )


def check_ids(network: Network, tokens: Tensor) -> None:
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < network.vocab_size:
        wrong = int(tokens.min()) if int(tokens.min()) < 0 else int(tokens.max())
        raise OptionError(f"token id {wrong} is outside the vocabulary, 0..{network.vocab_size - 1}")


def checked_logits(changed: Tensor, logits_MV: Tensor) -> Tensor:
    """What a hook returned; a token that it bans with -inf keeps a number, so that sums over all tokens have one."""
    if not isinstance(changed, Tensor) or changed.shape != logits_MV.shape or not changed.is_floating_point():
        raise OptionError(f"on_logits must return logits of the shape it was given, {list(logits_MV.shape)}, or None")
    return changed.float().clamp_min(torch.finfo(torch.float32).min)


def checked_tokens(changed: Tensor, tokens_BL: Tensor) -> Tensor:
    if not isinstance(changed, Tensor) or changed.shape != tokens_BL.shape or changed.dtype not in INTEGERS:
        raise OptionError(f"on_step must return tokens of the shape it was given, {list(tokens_BL.shape)}, or None")
    return changed
