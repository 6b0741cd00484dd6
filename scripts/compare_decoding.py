"""What each rule of decoding costs and buys on English: calls, seconds, and how good the answers are.

    python -m scripts.compare_decoding ARTIFACT OUTPUT.json [--checkpoint DIR] [--prompts N] [--only NAME ...]

An answer is held against the one that is written without a cache, one token a step, and by its loss under the float32
model: what each of its tokens costs when a half of the others is hidden. Settings take turns, prompt by prompt, so
that the ratios of seconds hold on a noisy machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from model import DreamEdge, load_hf_model
from pipeline.config import ASSETS
from report.chart import Axis, Series, chart
from report.files import write_json
from report.page import picture
from report.plots import Plot
from runtime.generation import Generation, generate
from runtime.program import Program
from runtime.tokenizer import encode, load_tokenizer

P, NEW, BLOCK = 128, 256, 32
UNCACHED = "none"
BEST_BEFORE = "dual, threshold 0.9"  # what all else is a ratio to
DUAL: dict[str, Any] = {"cache": "dual", "block_length": BLOCK}
WINDOW = {"suffix_window": 32}
SETTINGS: dict[str, dict[str, Any]] = {
    UNCACHED: {},
    "dual": DUAL,
    BEST_BEFORE: DUAL | {"threshold": 0.9},
    "dual, threshold 0.6": DUAL | {"threshold": 0.6},
    "window, threshold 0.9": DUAL | WINDOW | {"threshold": 0.9},
    "window, alpha 0.3": DUAL | WINDOW | {"threshold": 0.9, "alpha": 0.3},
    "window, LocalLeap 0.75": DUAL | WINDOW | {"threshold": 0.9, "relaxed_threshold": 0.75},
    "window, KLASS 0.001": DUAL | WINDOW | {"threshold": 0.9, "kl_threshold": 0.001},
    "window, entropy 0.5": DUAL | WINDOW | {"entropy_threshold": 0.5},
    "window, entropy 2": DUAL | WINDOW | {"entropy_threshold": 2.0},
    "window, EB 0.1": DUAL | WINDOW | {"gamma": 0.1},
    "window, EB 1": DUAL | WINDOW | {"gamma": 1.0},
    "window, EB 2": DUAL | WINDOW | {"gamma": 2.0},
    "window, EB 4": DUAL | WINDOW | {"gamma": 4.0},
    "window, EB 8": DUAL | WINDOW | {"gamma": 8.0},
    "EB 4": DUAL | {"gamma": 4.0},
}


@dataclass
class Found:
    """Of each prompt."""

    seconds: list[float] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    same: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    distinct: list[float] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("output", type=Path, help="a JSON file for the figures")
    parser.add_argument("--checkpoint", type=Path, default=ASSETS / "dream_english", help="the float32 model")
    parser.add_argument("--texts", type=Path, default=ASSETS / "text" / "held_out.jsonl")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), help="settings")
    args = parser.parse_args()
    program, model = Program.open(args.artifact), load_hf_model(args.checkpoint)[0]
    found = {name: Found() for name in args.only}
    for prompt in track(prompts_of(args.texts, args.checkpoint, args.prompts), "prompts", transient=True):
        answers = {name: written(program, prompt, SETTINGS[name]) for name in {UNCACHED: 0} | found}
        for name, one in found.items():
            note(one, model, prompt, answers[name], answers[UNCACHED].answers[0])
    write_json(args.output, {name: summed_up(one) for name, one in found.items()})


def prompts_of(texts: Path, checkpoint: Path, n: int) -> list[Tensor]:
    """n stretches of `P` tokens of text."""
    tokenizer = load_tokenizer(checkpoint)
    assert tokenizer is not None
    lines = texts.read_text(encoding="utf-8").splitlines()
    ids = [i for line in lines for i in encode(tokenizer, json.loads(line)["text"] + "\n\n")]
    return [torch.tensor(ids[i * P : (i + 1) * P]) for i in range(n)]


def written(program: Program, prompt: Tensor, options: dict[str, Any]) -> Generation:
    return generate(program, prompt, max_new_tokens=NEW, alg="maskgit_plus", **options)


def note(found: Found, model: DreamEdge, prompt: Tensor, one: Generation, uncached: Tensor) -> None:
    answer = one.answers[0]
    found.seconds.append(one.seconds)
    found.calls.append(one.forward_calls)
    found.positions.append(one.positions)
    found.same.append(float((answer == uncached).float().mean()))
    found.loss.append(loss_of(model, prompt, answer))
    found.distinct.append(distinct_trigrams(answer))


@torch.no_grad()
def loss_of(model: DreamEdge, prompt: Tensor, answer: Tensor) -> float:
    """Nats a token, each predicted from the prompt and from the half of the answer that it is not in."""
    half = torch.rand(len(answer), generator=torch.Generator().manual_seed(0)) < 0.5
    total = 0.0
    for hidden in (half, ~half):
        tokens = torch.cat([prompt, answer.masked_fill(hidden, model.mask_id)])
        logits = model(tokens[None])[0][0, len(prompt) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits[hidden], answer[hidden], reduction="sum"))
    return total / len(answer)


def distinct_trigrams(answer: Tensor) -> float:
    trigrams = [tuple(window) for window in answer.unfold(0, 3, 1).tolist()]
    return len(set(trigrams)) / len(trigrams)


def summed_up(found: Found) -> dict[str, float]:
    kept = {name: statistics.fmean(values) for name, values in vars(found).items()}
    return kept | {"tokens_per_second": NEW / statistics.median(found.seconds)}


def table_of(rows: dict[str, dict[str, float]]) -> str:
    """In Markdown."""
    lines = ["| setting | calls | positions | tokens/s | as uncached | loss, nats | distinct trigrams |"]
    lines.append("|---|---|---|---|---|---|---|")
    before = rows[BEST_BEFORE]["tokens_per_second"]
    for name, row in rows.items():
        faster = f"{row['tokens_per_second'] / before:.2f}x"
        cells = (name, f"{row['calls']:.0f}", f"{row['positions']:,.0f}", faster, f"{100 * row['same']:.0f}%")
        lines.append(f"| {' | '.join(cells)} | {row['loss']:.2f} | {100 * row['distinct']:.0f}% |")
    return "\n".join(lines)


def draw(rows: dict[str, dict[str, float]]) -> str:
    """Calls against agreement, as SVG."""
    kinds: dict[str, list[str]] = {}
    for name in rows:
        kinds.setdefault("EB" if "EB" in name else name.partition(",")[0], []).append(name)
    series = [
        Series(kind, [(rows[name]["calls"], 100 * rows[name]["same"]) for name in names], "dots", tuple(names))
        for kind, names in kinds.items()
    ]
    title = "Calls of an answer, and how much of it is as uncached"
    made = chart(title, Axis("calls of an answer", log=True), Axis("as uncached, %"), series)
    return picture([Plot(title, made, "")])


if __name__ == "__main__":
    main()
