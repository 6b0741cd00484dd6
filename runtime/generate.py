"""Writing with a diffusion language model: masks are filled in over several steps, the most confident first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Raw logits float [B, T, vocab] for tokens int64 [B, T].
Network = Callable[[Tensor], Tensor]


@torch.no_grad()
def fill_masks(network: Network, tokens_BT: Tensor, mask_id: int) -> Tensor:
    """Fill every mask, one a row and step, greedily; a copy, int64 [B, T].

    Logits are read shifted: the token of position i from raw row i-1, that of position 0 from row 0. The mask
    itself is never written.
    """
    tokens_BT = tokens_BT.clone()
    while (tokens_BT == mask_id).any():
        logits = network(tokens_BT)
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1).float()
        logits[..., mask_id] = -torch.inf
        confidence_BT, best_BT = logits.softmax(-1).max(-1)
        is_mask_BT = tokens_BT == mask_id
        chosen_B = confidence_BT.masked_fill(~is_mask_BT, -1).argmax(-1)
        rows_B = is_mask_BT.any(-1).nonzero()[:, 0]
        tokens_BT[rows_B, chosen_B[rows_B]] = best_BT[rows_B, chosen_B[rows_B]]
    return tokens_BT
