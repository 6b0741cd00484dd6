"""What eager gives for recorded calls, one layer at a time: the floats of one layer are all that is in memory.

The modules are `model`'s own, over weights that are read, and dequantized, when their turn comes. All calls go through
a layer together, each with a cache of its own sequence; only attention looks at one call at a time, or at neighbours
of one length that see no other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import DreamEdgeConfig
from model.dream import DecoderLayer, RMSNorm, apply_rope, attend, rope_cos_sin
from recipes.stored import Weights
from recipes.threads import one_thread_each
from validation.activations import ActivationQuantization, quantized_activations, quantizes_activations
from validation.output_layer import Multiply, Take, run_head
from validation.products import product, product_in_halves
from validation.progress import Report, silent, within
from validation.reference import Call, Sequence, calls_of, n_tokens
from validation.stream import Again, Everywhere, once_each, places
from validation.ties import TieMargins

TOKENS = 512  # that go through an MLP at once: its activations are the widest

Watch = Callable[[str, nn.Linear, Tensor, Tensor], None]


@dataclass(frozen=True)
class LayerRun:
    """What a layer gave for all N tokens of all calls, in order. k, v: as its cache is given them, k rotated."""

    x_1ND: Tensor
    k_1NGd: Tensor
    v_1NGd: Tensor


@dataclass
class Twin:
    """Some of the calls once more, in float32 and with products that are summed in another order: how far rounding
    alone may lead. Of float16 weights it is all that float16 rounds between them, of float32 the order of sums.

    x_1ND: their stream, as far as it has come. take: as that of `run_by_layer`.
    """

    sequences: tuple[Sequence, ...]
    take: Take
    x_1ND: Tensor | None = None


def run_by_layer(
    weights: Weights,
    sequences: tuple[Sequence, ...],
    take: Take,
    dtype: torch.dtype | None = None,
    report: Report = silent,
    twin: Twin | None = None,
    watch: Watch | None = None,
    multiply: Multiply = product,
    once: bool = True,
) -> list[list[float]]:
    """Calls take(i, j, logits float32 [K, vocab]) for call j of sequence i.

    dtype: to compute in; None for the weights' own. watch, multiply: as for `run_layers`; the output layer multiplies
    so too. once: equal calls are computed once, as `once_each` says.

    Returns the tie margin of each call, see `TieMargins`.
    """
    if once:
        sequences = once_each(sequences)
    ties = TieMargins(n_tokens(sequences))
    runs = run_layers(weights, sequences, dtype, ties, report, watch=watch, multiply=multiply, twin=twin)
    last = deque(runs, maxlen=1).pop()
    run_head(weights, sequences, last.x_1ND, take, dtype, ties, report, multiply)
    if twin is not None and twin.x_1ND is not None:
        again = within("in another order", report)
        run_head(weights, twin.sequences, twin.x_1ND, twin.take, torch.float32, None, again, product_in_halves)
    return ties.by_call(sequences)


@torch.no_grad()
def run_layers(
    weights: Weights,
    sequences: tuple[Sequence, ...],
    dtype: torch.dtype | None,
    ties: TieMargins | None,
    report: Report = silent,
    given: Callable[[int], Tensor | None] = lambda _: None,
    watch: Watch | None = None,
    order: list[int] | None = None,
    multiply: Multiply = F.linear,
    twin: Twin | None = None,
) -> Iterator[LayerRun]:
    """The layers one after another. While the caller looks at one, no layer's floats are in memory.

    given: what the i-th to run is given, [1, N, D], in place of what the one before it, or the embedding, gave.
    watch: sees each linear layer's name, the layer, what goes into it, and what comes out.
    order: which layers to run; None for the model's own.
    multiply: what the linear layers compute; with `product` a token's bits depend on how many others go with it.
    ties: None where nobody asks.
    """
    config = weights.model.config
    begun_1ND = given(0)
    x_1ND = embed(weights, sequences, dtype) if begun_1ND is None else begun_1ND
    rotate = _rotation(config, sequences, x_1ND.dtype)
    if twin is not None:
        twin.x_1ND = embed(weights, twin.sequences, torch.float32)
        rotate_twin = _rotation(config, twin.sequences, torch.float32)
    order = list(range(config.num_hidden_layers)) if order is None else order
    for step, i in enumerate(order):
        report("layers", step, len(order))
        instead_1ND = given(step) if step else None
        x_1ND = x_1ND if instead_1ND is None else instead_1ND.to(x_1ND.dtype)
        name = f"layers.{i}"
        floats = _floats_of_layer(config, weights, name, dtype)
        if step + 1 < len(order):
            weights.read_ahead(f"layers.{order[step + 1]}.")
        layer = _layer(config, weights, name, floats, ties, watch, multiply)
        with one_thread_each():
            x_1ND, k_1NGd, v_1NGd = _through(config, layer, rotate, sequences, x_1ND)
        if twin is not None and twin.x_1ND is not None:
            wide = {path: nn.Parameter(part.float(), requires_grad=False) for path, part in floats.items()}
            layer = _layer(config, weights, name, wide, None, None, product_in_halves)
            with one_thread_each():
                twin.x_1ND, *_ = _through(config, layer, rotate_twin, twin.sequences, twin.x_1ND)
            del wide
        del layer, floats  # before the next one takes as much
        weights.release(f"{name}.")
        yield LayerRun(x_1ND, k_1NGd, v_1NGd)


def _rotation(config: DreamEdgeConfig, sequences: tuple[Sequence, ...], dtype: torch.dtype) -> Callable[..., Tensor]:
    """Of queries and keys of all N tokens, the same in each layer."""
    return partial(apply_rope, *rope_cos_sin(config, _positions(sequences), dtype))


def _through(
    config: DreamEdgeConfig,
    layer: DecoderLayer,
    rotate: Callable[..., Tensor],
    sequences: tuple[Sequence, ...],
    x_1ND: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(stream after the layer, keys, values)"""
    kept: list[Tensor] = []
    attend_calls = partial(_attend_calls, config, sequences, kept)
    x_1ND = x_1ND + layer.self_attn(layer.input_layernorm(x_1ND), rotate, attend_calls)
    mlp = (part + layer.mlp(layer.post_attention_layernorm(part)) for part in x_1ND.split(TOKENS, dim=1))
    x_1ND = torch.cat(list(mlp), dim=1)
    k_1NGd, v_1NGd = kept
    return x_1ND, k_1NGd, v_1NGd


@torch.no_grad()
def keys_and_values(weights: Weights, i: int, sequence: Sequence, x_RND: Tensor) -> tuple[Tensor, Tensor]:
    """What layer i gives to its cache for each of R streams of a sequence: k rotated, and v, [R, N, G, d]."""
    config, path = weights.model.config, f"layers.{i}"
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    norm.weight = nn.Parameter(weights.rows(f"{path}.input_layernorm.weight"), requires_grad=False)
    normed_RND = norm(x_RND.to(norm.weight.dtype))

    def project(name: str) -> Tensor:
        weight, bias = (weights.rows(f"{name}.{leaf}") for leaf in ("weight", "bias"))
        quantizes = quantizes_activations(weights, f"{name}.weight")
        given_RND = quantized_activations(normed_RND) if quantizes else normed_RND
        return F.linear(given_RND, weight, bias).view(*x_RND.shape[:2], -1, config.head_dim)

    k_RNGd, v_RNGd = (project(f"{path}.self_attn.{kind}") for kind in ("k_proj", "v_proj"))
    weights.release(f"{path}.")
    return _rotation(config, (sequence,), k_RNGd.dtype)(k_RNGd), v_RNGd


@torch.no_grad()
def embed(weights: Weights, sequences: tuple[Sequence, ...], dtype: torch.dtype | None) -> Tensor:
    """[1, N, D]"""
    tokens_N = torch.cat([call.tokens for call in calls_of(sequences)])
    return weights.rows("embed_tokens.weight", tokens_N, dtype)[None]


def _positions(sequences: tuple[Sequence, ...]) -> Tensor:
    """[1, N]"""
    calls = calls_of(sequences)
    return torch.cat([torch.arange(c.start_pos, c.start_pos + len(c.tokens)) for c in calls])[None]


def _floats_of_layer(
    config: DreamEdgeConfig, weights: Weights, prefix: str, dtype: torch.dtype | None
) -> dict[str, nn.Parameter]:
    with torch.device("meta"):
        names = [f"{prefix}.{name}" for name, _ in DecoderLayer(config).named_parameters()]
    return {name: nn.Parameter(weights.rows(name, dtype=dtype), requires_grad=False) for name in names}


def _layer(
    config: DreamEdgeConfig,
    weights: Weights,
    prefix: str,
    floats: dict[str, nn.Parameter],
    ties: TieMargins | None,
    watch: Watch | None,
    multiply: Multiply,
) -> DecoderLayer:
    with torch.device("meta"):
        layer = DecoderLayer(config)
    for path, module in layer.named_modules(prefix=prefix):
        for leaf in [name for name, _ in module.named_parameters(recurse=False)]:
            setattr(module, leaf, floats[f"{path}.{leaf}"])
        if isinstance(module, nn.Linear):
            module.forward = partial(multiply, weight=module.weight, bias=module.bias)  # type: ignore[method-assign]
        if isinstance(module, nn.Linear) and quantizes_activations(weights, f"{path}.weight"):
            module.register_forward_pre_hook(ActivationQuantization(ties))
        if isinstance(module, nn.Linear) and watch is not None:
            module.register_forward_hook(partial(_watched, watch, f"{path}.weight"))
    return layer


def _watched(watch: Watch, name: str, linear: nn.Module, inputs: tuple[Tensor], out_1NM: Tensor) -> None:
    assert isinstance(linear, nn.Linear)
    watch(name, linear, inputs[0], out_1NM)


def _attend_calls(
    config: DreamEdgeConfig,
    sequences: tuple[Sequence, ...],
    kept: list[Tensor],
    q_1NHd: Tensor,
    k_1NGd: Tensor,
    v_1NGd: Tensor,
) -> Tensor:
    kept += [k_1NGd, v_1NGd]
    outs = []
    placed = zip(sequences, places(sequences), strict=True)
    for T, alike in groupby(placed, lambda pair: _tokens_alone(pair[0])):
        if T is None:
            outs += [_attend_cached(config, *pair, q_1NHd, k_1NGd, v_1NGd) for pair in alike]
        else:  # many prompts of one length at once
            in_stream = [tokens for _, (tokens,) in alike]
            tokens = slice(in_stream[0].start, in_stream[-1].stop)
            q_BTHd, k_BTGd, v_BTGd = (x_1N[0, tokens].unflatten(0, (-1, T)) for x_1N in (q_1NHd, k_1NGd, v_1NGd))
            outs.append(attend(q_BTHd, k_BTGd, v_BTGd, None).flatten(0, 1)[None])
    return torch.cat(outs, dim=1)


def _tokens_alone(sequence: Sequence) -> int | None:
    """Of its one call, where that sees its own tokens and no more."""
    call, *more = sequence.calls
    is_alone = not more and type(call) is Call and (call.start_pos, call.kv_len) == (0, len(call.tokens))
    return call.kv_len if is_alone else None


def _attend_cached(
    config: DreamEdgeConfig,
    sequence: Sequence,
    in_stream: list[slice],
    q_1NHd: Tensor,
    k_1NGd: Tensor,
    v_1NGd: Tensor,
) -> Tensor:
    """Its calls in order, over a cache of its own."""
    S = max(call.kv_len for call in sequence.calls)
    keys_1SGd, values_1SGd = (x.new_zeros(1, S, *x.shape[2:]) for x in (k_1NGd, v_1NGd))
    outs = []
    for call, tokens in zip(sequence.calls, in_stream, strict=True):
        slots = slice(call.start_pos, call.start_pos + tokens.stop - tokens.start)
        keys = k_1NGd[:, tokens]
        if isinstance(call, Everywhere):  # at 0, where it was computed, nothing is rotated
            slots = slice(0, call.kv_len)
            keys = apply_rope(*rope_cos_sin(config, torch.arange(call.kv_len)[None], keys.dtype), keys)
        keys_1SGd[:, slots], values_1SGd[:, slots] = keys, v_1NGd[:, tokens]
        if not isinstance(call, Again):
            outs.append(attend(q_1NHd[:, tokens], keys_1SGd[:, : call.kv_len], values_1SGd[:, : call.kv_len], None))
    return torch.cat(outs, dim=1) if outs else q_1NHd[:, :0]
