"""What torchao's quantized linear layers do to their inputs: int8 for each token, and back."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
    _apply_int8_act_asym_per_token_quant_dequant,
)

from recipes.stored import Weights
from recipes.threads import by_slices
from validation.ties import TieMargins

# That are looked at at once, by one thread: temporaries beyond a processor's cache make it ten times slower.
ACTIVATIONS = 2**18


class ActivationQuantization:
    """What torchao's quantized linear does to its input. Its weight is dequantized already.

    ties: is told what is quantized; None where nobody asks.
    """

    def __init__(self, ties: TieMargins | None) -> None:
        self.ties = ties
        self.seen = 0  # tokens so far: they come in order, some at a time

    def __call__(self, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (x_1ND,) = inputs
        tokens_N = self.seen + torch.arange(x_1ND.shape[1])
        self.seen += len(tokens_N)
        return (quantized_noting_ties(x_1ND[0], self.ties, tokens_N)[None],)


def quantized_noting_ties(x_ND: Tensor, ties: TieMargins | None, tokens_N: Tensor) -> Tensor:
    """`quantized_activations`, some tokens at a time, by all threads. ties: is told what of which token."""
    quantized_ND = torch.empty_like(x_ND)

    def fill(part: slice) -> None:
        if ties is not None:
            ties.note(x_ND[part], tokens_N[part])
        quantized_ND[part] = quantized_activations(x_ND[part])

    by_slices(len(x_ND), max(1, ACTIVATIONS // x_ND.shape[1]), fill)
    return quantized_ND


def quantizes_activations(weights: Weights, name: str) -> bool:
    return getattr(weights.model.get_parameter(name).data, "activation_quantization", None) is not None


def quantized_activations(x: Tensor) -> Tensor:
    """To int8 for each token and back, as torchao's quantized linear does."""
    quantized: Tensor = _apply_int8_act_asym_per_token_quant_dequant(x)
    return quantized
