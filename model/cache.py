"""The static key/value cache that attention talks to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from model.config import DreamEdgeConfig


def cache_shape(config: DreamEdgeConfig, batch_size: int, max_seq_len: int) -> tuple[int, int, int, int]:
    """Of the keys of one layer, and of its values, in eager and in a program: [B, max_seq_len, kv heads, head_dim]."""
    return batch_size, max_seq_len, config.num_key_value_heads, config.head_dim


class StaticKVCache:
    """Keys and values of every layer by position, in buffers that never grow.

    keys, values: [n_layers, B, max_seq_len, n_kv_heads, head_dim]. valid: bool [B, max_seq_len], true where a
    token was written. A token of position p lives in slot p; writing p again replaces it. Slots that were
    never written are never seen.
    """

    def __init__(
        self,
        config: DreamEdgeConfig,
        batch_size: int,
        max_seq_len: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (config.num_hidden_layers, *cache_shape(config, batch_size, max_seq_len))
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.valid = torch.zeros(batch_size, max_seq_len, dtype=torch.bool, device=device)
        self._rows, self._columns, self._slots = (torch.empty(0, dtype=torch.int64) for _ in range(3))

    @property
    def max_seq_len(self) -> int:
        return self.valid.shape[1]

    def claim(self, position_ids: Tensor, tokens: Tensor | None) -> None:
        """Say where the coming tokens go: positions int [B, T]; tokens bool [B, T], false for pads (not kept).

        Raises `ValueError` if a position is outside the cache or stands twice in a row of the batch.
        """
        if position_ids.shape[0] != self.valid.shape[0]:
            raise ValueError(f"the cache holds {self.valid.shape[0]} rows, the call has {position_ids.shape[0]}")
        kept = torch.ones_like(position_ids, dtype=torch.bool) if tokens is None else tokens
        rows, columns = kept.nonzero(as_tuple=True)
        slots = position_ids[rows, columns]
        if slots.numel() and not (0 <= int(slots.min()) and int(slots.max()) < self.max_seq_len):
            raise ValueError(
                f"positions {int(slots.min())}..{int(slots.max())} do not fit a cache of {self.max_seq_len} positions"
            )
        if torch.unique(rows * self.max_seq_len + slots).numel() != slots.numel():
            raise ValueError("a position stands twice in one row: the cache keeps one token a position")
        self._rows, self._columns, self._slots = rows, columns, slots
        self.valid[rows, slots] = True

    def mask(self, attention_mask: Tensor | None, T: int) -> Tensor:
        """[B, 1, T, S] over the first S slots (bool or additive): written slots only, and what the caller allows."""
        B = self.valid.shape[0]
        if attention_mask is None:
            return self.valid[:, None, None, :].expand(B, 1, T, -1)
        if attention_mask.dim() == 2:
            return self.valid[:, None, None, :] & attention_mask.bool()[:, None, :, None]
        valid = self.valid[:, None, None, : attention_mask.shape[-1]]
        if attention_mask.dtype == torch.bool:
            return valid & attention_mask
        return attention_mask.masked_fill(~valid, -torch.inf)

    def attend(
        self, layer: int, attend: Callable[..., Tensor], q_BTHd: Tensor, k_BTGd: Tensor, v_BTGd: Tensor, mask: Tensor
    ) -> Tensor:
        """Keep k and v of this layer in the claimed slots, then attend over the first S slots of the mask."""
        keys, values, S = self.keys[layer], self.values[layer], mask.shape[-1]
        keys[self._rows, self._slots] = k_BTGd[self._rows, self._columns].detach().to(keys.dtype)
        values[self._rows, self._slots] = v_BTGd[self._rows, self._columns].detach().to(values.dtype)
        return attend(q_BTHd, keys[:, :S].to(q_BTHd.dtype), values[:, :S].to(q_BTHd.dtype), mask=mask)
