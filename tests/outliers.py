"""Outliers put into a network without changing what it computes, and what rounding then costs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from model import DreamEdge
from model.dream import DecoderLayer
from recipes.options import Dtype, EmbeddingQuant, Fold, LinearQuant, Rotate
from recipes.quantization import quantize_model
from recipes.rescaling import transformed
from recipes.stored import parts

TIMES = 1000.0
CHANNEL = 5


def in_norms(model: DreamEdge) -> None:
    """A channel of all that is read of the residual stream. The output layer must not be the embedding's."""
    for layer in _layers(model):
        attention, mlp = layer.self_attn, layer.mlp
        _louder(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        _louder(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
    _louder(model.norm, model.lm_head)


def _layers(model: DreamEdge) -> list[DecoderLayer]:
    return [layer for layer in model.layers if isinstance(layer, DecoderLayer)]


def _louder(norm: nn.Module, *readers: nn.Linear) -> None:
    norm.get_parameter("weight").data[CHANNEL] *= TIMES
    for reader in readers:
        reader.weight.data[:, CHANNEL] /= TIMES


def in_up(model: DreamEdge) -> None:
    """The channel of the product that down_proj reads most of."""
    for layer in _layers(model):
        up, down = layer.mlp.up_proj.weight.data, layer.mlp.down_proj.weight.data
        channel = int((up.norm(dim=1) * down.norm(dim=0)).argmax())
        up[channel] *= TIMES
        down[:, channel] /= TIMES


def in_values(model: DreamEdge) -> None:
    """A channel of the last key/value head, that all query heads of its group read."""
    for layer in _layers(model):
        attention = layer.self_attn
        d, shared = attention.head_dim, attention.num_heads // attention.num_kv_heads
        last = attention.num_kv_heads - 1
        attention.v_proj.weight.data[last * d + CHANNEL] *= TIMES
        attention.v_proj.bias.data[last * d + CHANNEL] *= TIMES
        for head in range(last * shared, attention.num_heads):
            attention.o_proj.weight.data[:, head * d + CHANNEL] /= TIMES


OUTLIERS: dict[Fold, Callable[[DreamEdge], None]] = {
    Fold.norms: in_norms,
    Fold.up_down: in_up,
    Fold.v_o: in_values,
}


def rewritten(
    model: DreamEdge,
    fold: Sequence[Fold],
    rotate: Sequence[Rotate],
    inputs: Mapping[str, Tensor] | None = None,
    group_size: int | None = 32,
) -> DreamEdge:
    """The whole network of transformed parts, in the type of `model`. `model` gets an output layer of its own."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.data, requires_grad=False)
    made = DreamEdge(model.config).to(model.norm.weight.dtype).requires_grad_(False).eval()
    made.lm_head.weight = nn.Parameter(torch.empty_like(made.lm_head.weight), requires_grad=False)
    for name, part in parts(model).items():
        new = transformed(name, part, model, fold, rotate, inputs, 4, group_size)
        made.get_submodule(name).load_state_dict(new.state_dict())
    return made


def input_rms(model: DreamEdge, ids_BT: Tensor) -> dict[str, Tensor]:
    """Of each linear layer by name, the root mean square of its input channels [in]."""
    found: dict[str, Tensor] = {}

    def note(name: str, _: nn.Module, inputs: tuple[Tensor]) -> None:
        found[name] = inputs[0].flatten(0, -2).square().mean(0).sqrt()

    linear = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_pre_hook(partial(note, name)) for name, module in linear]
    logits(model, ids_BT)
    for hook in hooks:
        hook.remove()
    return found


def logits(model: DreamEdge, ids_BT: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids_BT)[0]


def cost_of_int4(model: DreamEdge, ids_BT: Tensor, expected_BTV: Tensor, group_size: int | None = 32) -> float:
    """KL, in nats a row, of `expected` to the logits of `model` in int4. `model` is quantized in place."""
    quantize_model(model, Dtype.float32, LinearQuant(4, group_size), EmbeddingQuant())
    actual = logits(model, ids_BT).double().log_softmax(-1)
    expected = expected_BTV.double().log_softmax(-1)
    return float((expected.exp() * (expected - actual)).sum(-1).mean())
