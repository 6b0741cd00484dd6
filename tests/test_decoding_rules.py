"""Rules of which masks a step writes, against each one written plainly: a whole call a step, lists, no caches."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from model import DreamEdge
from runtime import OptionError, Program, generate
from tests.checkpoints import Build
from tests.test_generation import PROMPT, eager

N_NEW, BLOCK, SHARPER = 24, 8, 3.0  # random weights are sure of nothing: their logits are made larger

# (columns, the probability of each one's best token, all probabilities of each, share of the block that is masked, what
# was said of the steps before) -> columns that are written besides the surest
Plain = Callable[[list[int], list[float], list[list[float]], float, list[dict[int, list[float]]]], set[int]]


def entropy_of(probs: list[float]) -> float:
    return -sum(p * math.log(p) for p in probs if p > 0)


def kl_of(now: list[float], before: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(now, before, strict=True) if p > 0)


def threshold(columns: list[int], best: list[float], *_: Any) -> set[int]:
    return {c for c, p in zip(columns, best, strict=True) if p >= 0.6}


def sliding(columns: list[int], best: list[float], _: Any, share: float, __: Any) -> set[int]:
    return {c for c, p in zip(columns, best, strict=True) if p >= 0.6 * (1 - 0.5 * (1 - share))}


def leap(columns: list[int], best: list[float], *_: Any) -> set[int]:
    anchors = threshold(columns, best)
    near = {c for c in columns if any(abs(c - anchor) <= 2 for anchor in anchors)}
    return anchors | {c for c, p in zip(columns, best, strict=True) if p >= 0.35 and c in near}


def entropy_bound(columns: list[int], best: list[float], probs: list[list[float]], *_: Any) -> set[int]:
    order = sorted(range(len(columns)), key=lambda i: (-best[i], columns[i]))
    chosen: list[int] = []
    for i in order:
        entropies = [entropy_of(probs[j]) for j in [*chosen, i]]
        if sum(entropies) - max(entropies) > 1.5:
            break
        chosen.append(i)
    return {columns[i] for i in chosen}


def klass(
    columns: list[int], best: list[float], probs: list[list[float]], _: float, before: list[dict[int, list[float]]]
) -> set[int]:
    steady = set()
    for c, p, now in zip(columns, best, probs, strict=True):
        states = [state[c] for state in before[-2:]] + [now] if all(c in state for state in before[-2:]) else []
        kls = [kl_of(b, a) for a, b in pairwise(states)]
        if p >= 0.3 and len(kls) == 2 and max(kls) < 0.5:
            steady.add(c)
    return steady


def low_entropy(columns: list[int], _: Any, probs: list[list[float]], *__: Any) -> set[int]:
    return {c for c, one in zip(columns, probs, strict=True) if entropy_of(one) <= 0.8}


RULES: dict[str, tuple[Plain, dict[str, Any]]] = {
    "alpha": (sliding, {"threshold": 0.6, "alpha": 0.5}),
    "relaxed_threshold": (leap, {"threshold": 0.6, "relaxed_threshold": 0.35, "radius": 2}),
    "kl_threshold": (klass, {"threshold": 0.3, "kl_threshold": 0.5}),
    "gamma": (entropy_bound, {"gamma": 1.5}),
    "entropy_threshold": (low_entropy, {"entropy_threshold": 0.8}),
}


def written_plainly(
    network: DreamEdge, rule: Plain, by_entropy: bool, window: int | None, block_length: int
) -> list[list[int]]:
    """The tokens before the first step and after each."""
    tokens = [*PROMPT, *[network.mask_id] * N_NEW]
    history = [list(tokens)]
    for start in range(len(PROMPT), len(tokens), block_length):
        end = min(start + block_length, len(tokens))
        seen = len(tokens) if window is None else min(len(tokens), end + window)
        before: list[dict[int, list[float]]] = []
        while masked := [c for c in range(start, end) if tokens[c] == network.mask_id]:
            with torch.no_grad():
                logits = SHARPER * network(torch.tensor([tokens[:seen]]))[0][0].double()
            logits[logits.argmax(-1) == network.mask_id, network.mask_id] = -torch.inf
            probs = [logits[c - 1].softmax(-1).tolist() for c in masked]
            best = [max(one) for one in probs]
            found = rule(masked, best, probs, len(masked) / (end - start), before)
            before.append(dict(zip(masked, probs, strict=True)))
            sure = [-entropy_of(one) for one in probs] if by_entropy else best
            if len(masked) == 1:
                found = set(masked)
            for c in found | {masked[max(range(len(masked)), key=lambda i: (sure[i], -i))]}:
                tokens[c] = int(logits[c - 1].argmax())
            history.append(list(tokens))
    return history


def sharper(step: int, tokens: Tensor, positions: Tensor, logits: Tensor) -> Tensor:
    return SHARPER * logits


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("window", [None, 0, 3])
@pytest.mark.parametrize("block_length", [BLOCK, N_NEW, 5])
def test_a_rule_writes_what_it_says(name: str, window: int | None, block_length: int) -> None:
    network = eager("gqa2")
    rule, options = RULES[name]
    written = generate(
        network,
        PROMPT,
        max_new_tokens=N_NEW,
        block_length=block_length,
        suffix_window=window,
        on_logits=sharper,
        **options,
    )
    expected = written_plainly(network, rule, name == "entropy_threshold", window, block_length)
    assert written.history[:, 0].tolist() == expected
    assert len(expected) - 1 == written.forward_calls


def test_each_rule_decides_something() -> None:
    """Else the tests above would hold for any: more than one token a step, and not as another rule."""
    network = eager("gqa2")
    histories = []
    for _, options in RULES.values():
        said = generate(network, PROMPT, max_new_tokens=N_NEW, block_length=BLOCK, on_logits=sharper, **options)
        assert 3 < said.forward_calls < N_NEW
        histories.append(said.history[:, 0].tolist())
    assert len({str(history) for history in histories}) == len(RULES)


def test_a_threshold_that_slides_goes_by_the_masks_alone() -> None:
    """Neither a prompt nor padding counts as filled: without blocks as in one, in a batch as alone."""
    network = eager("gqa2")
    options: dict[str, Any] = {"max_new_tokens": 9, "threshold": 0.9, "alpha": 1.0, "on_logits": sharper}
    long, short = [150, 205] * 20, [11]
    both = generate(network, [long, short], **options)
    for i, prompt in enumerate((long, short)):
        alone = generate(network, prompt, **options)
        assert torch.equal(both.answers[i], alone.answers[0])
        assert alone.forward_calls == generate(network, prompt, block_length=9, **options).forward_calls > 1


def test_a_window_is_what_is_computed_and_seen(build: Build) -> None:
    """By the program, with each cache: no position behind the window is part of a call."""
    program = Program.open(build("gqa2", "fp32_xnnpack"))
    calls: list[tuple[int, int, int]] = []

    class Traced(Program):
        def start(self) -> Any:
            forward = program.start()

            def noted(tokens: Tensor, start: int, kv_len: int, rows: Tensor) -> Tensor:
                calls.append((start, start + len(tokens), kv_len))
                return forward(tokens, start, kv_len, rows)

            return noted

    traced = object.__new__(Traced)
    traced.__dict__.update(vars(program))
    P = len(PROMPT)
    for cache in ("prefix", "dual"):
        calls.clear()
        generate(traced, PROMPT, max_new_tokens=12, block_length=4, cache=cache, gamma=0.1, suffix_window=2)
        opening = [call for call in calls if call[0] == 0]
        assert opening == [(0, P + 6, P + 6), (0, P + 10, P + 10), (0, P + 12, P + 12)]
        for start, stop, seen in calls:
            assert seen in (P + 6, P + 10, P + 12)
            assert stop == (
                seen if cache == "prefix" or start == 0 else min(P + 4 * ((start - P + 1) // 4 + 1), P + 12)
            )


def test_an_answer_that_ends_early_costs_no_calls_after_its_end() -> None:
    network = eager("gqa2")
    end = network.eos_ids[0]

    def put_end(step: int, tokens: Tensor, positions: Tensor, logits: Tensor) -> Tensor:
        logits = SHARPER * logits
        logits[positions == len(PROMPT) + 5, end] = 1e4
        return logits

    options: dict[str, Any] = {"max_new_tokens": N_NEW, "block_length": 4, "cache": "dual", "on_logits": put_end}
    for _, rule in RULES.values():
        cut = generate(network, PROMPT, stop_at_eos=True, suffix_window=4, **rule, **options)
        whole = generate(network, PROMPT, suffix_window=4, **rule, **options)
        assert cut.answers[0].tolist() == whole.answers[0][:5].tolist()
        assert cut.forward_calls < whole.forward_calls / 2


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"alpha": 0.3}, "alpha goes with a threshold"),
    ({"relaxed_threshold": 0.3}, "relaxed_threshold goes with a threshold"),
    ({"threshold": 0.9, "alpha": 0.3, "kl_threshold": 0.1}, "alpha and kl_threshold both say"),
    ({"threshold": 0.9, "gamma": 0.1}, "threshold and gamma both say"),
    ({"gamma": 0.1, "entropy_threshold": 0.1}, "gamma and entropy_threshold both say"),
    ({"threshold": 0.5, "relaxed_threshold": 0.6}, "must be 0 to the threshold"),
    ({"threshold": 0.5, "alpha": 1.5}, "alpha 1.5"),
    ({"gamma": -1.0}, "gamma -1.0"),
    ({"gamma": float("nan")}, "gamma nan"),
    ({"entropy_threshold": float("inf")}, "entropy_threshold inf"),
    ({"threshold": 0.5, "kl_threshold": "x"}, "kl_threshold 'x': must be a number"),
    ({"radius": 0}, "radius 0"),
    ({"suffix_window": 8}, "there must be blocks"),
    ({"suffix_window": -1, "block_length": 4}, "suffix_window -1"),
    ({"suffix_window": 1.5, "block_length": 4}, "suffix_window 1.5: must be a whole number"),
    ({"alg": "origin", "gamma": 0.1}, "origin"),
    ({"alg_temp": 0.5, "entropy_threshold": 0.1}, "give one of them"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        generate(eager("gqa2"), PROMPT, max_new_tokens=8, **options)
