"""Blocks in parallel against one block-causal forward of eager, token for token."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from model import DreamEdge
from runtime import OptionError, Program, generate
from tests.checkpoints import GOLDEN_NAMES, Build
from tests.test_generation import PROMPT, eager


def block_causal(model: DreamEdge, tokens: Tensor, P: int, size: int) -> Tensor:
    """Logits [T, V] of one forward in which each block sees itself, the blocks before it, and the prompt."""
    block_T = torch.cat([torch.zeros(P, dtype=torch.int64), 1 + torch.arange(len(tokens) - P) // size])
    sees_TT = block_T[:, None] >= block_T[None, :]
    with torch.no_grad():
        logits, _ = model(tokens[None], sees_TT[None, None])
    return logits[0]


def written_plainly(
    model: DreamEdge, prompt: list[int], n_new: int, size: int, threshold: float
) -> tuple[list[int], list[list[int]]]:
    """(tokens, how many blocks were open, full and kept in each round): D2F's loop with nothing kept."""
    P, mask = len(prompt), model.mask_id
    answer = [mask] * n_new
    starts = list(range(0, n_new, size))
    n_open, rounds = 1, []
    while mask in answer:
        seen = min(n_open * size, n_new)
        logits = block_causal(model, torch.tensor(prompt + answer[:seen]), P, size)
        done = [sum(t != mask for t in answer[s : s + size]) / len(answer[s : s + size]) for s in starts[:n_open]]
        rounds.append([n_open, sum(share == 1 for share in done)])
        before = list(answer)
        for b, s in enumerate(starts[:n_open]):
            masked = [i for i in range(s, min(s + size, n_new)) if before[i] == mask]
            found = {}
            for i in masked:
                row = logits[P + i - 1].clone()
                if int(row.argmax()) == mask:
                    row[mask] = -torch.inf
                sure, token = row.softmax(-1).max(-1)
                found[i] = (float(sure), int(token))
            accepted = [i for i in masked if found[i][0] >= threshold]
            if masked and (b == 0 or done[b - 1] >= 0.95) and not accepted:
                accepted = [max(masked, key=lambda i: (found[i][0], -i))]
            for i in accepted:
                answer[i] = found[i][1]
        last = answer[starts[n_open - 1] : starts[n_open - 1] + size]
        if n_open < len(starts) and sum(t != mask for t in last) / len(last) >= 0.1:
            n_open += 1
    return answer, rounds


@cache
def surer(name: str) -> DreamEdge:
    """With logits of such a size that some tokens are sure and others are not, as of a trained network."""
    model = deepcopy(eager(name))
    model.norm.weight.data *= 8
    return model


@pytest.mark.parametrize("name", GOLDEN_NAMES)
@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_it_is_one_block_causal_forward_a_round(name: str, threshold: float, size: int) -> None:
    model = surer(name)
    for seed in range(4):
        prompt = torch.randint(3, 200, (5 + seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        expected, rounds = written_plainly(model, prompt, 19, size, threshold)
        written = generate(model, prompt, max_new_tokens=19, cache="d2f", block_length=size, threshold=threshold)
        assert written.answers[0].tolist() == expected
        assert len(written.history) == len(rounds) + 1


def test_blocks_really_are_written_together() -> None:
    """The comparison has open blocks beside each other, and some that are full before those that come before them."""
    rounds = [written_plainly(surer(name), PROMPT, 24, 2, 0.5)[1] for name in GOLDEN_NAMES]
    assert max(n_open - n_full for one in rounds for n_open, n_full in one) > 1
    assert any(b - a > 1 for one in rounds for (_, a), (_, b) in pairwise(one))


def test_what_is_final_is_never_computed_again(build: Build) -> None:
    """On a program: the prompt once; each call sees up to its end; and the answers are eager's."""
    program, model = Program.open(build("gqa2", "fp32_xnnpack")), eager("gqa2")
    calls: list[tuple[int, int, int]] = []

    class Seen:
        def __getattr__(self, name: str) -> Any:
            return getattr(program, name)

        def start(self) -> Callable[..., Tensor]:
            forward = program.start()

            def heard(tokens: Tensor, start: int, kv_len: int, rows: Tensor) -> Tensor:
                calls.append((start, start + len(tokens), kv_len))
                return forward(tokens, start, kv_len, rows)

            return heard

    P = len(PROMPT)
    written = generate(Seen(), PROMPT, max_new_tokens=24, cache="d2f", block_length=4, threshold=0.02)
    expected, _ = written_plainly(model, PROMPT, 24, 4, 0.02)
    assert written.answers[0].tolist() == expected
    assert calls[0] == (0, P, P)
    assert all(end == kv_len and end - start == 4 for start, end, kv_len in calls[1:])
    assert sum(start == 0 for start, _, _ in calls) == 1
    assert sum(end - start for start, end, _ in calls) == written.positions
    last_seen = {start: i for i, (start, _, _) in enumerate(calls)}
    assert sorted(last_seen.values()) == [last_seen[start] for start in sorted(last_seen)], "left to right"


def test_an_end_ends_it() -> None:
    model = eager("gqa2")
    whole = generate(model, PROMPT, max_new_tokens=24, cache="d2f", block_length=4, threshold=0.02)
    end = int(whole.answers[0][6])

    class Ending:
        eos_ids = (end,)

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

    network: Any = Ending()
    cut = generate(network, PROMPT, max_new_tokens=24, cache="d2f", block_length=4, threshold=0.02, stop_at_eos=True)
    first = whole.answers[0].tolist().index(end)
    assert cut.answers[0].tolist() == whole.answers[0].tolist()[:first]
    assert cut.positions < whole.positions


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 4}, "without steps"),
        ({"gamma": 0.1, "threshold": None}, "gamma"),
        ({"alpha": 0.3}, "without alpha"),
        ({"suffix_window": 4}, "without suffix_window"),
        ({"alg": "origin", "threshold": None}, "origin"),
        ({"prompt_ids": [5, 319, 6]}, "no masks in it"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it(options: dict[str, Any], said: str) -> None:
    model = eager("gqa2")
    asked: dict[str, Any] = {"prompt_ids": PROMPT, "max_new_tokens": 8, "cache": "d2f", "threshold": 0.9} | options
    if "prompt_ids" in options:
        asked["prompt_ids"] = [5, model.mask_id, 6]
    with pytest.raises(OptionError, match=said):
        generate(model, **asked)
