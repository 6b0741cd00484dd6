"""The whole network: Qwen2's body with attention in both directions.

Shapes: B batch, T tokens of this call, D hidden_size, H attention heads, G key/value heads, d head_dim,
S positions that the attention can see.
Source: the public Dream reference (HF remote code of Dream-org/Dream-v0), measured in `tests/golden/`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cache import StaticKVCache
from model.config import DreamEdgeConfig

# (q [B, T, H, d], k [B, T, G, d], v [B, T, G, d]) -> [B, T, H, d]. Whoever calls the layers says what attention sees.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# [B, T, heads, d] -> the same, each head rotated by its position.
Rotate = Callable[[Tensor], Tensor]

# Positions that are written together where nothing else is asked for: Fast-dLLM's (arXiv 2505.22618).
BLOCK_LENGTH = 32


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back, then times the weight: the order matters below float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x_BTD: Tensor) -> Tensor:
        wide = x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x_BTD.dtype)


class Attention(nn.Module):
    is_causal = False

    def __init__(self, config: DreamEdgeConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        q_dim = config.num_attention_heads * config.head_dim
        kv_dim = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_dim, bias=True)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=True)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=True)
        self.o_proj = nn.Linear(q_dim, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, rotate: Rotate, attend: Attend) -> Tensor:
        B, _, D = x_BTD.shape
        # T is the inferred dimension: in an exported program it is the only one that changes.
        q_BTHd = self.q_proj(x_BTD).view(B, -1, self.num_heads, self.head_dim)
        k_BTGd = self.k_proj(x_BTD).view(B, -1, self.num_kv_heads, self.head_dim)
        v_BTGd = self.v_proj(x_BTD).view(B, -1, self.num_kv_heads, self.head_dim)
        return self.o_proj(attend(rotate(q_BTHd), rotate(k_BTGd), v_BTGd).reshape(B, -1, D))


class MLP(nn.Module):
    def __init__(self, config: DreamEdgeConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class DecoderLayer(nn.Module):
    def __init__(self, config: DreamEdgeConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, rotate: Rotate, attend: Attend) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotate, attend)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class DreamEdge(nn.Module):
    """Module names are the checkpoint's, without its `model.` prefix."""

    def __init__(self, config: DreamEdgeConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StaticKVCache | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, StaticKVCache | None]:
        """One pass over `input_ids`, int [B, T].

        attention_mask: [B, T] (1 = token, 0 = pad; pads neither see nor are seen, and are not cached), or
            [B, 1, T, S], bool (true = may attend) or additive float. S is T, or with a cache the first S of
            its positions. None: everything is seen. A query that sees nothing has attention output zero.
        position_ids: int [B, T], 0..T-1 when absent. With a cache they also say where the tokens are kept.
        past_key_values: the cache of an earlier call. Needs `position_ids`. Tokens see all of its valid positions.
        use_cache: without a cache, makes one of `config.max_seq_len` positions. For another size give your own.

        Returns the raw, unshifted logits [B, T, vocab] (float32, or float64 for a float64 model), and the cache.
        Raises `ValueError` for a mask or positions of the wrong shape, and for positions outside the cache.
        """
        B, T = input_ids.shape
        if past_key_values is not None and position_ids is None:
            raise ValueError("position_ids say where tokens go in the cache: give them along with past_key_values")
        if position_ids is None:
            position_ids = torch.arange(T, device=input_ids.device).expand(B, T)
        if position_ids.shape != (B, T):
            raise ValueError(f"position_ids must be {[B, T]}, got {list(position_ids.shape)}")
        cache = past_key_values
        if use_cache and cache is None:
            weight = self.embed_tokens.weight
            cache = StaticKVCache(self.config, B, self.config.max_seq_len, dtype=weight.dtype, device=weight.device)

        check_mask(attention_mask, B, T, cache.max_seq_len if cache is not None else None)

        x_BTD = self.embed_tokens(input_ids)
        rotate = partial(apply_rope, *rope_cos_sin(self.config, position_ids, x_BTD.dtype))
        if cache is None:
            mask = visible(attention_mask)
            attends = [partial(attend, mask=mask)] * len(self.layers)
        else:
            tokens = attention_mask.bool() if attention_mask is not None and attention_mask.dim() == 2 else None
            cache.claim(position_ids, tokens)
            mask = cache.mask(attention_mask, T)
            attends = [partial(cache.attend, i, attend, mask=mask) for i in range(len(self.layers))]
        for layer, layer_attend in zip(self.layers, attends, strict=True):
            x_BTD = layer(x_BTD, rotate, layer_attend)
        logits = self.lm_head(self.norm(x_BTD))
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), cache

    # What `runtime.generate` asks of a network, as the exported program answers it.

    @property
    def max_seq_len(self) -> int:
        return self.config.max_seq_len

    @property
    def max_rows(self) -> int:
        return self.config.max_seq_len

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def mask_id(self) -> int:
        return self.config.mask_token_id

    @property
    def pad_id(self) -> int:
        return self.config.pad_token_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self.config.eos_ids

    @property
    def block_length(self) -> int:
        return min(BLOCK_LENGTH, self.max_seq_len)

    def start(self, max_seq_len: int | None = None) -> Callable[[Tensor, int, int, Tensor], Tensor]:
        """The exported program's `forward` over a new cache, in eager.

        It takes tokens int64 [T], start_pos, kv_len and rows int64 [K], and gives raw logits float32 [1, K, vocab]:
        tokens go to positions start_pos .. start_pos+T-1 and see positions 0 .. kv_len-1.
        """
        weight = self.norm.weight
        S = max_seq_len or self.max_seq_len
        cache = StaticKVCache(self.config, 1, S, dtype=weight.dtype, device=weight.device)

        def forward(tokens_T: Tensor, start_pos: int, kv_len: int, rows_K: Tensor) -> Tensor:
            T = len(tokens_T)
            sees_11TS = torch.ones(1, 1, T, kv_len, dtype=torch.bool, device=weight.device)
            positions_1T = torch.arange(start_pos, start_pos + T, device=weight.device)[None]
            logits_1TV, _ = self(tokens_T[None].to(weight.device), sees_11TS, positions_1T, cache)
            return logits_1TV[:, rows_K].float()

        return forward


def rope_cos_sin(config: DreamEdgeConfig, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, 1, d] for positions [B, T], half-split layout; angles in float32 as in the reference."""
    exponents = torch.arange(0, config.head_dim, 2, device=position_ids.device, dtype=torch.int64).float()
    inv_freq = 1.0 / (config.rope_theta ** (exponents / config.head_dim))
    angles = position_ids[:, :, None, None].float() * inv_freq
    angles = torch.cat((angles, angles), dim=-1)
    # MKL's first cos of a process is now and then wrong by 1e-4 in a second thread (AVX-512, one run in five).
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return angles.cos().to(dtype), angles.sin().to(dtype)
    finally:
        torch.set_num_threads(threads)


def apply_rope(cos: Tensor, sin: Tensor, x_BTHd: Tensor) -> Tensor:
    first, second = x_BTHd.chunk(2, dim=-1)
    return x_BTHd * cos + torch.cat((-second, first), dim=-1) * sin


def check_mask(attention_mask: Tensor | None, B: int, T: int, max_seq_len: int | None) -> None:
    """Raises `ValueError` for a mask that is not of `DreamEdge.forward`. max_seq_len: of the cache, if there is one."""
    if attention_mask is None:
        return
    shape = list(attention_mask.shape)
    if attention_mask.dim() == 2:
        if shape != [B, T]:
            raise ValueError(f"a 2-D attention_mask must be {[B, T]}, got {shape}")
        return
    if attention_mask.dim() != 4 or shape[0] not in (1, B) or shape[1:3] != [1, T]:
        raise ValueError(f"a 4-D attention_mask must be [{B}, 1, {T}, positions], got {shape}")
    if max_seq_len is None and shape[3] != T:
        raise ValueError(f"a 4-D attention_mask must be {[B, 1, T, T]}, got {shape}")
    if max_seq_len is not None and not 1 <= shape[3] <= max_seq_len:
        raise ValueError(f"a 4-D attention_mask must be {[B, 1, T]} and 1 to {max_seq_len} positions, got {shape}")
    if not attention_mask.is_floating_point() and attention_mask.dtype != torch.bool:
        raise ValueError(f"a 4-D attention_mask must be bool or additive float, got {attention_mask.dtype}")


def visible(attention_mask: Tensor | None) -> Tensor | None:
    """A mask as [B or 1, 1, T, T] (bool, or additive float): pads neither see nor are seen. None if all is seen."""
    if attention_mask is None or attention_mask.dim() == 4:
        return attention_mask
    tokens = attention_mask.bool()
    return tokens[:, None, :, None] & tokens[:, None, None, :]


def attend(q_BTHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention over S positions, in both directions; mask [B, 1, T, S] bool or additive."""
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q_BTHd.dtype)
    out = F.scaled_dot_product_attention(
        q_BTHd.transpose(1, 2), k_BSGd.transpose(1, 2), v_BSGd.transpose(1, 2), attn_mask=mask, enable_gqa=True
    )
    if mask is not None:
        sees = mask if mask.dtype == torch.bool else mask != -torch.inf
        out = torch.where(sees.any(-1, keepdim=True), out, 0.0)
    return out.transpose(1, 2)
