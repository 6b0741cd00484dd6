"""Generation against the histories of the public reference, in eager and from a `.pte`; and what else it promises."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from model import DreamEdge, load_hf_model
from runtime import Generation, Network, OptionError, Program, generate
from runtime.network import Asked
from runtime.sample import sample
from tests.checkpoints import GOLDEN, GOLDEN_NAMES, ROOT, Build


@cache
def golden_cases(name: str) -> dict[str, dict[str, Any]]:
    return json.loads((GOLDEN / name / "generation.json").read_text(encoding="utf-8"))["cases"]


@cache
def golden_tensors(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / name / "generation.safetensors")


@cache
def sampler() -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = GOLDEN / "sampler"
    return json.loads((folder / "sampler.json").read_text(encoding="utf-8")), load_file(folder / "sampler.safetensors")


@cache
def eager(name: str) -> DreamEdge:
    return load_hf_model(GOLDEN / name, dtype=torch.float32)[0]


ALL_CASES = [(name, case) for name in GOLDEN_NAMES for case in golden_cases(name)]


@pytest.fixture(params=["eager", "pte"])
def network_of(request: pytest.FixtureRequest, build: Build) -> Callable[[str], Network]:
    if request.param == "eager":
        return eager
    return lambda name: Program.open(build(name, "fp32_xnnpack"))


def options_of(facts: dict[str, Any]) -> dict[str, Any]:
    names = ("steps", "max_new_tokens", "eps", "block_length", "cache", "threshold", "temperature", "top_p", "top_k")
    options = {name: facts[name] for name in names if facts.get(name) is not None}
    if facts["alg"] != "confidence_threshold":
        options["alg"] = facts["alg"]
    return options | {"alg_temp": facts.get("alg_temp"), "seed": facts.get("seed")}


def prompts_of(name: str, case: str) -> list[Tensor]:
    tensors = golden_tensors(name)
    prompts = tensors[f"{case}/prompt"]
    mask = tensors.get(f"{case}/attention_mask", torch.ones_like(prompts))[:, : prompts.shape[1]]
    return [row[seen.bool()] for row, seen in zip(prompts, mask, strict=True)]


def test_every_golden_case_is_here() -> None:
    assert len(ALL_CASES) == 97
    assert {facts["kind"] for name in GOLDEN_NAMES for facts in golden_cases(name).values()} == {"plain", "block"}


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_histories(network_of: Callable[[str], Network], name: str) -> None:
    """Token for token and step for step; the one case that reads a row of padding is the next test's."""
    network = network_of(name)
    for case, facts in golden_cases(name).items():
        expected = golden_tensors(name)[f"{case}/history"]
        written = generate(network, prompts_of(name, case), **options_of(facts))
        if facts.get("reads_pad_row"):
            # Its other row has no padding, and is right.
            assert torch.equal(written.history[:, 1], expected[:, 1]), case
            continue
        assert torch.equal(written.history, expected), case
        assert torch.equal(written.tokens, expected[-1]), case
        # One call a row and step, but for steps that write nothing; the reference makes those calls too.
        idle = int((expected[1:] == expected[:-1]).all(-1).sum())
        calls = facts["forward_calls"] * expected.shape[1]
        assert calls - idle <= written.forward_calls <= calls, case


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_each_row_of_a_batch_is_answered_as_if_alone(network_of: Callable[[str], Network], name: str) -> None:
    """Also where the reference reads the logits of a padding row, and its answer depends on the padding."""
    network, case = network_of(name), "entropy_s5_n8_rightpad_b2"
    options = options_of(golden_cases(name)[case])
    prompts = prompts_of(name, case)
    assert len({len(prompt) for prompt in prompts}) == 2
    for cache_mode in (None, "prefix", "dual"):
        together = generate(network, prompts, cache=cache_mode, **options)
        for row, prompt in enumerate(prompts):
            alone = generate(network, prompt, cache=cache_mode, **options)
            assert torch.equal(together.answers[row], alone.answers[0])
            assert torch.equal(together.history[:, row, -alone.tokens.shape[1] :], alone.history[:, 0])


@pytest.mark.parametrize("name", GOLDEN_NAMES)
@pytest.mark.parametrize(
    "rule", [{}, {"threshold": 0.3}, {"block_length": 4, "threshold": 0.3}, {"gamma": 1.0}], ids=str
)
def test_rows_that_are_computed_together_are_answered_as_if_alone(name: str, rule: dict[str, Any]) -> None:
    network, n_calls = eager(name), list[int]()
    prompts = [torch.arange(5, 5 + length) for length in (3, 7, 4)]

    def together(asked: list[Asked]) -> list[Tensor]:
        n_calls.append(len(asked))
        return [network.start()(*arguments) for arguments in asked]

    rule = rule | {"max_new_tokens": 8, "alg": "maskgit_plus"}
    both = generate(network, prompts, together=together, **rule)
    alone = [generate(network, prompt, **rule) for prompt in prompts]
    assert max(n_calls) == 3
    assert sum(n_calls) == both.forward_calls == sum(one.forward_calls for one in alone)
    for i, one in enumerate(alone):
        assert torch.equal(both.answers[i], one.answers[0])
        length = len(one.history)
        assert torch.equal(both.history[:length, i, -one.tokens.shape[1] :], one.history[:, 0])


def test_rows_that_are_computed_together_keep_no_cache() -> None:
    with pytest.raises(OptionError, match="together are whole, and keep none"):
        generate(eager("gqa2"), PROMPT, max_new_tokens=4, cache="dual", together=lambda _: [])


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_cached_calls_see_the_golden_logits(network_of: Callable[[str], Network], name: str) -> None:
    """The reference's own raw logits of each call, where they were kept."""
    network = network_of(name)
    traced = [case for case, facts in golden_cases(name).items() if "raw_logits" in facts]
    assert len(traced) == 4 * (name == "gqa2")
    for case in traced:
        facts = golden_cases(name)[case]
        calls = facts["calls"]
        seen = []

        def look(step: int, tokens: Tensor, positions: Tensor, logits: Tensor) -> None:
            _, _, first, _ = calls[step]  # noqa: B023
            expected = golden_tensors(name)[f"{case}/raw_logits_{step}"][0]  # noqa: B023
            torch.testing.assert_close(logits, expected[positions - 1 - first], rtol=0, atol=1e-4)
            seen.append(step)  # noqa: B023

        generate(network, prompts_of(name, case), on_logits=look, **options_of(facts))
        assert seen == list(range(facts["forward_calls"]))


class Table:
    """Logits from a table in place of a network: step i gets entry i of `raw_logits` [N, B, L, V]."""

    max_seq_len = max_rows = 64
    pad_id, eos_ids, block_length = 0, (1,), 4

    def __init__(self, raw_logits: Tensor, prompts: Tensor, mask_id: int) -> None:
        self.raw_logits, self.prompts, self.mask_id, self.step = raw_logits, prompts, mask_id, 0
        self.vocab_size = raw_logits.shape[-1]

    def start(self) -> Callable[[Tensor, int, int, Tensor], Tensor]:
        self.step = 0
        return self.forward

    def forward(self, tokens: Tensor, start_pos: int, kv_len: int, rows: Tensor) -> Tensor:
        P = self.prompts.shape[1]
        (row,) = (self.prompts == tokens[:P]).all(-1).nonzero()[:, 0].tolist()
        return self.raw_logits[min(self.step, len(self.raw_logits) - 1), row, rows][None]

    def on_step(self, step: int, tokens: Tensor) -> None:
        self.step = step + 1


def table_of(case: str) -> tuple[Table, dict[str, Any], Tensor]:
    listing, tensors = sampler()
    facts, prompts = listing["cases"][case], tensors[f"{case}/prompt"]
    assert len(prompts.unique(dim=0)) == len(prompts)
    table = Table(tensors[f"{case}/raw_logits"], prompts, listing["mask_token_id"])
    return table, options_of({**facts, "max_new_tokens": facts["new"]}), tensors[f"{case}/history"]


@pytest.mark.parametrize("case", [case for case in sampler()[0]["cases"] if "guesses_mask" not in case])
def test_sampler(case: str) -> None:
    table, options, expected = table_of(case)
    written = generate(table, table.prompts, on_step=table.on_step, **options)
    assert torch.equal(written.history, expected)


@pytest.mark.parametrize("case", [case for case in sampler()[0]["cases"] if "guesses_mask" in case])
def test_the_mask_is_never_written(case: str) -> None:
    """Where the reference writes a mask (and leaves it), the best other token is written. On purpose."""
    table, options, expected = table_of(case)
    assert (expected[-1] == table.mask_id).any()
    written = generate(table, table.prompts, on_step=table.on_step, **options)
    assert not (written.tokens == table.mask_id).any()
    guessed = sampler()[0]["cases"][case]["guesses_mask_at"]
    logits = table.raw_logits.clone()
    logits[..., table.mask_id] = -torch.inf
    step = int((written.history[:, 0, guessed] != table.mask_id).nonzero()[0]) - 1
    assert written.tokens[0, guessed] == logits[min(step, len(logits) - 1), 0, guessed - 1].argmax()


def test_schedules() -> None:
    """How many tokens each step writes: all 333 schedules of the reference."""
    listing, _ = sampler()
    assert len(listing["schedule"]) == 333
    for entry in listing["schedule"]:
        masks, steps = entry["masks"], entry["steps"]
        table = Table(torch.randn(1, 1, masks + 1, 8, generator=torch.Generator().manual_seed(0)), torch.ones(1, 1), 7)
        table.max_seq_len = table.max_rows = masks + 1
        written = generate(table, [1], max_new_tokens=masks, steps=steps, eps=entry["eps"], alg="maskgit_plus")
        left = (written.history[:, 0] == 7).sum(-1)
        assert (left[:-1] - left[1:]).tolist() == entry["counts"], entry


@pytest.fixture(scope="module")
def program(build: Build) -> Program:
    return Program.open(build("gqa2", "fp32_xnnpack"))


PROMPT = [11, 205, 7, 90, 150, 33]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_run_always_ends_and_fills_every_mask(data: st.DataObject) -> None:
    """Whatever the options, and however a hook changes the tokens."""
    network = eager("gqa2")
    draw = data.draw
    n_new = draw(st.integers(0, 12))
    block_length = draw(st.none() | st.integers(1, 13))
    steps = draw(st.none() | st.integers(14, 20))
    alg = draw(st.sampled_from(["origin", "maskgit_plus", "topk_margin", "entropy"]))
    threshold = None if alg == "origin" else draw(st.none() | st.sampled_from([0.0, 0.02, 1.0]))
    prompts = draw(st.lists(st.lists(st.integers(0, 319), min_size=1, max_size=5), min_size=1, max_size=3))
    calls = []
    steps = None if not n_new or any(network.mask_id in prompt for prompt in prompts) else steps
    written = generate(
        network,
        prompts,
        max_new_tokens=n_new,
        steps=steps if steps is not None else 30,
        alg=alg,
        temperature=draw(st.sampled_from([0.0, 1.0])),
        top_p=draw(st.none() | st.sampled_from([1e-6, 0.5, 1.0])),
        top_k=draw(st.none() | st.sampled_from([1, 5, 10_000])),
        alg_temp=None if threshold is not None or alg == "origin" else draw(st.none() | st.sampled_from([1e-5, 1.0])),
        block_length=block_length,
        cache=draw(st.sampled_from([None, "prefix", "dual"])),
        threshold=threshold,
        stop_at_eos=draw(st.booleans()),
        seed=1,
        on_step=lambda step, tokens: calls.append(step),
    )
    for row, prompt in enumerate(prompts):
        kept = written.tokens[row, written.tokens.shape[1] - n_new - len(prompt) :]
        assert not (kept == network.mask_id).any()
        given_ids = torch.tensor(prompt)
        assert torch.equal(kept[: len(prompt)][given_ids != network.mask_id], given_ids[given_ids != network.mask_id])
    assert len(written.history) <= len(calls) + 1


def test_a_row_with_masks_does_not_move_its_neighbours() -> None:
    """Blocks, steps and pace are a row's own: masks inside other prompts, or none, change nothing."""
    network = eager("gqa2")
    mask = network.mask_id
    rows = [PROMPT, [mask, *PROMPT, mask], [mask] * 3, [*PROMPT[:5], mask, mask, 4, mask], [49]]
    options: list[dict[str, Any]] = [{}, {"threshold": 0.02}, {"block_length": 1, "threshold": 0.0}]
    options += [{"block_length": 4, "cache": cache_mode} for cache_mode in (None, "prefix", "dual")]
    options += [{"block_length": 4, "cache": "dual", "threshold": 0.05}, {"steps": 9, "stop_at_eos": True}]
    for chosen in options:
        together = generate(network, rows, max_new_tokens=8, **chosen)
        alone = [generate(network, row, max_new_tokens=8, **chosen) for row in rows]
        for row, one in enumerate(alone):
            assert torch.equal(together.tokens[row, -one.tokens.shape[1] :], one.tokens[0]), (chosen, row)
        assert together.forward_calls == sum(one.forward_calls for one in alone)


def test_a_hook_may_ban_a_token_and_must_return_what_it_got(program: Program) -> None:
    banned = generate(program, PROMPT, max_new_tokens=8).answers[0].tolist()

    def ban(step: int, tokens: Tensor, positions: Tensor, logits: Tensor, value: float) -> Tensor:
        logits = logits.clone()
        logits[:, banned] = value
        return logits

    for alg in ("entropy", "maskgit_plus", "topk_margin"):
        histories = [
            generate(program, PROMPT, max_new_tokens=8, alg=alg, on_logits=partial(ban, value=value)).history
            for value in (-torch.inf, -1e30)
        ]
        assert torch.equal(*histories)
        assert not set(histories[0][-1, 0, len(PROMPT) :].tolist()) & set(banned)
    wrong: list[Callable[..., Any]] = [lambda s, t, p, x: x[:, :3], lambda s, t, p, x: x[:1, :1], lambda *_: "x"]
    for hook in wrong:
        with pytest.raises(OptionError, match="on_logits must return"):
            generate(program, PROMPT, max_new_tokens=8, on_logits=hook)
    with pytest.raises(OptionError, match="on_step must return"):
        generate(program, PROMPT, max_new_tokens=8, on_step=lambda s, t: t[:, :2])
    with pytest.raises(OptionError, match="9999 is outside"):
        generate(program, PROMPT, max_new_tokens=8, on_step=lambda s, t: t * 0 + 9999)


def test_a_hook_may_change_tokens_and_put_masks_back(program: Program) -> None:
    def remask(step: int, tokens: Tensor) -> Tensor:
        tokens = tokens.clone()
        tokens[:, len(PROMPT)] = program.mask_id
        return tokens

    for network in (program, eager("gqa2")):
        for options in (
            {},
            {"threshold": 0.5},
            {"cache": "dual", "block_length": 4},
            {"threshold": 0.5, "cache": "dual"},
        ):
            written = generate(network, PROMPT, max_new_tokens=8, on_step=remask, **options)
            assert (written.history[1:, 0, len(PROMPT)] == program.mask_id).all()
            assert not (written.tokens[0, len(PROMPT) + 1 :] == program.mask_id).any()
        forced = generate(network, PROMPT, max_new_tokens=8, on_logits=lambda s, t, p, x: torch.eye(x.shape[-1])[p])
        assert forced.answers[0].tolist() == list(range(len(PROMPT), len(PROMPT) + 8))


def test_logits_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        generate(eager("gqa2"), PROMPT, max_new_tokens=4, on_logits=lambda s, t, p, x: x * float("nan"))


def test_stop_at_eos(program: Program) -> None:
    """What is after it is cut, and blocks after it are not computed."""
    eos = program.eos_ids[0]

    def put_eos(step: int, tokens: Tensor, positions: Tensor, logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[positions == len(PROMPT) + 5, eos] = 100.0
        return logits

    options: dict[str, Any] = {"max_new_tokens": 16, "cache": "dual", "block_length": 4, "on_logits": put_eos}
    whole = generate(program, PROMPT, **options)
    cut = generate(program, PROMPT, stop_at_eos=True, **options)
    assert cut.answers[0].tolist() == whole.answers[0][:5].tolist()
    assert (cut.tokens[0, len(PROMPT) + 5 :] == eos).all()
    assert len(cut.history) < len(whole.history)
    assert cut.forward_calls < whole.forward_calls
    assert eos in whole.answers[0].tolist()


@pytest.mark.parametrize("end", [7, 9, 300])
def test_generation_stops_at_any_end_token(end: int) -> None:
    network = copy(eager("gqa2"))
    network.config = replace(network.config, eos_token_id=(300, 7, 9))

    def put_end(step: int, tokens: Tensor, positions: Tensor, logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[:, [7, 9, 300]] = -100.0
        logits[positions == len(PROMPT) + 5, end] = 100.0
        return logits

    cut = generate(network, PROMPT, max_new_tokens=16, block_length=4, stop_at_eos=True, on_logits=put_end)
    assert len(cut.answers[0]) == 5
    assert (cut.tokens[0, len(PROMPT) + 5 :] == end).all()
    assert len(cut.history) < 16


def test_a_block_at_the_left_edge_is_no_call_of_its_own(program: Program) -> None:
    """Steps that write nothing make no call, with a cache as without one."""
    options: dict[str, Any] = {"max_new_tokens": 4, "block_length": 4, "steps": 60}
    prompt = [program.mask_id, *PROMPT, program.mask_id]
    calls = [generate(program, prompt, cache=cache_mode, **options).forward_calls for cache_mode in (None, "dual")]
    assert calls[0] == calls[1] < 10


def test_sampling_follows_the_seed(program: Program) -> None:
    def written(seed: int | None, **options: Any) -> list[int]:
        return generate(program, PROMPT, max_new_tokens=12, seed=seed, **options).answers[0].tolist()

    for options in ({"temperature": 1.0}, {"alg": "origin"}, {"alg_temp": 0.5}):
        assert written(3, **options) == written(3, **options)
        assert written(3, **options) != written(4, **options)
        torch.manual_seed(5)
        drawn = written(None, **options)
        torch.manual_seed(5)
        assert written(None, **options) == drawn


def test_temperature_samples_from_the_softmax() -> None:
    """4,096 draws over 8 tokens: frequencies within five standard deviations."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 1.5, -2.0, 3.0])
    n, mask_id = 4096, 7
    table = Table(logits.expand(1, 1, n + 1, 8), torch.ones(1, 1), mask_id)
    table.max_seq_len = table.max_rows = n + 1
    written = generate(table, [1], max_new_tokens=n, steps=1, temperature=0.5, seed=0).answers[0]
    probs = (logits[:7] / 0.5).softmax(-1)
    found = torch.bincount(written, minlength=8)[:7] / n
    assert ((found - probs).abs() < 5 * (probs * (1 - probs) / n).sqrt()).all()
    narrow = generate(table, [1], max_new_tokens=n, steps=1, temperature=1.0, top_k=2, seed=0).answers[0]
    assert set(narrow.tolist()) == {2, 5}


def flat_table(n: int, vocab: int = 8) -> Table:
    """All logits are equal, at all of n positions after a prompt of one token."""
    table = Table(torch.zeros(1, 1, n + 1, vocab), torch.ones(1, 1), vocab - 1)
    table.max_seq_len = table.max_rows = n + 1
    return table


@pytest.mark.parametrize("alg", ["maskgit_plus", "topk_margin", "entropy"])
def test_equal_positions_are_written_from_the_left_and_equal_tokens_by_their_id(alg: str) -> None:
    """torch's topk and sort promise no order of equal values, and have none: not of 5, not of 17, not of 300."""
    for n in (5, 17, 40, 300):
        table = flat_table(n)
        written = generate(table, [1], max_new_tokens=n, steps=max(1, n // 4), alg=alg)
        left = (written.history[:, 0] == table.mask_id).int()
        assert (left.diff(dim=1) >= 0).all(), "a mask has a written position on its right"
        assert written.answers[0].tolist() == [0] * n
    table.mask_id = 0  # the best one, if it were one to write
    assert set(generate(table, [1], max_new_tokens=40, steps=4, alg=alg).answers[0].tolist()) == {1}


def test_equal_tokens_at_a_cut_are_kept_by_their_id() -> None:
    rows = 3
    logits = torch.zeros(rows, 40)
    logits[1, [30, 20]] = 1.0  # two better ones, then the ties
    logits[2] = torch.arange(40.0)  # no ties
    for cut, kept in (({"top_k": 5}, [5, 5, 5]), ({"top_p": 0.14}, [6, 3, 1]), ({"top_p": 1e-6}, [1, 1, 1])):
        cuts: dict[str, Any] = {"top_k": None, "top_p": None} | cut
        found: list[set[int]] = [set() for _ in range(rows)]
        for seed in range(300):
            generator = torch.Generator().manual_seed(seed)
            tokens, _ = sample(logits, 39, "entropy", 1.0, generator=generator, **cuts)
            for row, token in enumerate(tokens.tolist()):
                found[row].add(token)
        orders = [list(range(40)), [20, 30, *range(40)], [38, 37, 36, 35, 34]]
        assert found == [set(order[:n]) for order, n in zip(orders, kept, strict=True)], cut
        best, confidence = sample(logits, 39, "entropy", 0.0, generator=None, **cuts)
        assert best.tolist() == [0, 20, 38]
        assert confidence.isfinite().all(), "the best token was cut off"


def test_the_first_of_equal_tokens_is_taken_in_a_large_vocabulary() -> None:
    logits = torch.full((2, 152_064), -1.0)
    logits[0, [151_000, 70_000, 3_001]] = logits[1, [9, 8]] = 1.0
    tokens, _ = sample(logits, 0, "maskgit_plus", 0.0, None, None, None)
    assert tokens.tolist() == [3_001, 8]


def test_a_threshold_is_held_against_the_networks_own_probability() -> None:
    """Before temperature and cuts: they make any token as sure as one likes."""
    table = flat_table(8)
    table.raw_logits[..., 2] = 2.0  # 2 has exp(2) / (exp(2) + 6) = 0.55 of what may be written
    options: list[dict[str, Any]] = [{"temperature": 0.1}, {"top_k": 1}, {"top_p": 0.1}]
    options += [{"temperature": 0.1, "top_k": 1}, {"temperature": 3.0, "top_k": 1}]
    for chosen in options:
        sure = generate(table, [1], max_new_tokens=8, threshold=0.5, seed=0, **chosen)
        unsure = generate(table, [1], max_new_tokens=8, threshold=0.6, seed=0, **chosen)
        assert sure.answers[0].tolist() == unsure.answers[0].tolist() == [2] * 8
        assert (sure.forward_calls, unsure.forward_calls) == (1, 8), chosen
    # What was drawn counts, not what is best: at 3.0 most tokens are drawn now and then.
    assert generate(table, [1], max_new_tokens=8, threshold=0.5, temperature=3.0, seed=0).forward_calls > 1


def test_positions_computed(program: Program) -> None:
    """What each cache computes: all; from the block on; the block."""
    P, n, block = len(PROMPT), 16, 4
    L = P + n

    def count(cache_mode: Any) -> Generation:
        return generate(program, PROMPT, max_new_tokens=n, block_length=block, cache=cache_mode)

    # Of a block's steps the first writes one token, the second none (int(3 * (1 - s/t)) = 0), the last two.
    suffixes = [L - (P + i * block) for i in range(n // block)]
    assert count(None).positions == sum(3 * L for _ in suffixes)
    assert count("prefix").positions == sum(L + 2 * suffix for suffix in suffixes)
    assert count("dual").positions == sum(L + 2 * block for _ in suffixes)


def test_steps_that_do_not_divide(program: Program) -> None:
    """The reference refuses both; here the first blocks get the extra steps, and the last block may be shorter."""
    written = generate(program, PROMPT, max_new_tokens=10, steps=8, block_length=4, cache="dual")
    left = (written.history[:, 0] == program.mask_id).sum(-1)
    assert left.tolist()[0] == 10
    assert left[[3, 6, 8]].tolist() == [6, 2, 0]


def test_one_step_a_block(program: Program) -> None:
    """Steps equal to blocks: the call over everything writes the whole block."""
    written = generate(program, PROMPT, max_new_tokens=12, steps=3, block_length=4, cache="dual")
    assert (written.history[:, 0] == program.mask_id).sum(-1).tolist() == [12, 8, 4, 0]
    assert written.forward_calls == 3


def test_infilling_in_blocks(program: Program) -> None:
    """Masks of the prompt are a first block, then comes the answer."""
    prompt = list(PROMPT)
    prompt[2] = prompt[4] = program.mask_id
    for cache_mode in (None, "prefix", "dual"):
        written = generate(program, prompt, max_new_tokens=8, block_length=4, cache=cache_mode)
        states = written.history[:, 0] == program.mask_id
        assert not states[-1].any()
        inside = states[:, : len(PROMPT)].any(-1)
        assert (states[inside][:, len(PROMPT) :]).all()


def test_more_rows_than_a_call_may_ask_for() -> None:
    class Narrow(DreamEdge):
        max_rows = 3

    whole = eager("gqa2")
    narrow = Narrow(whole.config)
    narrow.load_state_dict(whole.state_dict())
    options: dict[str, Any] = {"max_new_tokens": 8, "steps": 4}
    expected, written = generate(whole, PROMPT, **options), generate(narrow, PROMPT, **options)
    assert torch.equal(written.history, expected.history)
    assert written.forward_calls > expected.forward_calls


REFUSED = [
    ({"prompt_ids": []}, "empty"),
    ({"prompt_ids": [[1], []]}, "empty"),
    ({"prompt_ids": torch.zeros(1, 1, 1, dtype=torch.int64)}, r"\[P\] or \[B, P\]"),
    ({"prompt_ids": torch.zeros(3)}, "integers"),
    ({"prompt_ids": "text"}, "token ids"),
    ({"prompt_ids": [1, 320]}, "320 is outside the vocabulary, 0..319"),
    ({"prompt_ids": [-1]}, "-1 is outside"),
    ({"prompt_ids": [1] * 300}, "the prompt has 300 tokens, max_seq_len is 256"),
    ({"max_new_tokens": 251}, "at most 250 new tokens fit"),
    ({"max_new_tokens": -1}, "max_new_tokens -1"),
    ({"steps": 0}, "steps 0"),
    ({"steps": 2, "block_length": 4}, "steps 2: must be at least 1 for each of the 3 blocks"),
    ({"alg": "best"}, "there are origin, maskgit_plus, topk_margin, entropy"),
    ({"cache": "both"}, "there are prefix, dual, "),
    ({"threshold": 1.5}, "threshold 1.5"),
    ({"threshold": float("nan")}, "threshold nan"),
    ({"top_p": 0.0}, "top_p 0.0"),
    ({"top_k": 0}, "top_k 0"),
    ({"temperature": -0.1}, "temperature -0.1"),
    ({"temperature": float("inf")}, "temperature inf"),
    ({"alg_temp": -1.0}, "alg_temp -1.0"),
    ({"eps": 0.0}, "eps 0.0"),
    ({"block_length": 0}, "block_length 0"),
    ({"alg": "origin", "threshold": 0.5}, "origin"),
    ({"alg": "origin", "alg_temp": 0.5}, "origin"),
    ({"threshold": 0.5, "alg_temp": 0.5}, "give one of them"),
    ({"max_new_tokens": 2.5}, "max_new_tokens 2.5: must be a whole number"),
    ({"max_new_tokens": True}, "max_new_tokens True"),
    ({"steps": "5"}, "steps '5'"),
    ({"steps": 10**9}, "at most 100000"),
    ({"steps": 10**30}, "must be a whole number"),
    ({"top_k": float("nan")}, "top_k nan"),
    ({"seed": "5"}, "seed '5'"),
    ({"seed": 10**30}, "seed 1"),
    ({"temperature": None}, "temperature None"),
    ({"temperature": 1e-40}, "below 1e-6"),
    ({"top_p": "0.5"}, "top_p '0.5': must be a number"),
    ({"threshold": True}, "threshold True"),
    ({"prompt_ids": {"a": 1}}, "token ids"),
    ({"prompt_ids": torch.zeros(3, dtype=torch.complex64)}, "integers"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_refused(program: Program, options: dict[str, Any], said: str) -> None:
    arguments: dict[str, Any] = {"prompt_ids": PROMPT, "max_new_tokens": 12} | options
    with pytest.raises(OptionError, match=said) as raised:
        generate(program, arguments.pop("prompt_ids"), **arguments)
    assert "\n" not in str(raised.value)


def test_runtime_needs_torch_and_executorch_only() -> None:
    others = {"pipeline", "recipes", "model", "hydra", "rich", "safetensors", "tokenizers", "torchao"}
    touched = "runtime.Program, runtime.generate"  # they are imported when they are asked for
    check = f"import sys, runtime; {touched}; print({others} & {{name.split('.')[0] for name in sys.modules}})"
    found = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "set()"
