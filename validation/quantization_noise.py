"""What quantization costs, by layer and by matrix: the quantized model against float32, both in eager."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.stored import Weights
from validation.activations import quantized_activations, quantizes_activations
from validation.eager import embed, run_layers
from validation.figure import IDENTICAL_DB
from validation.figures import sqnr_db
from validation.output_layer import normed_rows
from validation.products import product
from validation.progress import Report
from validation.reference import Sequence, n_tokens

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKENS = 512  # of whole sequences, that noise is measured over
ROWS = 1024  # of the output layer, whose floats are in memory at once


@dataclass(frozen=True)
class LayerNoise:
    """Decibels: signal to noise, the signal is float32's.

    stream_db: the residual stream after the layer. alone_db: the same where the layer is given float32's own stream,
        so that only its own noise counts. share: of the noise that all layers add, each in proportion to its stream.
    matrices: by kind, the output of one matrix that is given float32's input.
    """

    stream_db: float
    alone_db: float
    share: float
    matrices: dict[str, float]


@dataclass(frozen=True)
class ModelNoise:
    """embedding_db, lm_head_db: as `matrices` of a layer. logits_db: of the whole quantized model."""

    embedding_db: float
    layers: tuple[LayerNoise, ...]
    lm_head_db: float
    logits_db: float


@dataclass
class Noise:
    """Sums of squares of what was expected, and of what the actual differed by."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, expected: Tensor, actual: Tensor) -> None:
        self.signal += expected.double().pow(2).sum().item()
        self.noise += (expected.double() - actual.double()).pow(2).sum().item()

    @property
    def db(self) -> float:
        if self.noise == 0:
            return IDENTICAL_DB
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 else -math.inf


@dataclass
class MatrixNoise:
    """Holds each matrix of a quantized layer against float32's, on float32's input. Biases are not quantized."""

    quantized: Weights
    exact: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=lambda: defaultdict(list))
    by_name: dict[str, Noise] = field(default_factory=lambda: defaultdict(Noise))

    def note(self, name: str, linear: nn.Linear, x_1ND: Tensor, out_1NM: Tensor) -> None:
        """Watches the float32 layer: what goes into its matrices, and what comes out."""
        without_bias = out_1NM[0] if linear.bias is None else product(x_1ND[0], linear.weight)
        self.exact[name].append((x_1ND[0], without_bias))

    def compare(self, name: str, linear: nn.Linear, _: Tensor, __: Tensor) -> None:
        """Watches the quantized layer after it."""
        for x_ND, expected in self.exact.pop(name, []):
            given_ND = _given(self.quantized, name, x_ND).to(linear.weight.dtype)
            self.by_name[name].add(expected, product(given_ND, linear.weight))

    def of_layer(self, i: int) -> dict[str, float]:
        """Decibels by kind."""
        prefix = f"layers.{i}."
        return {name.split(".")[-2]: noise.db for name, noise in self.by_name.items() if name.startswith(prefix)}


def quantization_noise(
    float32: Weights,
    quantized: Weights,
    sequences: tuple[Sequence, ...],
    report: Report,
    tokens: int = TOKENS,
) -> ModelNoise:
    """Over the first of the whole sequences of a reference, at most so many tokens of them.

    Both models go through their layers side by side, each with the floats of one layer in memory only while it runs.
    """
    sequences = _first(tuple(sequence for sequence in sequences if sequence.name.startswith("whole")), tokens)
    watch = MatrixNoise(quantized)
    exact_1ND, stream_1ND = embed(float32, sequences, torch.float32), embed(quantized, sequences, None)
    embedding_db = sqnr_db(exact_1ND, stream_1ND)

    def both(_: int) -> Tensor:
        """Of the quantized layer: what the one before it gave, and what float32's gave."""
        return torch.cat([stream_1ND, exact_1ND.to(stream_1ND.dtype)], dim=1)

    floats = run_layers(float32, sequences, torch.float32, None, report, watch=watch.note, multiply=product)
    twice = run_layers(
        quantized, (*sequences, *sequences), None, None, given=both, watch=watch.compare, multiply=product
    )
    decibels = []
    for exact in floats:
        stream_1ND, alone_1ND = next(twice).x_1ND.chunk(2, dim=1)
        exact_1ND = exact.x_1ND
        decibels.append((sqnr_db(exact_1ND, stream_1ND), sqnr_db(exact_1ND, alone_1ND)))
    noises = [0.0 if own_db >= IDENTICAL_DB else 10 ** (-own_db / 10) for _, own_db in decibels]
    shares = [noise / (sum(noises) or 1.0) for noise in noises]
    layers = tuple(
        LayerNoise(*pair, share, watch.of_layer(i))
        for i, (pair, share) in enumerate(zip(decibels, shares, strict=True))
    )
    head_db, logits_db = _head(float32, quantized, sequences, exact_1ND, stream_1ND, report)
    return ModelNoise(embedding_db, layers, head_db, logits_db)


def _first(sequences: tuple[Sequence, ...], tokens: int) -> tuple[Sequence, ...]:
    chosen = [sequences[0]]
    for sequence in sequences[1:]:
        if n_tokens((*chosen, sequence)) > tokens:
            break
        chosen.append(sequence)
    return tuple(chosen)


def _head(
    float32: Weights,
    quantized: Weights,
    sequences: tuple[Sequence, ...],
    exact_1ND: Tensor,
    actual_1ND: Tensor,
    report: Report,
) -> tuple[float, float]:
    """Decibels of the output layer on float32's input, and of the logits."""
    name = "lm_head.weight"
    exact_RD, _ = normed_rows(float32, sequences, exact_1ND, torch.float32)
    actual_RD, _ = normed_rows(quantized, sequences, actual_1ND, None)
    alone_RD, given_RD = (_given(quantized, name, x_RD) for x_RD in (exact_RD, actual_RD))
    head, logits = Noise(), Noise()
    V = float32.model.config.vocab_size
    for start in range(0, V, ROWS):
        report("rows of the output layer", start, V)
        rows = slice(start, min(V, start + ROWS))
        expected = F.linear(exact_RD, float32.rows(name, rows, torch.float32))
        head.add(expected, _product(quantized, name, rows, alone_RD))
        logits.add(expected, _product(quantized, name, rows, given_RD))
    for weights in (float32, quantized):
        weights.release()
    return head.db, logits.db


def _given(quantized: Weights, name: str, x: Tensor) -> Tensor:
    return quantized_activations(x) if quantizes_activations(quantized, name) else x


def _product(quantized: Weights, name: str, rows: slice, x: Tensor) -> Tensor:
    weight = quantized.rows(name, rows)
    return F.linear(x.to(weight.dtype), weight)
