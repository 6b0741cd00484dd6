"""How much of a checkpoint eager looks at: a token costs two operations a weight, in up to three models."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model import DreamEdgeConfig
from model.dream import DecoderLayer


@dataclass(frozen=True)
class Effort:
    """text: tokens that are read of each, and tuned: that `tune` reads. random: prompts of random tokens, of which
    no quality is told. plain: texts that the plainly rounded model reads, too. greedy: prompts that are answered.
    candidates: short calls of each kind, among which those free of ties are searched. noise: tokens that the noise
    of each matrix is measured over. at_the_end: of the longest call one token again and again, and then so many
    others in the last places; None for a call of all others.
    """

    text: int
    tuned: int
    random: int
    plain: int
    greedy: int
    candidates: int
    noise: int
    at_the_end: int | None = None


LARGE = 1.5e9  # weights, above which a minute of eager is but a few hundred tokens


def effort_for(config: DreamEdgeConfig) -> Effort:
    if layer_weights(config) <= LARGE:
        return Effort(text=96, tuned=96, random=10**6, plain=10**6, greedy=8, candidates=48, noise=128)
    # Of as many texts less of each: tokens of one text are alike. Each step of an answer reads all weights anew, and
    # two answers tell nothing. Wide layers have a tie in nearly all calls: more candidates find none.
    return Effort(text=24, tuned=48, random=8, plain=16, greedy=0, candidates=6, noise=48, at_the_end=64)


def layer_weights(config: DreamEdgeConfig) -> int:
    """Of all layers, without embedding and output layer."""
    with torch.device("meta"):
        return config.num_hidden_layers * sum(p.numel() for p in DecoderLayer(config).parameters())
