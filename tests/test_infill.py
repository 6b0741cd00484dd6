"""Gaps of unknown length: against the loop written plainly, on a trained checkpoint, and as a user fills them."""

from __future__ import annotations

import io
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor

from model import DreamEdge, load_hf_model
from pipeline.commands.infill import fill_gap
from pipeline.schema import GenerateConfig
from runtime import Network, OptionError, Program
from runtime.canvas import MASK as MASK_SHOWN
from runtime.infill import Infilled, infill
from scripts import train_infill as training
from scripts import train_sudoku
from tests.checkpoints import INFILL, Build
from tests.test_generation import eager

Pipeline = Callable[..., tuple[int, str, str]]
GREEDY: dict[str, Any] = {"temperature": 0.0, "top_p": None}
BOS, EXPAND, DELETE, MASK, V = 1, 9, 10, 11, 12


@dataclass
class Drawn:
    """A network of drawn numbers: what it says depends on the place, the token there and the whole canvas."""

    seed: int
    max_seq_len: int = 40
    max_rows: int = 3
    vocab_size: int = V
    mask_id: int = MASK
    pad_id: int = DELETE
    eos_ids: tuple[int, ...] = (DELETE,)
    block_length: int = 4
    calls: list[tuple[int, int, int]] = field(default_factory=list)  # tokens, kv_len, rows of each

    def start(self) -> Callable[[Tensor, int, int, Tensor], Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        table = 2 * torch.randn(7, 5, V, V, generator=generator)
        louder = torch.zeros(V)
        louder[EXPAND], louder[DELETE] = 1.5 * torch.rand(2, generator=generator)

        def forward(tokens_T: Tensor, start_pos: int, kv_len: int, rows_K: Tensor) -> Tensor:
            assert start_pos == 0, "what it says depends on all"
            self.calls.append((len(tokens_T), kv_len, len(rows_K)))
            said_TV = table[torch.arange(len(tokens_T)) % 7, int(tokens_T.sum() + len(tokens_T)) % 5, tokens_T]
            return (said_TV + louder)[rows_K][None]

        return forward


@dataclass
class Louder:
    """A real network that likes to expand and to delete."""

    network: DreamEdge
    louder: dict[int, float]
    calls: list[tuple[int, int, int]] = field(default_factory=list)  # first position, tokens, kv_len of each

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def start(self) -> Callable[[Tensor, int, int, Tensor], Tensor]:
        forward = self.network.start()

        def louder(tokens_T: Tensor, start_pos: int, kv_len: int, rows_K: Tensor) -> Tensor:
            self.calls.append((start_pos, len(tokens_T), kv_len))
            logits = forward(tokens_T, start_pos, kv_len, rows_K).clone()
            for token, by in self.louder.items():
                logits[..., token] += by
            return logits

        return louder


# ---- The loop, written plainly: lists, one call a step ----


def sureness(row: list[float], alg: str) -> float:
    top = max(row)
    weights = [math.exp(one - top) for one in row]
    probs = sorted((weight / sum(weights) for weight in weights), reverse=True)
    if alg == "maskgit_plus":
        return probs[0]
    if alg == "topk_margin":
        return probs[0] - probs[1]
    return sum(p * math.log(p) for p in probs if p > 0)


def filled_plainly(
    network: Any,
    tokens: tuple[int, int, int],
    prefix: list[int],
    suffix: list[int],
    n: int,
    longest: int,
    alg: str = "entropy",
    keeps: bool = False,
) -> tuple[list[list[int]], list[str]]:
    """The canvases, and what happened between them. keeps: what stands before the first mask is not computed again."""
    bos, expand, delete = tokens
    mask = network.mask_id
    canvas = [bos, *prefix, *[mask] * n, *suffix, delete]
    history, events, budget, computed, forward = [canvas], [], 2 * longest, 0, network.start()
    while mask in canvas:
        masked = [i for i, token in enumerate(canvas) if token == mask]
        first = min(computed, masked[0] - 1) if keeps else 0
        with torch.no_grad():
            said = forward(torch.tensor(canvas[first:]), first, len(canvas), torch.arange(len(canvas) - first))[0]
        computed = masked[0]
        rows = {i: said[i - 1 - first].double().tolist() for i in masked}
        is_full = len(canvas) == min(network.max_seq_len, len(prefix) + len(suffix) + 2 + longest)
        for row in rows.values():
            if budget == 0 or is_full:
                row[expand] = -math.inf
            if row.index(max(row)) == mask:
                row[mask] = -math.inf
        if is_full or budget == 0:
            events.append("full" if budget else "spent")
        best = max(masked, key=lambda i: (sureness(rows[i], alg), -i))
        token = rows[best].index(max(rows[best]))
        if token == delete:
            canvas = [old for i, old in enumerate(canvas) if not (i in masked and i >= best)]
            events.append("delete")
        elif token == expand:
            canvas = [*canvas[:best], mask, mask, *canvas[best + 1 :]]
            budget -= 1
            events.append("expand")
        else:
            canvas = [*canvas[:best], token, *canvas[best + 1 :]]
            events.append("write")
        history.append(canvas)
    return history, events


def test_the_loop_is_the_plain_one() -> None:
    """Canvas by canvas, on 150 networks of drawn numbers that may compute three rows a call."""
    seen: dict[str, int] = {}
    for seed in range(150):
        draw = random.Random(seed)
        network = Drawn(seed)
        prefix, suffix = ([draw.randrange(MASK) for _ in range(draw.randrange(5))] for _ in range(2))
        n = draw.randint(1, 9)
        longest = draw.randint(n, 12)
        alg = draw.choice(["entropy", "maskgit_plus", "topk_margin"])
        expected, events = filled_plainly(network, (BOS, EXPAND, DELETE), prefix, suffix, n, longest, alg)
        network.calls.clear()
        found = fill(network, prefix, suffix, n_masks=n, max_masks=longest, alg=alg)
        assert [canvas.tolist() for canvas in found.history] == expected, seed
        assert found.tokens.tolist() == expected[-1][1 + len(prefix) : len(expected[-1]) - len(suffix) - 1]
        assert (found.expanded, found.budget) == (events.count("expand"), 2 * longest)
        assert found.forward_calls == len(network.calls)
        assert found.positions == sum(tokens for tokens, _, _ in network.calls)
        assert all(rows <= 3 and tokens == seen for tokens, seen, rows in network.calls)
        for event in events:
            seen[event] = seen.get(event, 0) + 1
    assert min(seen[event] for event in ("write", "expand", "delete", "full")) > 30, seen
    assert seen["spent"] > 0


def fill(network: Network, prefix: list[int], suffix: list[int], **options: Any) -> Infilled:
    tokens = {"bos_id": BOS, "expand_id": EXPAND, "delete_id": DELETE}
    return infill(network, prefix, suffix, **(tokens | GREEDY | options))


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize(("name", "by"), [("gqa2", (6.0, 7.0)), ("mqa4-sharded", (8.0, 8.0))])
def test_a_real_network_fills_as_the_plain_loop_does(name: str, by: tuple[float, float], keeps: bool) -> None:
    """Also where a call begins at the first mask, and finds the rest in the cache."""
    model = eager(name)
    delete, expand = model.eos_ids[0], 11
    network = Louder(model, {expand: by[0], delete: by[1]})
    events: set[str] = set()
    for seed in range(3):
        draw = random.Random(seed)
        prefix, suffix = ([draw.randrange(20, 200) for _ in range(n)] for n in (6, 4))
        expected, happened = filled_plainly(network, (7, expand, delete), prefix, suffix, 5, 14, keeps=keeps)
        network.calls.clear()
        found = infill(
            network,
            prefix,
            suffix,
            bos_id=7,
            expand_id=expand,
            delete_id=delete,
            n_masks=5,
            max_masks=14,
            cache="prefix" if keeps else None,
            **GREEDY,
        )
        assert [canvas.tolist() for canvas in found.history] == expected
        assert all(start + tokens == seen for start, tokens, seen in network.calls)
        assert all((start > 0) == keeps for start, _, _ in network.calls[1:])
        events |= set(happened)
    assert events >= {"write", "expand", "delete", "full"}


# ---- What each written token does ----


@dataclass
class Told(Drawn):
    """Says at each step one token, surely, at one of the masks, counted from the left."""

    says: tuple[tuple[int, int], ...] = ()

    def start(self) -> Callable[[Tensor, int, int, Tensor], Tensor]:
        steps = iter(self.says)

        def forward(tokens_T: Tensor, start_pos: int, kv_len: int, rows_K: Tensor) -> Tensor:
            token, at = next(steps)
            logits = torch.zeros(1, len(rows_K), V)
            logits[0, :, 2] = 1.0  # what all others would be, less surely
            logits[0, at, token] = 50.0
            return logits

        return forward


def middles(network: Drawn, found: Infilled, n_before: int = 1) -> list[list[int]]:
    return [canvas.tolist()[n_before:-1] for canvas in found.history]


def test_a_delete_takes_the_masks_behind_it() -> None:
    """Not those before it, and no token that is written."""
    network = Told(0, max_rows=9, says=((5, 3), (DELETE, 1), (6, 0)))
    found = fill(network, [], [], n_masks=5)
    M = MASK
    assert middles(network, found) == [[M, M, M, M, M], [M, M, M, 5, M], [M, 5], [6, 5]]
    assert found.forward_calls == 3


def test_an_expand_makes_room_where_it_stands() -> None:
    network = Told(0, max_rows=9, says=((5, 0), (EXPAND, 0), (6, 2), (7, 1), (8, 0)))
    found = fill(network, [], [], n_masks=3)
    M = MASK
    assert middles(network, found) == [[M, M, M], [5, M, M], [5, M, M, M], [5, M, M, 6], [5, M, 7, 6], [5, 8, 7, 6]]
    assert (found.expanded, found.budget) == (1, 2 * (network.max_seq_len - 2))


def test_a_full_gap_expands_no_more() -> None:
    """Where expand is banned the next best token is written."""
    network, M = Told(0, max_rows=9, says=((EXPAND, 0), (EXPAND, 1), (DELETE, 0))), MASK
    found = fill(network, [], [], n_masks=1, max_masks=2)
    assert middles(network, found) == [[M], [M, M], [2, M], [2]]
    assert (found.expanded, found.budget) == (1, 4)


def test_a_delete_makes_room_again() -> None:
    network, M = Told(0, max_rows=9, says=((DELETE, 2), (EXPAND, 0), (5, 2), (6, 1), (7, 0))), MASK
    found = fill(network, [], [], n_masks=3, max_masks=3)
    assert middles(network, found) == [[M, M, M], [M, M], [M, M, M], [M, M, 5], [M, 6, 5], [7, 6, 5]]


def test_a_budget_is_spent_once() -> None:
    """A network that expands whenever it may, and deletes when it may not, ends."""

    class Greedy(Drawn):
        def start(self) -> Callable[[Tensor, int, int, Tensor], Tensor]:
            logits_V = torch.zeros(V)
            logits_V[EXPAND], logits_V[DELETE] = 9.0, 8.0
            return lambda tokens, start, kv_len, rows: logits_V.expand(1, len(rows), V)

    found = fill(Greedy(0), [3], [4], n_masks=1, max_masks=6)
    assert (found.expanded, len(found.tokens)) == (5, 0)  # the leftmost mask is the surest: all go at once
    assert [len(canvas) for canvas in found.history] == [5, 6, 7, 8, 9, 10, 4]

    class Alternating(Greedy):
        """Deletes the last mask when there is no room."""

        def start(self) -> Callable[[Tensor, int, int, Tensor], Tensor]:
            said = super().start()

            def forward(tokens_T: Tensor, start_pos: int, kv_len: int, rows_K: Tensor) -> Tensor:
                logits = said(tokens_T, start_pos, kv_len, rows_K).clone()
                logits[0, -1, DELETE] = 8.5
                return logits

            return forward

    found = fill(Alternating(0, max_rows=40), [3], [4], n_masks=1, max_masks=6)
    assert (found.expanded, found.budget) == (12, 12)
    assert MASK not in found.history[-1]


def test_the_window_of_the_network_bounds_the_gap() -> None:
    network = Louder(eager("gqa2"), {11: 100.0})
    network.network = type(
        "Short", (), {"max_seq_len": 20, "__getattr__": lambda _, name: getattr(eager("gqa2"), name)}
    )()
    found = infill(network, [5] * 6, [6] * 4, bos_id=7, expand_id=11, delete_id=300, n_masks=2, **GREEDY)
    assert max(map(len, found.history)) == 20
    assert found.expanded == 6
    assert 11 not in found.tokens


def test_the_last_of_given_steps_writes_all_that_is_left() -> None:
    network = Drawn(3)
    found = fill(network, [3], [4], n_masks=8, steps=3)
    assert len(found.history) == 4
    assert MASK not in found.history[-1]
    assert EXPAND not in found.tokens
    assert len(fill(network, [3], [4], n_masks=8, steps=1).history) == 2


def test_what_is_drawn_follows_the_seed() -> None:
    def drawn(seed: int) -> list[list[int]]:
        found = fill(Drawn(1), [3], [4], n_masks=8, seed=seed, temperature=1.0, top_p=0.9)
        return [canvas.tolist() for canvas in found.history]

    assert drawn(1) == drawn(1)
    assert len({str(drawn(seed)) for seed in range(5)}) > 1


def test_each_step_is_seen() -> None:
    seen: list[tuple[int, list[int]]] = []

    def look(step: int, canvas_L: Tensor) -> None:
        seen.append((step, canvas_L.tolist()))
        canvas_L.fill_(0)  # it is its own

    found = fill(Drawn(5), [3], [4], n_masks=6, on_step=look)
    assert seen == list(enumerate(canvas.tolist() for canvas in found.history[1:]))
    assert fill(Drawn(5), [3], [4], n_masks=6).tokens.tolist() == found.tokens.tolist()


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"prefix_ids": [3] * 30, "n_masks": 8},
        "33 tokens with bos and end, max_seq_len is 40: 8 masks do not fit between them, at most 7 do",
    ),
    ({"suffix_ids": [3] * 50}, "53 tokens with bos and end, max_seq_len is 40: 8 masks do not fit between them$"),
    ({"prefix_ids": [12]}, "token id 12 is outside the vocabulary, 0..11"),
    ({"suffix_ids": [-1]}, "token id -1 is outside"),
    ({"prefix_ids": [2.5]}, "prefix_ids must be integers"),
    ({"suffix_ids": [[1], [2]]}, "suffix_ids must be integers"),
    ({"prefix_ids": "text"}, "prefix_ids must be token ids"),
    ({"prefix_ids": [MASK]}, "prefix_ids: holds a mask"),
    ({"n_masks": 0}, "n_masks 0: a gap starts with at least 1"),
    ({"n_masks": 2.0}, "n_masks 2.0: must be a whole number"),
    ({"n_masks": 8, "max_masks": 7}, "max_masks 7: the gap starts with 8"),
    ({"steps": 0}, "steps 0: must be at least 1"),
    ({"n_masks": None}, "n_masks None: must be a whole number"),
    ({"bos_id": 99}, "token id 99"),
    ({"bos_id": None}, "bos_id None: must be a whole number"),
    ({"expand_id": MASK}, "expand_id 11: is the mask"),
    ({"expand_id": DELETE}, "expand_id and delete_id are both 10"),
    ({"alg": "origin"}, "origin"),
    ({"alg": "entropie"}, "there are"),
    ({"cache": "dual"}, "cache 'dual' is of blocks"),
    ({"cache": "d2f"}, "cache 'd2f' is of blocks"),
    ({"temperature": -1.0}, "temperature -1.0"),
    ({"top_p": 0.0}, "top_p 0.0"),
    ({"seed": "x"}, "seed 'x'"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_refused(options: dict[str, Any], said: str) -> None:
    options = {"prefix_ids": [3], "suffix_ids": [4]} | options
    with pytest.raises(OptionError, match=said) as refused:
        fill(Drawn(0), options.pop("prefix_ids"), options.pop("suffix_ids"), **options)
    assert "\n" not in str(refused.value)


# ---- The trained checkpoint ----


@cache
def trained() -> DreamEdge:
    return load_hf_model(INFILL, dtype=torch.float32)[0]


def test_it_is_a_small_dreamon_in_hf_layout() -> None:
    model, _, config = load_hf_model(INFILL, dtype=None)
    assert config == training.CONFIG
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert (INFILL / "model.safetensors").stat().st_size < 3e6
    tokenizer = Tokenizer.from_file(str(INFILL / "tokenizer.json"))
    tokens = {"<|mask|>": config.mask_token_id, "<|endoftext|>": config.eos_ids[0], "<|expand|>": training.EXPAND_ID}
    assert {name: tokenizer.token_to_id(name) for name in tokens} == tokens


@pytest.mark.parametrize("n_masks", training.STARTS)
def test_it_fills_gaps_that_it_was_not_trained_on(n_masks: int) -> None:
    """From too few masks as from too many."""
    gaps = training.held_out_gaps(12, seed=7)
    found = [(gap, training.filled(trained(), gap, n_masks, seed=0)) for gap in gaps]
    assert sum(training.is_right(gap, one.tokens) for gap, one in found) >= 10
    for gap, one in found:
        if training.is_right(gap, one.tokens) and len(gap.middle) > n_masks:
            assert one.expanded >= len(gap.middle) - n_masks, "there is no other way to become longer"


def test_training_learns_what_masks_stand_for() -> None:
    """Undone, an example is its gap; and one step down the gradient of its loss lowers it."""
    draw, one = random.Random(0), training.gap("207")
    assert (one.prefix, one.middle, one.suffix) == ("207 is ", "two zero seven", ".")
    end, kinds = training.CONFIG.eos_ids[0], set()
    for _ in range(200):
        tokens, targets = training.example(one, draw)
        assert len(tokens) == len(targets)
        around = [training.CONFIG.bos_token_id, *one.prefix.encode()], [*one.suffix.encode(), end]
        P, S = map(len, around)
        assert (tokens[:P], tokens[-S:]) == around
        middle = list(zip(tokens, targets, strict=True))[P:-S]
        assert all((token == training.CONFIG.mask_token_id) == (target != training.IGNORED) for token, target in middle)
        left = [token if target == training.IGNORED else target for token, target in middle]
        kept = bytes(token for token in left if token < 256).decode()
        if training.EXPAND_ID in left:
            assert len(kept) < len(one.middle)
        else:
            assert kept == one.middle
        assert end not in left or set(left[left.index(end) :]) == {end}
        kinds |= set(left) & {end, training.EXPAND_ID}
    assert kinds == {end, training.EXPAND_ID}
    batch = training.batch_of([training.example(one, draw) for _ in range(8)])
    torch.manual_seed(0)
    model = DreamEdge(training.CONFIG)
    train_sudoku.init_weights(model)
    before = training.infilling_loss(model, *batch)
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.sub_(0.01 * parameter.grad)
        assert training.infilling_loss(model, *batch) < before


# ---- As a user fills a gap ----


@pytest.fixture
def artifact(build: Build) -> Path:
    return build(INFILL.name, "int4_xnnpack")


PREFIX, MIDDLE, SUFFIX = "372 is ", "three seven two", "."


def test_a_gap_is_filled(pipeline: Pipeline, artifact: Path) -> None:
    gap = [f"artifact={artifact}", f"prefix={PREFIX}", f"suffix={SUFFIX}", "seed=0"]
    for options in ([], ["masks=1"], ["masks=16", "max_masks=20"], ["cache=prefix"], ["temperature=0.1", "top_p=0.8"]):
        code, out, err = pipeline("generate", *gap, *options)
        assert (code, out) == (0, MIDDLE + "\n")
        assert err.startswith("15 tokens in")
        assert err.count("\n") == 1


def test_masks_are_seen_as_they_become_more(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    fill_gap(GenerateConfig(artifact=str(artifact), prefix=PREFIX, suffix=SUFFIX, masks=1, seed=0), console)
    assert capsys.readouterr().out == MIDDLE + "\n"
    said = console.file.getvalue()  # type: ignore[attr-defined]
    for n in (2, 3):
        assert f"step {n - 1}, {n} masks left" in said
        assert MASK_SHOWN * n in said


def test_a_program_fills_as_the_plain_loop_does(artifact: Path) -> None:
    program, end = Program.open(artifact), training.CONFIG.eos_ids[0]
    for gap in training.held_out_gaps(4, seed=3):
        around = list(gap.prefix.encode()), list(gap.suffix.encode())
        for n_masks in (1, 16):
            tokens = (training.CONFIG.bos_token_id, training.EXPAND_ID, end)
            expected, _ = filled_plainly(program, tokens, *around, n_masks, 64)
            found = training.filled(program, gap, n_masks, **GREEDY)
            assert [canvas.tolist() for canvas in found.history] == expected


def test_what_cannot_be_ends_in_one_line(pipeline: Pipeline, artifact: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    shutil.copytree(artifact, plain)
    tokenizer = (plain / "tokenizer.json").read_text()
    (plain / "tokenizer.json").write_text(tokenizer.replace("<|expand|>", "<|other|>"))
    gap = ["prefix=1", "suffix=2"]
    cases = [
        ("no <|expand|>: the checkpoint is none of DreamOn's", [f"artifact={plain}", *gap]),
        ("prompt: not with prefix or suffix", [f"artifact={artifact}", "prompt=1", *gap]),
        ("prompts: not with prefix or suffix", [f"artifact={artifact}", "prompts=x", "suffix=1"]),
        (
            "block_length, threshold: not with prefix or suffix",
            [f"artifact={artifact}", "threshold=0.9", "block_length=4", "prefix=1"],
        ),
        ("chat: not with", [f"artifact={artifact}", "chat=true", "prefix=1"]),
        ("cache 'dual' is of blocks", [f"artifact={artifact}", "cache=dual", *gap]),
        ("masks: of a gap, so prefix or suffix must be given", [f"artifact={artifact}", "prompt=1", "masks=4"]),
        ("n_masks 0", [f"artifact={artifact}", "masks=0", *gap]),
        ("max_masks 4: the gap starts with 8", [f"artifact={artifact}", "max_masks=4", *gap]),
        ("max_seq_len is", [f"artifact={artifact}", "prefix=" + "1" * 300]),
        ("holds a mask", [f"artifact={artifact}", "prefix=<|mask|>"]),
        ("not valid Unicode", [f"artifact={artifact}", "suffix=\udce9"]),
    ]
    for said, arguments in cases:
        code, out, err = pipeline("generate", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert said in err, err
    code, _, err = pipeline("inspect", "prefix=1")
    assert (code, err.count("\n")) == (2, 1)
    assert "no key 'prefix'" in err or "artifact is not given" in err
