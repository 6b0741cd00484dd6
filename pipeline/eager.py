"""What eager gives for recorded calls, one layer at a time: the floats of one layer are all that is in memory.

The modules are `model`'s own, over weights that are read, and dequantized, when their turn comes. All calls go through
a layer together, each with a cache of its own sequence; only attention looks at one call at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
    _apply_int8_act_asym_per_token_quant_dequant,
)

from model import DreamEdgeConfig
from model.dream import DecoderLayer, RMSNorm, apply_rope, attend, rope_cos_sin
from recipes.stored import Weights
from runtime.reference import Sequence

TOKENS = 512  # that go through an MLP at once: its activations are the widest
ACTIVATIONS = 2**18  # that are quantized at once: temporaries beyond a processor's cache make it ten times slower
ROWS = 512  # whose logits are computed at once
VOCAB = 8192  # rows of the output layer that are in memory at once

Take = Callable[[int, int, Tensor], None]


@torch.no_grad()
def run_by_layer(
    weights: Weights,
    sequences: tuple[Sequence, ...],
    take: Take,
    dtype: torch.dtype | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> list[list[float]]:
    """Calls take(i, j, logits float32 [K, vocab]) for call j of sequence i.

    dtype: to compute in; None for the weights' own. Returns the tie margin of each call, see `TieMargins`.
    """
    config = weights.model.config
    calls = [call for sequence in sequences for call in sequence.calls]
    tokens_N = torch.cat([call.tokens for call in calls])
    positions_1N = torch.cat([torch.arange(c.start_pos, c.start_pos + len(c.tokens)) for c in calls])[None]
    ties = TieMargins(len(tokens_N))
    x_1ND = _floats(weights, "embed_tokens.weight", dtype, tokens_N)[None]
    rotate = partial(apply_rope, *rope_cos_sin(config, positions_1N, x_1ND.dtype))
    attend_calls = partial(_attend_calls, sequences)
    for i in range(config.num_hidden_layers):
        report(f"layer {i + 1}/{config.num_hidden_layers}")
        layer = _layer(config, weights, f"layers.{i}", dtype, ties)
        x_1ND = x_1ND + layer.self_attn(layer.input_layernorm(x_1ND), rotate, attend_calls)
        mlp = (part + layer.mlp(layer.post_attention_layernorm(part)) for part in x_1ND.split(TOKENS, dim=1))
        x_1ND = torch.cat(list(mlp), dim=1)
        del layer  # before the next one takes as much
        weights.release(f"layers.{i}.")
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
    norm.weight = nn.Parameter(_floats(weights, "norm.weight", dtype), requires_grad=False)
    starts = torch.tensor([0, *(len(call.tokens) for call in calls)]).cumsum(0)
    rows_R = torch.cat([start + call.rows for start, call in zip(starts.tolist(), calls, strict=False)])
    x_RD = norm(x_1ND[0, rows_R])
    if _quantizes_activations(weights, "lm_head.weight"):
        for part in torch.arange(len(x_RD)).split(max(1, ACTIVATIONS // x_RD.shape[1])):
            ties.note(x_RD[part], rows_R[part])
        x_RD = _apply_int8_act_asym_per_token_quant_dequant(x_RD)
    _take_logits(weights, sequences, x_RD, take, report)
    return ties.by_call(sequences)


class TieMargins:
    """How near any dynamically quantized activation of a token comes to a rounding tie.

    In steps of the int8 grid, 0 (a tie) to 0.5; infinite where no activation is quantized. An activation nearer to a
    tie than float32 rounding can move it may become another integer on the device than in eager; both are right.
    torchao's grid: int8 for each token, from min(x, 0) to max(x, 0).
    """

    def __init__(self, n_tokens: int) -> None:
        self.margin_N = torch.full((n_tokens,), torch.inf, dtype=torch.float64)

    def note(self, x_ND: Tensor, tokens_N: Tensor) -> None:
        x = x_ND.double()
        low = x.amin(-1, keepdim=True).clamp_max(0)
        high = x.amax(-1, keepdim=True).clamp_min(0)
        scale = ((high - low) / 255).clamp_min(torch.finfo(torch.float32).eps)
        for steps in (x / scale, low / scale):
            margin_N = (steps - steps.floor() - 0.5).abs_().amin(-1)
            self.margin_N.index_reduce_(0, tokens_N, margin_N, "amin")

    def by_call(self, sequences: tuple[Sequence, ...]) -> list[list[float]]:
        """Over the sequence so far: what a call leaves in the cache is as uncertain as the call."""
        margins, at = [], 0
        for sequence in sequences:
            margins.append([float("inf")])
            for call in sequence.calls:
                nearest = self.margin_N[at : at + len(call.tokens)].min().item()
                margins[-1].append(min(margins[-1][-1], nearest))
                at += len(call.tokens)
            del margins[-1][0]
        return margins


def _layer(
    config: DreamEdgeConfig, weights: Weights, prefix: str, dtype: torch.dtype | None, ties: TieMargins
) -> DecoderLayer:
    with torch.device("meta"):
        layer = DecoderLayer(config)
    for path, module in layer.named_modules(prefix=prefix):
        for leaf in [name for name, _ in module.named_parameters(recurse=False)]:
            setattr(module, leaf, nn.Parameter(_floats(weights, f"{path}.{leaf}", dtype), requires_grad=False))
        if isinstance(module, nn.Linear) and _quantizes_activations(weights, f"{path}.weight"):
            module.register_forward_pre_hook(_Quantization(ties))
    return layer


class _Quantization:
    """What torchao's quantized linear does to its input. Its weight is dequantized already."""

    def __init__(self, ties: TieMargins) -> None:
        self.ties = ties
        self.seen = 0  # tokens so far: they come in order, some at a time

    def __call__(self, _: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        (x_1ND,) = inputs
        quantized_1ND = torch.empty_like(x_1ND)
        for tokens in torch.arange(x_1ND.shape[1]).split(max(1, ACTIVATIONS // x_1ND.shape[2])):
            part = slice(int(tokens[0]), int(tokens[-1]) + 1)
            self.ties.note(x_1ND[0, part], self.seen + tokens)
            quantized_1ND[:, part] = _apply_int8_act_asym_per_token_quant_dequant(x_1ND[:, part])
        self.seen += x_1ND.shape[1]
        return (quantized_1ND,)


def _quantizes_activations(weights: Weights, name: str) -> bool:
    return getattr(weights.model.get_parameter(name).data, "activation_quantization", None) is not None


def _floats(weights: Weights, name: str, dtype: torch.dtype | None, rows: slice | Tensor = slice(None)) -> Tensor:
    found = weights.rows(name, rows)
    return found.to(dtype or found.dtype)


def _attend_calls(sequences: tuple[Sequence, ...], q_1NHd: Tensor, k_1NGd: Tensor, v_1NGd: Tensor) -> Tensor:
    outs, at = [], 0
    for sequence in sequences:
        S = max(call.kv_len for call in sequence.calls)
        keys_1SGd, values_1SGd = (x.new_zeros(1, S, *x.shape[2:]) for x in (k_1NGd, v_1NGd))
        for call in sequence.calls:
            tokens = slice(at, at + len(call.tokens))
            at = tokens.stop
            slots = slice(call.start_pos, call.start_pos + len(call.tokens))
            keys_1SGd[:, slots], values_1SGd[:, slots] = k_1NGd[:, tokens], v_1NGd[:, tokens]
            outs.append(attend(q_1NHd[:, tokens], keys_1SGd[:, : call.kv_len], values_1SGd[:, : call.kv_len], None))
    return torch.cat(outs, dim=1)


def _take_logits(
    weights: Weights,
    sequences: tuple[Sequence, ...],
    x_RD: Tensor,
    take: Take,
    report: Callable[[str], None],
) -> None:
    """The output layer over some rows at a time, a slice of the vocabulary at a time."""
    calls = [(i, j, len(call.rows)) for i, sequence in enumerate(sequences) for j, call in enumerate(sequence.calls)]
    V = weights.model.config.vocab_size
    at = 0
    while calls:
        batch = [calls.pop(0)]
        while calls and sum(K for *_, K in batch) + calls[0][2] <= ROWS:
            batch.append(calls.pop(0))
        R = sum(K for *_, K in batch)
        report(f"logits of rows {at + R}/{len(x_RD)}")
        logits_RV = torch.empty(R, V)
        for start in range(0, V, VOCAB):
            head_WD = _floats(weights, "lm_head.weight", x_RD.dtype, slice(start, min(V, start + VOCAB)))
            logits_RV[:, start : start + VOCAB] = nn.functional.linear(x_RD[at : at + R], head_WD).float()
        weights.release("lm_head.")
        weights.release("embed_tokens.")  # of a tied model
        at += R
        for (i, j, _), logits_KV in zip(batch, logits_RV.split([K for *_, K in batch]), strict=True):
            take(i, j, logits_KV)
