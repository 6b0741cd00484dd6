"""Calls through the static cache against full forwards without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model import DreamEdge, DreamEdgeConfig, StaticKVCache, load_hf_model

RandomNetwork = Callable[[DreamEdgeConfig, int], DreamEdge]
SameLogits = Callable[[Tensor, Tensor], None]
# input_ids, position_ids and attention_mask of one call
Call = tuple[Tensor, Tensor, Tensor | None]

SLOTS = 16

SMALL = DreamEdgeConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    mask_token_id=39,
    pad_token_id=38,
    bos_token_id=38,
    eos_token_id=38,
)


class Unrolled:
    """What cached calls must give, computed without a cache: one full forward over every token ever written.

    The keys and values of a token are computed once, when it is written, and from what it saw then. They do not
    change when later tokens come, or when a neighbour is replaced (its own keys then go stale, but stay). So a
    sequence of calls is one long row of tokens in the order of writing, each at its own position, in which a token
    sees, of each position, only the token that was written there last when it was its turn. Tokens that were
    replaced stay in the row, seen by those who saw them then. Pads are left out, and each row of the batch is run
    alone: padding has nothing to hide behind.
    """

    def __init__(self, rows: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.positions: list[list[int]] = [[] for _ in range(rows)]
        self.biases: list[list[dict[int, float]]] = [[] for _ in range(rows)]  # of each token: what it sees -> bias
        self.calls: list[list[int]] = [[] for _ in range(rows)]  # of each token: the call that wrote it
        self.slots: list[dict[int, int]] = [{} for _ in range(rows)]  # position -> the token written there last

    def write(self, call: int, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> None:
        kept, bias = real(input_ids, attention_mask), None
        if attention_mask is not None and attention_mask.dim() == 4:
            bias = attention_mask
            if bias.dtype == torch.bool:
                bias = torch.where(bias, 0.0, -torch.inf)
            bias = bias.expand(len(input_ids), -1, -1, -1)
        for b, slots in enumerate(self.slots):
            written = position_ids[b, kept[b]].tolist()
            slots |= {position: len(self.tokens[b]) + i for i, position in enumerate(written)}
            self.tokens[b] += input_ids[b, kept[b]].tolist()
            self.positions[b] += written
            self.calls[b] += [call] * len(written)
            for t in kept[b].nonzero()[:, 0].tolist():
                row = [0.0] * SLOTS if bias is None else bias[b, 0, t].tolist()
                self.biases[b].append({token: row[slot] for slot, token in slots.items() if slot < len(row)})

    def forward(self, network: DreamEdge, calls: int) -> list[Tensor]:
        """The logits of each call, of all rows one after the other, without pads."""
        logits: list[list[Tensor]] = [[] for _ in range(calls)]
        for b, tokens in enumerate(self.tokens):
            if tokens:
                L = len(tokens)
                mask = torch.full((1, 1, L, L), -torch.inf)
                for query, seen in enumerate(self.biases[b]):
                    for key, value in seen.items():
                        mask[0, 0, query, key] = value
                row, _ = network(torch.tensor([tokens]), mask, torch.tensor([self.positions[b]]))
                for call, of_call in enumerate(logits):
                    of_call.append(row[0, torch.tensor(self.calls[b]) == call])
        return [torch.cat(of_call) if of_call else torch.empty(0, network.config.vocab_size) for of_call in logits]


def real(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Where tokens of a call are no pads."""
    if attention_mask is not None and attention_mask.dim() == 2:
        return attention_mask.bool()
    return torch.ones_like(input_ids, dtype=torch.bool)


def run(network: DreamEdge, same_logits: SameLogits, calls: list[Call]) -> tuple[StaticKVCache, Tensor]:
    """Makes the calls through a new cache, compares the logits of each, gives the cache and the last logits."""
    rows = len(calls[0][0])
    cache, unrolled = StaticKVCache(network.config, rows, SLOTS), Unrolled(rows)
    logits = []
    for call, (input_ids, position_ids, attention_mask) in enumerate(calls):
        of_call, returned = network(input_ids, attention_mask, position_ids, past_key_values=cache)
        assert returned is cache
        logits.append(of_call)
        unrolled.write(call, input_ids, position_ids, attention_mask)
    for (input_ids, _, mask), actual, expected in zip(
        calls, logits, unrolled.forward(network, len(calls)), strict=True
    ):
        same_logits(actual[real(input_ids, mask)], expected)
    return cache, logits[-1]


def draw(network: DreamEdge, B: int, T: int, seed: int = 0) -> Tensor:
    return torch.randint(network.config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def span(start: int, stop: int, B: int = 1) -> Tensor:
    return torch.arange(start, stop).expand(B, -1)


def test_prefill_is_the_full_forward(network: DreamEdge, same_logits: SameLogits) -> None:
    input_ids = draw(network, 2, 9)
    full, none = network(input_ids)
    assert none is None
    logits, cache = network(input_ids, use_cache=True)
    same_logits(logits, full)
    assert cache.max_seq_len == network.config.max_seq_len
    assert cache.keys.dtype == cache.values.dtype == torch.float32
    _, returned = network(input_ids[:, :1], None, span(9, 10, 2), past_key_values=cache)
    assert returned is cache
    assert cache.valid[:, :10].all()
    assert not cache.valid[:, 10:].any()


def test_prefill_then_a_token_then_a_block(network: DreamEdge, same_logits: SameLogits) -> None:
    """Each call sees what is in the cache and itself: the block-causal mask, in one full forward."""
    input_ids = draw(network, 2, 11)
    blocks = [(0, 6), (6, 7), (7, 11)]
    block = torch.tensor([0] * 6 + [1] + [2] * 4)
    full, _ = network(input_ids, (block[:, None] >= block)[None, None])
    cache = StaticKVCache(network.config, 2, SLOTS)
    for start, stop in blocks:
        logits, _ = network(input_ids[:, start:stop], None, span(start, stop, 2), past_key_values=cache)
        same_logits(logits, full[:, start:stop])
    run(network, same_logits, [(input_ids[:, a:b], span(a, b, 2), None) for a, b in blocks])


def test_positions_need_not_be_in_order(network: DreamEdge, same_logits: SameLogits) -> None:
    """A token's place is its position: neither the order of calls nor the order within a call counts."""
    input_ids, order = draw(network, 1, 8), torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])
    straight, expected = run(network, same_logits, [(input_ids, span(0, 8), None)])
    shuffled, logits = run(network, same_logits, [(input_ids[:, order], order[None], None)])
    same_logits(logits, expected[:, order])
    torch.testing.assert_close(shuffled.keys, straight.keys, rtol=1e-4, atol=1e-3)
    rows = draw(network, 2, 4), torch.tensor([[0, 1, 2, 3], [9, 3, 15, 4]]), None
    run(network, same_logits, [rows, (draw(network, 2, 2, 1), torch.tensor([[9, 5], [10, 0]]), None)])


def test_slots_hold_the_keys_and_values_of_their_tokens(network: DreamEdge) -> None:
    """Against what the projections gave, each pair of a key turned as a complex number by its position."""
    given_keys: dict[int, Tensor] = {}
    given_values: dict[int, Tensor] = {}

    def keep(into: dict[int, Tensor], layer: int) -> Callable[..., None]:
        return lambda _module, _inputs, output: into.__setitem__(layer, output)

    hooks = []
    for i, layer in enumerate(network.layers):
        hooks.append(layer.get_submodule("self_attn.k_proj").register_forward_hook(keep(given_keys, i)))
        hooks.append(layer.get_submodule("self_attn.v_proj").register_forward_hook(keep(given_values, i)))
    cache, position_ids = StaticKVCache(network.config, 2, SLOTS), torch.tensor([[3, 11, 0], [7, 2, 15]])
    try:
        network(draw(network, 2, 3), None, position_ids, past_key_values=cache)
    finally:
        for hook in hooks:
            hook.remove()

    config = network.config
    half = config.head_dim // 2
    angles = position_ids[..., None] * config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.complex(angles.cos(), angles.sin())[:, :, None]
    for i in range(config.num_hidden_layers):
        keys, values = (given[i].unflatten(-1, (-1, config.head_dim)) for given in (given_keys, given_values))
        turned = torch.complex(keys[..., :half], keys[..., half:]) * turn
        for b in range(2):
            slots = position_ids[b]
            assert torch.equal(cache.values[i, b, slots], values[b])
            expected = torch.cat((turned[b].real, turned[b].imag), dim=-1).float()
            atol = 1e-5 * max(1.0, float(expected.abs().max()))
            torch.testing.assert_close(cache.keys[i, b, slots], expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("start", "stop"), [(0, 12), (6, 12), (4, 8), (4, 5), (0, 3)])
def test_rewriting(network: DreamEdge, same_logits: SameLogits, start: int, stop: int) -> None:
    """Tokens of a span replaced: the others' keys stay as they were, computed from the tokens before."""
    before, after = draw(network, 2, 12), draw(network, 2, stop - start, 1)
    calls: list[Call] = [(before, span(0, 12, 2), None), (after, span(start, stop, 2), None)]
    prefilled, _ = run(network, same_logits, calls[:1])
    cache, logits = run(network, same_logits, calls)

    inside = torch.zeros(SLOTS, dtype=torch.bool)
    inside[start:stop] = True
    assert torch.equal(cache.keys[:, :, ~inside], prefilled.keys[:, :, ~inside])
    assert torch.equal(cache.values[:, :, ~inside], prefilled.values[:, :, ~inside])
    assert torch.equal(cache.valid, prefilled.valid)

    replaced = before.clone()
    replaced[:, start:stop] = after
    full = network(replaced)[0][:, start:stop]
    fresh, _ = run(network, same_logits, [(replaced, span(0, 12, 2), None)])
    # A first layer's keys know nothing of the neighbours, so none of them is stale.
    torch.testing.assert_close(cache.keys[0], fresh.keys[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(cache.values[0], fresh.values[0], rtol=1e-5, atol=1e-4)
    if stop - start == 12:
        same_logits(logits, full)
    else:
        with pytest.raises(AssertionError, match="not close"):  # or the comparison above would not see staleness
            same_logits(logits, full)


def test_rewriting_in_one_layer_is_exact(random_network: RandomNetwork, same_logits: SameLogits) -> None:
    """With one layer no key is ever stale: a call equals the full forward over the tokens as they are now."""
    network = random_network(replace(SMALL, num_hidden_layers=1), 0)
    input_ids, cache = draw(network, 1, 10), StaticKVCache(network.config, 1, SLOTS)
    network(input_ids, None, span(0, 10), past_key_values=cache)
    for seed, (start, stop) in enumerate([(3, 6), (9, 10), (0, 4), (5, 9)], start=1):
        input_ids[:, start:stop] = draw(network, 1, stop - start, seed)
        logits, _ = network(input_ids[:, start:stop], None, span(start, stop), past_key_values=cache)
        same_logits(logits, network(input_ids)[0][:, start:stop])


def test_block_wise_generation_pattern(network: DreamEdge, same_logits: SameLogits) -> None:
    """Full forwards that refill the cache, between them blocks recomputed with and without a suffix in sight."""
    calls: list[Call] = []
    for start, stop in [(4, 8), (8, 12)]:
        calls.append((draw(network, 1, 12, start), span(0, 12), None))
        calls += [(draw(network, 1, stop - start, start + i), span(start, stop), None) for i in (1, 2)]
        calls.append((draw(network, 1, 12 - start, start + 3), span(start, 12), None))
    run(network, same_logits, calls)


@pytest.mark.parametrize("pad_position", [-1, 1, 99])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padded_batches(network: DreamEdge, same_logits: SameLogits, side: str, pad_position: int) -> None:
    """Each row is as if it ran alone. A pad's position does not count: it is not kept."""
    mask = {
        "left": torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]]),
        "right": torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]]),
        "both": torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0]]),
    }[side]
    position_ids = (mask.cumsum(-1) - 1).masked_fill(mask == 0, pad_position)
    lengths = mask.sum(-1, keepdim=True)
    second = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 1]])
    second_ids = (lengths + second.cumsum(-1) - 1).masked_fill(second == 0, pad_position)
    calls: list[Call] = [
        (draw(network, 3, 6), position_ids, mask),
        (draw(network, 3, 1, 1), lengths, None),
        (draw(network, 3, 3, 2), second_ids + 1, second.bool()),
        (draw(network, 3, 2, 3), lengths + torch.tensor([[-1, 0]]), None),
    ]
    cache, _ = run(network, same_logits, calls[:1])
    assert torch.equal(cache.valid, torch.arange(SLOTS) < lengths)
    assert not cache.keys[:, ~cache.valid].any()
    assert not cache.values[:, ~cache.valid].any()
    run(network, same_logits, calls)


def test_pads_may_have_any_position(network: DreamEdge, same_logits: SameLogits) -> None:
    """A call of pads only in one row leaves that row of the cache as it was."""
    mask = torch.tensor([[1, 1], [0, 0]])
    calls: list[Call] = [(draw(network, 2, 3), span(0, 3, 2), None), (draw(network, 2, 2), span(3, 5, 2), mask)]
    before, _ = run(network, same_logits, calls[:1])
    cache, logits = run(network, same_logits, calls)
    assert logits.isfinite().all()
    assert torch.equal(cache.keys[:, 1], before.keys[:, 1])
    assert torch.equal(cache.valid[1], before.valid[1])
    run(network, same_logits, [*calls, (draw(network, 2, 1), torch.tensor([[5], [3]]), None)])


@pytest.mark.parametrize("S", [7, 12, SLOTS])
@pytest.mark.parametrize("form", ["bool", "additive"])
def test_masks_that_hide_a_suffix(network: DreamEdge, same_logits: SameLogits, form: str, S: int) -> None:
    """A block recomputed without its suffix in sight: as if the suffix had never been written.

    The prefix is written first and alone, so none of its keys has seen the suffix.
    """
    prompt, suffix, block = draw(network, 2, 4), draw(network, 2, 8, 1), draw(network, 2, 3, 2)
    seen = (torch.arange(S) < 7).expand(1, 1, 3, S)
    mask = seen if form == "bool" else torch.where(seen, 0.0, -torch.inf)
    calls: list[Call] = [
        (prompt, span(0, 4, 2), None),
        (suffix, span(4, 12, 2), None),
        (block, span(4, 7, 2), mask),
    ]
    _, logits = run(network, same_logits, calls)
    _, without = run(network, same_logits, [calls[0], (block, span(4, 7, 2), None)])
    same_logits(logits, without)
    block_causal = torch.ones(7, 7, dtype=torch.bool)
    block_causal[:4, 4:] = False
    same_logits(logits, network(torch.cat((prompt, block), dim=1), block_causal[None, None])[0][:, 4:])
    _, seeing = run(network, same_logits, [*calls[:2], (block, span(4, 7, 2), None)])
    with pytest.raises(AssertionError, match="not close"):
        same_logits(logits, seeing)


def test_a_token_may_be_hidden_from_itself(network: DreamEdge, same_logits: SameLogits) -> None:
    """A mask over the first S slots is about what is seen; what lies beyond is written all the same."""
    mask = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    calls: list[Call] = [(draw(network, 1, 4), span(0, 4), None), (draw(network, 1, 3, 1), span(4, 7), mask)]
    cache, _ = run(network, same_logits, calls)
    assert cache.valid[0].nonzero()[:, 0].tolist() == list(range(7))
    run(network, same_logits, [*calls, (draw(network, 1, 1, 2), span(7, 8), None)])


def test_queries_that_see_nothing(network: DreamEdge, same_logits: SameLogits) -> None:
    """Their attention output is zero: no NaN, in any form of saying it."""
    prompt, later = draw(network, 1, 4), draw(network, 1, 2, 1)
    seen = torch.zeros(1, 1, 2, 6, dtype=torch.bool)
    seen[..., 1, :] = True
    results = []
    for mask in (seen, torch.where(seen, 0.0, -torch.inf)):
        _, logits = run(network, same_logits, [(prompt, span(0, 4), None), (later, span(4, 6), mask)])
        results.append(logits)
    same_logits(results[0], results[1])
    # What is allowed is not enough: these slots are empty.
    empty = torch.zeros(1, 1, 4, SLOTS, dtype=torch.bool)
    empty[..., 8:] = True
    _, nothing = run(network, same_logits, [(prompt, span(0, 4), empty)])
    same_logits(nothing, network(prompt, torch.zeros(1, 1, 4, 4, dtype=torch.bool))[0])


def test_additive_masks(network: DreamEdge, same_logits: SameLogits) -> None:
    """0 and -inf are a bool mask; biases between them are added to the scores; the least float hides as well."""
    prompt, later = draw(network, 2, 6), draw(network, 2, 3, 1)
    seen = torch.rand(2, 1, 3, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    seen[..., 7] = True

    def last(mask: Tensor) -> Tensor:
        return run(network, same_logits, [(prompt, span(0, 6, 2), None), (later, span(6, 9, 2), mask)])[1]

    expected = last(seen)
    same_logits(last(torch.where(seen, 0.0, -torch.inf)), expected)
    same_logits(last(torch.where(seen, 0.0, torch.finfo(torch.float32).min)), expected)
    same_logits(last(torch.where(seen, 0.0, -torch.inf).double()), expected)
    last(torch.where(seen, 0.0, -torch.inf)[:1])  # one mask for all rows
    bias = torch.randn(2, 1, 3, 9, generator=torch.Generator().manual_seed(1))
    biased = last(bias.masked_fill(~seen, -torch.inf))
    with pytest.raises(AssertionError, match="not close"):
        same_logits(biased, expected)


@pytest.mark.parametrize("form", ["none", "2-D", "bool", "additive"])
def test_empty_slots_are_never_seen(network: DreamEdge, form: str) -> None:
    """Whatever lies in slots that were not written, not one bit of the logits depends on it."""
    masks: dict[str, Tensor | None] = {
        "none": None,
        "2-D": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "bool": torch.ones(2, 1, 3, SLOTS, dtype=torch.bool),
        "additive": torch.zeros(2, 1, 3, SLOTS),
    }
    results = []
    for garbage in (0.0, 1e4):
        cache = StaticKVCache(network.config, 2, SLOTS)
        cache.keys.fill_(garbage)
        cache.values.fill_(garbage)
        prompt_mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
        network(draw(network, 2, 5), prompt_mask, prompt_mask.cumsum(-1) - 1, past_key_values=cache)
        assert (cache.keys[:, ~cache.valid] == garbage).all()
        logits, _ = network(draw(network, 2, 3, 1), masks[form], span(6, 9, 2), past_key_values=cache)
        results.append(logits[real(draw(network, 2, 3), masks[form])])
    assert results[0].isfinite().all()
    assert torch.equal(results[0], results[1])


def test_written_slots_are_seen(network: DreamEdge) -> None:
    """The garbage of the test above does change the logits in a slot that counts as written."""
    results = []
    for garbage in (0.0, 1e4):
        cache = StaticKVCache(network.config, 1, SLOTS)
        network(draw(network, 1, 5), None, span(0, 5), past_key_values=cache)
        cache.values[:, :, 2] = garbage
        results.append(network(draw(network, 1, 1, 1), None, span(5, 6), past_key_values=cache)[0])
    assert not torch.allclose(results[0], results[1], atol=1e-2)


def contents(cache: StaticKVCache) -> list[Tensor]:
    return [cache.keys.clone(), cache.values.clone(), cache.valid.clone()]


@pytest.mark.parametrize(
    ("position_ids", "mask", "words"),
    [
        ([[0, SLOTS]], None, f"positions 0..{SLOTS} do not fit a cache of {SLOTS}"),
        ([[0, 10**12]], None, "do not fit"),
        ([[-1, 0]], None, "positions -1..0 do not fit"),
        ([[-1, 0]], [[1, 1]], "do not fit"),
        ([[3, 3]], None, "stands twice"),
        ([[5, 5]], [[1, 1]], "stands twice"),
    ],
)
def test_refused_positions(
    network: DreamEdge, position_ids: list[list[int]], mask: list[list[int]] | None, words: str
) -> None:
    """Positions outside the cache or repeated are refused, and the cache stays as it was."""
    cache = StaticKVCache(network.config, 1, SLOTS)
    network(draw(network, 1, 4), None, span(0, 4), past_key_values=cache)
    before = contents(cache)
    attention_mask = None if mask is None else torch.tensor(mask)
    with pytest.raises(ValueError, match=words):
        network(draw(network, 1, 2), attention_mask, torch.tensor(position_ids), past_key_values=cache)
    assert all(map(torch.equal, contents(cache), before))


def test_the_same_position_in_two_rows_is_no_repeat(network: DreamEdge, same_logits: SameLogits) -> None:
    """Also where row * slots + position would be ambiguous with a position out of range."""
    run(network, same_logits, [(draw(network, 2, 2), torch.tensor([[SLOTS - 1, 0], [0, SLOTS - 1]]), None)])
    cache = StaticKVCache(network.config, 2, SLOTS)
    with pytest.raises(ValueError, match="do not fit"):
        network(draw(network, 2, 1), None, torch.tensor([[SLOTS], [0]]), past_key_values=cache)


def test_a_full_cache(network: DreamEdge, same_logits: SameLogits) -> None:
    """All slots can be used, and used again; one more is refused."""
    cache, _ = run(network, same_logits, [(draw(network, 1, SLOTS), span(0, SLOTS), None)])
    run(network, same_logits, [(draw(network, 1, SLOTS, seed), span(0, SLOTS), None) for seed in range(2)])
    with pytest.raises(ValueError, match="do not fit"):
        network(draw(network, 1, 1), None, span(SLOTS, SLOTS + 1), past_key_values=cache)


def test_refused_calls(network: DreamEdge) -> None:
    cache = StaticKVCache(network.config, 2, SLOTS)
    before = contents(cache)
    input_ids = draw(network, 2, 3)
    with pytest.raises(ValueError, match="give them along with past_key_values"):
        network(input_ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"position_ids must be \[2, 3\], got \[1, 3\]"):
        network(input_ids, None, span(0, 3, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="the cache holds 2 rows, the call has 1"):
        network(input_ids[:1], None, span(0, 3, 1), past_key_values=cache)
    assert all(map(torch.equal, contents(cache), before))


BAD_MASKS = {
    "2-D too narrow": torch.ones(2, 2),
    "2-D too wide": torch.ones(2, 4),
    "2-D of other rows": torch.ones(1, 3),
    "3-D": torch.ones(2, 3, SLOTS, dtype=torch.bool),
    "4-D of heads": torch.ones(2, 2, 3, SLOTS, dtype=torch.bool),
    "4-D of other queries": torch.ones(2, 1, 2, SLOTS, dtype=torch.bool),
    "4-D beyond the cache": torch.ones(2, 1, 3, SLOTS + 1, dtype=torch.bool),
    "4-D of other rows": torch.ones(3, 1, 3, SLOTS, dtype=torch.bool),
    "4-D int": torch.ones(2, 1, 3, SLOTS, dtype=torch.int64),
}


@pytest.mark.parametrize("mask", list(BAD_MASKS.values()), ids=list(BAD_MASKS))
def test_refused_masks(random_network: RandomNetwork, mask: Tensor) -> None:
    """A mask of the wrong shape or type is refused, and the cache stays as it was."""
    network = random_network(SMALL, 0)
    cache = StaticKVCache(network.config, 2, SLOTS)
    network(draw(network, 2, 2), None, span(0, 2, 2), past_key_values=cache)
    before = contents(cache)
    with pytest.raises(ValueError, match="attention_mask must be"):
        network(draw(network, 2, 3), mask, span(2, 5, 2), past_key_values=cache)
    assert all(map(torch.equal, contents(cache), before))


def test_the_cache_never_grows(network: DreamEdge) -> None:
    """The same buffers, of the same shape, whatever comes."""
    config = network.config
    cache = StaticKVCache(config, 1, SLOTS)
    buffers = [cache.keys, cache.values, cache.valid]
    pointers = [buffer.data_ptr() for buffer in buffers]
    shape = (config.num_hidden_layers, 1, SLOTS, config.num_key_value_heads, config.head_dim)
    for start in (0, 5, 10, 11, 3, 0):
        network(draw(network, 1, 5), None, span(start, start + 5), past_key_values=cache)
        assert [cache.keys.data_ptr(), cache.values.data_ptr(), cache.valid.data_ptr()] == pointers
        assert cache.keys.shape == cache.values.shape == shape
        assert cache.valid.shape == (1, SLOTS)
        assert cache.max_seq_len == SLOTS


# How far logits of up to 15 may be from those of float32: about 8 units in the last place of such a logit, for the
# half types. The float64 model still has float32 angles, so it differs by no more than float32's own rounding.
DTYPES = {torch.float64: 1e-4, torch.float32: 0.0, torch.bfloat16: 0.5, torch.float16: 0.0625}


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_dtypes(golden: tuple[Path, DreamEdge], dtype: torch.dtype) -> None:
    """On the golden checkpoints only: a real one may have no room for itself in float64."""
    folder, wide = golden
    network, _, config = load_hf_model(folder, dtype=dtype)
    input_ids, block = draw(wide, 2, 8), draw(wide, 2, 3, 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])
    position_ids = mask.cumsum(-1) - 1
    seen = (torch.arange(9) < 7).expand(1, 1, 3, 9)
    results = []
    for net in (wide, network):
        cache = StaticKVCache(config, 2, SLOTS, dtype=net.lm_head.weight.dtype)
        first, _ = net(input_ids, mask, position_ids, past_key_values=cache)
        logits = [first[mask.bool()]]
        for later in (None, seen, torch.where(seen, 0.0, -torch.inf), torch.where(seen, 0.0, -1e9)):
            logits.append(net(block, later, span(5, 8, 2), past_key_values=cache)[0].flatten(0, 1))
        assert cache.keys.dtype == net.lm_head.weight.dtype
        results.append(torch.cat(logits))
    assert results[1].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert results[1].isfinite().all()
    torch.testing.assert_close(results[1].float(), results[0], rtol=0, atol=DTYPES[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_cache_narrower_than_the_network(golden: tuple[Path, DreamEdge], dtype: torch.dtype) -> None:
    _, network = golden
    logits = []
    for kept in (torch.float32, dtype):
        cache = StaticKVCache(network.config, 1, SLOTS, dtype=kept)
        network(draw(network, 1, 8), None, span(0, 8), past_key_values=cache)
        logits.append(network(draw(network, 1, 4, 1), None, span(6, 10), past_key_values=cache)[0])
        assert cache.keys.dtype == cache.values.dtype == kept
    assert logits[1].dtype == torch.float32
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=DTYPES[dtype])


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, list[tuple[int, str]], int]:
    """Rows of the batch, then of each call its length and kind of mask; a seed for all the rest."""
    kinds = st.sampled_from(["none", "2-D", "bool", "additive"])
    calls = st.lists(st.tuples(st.integers(1, 6), kinds), min_size=2, max_size=5)
    return draw(st.integers(1, 3)), draw(calls), draw(st.integers(0, 2**32))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(shape=shapes())
def test_any_sequence_of_calls(
    network: DreamEdge, same_logits: SameLogits, shape: tuple[int, list[tuple[int, str]], int]
) -> None:
    """Random tokens at random positions, new or written before, under random masks, row by row."""
    B, plan, seed = shape
    random = torch.Generator().manual_seed(seed)
    calls: list[Call] = []
    for T, kind in plan:
        position_ids = torch.stack([torch.randperm(SLOTS, generator=random)[:T] for _ in range(B)])
        S = int(torch.randint(1, SLOTS + 1, (), generator=random))
        seen = torch.rand(B, 1, T, S, generator=random) < 0.6
        mask: Tensor | None = None
        if kind == "2-D":
            mask = torch.randint(2, (B, T), generator=random)
        elif kind == "bool":
            mask = seen
        elif kind == "additive":
            mask = torch.randn(B, 1, T, S, generator=random).masked_fill(~seen, -torch.inf)
        calls.append((draw(network, B, T, int(torch.randint(2**31, (), generator=random))), position_ids, mask))
    run(network, same_logits, calls)
