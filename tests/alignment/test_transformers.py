"""The network against transformers' Qwen2, made bidirectional by its attention mask: an independent reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm, Qwen2RotaryEmbedding

from model import DreamEdge, DreamEdgeConfig
from model.dream import RMSNorm

RandomNetwork = Callable[[DreamEdgeConfig, int], DreamEdge]
SameLogits = Callable[[Tensor, Tensor], None]

SMALL = DreamEdgeConfig(
    vocab_size=50,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    mask_token_id=49,
    pad_token_id=48,
    bos_token_id=47,
    eos_token_id=46,
)


def twin(network: DreamEdge) -> Qwen2ForCausalLM:
    """Qwen2 with the very tensors of `network`: nothing is copied, so a network of any size has room for a twin."""
    config = network.config
    qwen2 = Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_word_embeddings,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        made = Qwen2ForCausalLM(qwen2)
    weights = {n if n.startswith("lm_head.") else f"model.{n}": t for n, t in network.state_dict().items()}
    made.load_state_dict(weights, strict=True, assign=True)
    made.model.rotary_emb = Qwen2RotaryEmbedding(qwen2)  # its buffers are in no checkpoint and stayed on meta
    return made.requires_grad_(False).eval()


def additive(seen: Tensor) -> Tensor:
    # Not -inf: a row of a pad sees nothing, and its NaN would reach the others through 0 * NaN.
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)


def draw_tokens(config: DreamEdgeConfig, B: int, T: int, seed: int) -> Tensor:
    return torch.randint(config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def draw_seen(B: int, T: int, seed: int) -> Tensor:
    """A bool mask [B, 1, T, T] in which each query sees something, not always itself."""
    random = torch.Generator().manual_seed(seed)
    seen = torch.rand(B, 1, T, T, generator=random) < 0.4
    return seen.scatter(-1, torch.randint(T, (B, 1, T, 1), generator=random), True)


@st.composite
def configs(draw: st.DrawFn) -> DreamEdgeConfig:
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 7))
    # RMSNorm of a few numbers that happen to be small blows float32's rounding up beyond any fixed bound.
    head_dims = [head_dim for head_dim in (2, 4, 6, 16, 34, 64) if heads * head_dim >= 32]
    vocab = draw(st.integers(5, 80))
    return DreamEdgeConfig(
        vocab_size=vocab,
        hidden_size=heads * draw(st.sampled_from(head_dims)),
        intermediate_size=draw(st.integers(1, 48)),
        num_hidden_layers=draw(st.integers(1, 4)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rope_theta=draw(st.sampled_from([1e4, 5e5, 1e6])),
        rms_norm_eps=draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        tie_word_embeddings=draw(st.booleans()),
        mask_token_id=vocab - 1,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )


sizes = {"B": st.integers(1, 3), "T": st.integers(1, 12), "seed": st.integers(0, 2**32)}
few = settings(max_examples=25, deadline=None, derandomize=True)


@few
@given(config=configs(), **sizes)
def test_everything_is_seen(random_network: RandomNetwork, config: DreamEdgeConfig, B: int, T: int, seed: int) -> None:
    network = random_network(config, seed)
    input_ids = draw_tokens(config, B, T, seed)
    logits, _ = network(input_ids)
    reference = twin(network)
    for mask in (torch.ones(B, 1, T, T, dtype=torch.bool), torch.zeros(B, 1, T, T)):
        expected = reference(input_ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@few
@given(config=configs(), **sizes)
def test_random_masks_and_positions(
    random_network: RandomNetwork, config: DreamEdgeConfig, B: int, T: int, seed: int
) -> None:
    """4-D bool masks that are not symmetric; positions out of order and with repeats."""
    network = random_network(config, seed)
    input_ids, seen = draw_tokens(config, B, T, seed), draw_seen(B, T, seed)
    position_ids = torch.randint(2 * T, (B, T), generator=torch.Generator().manual_seed(seed + 1))
    logits, _ = network(input_ids, seen, position_ids)
    expected = twin(network)(input_ids, attention_mask=additive(seen), position_ids=position_ids, use_cache=False)
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=1e-4)


@few
@given(config=configs(), **sizes, left=st.booleans())
def test_padded_batches(
    random_network: RandomNetwork, config: DreamEdgeConfig, B: int, T: int, seed: int, left: bool
) -> None:
    network = random_network(config, seed)
    input_ids = draw_tokens(config, B, T, seed)
    pads = torch.randint(T, (B, 1), generator=torch.Generator().manual_seed(seed + 1))
    tokens = torch.arange(T) >= pads if left else torch.arange(T) < T - pads
    position_ids = (tokens.long().cumsum(-1) - 1).masked_fill(~tokens, 1)
    logits, _ = network(input_ids, tokens.long(), position_ids)
    seen = tokens[:, None, :, None] & tokens[:, None, None, :]
    expected = twin(network)(input_ids, attention_mask=additive(seen), position_ids=position_ids, use_cache=False)
    torch.testing.assert_close(logits[tokens], expected.logits[tokens], rtol=0, atol=1e-4)


@few
@given(config=configs(), **sizes, start=st.integers(1000, 131072 - 64))
def test_large_positions(
    random_network: RandomNetwork, config: DreamEdgeConfig, B: int, T: int, seed: int, start: int
) -> None:
    """Angles are float32: position * frequency (at most 1) is rounded by up to position * 2**-24 radians.

    Two float32 implementations that round an angle differently may differ by that in a cos or sin, and logits
    move by about as much (5e-3 at 131,000 in the golden data), so the bound grows with the position. A position
    that is off by one turns the first pair by a whole radian: far beyond the bound.
    """
    network = random_network(config, seed)
    input_ids, seen = draw_tokens(config, B, T, seed), draw_seen(B, T, seed)
    position_ids = start + torch.randint(64, (B, T), generator=torch.Generator().manual_seed(seed + 1))
    logits, _ = network(input_ids, seen, position_ids)
    expected = twin(network)(input_ids, attention_mask=additive(seen), position_ids=position_ids, use_cache=False)
    atol = 1e-4 + 2 * float(position_ids.max()) * 2**-24
    torch.testing.assert_close(logits, expected.logits, rtol=0, atol=atol)


def test_causal_attention_would_be_noticed(random_network: RandomNetwork) -> None:
    """Qwen2 left causal is another network: the comparison fails, unless ours is given a causal mask too."""
    network = random_network(SMALL, 0)
    input_ids = draw_tokens(SMALL, 2, 8, 0)
    causal = twin(network)(input_ids, use_cache=False).logits
    logits, _ = network(input_ids)
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(logits, causal, rtol=0, atol=1e-2)
    tril = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(network(input_ids, tril)[0], causal, rtol=0, atol=1e-4)


def test_an_off_by_one_at_a_large_position_would_be_noticed(random_network: RandomNetwork) -> None:
    network = random_network(SMALL, 0)
    input_ids, position_ids = draw_tokens(SMALL, 1, 8, 0), torch.arange(131064, 131072)[None]
    shifted = position_ids.clone()
    shifted[0, 3] -= 1
    seen = torch.zeros(1, 1, 8, 8)
    expected = twin(network)(input_ids, attention_mask=seen, position_ids=shifted, use_cache=False).logits
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(network(input_ids, None, position_ids)[0], expected, rtol=0, atol=0.016)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rms_norm(dtype: torch.dtype) -> None:
    """Bit for bit, where float32 ends and the weight comes in: below float32 the order of the two shows."""
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, 7, 96, generator=random).to(dtype), torch.randn(96, generator=random).to(dtype)
    ours, theirs = RMSNorm(96, 1e-6).to(dtype), Qwen2RMSNorm(96, 1e-6).to(dtype)
    for norm in (ours, theirs):
        norm.requires_grad_(False).weight.copy_(weight)
    assert ours(x).dtype == dtype
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(random_network: RandomNetwork, dtype: torch.dtype) -> None:
    """Both round after every operation, but not in the same places of attention: bounded by a few such roundings."""
    network = random_network(SMALL, 0).to(dtype)
    input_ids, seen = draw_tokens(SMALL, 2, 9, 0), torch.zeros(2, 1, 9, 9, dtype=dtype)
    expected = twin(network)(input_ids, attention_mask=seen, use_cache=False).logits
    logits, _ = network(input_ids)
    assert logits.dtype == torch.float32
    bound = 16 * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(logits, expected.float(), rtol=0, atol=bound)


@pytest.mark.parametrize("tied", [False, True])
def test_the_twin_shares_the_weights(random_network: RandomNetwork, tied: bool) -> None:
    network = random_network(replace(SMALL, tie_word_embeddings=tied), 0)
    reference = twin(network)
    ours = {tensor.data_ptr() for tensor in network.state_dict().values()}
    assert {tensor.data_ptr() for tensor in reference.state_dict().values()} == ours
    assert (reference.lm_head.weight.data_ptr() == reference.model.embed_tokens.weight.data_ptr()) == tied


@pytest.mark.parametrize("seen", ["all", "some", "padded"])
def test_checkpoint(network: DreamEdge, same_logits: SameLogits, seen: str) -> None:
    """The loaded checkpoint: golden ones, or the one of --checkpoint."""
    B, T = 2, 13
    input_ids = draw_tokens(network.config, B, T, 0)
    input_ids[:, 8:] = network.config.mask_token_id
    tokens = torch.ones(B, T, dtype=torch.bool)
    given_mask: Tensor | None
    if seen == "padded":
        tokens[0, :4] = False
        given_mask, full = tokens.long(), tokens[:, None, :, None] & tokens[:, None, None, :]
        position_ids = (tokens.long().cumsum(-1) - 1).masked_fill(~tokens, 1)
    else:
        full = draw_seen(B, T, 0) if seen == "some" else torch.ones(B, 1, T, T, dtype=torch.bool)
        given_mask = full if seen == "some" else None
        position_ids = torch.arange(T).expand(B, T)
    logits, _ = network(input_ids, given_mask, position_ids)
    expected = twin(network)(input_ids, attention_mask=additive(full), position_ids=position_ids, use_cache=False)
    same_logits(logits[tokens], expected.logits[tokens])
