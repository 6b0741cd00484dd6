"""A part of the network with other parameters, so that the whole network computes the same function.

What is moved: a factor of each channel, from a norm into the matrices that read it, from up_proj into down_proj (the
gated product is linear in up), from v_proj into o_proj (attention is linear in its values); an orthogonal matrix of the
residual stream, and of each head's values. In float that is for nothing. Rounded to integers, a matrix loses less where
what its inputs make loud is coarse in no column, and inputs lose less where none is louder than all others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from model import DreamEdge
from model.dream import MLP, Attention, DecoderLayer, RMSNorm
from model.pages import large, release
from recipes.factors import WeightGrid, channel_factors, for_inputs, largest
from recipes.options import Fold, Rotate
from recipes.quantization import QuantizationError
from recipes.rotation import check_rotation, rotate_rows

COPIED = 2**22  # entries that are copied at once

Inputs = Callable[[str], Tensor | None]  # name of a matrix in its layer -> root mean square of its input channels


def transformed(
    name: str,
    part: nn.Module,
    model: DreamEdge,
    fold: Sequence[Fold],
    rotate: Sequence[Rotate],
    inputs: Mapping[str, Tensor] | None = None,
    weight_bits: int = 4,
    group_size: int | None = 32,
) -> nn.Module:
    """A copy of `part`, one of `recipes.stored.parts(model)` by that name, in float32 (float64 stays float64).

    Parts belong together: all of a model's are made with the same `fold` and `rotate`, or the function is another one.

    model: the network as it was loaded, but with an output layer of its own; nothing of it is changed.
    inputs: the root mean square of each input channel, float [in], of q_proj, o_proj, gate_proj and down_proj of each
        layer (`layers.3.self_attn.q_proj`), of the network as it was loaded. Without it factors are chosen by weights.
    weight_bits, group_size: the grid that a layer's factors are chosen for, as in `LinearQuant`.

    Raises `QuantizationError` for an output layer that is the embedding's, and for sizes that cannot be rotated.
    """
    check_rotation(model.config, rotate)
    norms, r1 = Fold.norms in fold or Rotate.r1 in rotate, Rotate.r1 in rotate
    if norms and model.lm_head.weight is model.embed_tokens.weight:
        raise QuantizationError(
            "fold norms, rotate r1: the output layer needs a weight of its own, not the embedding's"
        )
    made = _copied(part)
    if isinstance(made, DecoderLayer):

        def of_layer(matrix: str) -> Tensor | None:
            return inputs[f"{name}.{matrix}"] if inputs is not None else None

        _transform_layer(made, fold, rotate, of_layer, WeightGrid(weight_bits, group_size))
        return made
    weight = made.get_parameter("weight").data
    if norms and isinstance(made, RMSNorm):
        _divide_norm(weight, None if r1 else _last_factors(model))
    elif norms and isinstance(made, nn.Linear):
        weight.mul_((model.norm.weight.data if r1 else _last_factors(model)).to(weight.dtype))
    if r1 and isinstance(made, nn.Linear | nn.Embedding):
        rotate_rows(weight)
    return made


def _copied(part: nn.Module) -> nn.Module:
    return copy.deepcopy(part, {id(parameter): _float(parameter) for parameter in part.parameters()})


def _float(parameter: nn.Parameter) -> nn.Parameter:
    """A block at a time: what was read of a mapping is given back."""
    made = large(parameter.shape, torch.promote_types(parameter.dtype, torch.float32))
    source, into = parameter.data.reshape(-1), made.view(-1)
    for start in range(0, len(into), COPIED):
        block = source[start : start + COPIED]
        into[start : start + COPIED] = block
        release(block)
    return nn.Parameter(made, requires_grad=False)


def _last_factors(model: DreamEdge) -> Tensor:
    """From the last norm into the output layer, only what stands out.

    Weights say too little for more: most rows are of rare tokens. And two parts take these factors up, maybe in two
    processes: they must find the same.
    """
    norm, head = model.norm.weight.data, model.lm_head.weight.data
    factors = channel_factors(norm.abs(), [head], None, None)
    release(head)
    return factors


def _transform_layer(
    layer: DecoderLayer, fold: Sequence[Fold], rotate: Sequence[Rotate], inputs: Inputs, grid: WeightGrid
) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    if Rotate.r1 in rotate:
        for writer in (attention.o_proj, mlp.down_proj):
            rotate_rows(writer.weight.data.T)
    # Before the norms: a loud row of up_proj or v_proj would be all that their factors are chosen for.
    if Fold.up_down in fold:
        _fold_up_down(mlp, inputs("mlp.down_proj"), grid)
    if Fold.v_o in fold:
        _fold_v_o(attention, inputs("self_attn.o_proj"), grid)
    for norm, readers, rms in (
        (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj), inputs("self_attn.q_proj")),
        (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), inputs("mlp.gate_proj")),
    ):
        weights = [reader.weight.data for reader in readers]
        if Rotate.r1 in rotate:
            _fold_norm(norm.weight.data, weights, None)
            for weight in weights:
                rotate_rows(weight)
        elif Fold.norms in fold:
            _fold_norm(norm.weight.data, weights, channel_factors(norm.weight.data.abs(), weights, rms, grid))
    if Rotate.r2 in rotate:  # after what is moved between single channels
        _rotate_values(attention)


def _fold_norm(norm: Tensor, readers: Sequence[Tensor], factors: Tensor | None) -> None:
    """factors: None for all of the norm."""
    for reader in readers:
        reader.mul_(norm if factors is None else factors.to(reader.dtype))
    _divide_norm(norm, factors)


def _divide_norm(norm: Tensor, factors: Tensor | None) -> None:
    if factors is None:
        norm.fill_(1)  # also where it was zero
    else:
        norm.div_(factors.to(norm.dtype))


def _fold_up_down(mlp: MLP, rms: Tensor | None, grid: WeightGrid) -> None:
    up, down = mlp.up_proj.weight.data, mlp.down_proj.weight.data
    factors = channel_factors(largest(up, 1), [down], rms, grid).to(up.dtype)
    up.div_(factors[:, None])
    down.mul_(factors)


def _fold_v_o(attention: Attention, rms: Tensor | None, grid: WeightGrid) -> None:
    v, bias, o = attention.v_proj.weight.data, attention.v_proj.bias.data, attention.o_proj.weight.data
    groups, shared = attention.num_kv_heads, attention.num_heads // attention.num_kv_heads
    written = torch.maximum(largest(v, 1), bias.abs())
    factors = channel_factors(written, [o], rms, grid, groups, shared).to(v.dtype)
    v.div_(factors[:, None])
    bias.div_(factors)
    o.mul_(for_inputs(factors, groups, shared))


def _rotate_values(attention: Attention) -> None:
    G, d = attention.num_kv_heads, attention.head_dim
    for head_dD in attention.v_proj.weight.data.view(G, d, -1):
        rotate_rows(head_dD.T)
    rotate_rows(attention.v_proj.bias.data.view(G, d))
    rotate_rows(attention.o_proj.weight.data.view(-1, d))
