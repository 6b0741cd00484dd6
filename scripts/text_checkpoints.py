"""Checkpoints that know some English, in any sizes: trained on the bundled text for half a minute, then made hard."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from model import DreamEdgeConfig, load_hf_model
from pipeline.config import ASSETS
from recipes.options import Fold
from runtime.tokenizer import load_tokenizer
from scripts import train_english
from tests.outliers import OUTLIERS

SECONDS = 30.0


def write_text_checkpoint(
    sizes: DreamEdgeConfig, output: Path, seed: int, outliers: Iterable[Fold] = (), seconds: float = SECONDS
) -> None:
    """outliers: of the kinds that such a fold removes, one channel each is 1,000 times louder; the function stays."""
    output.mkdir(parents=True)
    corpus, shape = output.with_suffix(".corpus"), output.with_suffix(".yaml")
    write_corpus(corpus)
    sizes = train_english.with_last_ids(sizes)
    shape.write_text(json.dumps(asdict(sizes)), encoding="utf-8")
    asked: dict[str, Any] = {"output": output, "seconds": seconds, "device": "cpu", "corpus": [corpus], "shape": shape}
    before = train_english.log.level
    train_english.log.setLevel(logging.WARNING)
    try:
        train_english.run(argparse.Namespace(**asked, length=64, batch=16, seed=seed))
    finally:
        train_english.log.setLevel(before)
    if outliers := tuple(outliers):
        _make_louder(output, outliers)


def write_corpus(folder: Path) -> None:
    """A document for each three of the paragraphs that calibration has."""
    folder.mkdir()
    lines = (ASSETS / "text" / "calibration.jsonl").read_text(encoding="utf-8").splitlines()
    paragraphs = [json.loads(line)["text"] for line in lines]
    for i in range(0, len(paragraphs) - 2, 3):
        (folder / f"{i:03d}.txt").write_text("\n\n".join(paragraphs[i : i + 3]), encoding="utf-8")


def _make_louder(folder: Path, kinds: Iterable[Fold]) -> None:
    model, _, _ = load_hf_model(folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    for kind in kinds:
        OUTLIERS[kind](model)
    train_english.save(model, tokenizer, folder)
