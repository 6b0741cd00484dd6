"""The exported form of Dream: one `forward` over a static cache, for every use.

    forward(tokens int64 [1, T], start_pos int64 [1], kv_len int64 [1], rows int64 [K]) -> logits float32 [1, K, vocab]

`tokens` go to cache positions start_pos .. start_pos+T-1, attention sees positions 0 .. kv_len-1 in both
directions, and only the K `rows` of the T get logits (raw, unshifted).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import DreamEdge
from model.cache import cache_shape
from model.dream import DecoderLayer, RMSNorm, apply_rope, attend, rope_cos_sin
from recipes.exporter import garbage_of_now_only, without_inductor, without_stack_traces
from recipes.options import Attention, Backend

Module = TypeVar("Module", bound=nn.Module)

CONTRACT_VERSION = 1


class StaticProgram(nn.Module):
    """Wraps a model, quantized or not; shares its weights and leaves it as it is.

    For XNNPACK, norms and RoPE are written with the operators that its delegate takes at a dynamic length, so that
    all between two attentions is one delegate. Otherwise the model's own modules are traced.
    """

    cos_1S1d: Tensor
    sin_1S1d: Tensor
    half_turn_dd: Tensor

    def __init__(self, model: DreamEdge, max_seq_len: int, backend: Backend, attention: Attention) -> None:
        super().__init__()
        config = model.config
        self.max_seq_len = max_seq_len
        self.is_delegable = backend is Backend.xnnpack
        self.model = _with_delegable_norms(model) if self.is_delegable else model
        dtype = model.norm.weight.dtype
        if attention is not Attention.aten:
            with without_inductor():
                import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401 (registers torch.ops.llama)
        cache = CACHES[attention]
        shape = cache_shape(config, 1, max_seq_len)
        self.caches = nn.ModuleList(cache(shape, dtype) for _ in range(config.num_hidden_layers))
        cos_1S1d, sin_1S1d = rope_cos_sin(config, torch.arange(max_seq_len)[None], dtype)
        self.register_buffer("cos_1S1d", cos_1S1d)
        self.register_buffer("sin_1S1d", sin_1S1d)
        self.register_buffer("half_turn_dd", half_turn(config.head_dim).to(dtype))

    def forward(self, tokens: Tensor, start_pos: Tensor, kv_len: Tensor, rows: Tensor) -> Tensor:
        T = tokens.shape[1]
        start, seen = cast(int, start_pos.item()), cast(int, kv_len.item())
        torch._check(start >= 0)
        torch._check(start + T <= self.max_seq_len)
        torch._check(seen >= start + T)
        torch._check(seen <= self.max_seq_len)
        cos_1T1d = self.cos_1S1d.narrow(1, start, T)
        sin_1T1d = self.sin_1S1d.narrow(1, start, T)

        def rotate(x_1THd: Tensor) -> Tensor:
            if self.is_delegable:
                return x_1THd * cos_1T1d + F.linear(x_1THd, self.half_turn_dd) * sin_1T1d
            return apply_rope(cos_1T1d, sin_1T1d, x_1THd)

        def attend_to(cache: nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
            return lambda q_1THd, k_1TGd, v_1TGd: cache(q_1THd, k_1TGd, v_1TGd, start, seen)

        x_1TD = self.model.embed_tokens(tokens)
        *first, last = cast(list[DecoderLayer], list(self.model.layers))
        *first_caches, last_cache = cast(list[CacheBuffers], list(self.caches))
        for layer, cache in zip(first, first_caches, strict=True):
            x_1TD = layer(x_1TD, rotate, attend_to(cache))

        # From the last attention on only the asked rows are computed.
        normed = last.input_layernorm(x_1TD)
        attended_1KD = last.self_attn(
            normed, rotate, lambda q, k, v: last_cache.attend_rows(q, k, v, start, seen, rows)
        )
        x_1KD = x_1TD[:, rows] + attended_1KD
        x_1KD = x_1KD + last.mlp(last.post_attention_layernorm(x_1KD))
        logits: Tensor = self.model.lm_head(self.model.norm(x_1KD))
        return logits.float()


class CacheBuffers(nn.Module):
    """Keys and values of one layer, [1, max_seq_len, kv heads, head_dim]: planned into the program's memory once.

    `forward` keeps k and v at `start`, and returns what queries see of positions 0 .. seen-1. There may be fewer
    queries than keys.
    """

    k_1SGd: Tensor
    v_1SGd: Tensor

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("k_1SGd", torch.zeros(shape, dtype=dtype))
        self.register_buffer("v_1SGd", torch.zeros(shape, dtype=dtype))

    def attend_rows(
        self, q_1THd: Tensor, k_1TGd: Tensor, v_1TGd: Tensor, start: int, seen: int, rows_K: Tensor
    ) -> Tensor:
        """All keys and values are kept, only the asked queries attend."""
        out_1KHd: Tensor = self(q_1THd[:, rows_K], k_1TGd, v_1TGd, start, seen)
        return out_1KHd


class DelegatedCache(CacheBuffers):
    """executorch's `update_cache`, and attention in operators that XNNPACK's delegate takes.

    Faster than `custom_sdpa` (docs/performance.md), but all scores of a layer, H * T * kv_len, are in memory.
    """

    def forward(self, q_1THd: Tensor, k_1TGd: Tensor, v_1TGd: Tensor, start: int, seen: int) -> Tensor:
        torch.ops.llama.update_cache(k_1TGd, self.k_1SGd, start)
        torch.ops.llama.update_cache(v_1TGd, self.v_1SGd, start)
        H, G, d = q_1THd.shape[2], self.k_1SGd.shape[2], q_1THd.shape[3]
        R = H // G  # query heads that share keys and values: they are rows X = R * T of one product
        # permute_copy, not permute: a view of what it gives keeps the -1 that the delegate needs.
        q_GRTd = torch.permute_copy((q_1THd * d**-0.5).view(-1, G, R, d), (1, 2, 0, 3))
        k_1GdS = torch.permute_copy(self.k_1SGd.narrow(1, 0, seen), (0, 2, 3, 1))
        v_1GSd = torch.permute_copy(self.v_1SGd.narrow(1, 0, seen), (0, 2, 1, 3))
        scores_GXS = torch.bmm(q_GRTd.view(G, -1, d), k_1GdS.view(G, d, -1))
        out_GXd = torch.bmm(scores_GXS.softmax(-1), v_1GSd.view(G, -1, d))
        return torch.permute_copy(out_GXd.view(G, R, -1, d), (2, 0, 1, 3)).view(1, -1, H, d)


class CustomSdpaCache(CacheBuffers):
    """executorch's `update_cache` and `custom_sdpa`: they work in place, and look at no slot too many."""

    def forward(self, q_1THd: Tensor, k_1TGd: Tensor, v_1TGd: Tensor, start: int, seen: int) -> Tensor:
        torch.ops.llama.update_cache(k_1TGd, self.k_1SGd, start)
        torch.ops.llama.update_cache(v_1TGd, self.v_1SGd, start)
        # Not causal and without a mask it sees positions 0 .. its start + T - 1: this start makes that `seen`.
        out: Tensor = torch.ops.llama.custom_sdpa(
            q_1THd, self.k_1SGd, self.v_1SGd, seen - q_1THd.shape[1], None, 0.0, False
        )
        return out

    def attend_rows(
        self, q_1THd: Tensor, k_1TGd: Tensor, v_1TGd: Tensor, start: int, seen: int, rows_K: Tensor
    ) -> Tensor:
        # A row may be asked for many times, but custom_sdpa takes no more queries than it sees positions.
        return self(q_1THd, k_1TGd, v_1TGd, start, seen)[:, rows_K]


class AtenCache(CacheBuffers):
    """The same in plain operators, over the whole cache with a mask."""

    def forward(self, q_1THd: Tensor, k_1TGd: Tensor, v_1TGd: Tensor, start: int, seen: int) -> Tensor:
        S = self.k_1SGd.shape[1]
        slots_T = start + torch.arange(k_1TGd.shape[1])
        self.k_1SGd[:, slots_T] = k_1TGd
        self.v_1SGd[:, slots_T] = v_1TGd
        mask_1TS = (torch.arange(S) < seen).expand(1, 1, q_1THd.shape[1], S)
        return attend(q_1THd, self.k_1SGd, self.v_1SGd, mask_1TS)


class DelegableRMSNorm(nn.Module):
    """RMSNorm with the mean as a product with 1/D: XNNPACK takes a linear at a dynamic length, not a mean."""

    average_1D: Tensor

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        dim = norm.weight.numel()
        self.weight = norm.weight
        self.eps = norm.eps
        self.register_buffer("average_1D", torch.full((1, dim), 1.0 / dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(F.linear(wide * wide, self.average_1D) + self.eps)
        return self.weight * normed.to(x.dtype)


CACHES = {
    Attention.delegated: DelegatedCache,
    Attention.custom_sdpa: CustomSdpaCache,
    Attention.aten: AtenCache,
}


def _with_delegable_norms(module: nn.Module) -> DreamEdge:
    """A copy of the module tree with its norms replaced; every tensor is shared."""

    def replaced(module: nn.Module) -> nn.Module:
        if isinstance(module, RMSNorm):
            return DelegableRMSNorm(module)
        return with_modules(module, {name: child and replaced(child) for name, child in module._modules.items()})

    twin = replaced(module)
    assert isinstance(twin, DreamEdge)
    return twin


def with_modules(module: Module, modules: dict[str, nn.Module | None]) -> Module:
    """A module like this one, which shares its tensors, with these in it."""
    twin = copy.copy(module)
    twin._modules = modules
    return twin


def half_turn(head_dim: int) -> Tensor:
    """[d, d]: as a linear's weight it maps (first, second) to (-second, first), exactly."""
    half = head_dim // 2
    turn = torch.zeros(head_dim, head_dim)
    turn[:half, half:] = -torch.eye(half)
    turn[half:, :half] = torch.eye(half)
    return turn


@garbage_of_now_only()
def export_program(program: StaticProgram, max_rows: int) -> torch.export.ExportedProgram:
    """`torch.export` with T dynamic in 1..max_seq_len, and K in 1..max_rows."""
    S = program.max_seq_len
    T = torch.export.Dim("T", min=1, max=S)
    K = torch.export.Dim("K", min=1, max=max_rows)
    # Lengths above 1, or torch.export would take them for constants.
    n = min(4, S)
    example = (
        torch.zeros(1, n, dtype=torch.int64),
        torch.tensor([0]),
        torch.tensor([n]),
        torch.arange(min(n - 1, max_rows)),
    )
    # Buffers that are written in place cannot be lowered from a graph with gradients.
    program.requires_grad_(False)
    with torch.no_grad(), without_stack_traces():
        return torch.export.export(
            program,
            example,
            dynamic_shapes={"tokens": {1: T}, "start_pos": None, "kv_len": None, "rows": {0: K}},
        )


def metadata(model: DreamEdge, max_seq_len: int, max_rows: int, attention: Attention) -> dict[str, object]:
    """The constant methods of the program: what a runner must know of it."""
    config = model.config
    return {
        "get_contract_version": CONTRACT_VERSION,
        "get_max_seq_len": max_seq_len,
        "get_max_context_len": max_seq_len,
        "get_max_rows": max_rows,
        "get_vocab_size": config.vocab_size,
        "get_n_layers": config.num_hidden_layers,
        "get_bos_id": config.bos_token_id,
        "get_eos_ids": list(config.eos_ids),
        "get_pad_id": config.pad_token_id,
        "get_mask_id": config.mask_token_id,
        "get_block_length": min(model.block_length, max_seq_len),
        "logits_shift": 1,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": attention is Attention.custom_sdpa,
        "enable_dynamic_shape": True,
    }
