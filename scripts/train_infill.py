"""Train the bundled infilling checkpoint: a small Dream that fills a gap whose length it is not told, as DreamOn does.

    python -m scripts.train_infill --output assets/dream_infill

A gap is a number read out digit by digit, so its length follows from the text around it, and from nothing else:

    372 is … .     ->     372 is three seven two.

Training is DreamOn's: some tokens of the middle are masked, runs of neighbouring masks become one mask that is to be
`<|expand|>`, and behind the middle stand masks that are to be deleted, that is to be the end token. Everything is made
here from a fixed seed. One gap in ten, chosen by the hash of its text, is held out.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.logging import RichHandler
from rich.progress import track
from torch import Tensor

from model import DreamEdge
from runtime import Network
from runtime.infill import Infilled, infill
from runtime.text import EXPAND
from scripts import train_sudoku

log = logging.getLogger("train_infill")

TOKENS = [*train_sudoku.SPECIAL_TOKENS, EXPAND]
EXPAND_ID = 256 + TOKENS.index(EXPAND)
CONFIG = replace(
    train_sudoku.CONFIG, hidden_size=128, intermediate_size=320, num_hidden_layers=4, max_position_embeddings=128
)
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MAX_DELETE = 16  # masks behind a middle
STARTS = (1, 4, 8, 16)  # masks that a gap is filled from
IGNORED = -100  # what cross entropy does not count


@dataclass(frozen=True)
class Gap:
    """The bytes of these are tokens, and their ids."""

    prefix: str
    middle: str
    suffix: str


def gap(digits: str) -> Gap:
    return Gap(f"{digits} is ", " ".join(WORDS[int(digit)] for digit in digits), ".")


def is_held_out(one: Gap) -> bool:
    return hashlib.sha256(one.prefix.encode()).digest()[0] % 10 == 0


def gaps(held_out: bool, draw: random.Random) -> Iterator[Gap]:
    """Without end."""
    while True:
        one = gap("".join(draw.choices("0123456789", k=draw.randint(1, 4))))
        if is_held_out(one) == held_out:
            yield one


def held_out_gaps(n: int, seed: int) -> list[Gap]:
    """n different ones that training never sees."""
    found: dict[Gap, None] = {}
    stream = gaps(True, random.Random(seed))
    while len(found) < n:
        found[next(stream)] = None
    return list(found)


def example(one: Gap, draw: random.Random) -> tuple[list[int], list[int]]:
    """Tokens, and what each is to become: `IGNORED` where it is no mask."""
    mask, end = CONFIG.mask_token_id, CONFIG.eos_ids[0]
    # A middle has too few masks or too many: with both, no number of masks would say what is to be done.
    merges, n_deleted = (draw.random(), 0) if draw.random() < 0.5 else (0.0, draw.randint(0, MAX_DELETE))
    middle, ratio = [*one.middle.encode(), *[end] * n_deleted], draw.random() ** 0.5  # a gap is first all masks
    is_masked = [token == end or draw.random() < ratio for token in middle]
    tokens, targets = [CONFIG.bos_token_id, *one.prefix.encode()], [IGNORED] * (1 + len(one.prefix))
    i = 0
    while i < len(middle):
        run = i + 1
        # As in DreamOn's data: each pair of neighbouring masks is merged by chance, the second of them is dropped.
        while run < len(middle) and is_masked[run - 1] and is_masked[run] and draw.random() < merges:
            run += 1
        tokens.append(mask if is_masked[i] else middle[i])
        targets.append((EXPAND_ID if run > i + 1 else middle[i]) if is_masked[i] else IGNORED)
        i = run
    suffix = [*one.suffix.encode(), end]
    return tokens + suffix, targets + [IGNORED] * len(suffix)


def batch_of(examples: list[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and which are no padding, [B, T] each."""
    T = max(len(tokens) for tokens, _ in examples)
    pad = CONFIG.pad_token_id
    tokens_BT = torch.tensor([tokens + [pad] * (T - len(tokens)) for tokens, _ in examples])
    targets_BT = torch.tensor([targets + [IGNORED] * (T - len(targets)) for _, targets in examples])
    seen_BT = torch.tensor([[1] * len(tokens) + [0] * (T - len(tokens)) for tokens, _ in examples])
    return tokens_BT, targets_BT, seen_BT


def infilling_loss(model: DreamEdge, tokens_BT: Tensor, targets_BT: Tensor, seen_BT: Tensor) -> Tensor:
    """Of all masks; those of one sequence that are to be deleted count as one. Position i is read from row i-1."""
    logits_BTV, _ = model(tokens_BT, seen_BT)
    targets_BT = targets_BT[:, 1:]
    loss_BT = F.cross_entropy(logits_BTV[:, :-1].transpose(1, 2), targets_BT, ignore_index=IGNORED, reduction="none")
    is_end_BT = targets_BT == CONFIG.eos_ids[0]
    weights_BT = torch.where(
        is_end_BT, 1 / is_end_BT.sum(1, keepdim=True).clamp_min(1), (targets_BT != IGNORED).float()
    )
    return (loss_BT * weights_BT).sum() / weights_BT.sum().clamp_min(1)


def filled(network: Network, one: Gap, n_masks: int, **options: Any) -> Infilled:
    """options: of `runtime.infill`."""
    return infill(
        network,
        list(one.prefix.encode()),
        list(one.suffix.encode()),
        bos_id=CONFIG.bos_token_id,
        expand_id=EXPAND_ID,
        delete_id=CONFIG.eos_ids[0],
        n_masks=n_masks,
        **options,
    )


def is_right(one: Gap, tokens: Tensor) -> bool:
    return tokens.tolist() == list(one.middle.encode())


def train(steps: int, batch: int, lr: float, seed: int) -> DreamEdge:
    torch.manual_seed(seed)
    draw = random.Random(seed)
    stream = gaps(False, draw)
    model = DreamEdge(CONFIG)
    train_sudoku.init_weights(model)
    optimizer = train_sudoku.make_optimizer(model, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100, 0.02 + 0.98 * (1 - step / steps) / 0.5)
    )
    for step in track(range(steps), "training"):
        loss = infilling_loss(model, *batch_of([example(next(stream), draw) for _ in range(batch)]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            log.info("step %d: loss %.4f", step + 1, loss.item())
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    started = time.monotonic()
    model = train(args.steps, args.batch, args.lr, args.seed)
    train_sudoku.save(model, args.output, train_sudoku.make_tokenizer(TOKENS))
    log.info("%d parameters", sum(math.prod(p.shape) for p in model.parameters()))
    stored = model.bfloat16().float()  # what the file holds
    test = held_out_gaps(200, seed=2**31)
    for n_masks in STARTS:
        n = sum(is_right(one, filled(stored, one, n_masks, seed=0).tokens) for one in test)
        log.info("from %d masks it fills %d of %d held-out gaps", n_masks, n, len(test))
    log.info("%.1f minutes", (time.monotonic() - started) / 60)


if __name__ == "__main__":
    main()
