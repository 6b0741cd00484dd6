"""What is not to be written: ends that come early, and what stands there already."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime import OptionError, generate
from runtime.guards import BANNED, ban_repetitions, end_later
from runtime.sample import sample
from tests.test_generation import PROMPT, eager

N_NEW = 24


class Ender:
    """A network that likes its end token best, by `lead` over the best other one, wherever it is asked."""

    def __init__(self, lead: float) -> None:
        self.network, self.lead = eager("gqa2"), lead

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def start(self) -> Any:
        forward = self.network.start()

        def led(*call: Any) -> Tensor:
            logits = forward(*call).clone()
            logits[..., self.network.eos_ids[0]] = logits.amax(-1) + self.lead
            return logits

        return led


def test_an_answer_has_its_least_length() -> None:
    network = Ender(50.0)
    assert len(generate(network, PROMPT, max_new_tokens=N_NEW, stop_at_eos=True).answers[0]) == 0
    for blocks in ({}, {"block_length": 8, "cache": "dual"}):
        options: dict[str, Any] = {"max_new_tokens": N_NEW, "stop_at_eos": True, "min_new_tokens": 10, **blocks}
        answer = generate(network, PROMPT, **options).answers[0]
        assert len(answer) == 10
        assert network.network.eos_ids[0] not in answer.tolist()
    rows = [list(PROMPT), list(PROMPT[:3])]
    both = generate(network, rows, max_new_tokens=N_NEW, stop_at_eos=True, min_new_tokens=10).answers
    assert [len(answer) for answer in both] == [10, 10]


def test_an_end_is_punished_while_much_is_masked() -> None:
    """penalty * ln(1 - t + 0.001), t the share that is masked: an end that leads by 5 nats comes when t is 0.82."""
    network, end = Ender(5.0), eager("gqa2").eos_ids[0]
    seen: list[tuple[int, float]] = []

    def look(step: int, tokens: Tensor, positions: Tensor, logits: Tensor) -> None:
        best = logits.index_fill(-1, torch.tensor([end]), BANNED).amax(-1)
        seen.append((len(positions), float((logits[:, end] - best).mean())))

    generate(network, PROMPT, max_new_tokens=N_NEW, eos_penalty=3.0, on_logits=look)
    for masked, lead in seen:
        assert lead == pytest.approx(5.0 + 3.0 * math.log(1 - masked / N_NEW + 1e-3), abs=1e-4)
    assert len(generate(network, PROMPT, max_new_tokens=N_NEW, eos_penalty=3.0, steps=1).answers[0]) == N_NEW


def banned_plainly(tokens: list[int], column: int, n: int, mask_id: int, vocab: int) -> set[int]:
    """Each token is tried."""
    written = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    there = {gram for gram in written if mask_id not in gram}
    banned = set()
    for token in range(vocab):
        tried = [*tokens[:column], token, *tokens[column + 1 :]]
        grams = [tuple(tried[i : i + n]) for i in range(max(0, column - n + 1), column + 1) if i + n <= len(tried)]
        if any(gram in there for gram in grams if mask_id not in gram):
            banned.add(token)
    return banned


@pytest.mark.parametrize("n", [2, 3, 4])
def test_each_token_that_repeats_is_banned_and_no_other(n: int) -> None:
    mask, vocab = 6, 7
    generator = torch.Generator().manual_seed(n)
    n_banned = 0
    for _ in range(60):
        tokens = torch.randint(mask, (18,), generator=generator)
        tokens[torch.rand(18, generator=generator) < 0.3] = mask
        columns = (tokens == mask).nonzero()[:, 0]
        logits = torch.zeros(len(columns), vocab)
        ban_repetitions(logits, tokens, columns, n, mask)
        for row, column in zip(logits, columns.tolist(), strict=True):
            found = set((row == BANNED).nonzero()[:, 0].tolist())
            assert found == banned_plainly(tokens.tolist(), column, n, mask, mask)
            n_banned += len(found)
    assert n_banned > 5


def test_what_is_banned_stays_a_number_at_a_low_temperature() -> None:
    """Else its part of an entropy is none, and the position the surest of all."""
    logits = torch.tensor([[1.0, 2.0, 3.0, BANNED], [1.0, 2.0, 3.0, 0.0]])
    for alg in ("entropy", "maskgit_plus", "topk_margin"):
        _, sure = sample(logits, 0, alg, 0.5, None, None, torch.Generator().manual_seed(0))
        assert sure.isfinite().all(), alg
    end_later(logits, (3,), 1e38, 1.0)
    assert logits.isfinite().all()


def test_an_end_is_no_matter_where_nothing_is_asked_for() -> None:
    network = eager("gqa2")
    filled = generate(network, [33, network.mask_id, 7], max_new_tokens=0, eos_penalty=3.0)
    assert network.mask_id not in filled.tokens


def test_an_answer_does_not_repeat_itself() -> None:
    network = eager("gqa2")

    def repeated(**options: Any) -> int:
        tokens = generate(network, PROMPT, max_new_tokens=60, **options).tokens[0]
        grams = [tuple(window) for window in tokens.unfold(0, 3, 1).tolist()]
        return len(grams) - len(set(grams))

    assert repeated() > 0
    assert repeated(no_repeat_ngram_size=3) == 0
    assert repeated(no_repeat_ngram_size=3, block_length=8, cache="dual", threshold=1.0) == 0


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"eos_penalty": -1.0}, "eos_penalty -1.0"),
    ({"eos_penalty": float("nan")}, "eos_penalty nan"),
    ({"eos_penalty": None}, "eos_penalty None: must be a number"),
    ({"min_new_tokens": -1}, "min_new_tokens -1"),
    ({"no_repeat_ngram_size": 1}, "at least 2 tokens"),
    ({"no_repeat_ngram_size": 2.5}, "must be a whole number"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        generate(eager("gqa2"), PROMPT, max_new_tokens=8, **options)
