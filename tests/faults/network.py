"""Faults of the exported form: each changes a `StaticProgram` before it is exported, in one layer or in all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.dream import RMSNorm, rope_cos_sin
from recipes.static_program import CustomSdpaCache, DelegableRMSNorm, DelegatedCache, StaticProgram, half_turn

Change = Callable[[StaticProgram], None]
LAYER = 1  # where a fault of one layer is put, or begins


def layer_of(program: StaticProgram) -> Any:
    return program.model.layers[LAYER]


# ---- Rotation ----


def wrong_rope_theta(program: StaticProgram) -> None:
    _rotate(program, replace(program.model.config, rope_theta=10_000.0), torch.arange(program.max_seq_len))


def rope_one_off(program: StaticProgram) -> None:
    """Of queries and keys alike: attention sees only differences of positions, so no logit changes."""
    _rotate(program, program.model.config, torch.arange(program.max_seq_len) + 1)


def rope_one_off_for_queries(program: StaticProgram) -> None:
    """The turn between two positions is the same everywhere: one more matrix."""
    d = program.model.config.head_dim
    cos_11d, sin_11d = (
        table[0, 0].float() for table in rope_cos_sin(program.model.config, torch.ones(1, 1), torch.float32)
    )
    turn_dd = torch.diag(cos_11d[0]) + torch.diag(sin_11d[0]) @ half_turn(d)
    caches_of(LateQueries)(program)
    for cache in program.caches:
        cache.register_buffer("turn_dd", turn_dd)


def rope_from_start(program: StaticProgram) -> None:
    """Positions are counted from the call's first token, not from `start_pos`."""
    for name in ("cos_1S1d", "sin_1S1d"):
        table = getattr(program, name)
        delattr(program, name)
        setattr(program, name, _FromZero(table))


class _FromZero:
    """A table whose rows are always the first."""

    def __init__(self, table_1S1d: Tensor) -> None:
        self.table_1S1d = table_1S1d

    def narrow(self, dim: int, _: int, length: int) -> Tensor:
        return self.table_1S1d.narrow(dim, 0, length)


def interleaved_rope(program: StaticProgram) -> None:
    """Neighbours are turned, as in GPT-J, not halves."""
    d = program.model.config.head_dim
    for name in ("cos_1S1d", "sin_1S1d"):
        table = getattr(program, name)
        setattr(program, name, table[..., : d // 2].repeat_interleave(2, dim=-1))
    turn = torch.zeros(d, d)
    pairs = torch.arange(0, d, 2)
    turn[pairs, pairs + 1], turn[pairs + 1, pairs] = -1.0, 1.0
    program.half_turn_dd = turn.to(program.half_turn_dd.dtype)


def _rotate(program: StaticProgram, config: Any, positions_S: Tensor) -> None:
    program.cos_1S1d, program.sin_1S1d = rope_cos_sin(config, positions_S[None], program.cos_1S1d.dtype)


# ---- Matrices, biases and norms ----


def bias_dropped(name: str) -> Change:
    def change(program: StaticProgram) -> None:
        getattr(layer_of(program).self_attn, name).bias = None

    return change


def biases_swapped(program: StaticProgram) -> None:
    k, v = layer_of(program).self_attn.k_proj, layer_of(program).self_attn.v_proj
    k.bias, v.bias = v.bias, k.bias


def wrong_eps(eps: float) -> Change:
    def change(program: StaticProgram) -> None:
        for module in program.modules():
            if isinstance(module, DelegableRMSNorm):
                module.eps = eps

    return change


def weight_before_the_cast(program: StaticProgram) -> None:
    for module in program.modules():
        if isinstance(module, DelegableRMSNorm):
            module.__class__ = _CastLater


class _CastLater(DelegableRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(F.linear(wide * wide, self.average_1D) + self.eps)
        return (self.weight.float() * normed).to(x.dtype)


def gate_and_up_swapped(program: StaticProgram) -> None:
    mlp = layer_of(program).mlp
    mlp.gate_proj, mlp.up_proj = mlp.up_proj, mlp.gate_proj


def untied(program: StaticProgram) -> None:
    """The output layer has weights of its own, which no checkpoint ever filled."""
    weight = program.model.lm_head.weight
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * weight.std()
    program.model.lm_head.weight = nn.Parameter(drawn, requires_grad=False)


def mask_row_zeroed(program: StaticProgram) -> None:
    embedding = copy.deepcopy(program.model.embed_tokens)
    data: Any = embedding.weight.data
    getattr(data, "qdata", data)[program.model.config.mask_token_id] = 0
    program.model.embed_tokens = embedding


# ---- Layers and logits ----


def in_order(*layers: int) -> Change:
    """The network runs these layers."""

    def change(program: StaticProgram) -> None:
        program.model.layers = nn.ModuleList(program.model.layers[i] for i in layers)
        program.caches = nn.ModuleList(copy.deepcopy(program.caches[0]) for _ in layers)

    return change


def logits_shifted(program: StaticProgram) -> None:
    program.__class__ = _Shifted


class _Shifted(StaticProgram):
    def forward(self, tokens: Tensor, start_pos: Tensor, kv_len: Tensor, rows: Tensor) -> Tensor:
        return super().forward(tokens, start_pos, kv_len, (rows - 1).clamp(min=0))


# ---- Attention and cache ----


def caches_of(kind: type[nn.Module]) -> Change:
    def change(program: StaticProgram) -> None:
        for cache in program.caches:
            cache.__class__ = kind

    return change


def cache_shared(program: StaticProgram) -> None:
    first, *others = program.caches
    others[LAYER - 1] = first
    del program.caches
    # Registered once: torch.export takes no buffer under two names.
    program.first_cache, program.caches = first, [first, *others]  # type: ignore[assignment]


class Causal(CustomSdpaCache):
    """The mask of a language model that writes from left to right."""

    def forward(self, q_1THd: Tensor, k_1TGd: Tensor, v_1TGd: Tensor, start: int, seen: int) -> Tensor:
        torch.ops.llama.update_cache(k_1TGd, self.k_1SGd, start)
        torch.ops.llama.update_cache(v_1TGd, self.v_1SGd, start)
        out: Tensor = torch.ops.llama.custom_sdpa(q_1THd, self.k_1SGd, self.v_1SGd, start, None, 0.0, True)
        return out


class Faulty(DelegatedCache):
    """`DelegatedCache` in parts that can be wrong one at a time."""

    is_repeated_wrong = is_unscaled = False

    def turned(self, q_1THd: Tensor) -> Tensor:
        return q_1THd

    def written(self, k_1TGd: Tensor, v_1TGd: Tensor, start: int, seen: int) -> tuple[Tensor, Tensor, int]:
        return k_1TGd, v_1TGd, start

    def visible(self, start: int, T: int, seen: int) -> int:
        """How many positions, from the first."""
        return seen

    def hidden(self, scores_GXS: Tensor, start: int, n: int) -> Tensor:
        return scores_GXS

    def forward(self, q_1THd: Tensor, k_1TGd: Tensor, v_1TGd: Tensor, start: int, seen: int) -> Tensor:
        T = k_1TGd.shape[1]
        k_1TGd, v_1TGd, at = self.written(k_1TGd, v_1TGd, start, seen)
        torch.ops.llama.update_cache(k_1TGd, self.k_1SGd, at)
        torch.ops.llama.update_cache(v_1TGd, self.v_1SGd, at)
        H, G, d = q_1THd.shape[2], self.k_1SGd.shape[2], q_1THd.shape[3]
        R = H // G
        q_1THd = self.turned(q_1THd)
        scale = 1.0 if self.is_unscaled else d**-0.5
        n = self.visible(start, T, seen)
        if self.is_repeated_wrong:  # head h sees keys h % G in place of h // R
            q_GRTd = torch.permute_copy((q_1THd * scale).view(-1, R, G, d), (2, 1, 0, 3))
        else:
            q_GRTd = torch.permute_copy((q_1THd * scale).view(-1, G, R, d), (1, 2, 0, 3))
        k_1GdS = torch.permute_copy(self.k_1SGd.narrow(1, 0, n), (0, 2, 3, 1))
        v_1GSd = torch.permute_copy(self.v_1SGd.narrow(1, 0, n), (0, 2, 1, 3))
        scores_GXS = self.hidden(torch.bmm(q_GRTd.view(G, -1, d), k_1GdS.view(G, d, -1)), start, n)
        out_GXd = torch.bmm(scores_GXS.softmax(-1), v_1GSd.view(G, -1, d))
        order = (2, 1, 0, 3) if self.is_repeated_wrong else (2, 0, 1, 3)
        return torch.permute_copy(out_GXd.view(G, R, -1, d), order).view(1, -1, H, d)


class LateQueries(Faulty):
    turn_dd: Tensor

    def turned(self, q_1THd: Tensor) -> Tensor:
        return F.linear(q_1THd, self.turn_dd)


class RepeatedWrong(Faulty):
    is_repeated_wrong = True


class Unscaled(Faulty):
    is_unscaled = True


class HiddenPrefix(Faulty):
    """Rows below start_pos are not seen."""

    def hidden(self, scores_GXS: Tensor, start: int, n: int) -> Tensor:
        is_below_S = torch.arange(self.k_1SGd.shape[1]) < torch.scalar_tensor(start)
        return scores_GXS + torch.where(is_below_S, -1e9, 0.0).narrow(0, 0, n)


class KvLenIgnored(Faulty):
    """What is written beyond this call is not seen."""

    def visible(self, start: int, T: int, seen: int) -> int:
        return start + T


class StaleRows(Faulty):
    """One row beyond kv_len is seen."""

    def visible(self, start: int, T: int, seen: int) -> int:
        return seen + 1


class OneLate(Faulty):
    """Written one position too far."""

    def written(self, k_1TGd: Tensor, v_1TGd: Tensor, start: int, seen: int) -> tuple[Tensor, Tensor, int]:
        return k_1TGd, v_1TGd, start + 1


class NoRewrite(Faulty):
    """Only what is appended is kept: a call inside of what is there sees the old rows."""

    def written(self, k_1TGd: Tensor, v_1TGd: Tensor, start: int, seen: int) -> tuple[Tensor, Tensor, int]:
        T = k_1TGd.shape[1]
        is_new = torch.scalar_tensor(start + T) == torch.scalar_tensor(seen)
        return (
            torch.where(is_new, k_1TGd, self.k_1SGd.narrow(1, start, T)),
            torch.where(is_new, v_1TGd, self.v_1SGd.narrow(1, start, T)),
            start,
        )


class Surviving(Faulty):
    """A tenth of what an earlier call wrote to these rows stays in them."""

    def written(self, k_1TGd: Tensor, v_1TGd: Tensor, start: int, seen: int) -> tuple[Tensor, Tensor, int]:
        T = k_1TGd.shape[1]
        return k_1TGd + 0.1 * self.k_1SGd.narrow(1, start, T), v_1TGd, start


def longer_caches(kind: type[nn.Module]) -> Change:
    """With room for one row more."""

    def change(program: StaticProgram) -> None:
        caches_of(kind)(program)
        for cache in program.caches:
            for name, buffer in list(cache.named_buffers()):
                setattr(cache, name, F.pad(buffer, (0, 0, 0, 0, 0, 1)))

    return change


# ---- Operators ----


def norm_outside(program: StaticProgram) -> None:
    """One norm as the network has it: its mean is not XNNPACK's at a dynamic length. No logit changes."""
    norm = layer_of(program).post_attention_layernorm
    plain = RMSNorm(norm.weight.numel(), norm.eps)
    plain.weight = norm.weight
    layer_of(program).post_attention_layernorm = plain
