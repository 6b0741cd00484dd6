"""What each matrix adds to the divergence from float32 in each format: measured, on texts that nothing is verified on.

Of each format the noise of each matrix (`validation/quantization_noise.py`), with plain rounding; and the divergence of
the model where one kind of matrix, or one layer, is in the smallest format, and all else in the best. Between them a
matrix is told by its noise: `pipeline/tuning.py` says what is supposed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from model import DreamEdge, DreamEdgeConfig
from pipeline.load import Loaded
from pipeline.tuning import BEST, FORMATS, fitted
from recipes.stored import Weights
from runtime.errors import UsageError
from validation.divergence import Divergence
from validation.effort import effort_for
from validation.material import hidden_texts
from validation.progress import Report, within
from validation.quantization_noise import KINDS, quantization_noise
from validation.reference import Sequence
from validation.texts import read_texts, tokens_of, windows

N_TEXTS = 32
SMALLEST = FORMATS[0]
HEAD = "lm_head"


def linears(config: DreamEdgeConfig) -> dict[str, tuple[int, int]]:
    """(rows, columns) of each matrix by its name, layer by layer."""
    with torch.device("meta"):
        model = DreamEdge(replace(config, num_hidden_layers=1))
    shapes = {n: (m.out_features, m.in_features) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    head = {HEAD: shapes.pop(HEAD)}
    of_all = {
        f"layers.{i}{n.removeprefix('layers.0')}": s for i in range(config.num_hidden_layers) for n, s in shapes.items()
    }
    return of_all | head


def texts_of(loaded: Loaded, file: Path, seed: int) -> tuple[Sequence, ...]:
    """Some of the file, drawn, with masks of all ratios. Raises `UsageError`."""
    if loaded.tokenizer is None:
        raise UsageError(f"checkpoint {loaded.folder}: without a tokenizer no text can be read")
    texts = tokens_of(loaded.tokenizer, read_texts(file, "calibration", loaded.folder), f"calibration: {file}", least=1)
    length = effort_for(loaded.config).tuned
    pieces = windows(texts, min(length, loaded.config.max_seq_len))
    drawn = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))[:N_TEXTS].tolist()
    sequences, _ = hidden_texts([pieces[i] for i in drawn], loaded.config.mask_token_id, seed, length)
    return sequences


def sensitivities(
    loaded: Loaded, plain: Mapping[str, Weights], sequences: tuple[Sequence, ...], report: Report
) -> dict[str, dict[str, float]]:
    """By matrix and format the nats that it adds to those of `BEST` for all, which adds 0.

    plain: the model in each format of `FORMATS` for all matrices that it fits, weights rounded to the nearest.
    """
    float32 = Weights(loaded.model, {})
    noise = {f: noise_of(float32, weights, sequences, within(f, report)) for f, weights in plain.items()}
    more = {f: {n: noise[f][n] - noise[BEST][n] for n in noise[f]} for f in FORMATS}
    names = list(noise[BEST])
    L = loaded.config.num_hidden_layers
    of_kind = [[n for n in names if n.endswith(kind)] for kind in (*KINDS, HEAD)]
    of_layer = [[n for n in names if n.startswith(f"layers.{i}.")] for i in range(L)]
    divergence = Divergence(float32, sequences, report)
    base, added = divergence.of(plain[BEST]), []
    for i, group in enumerate([*of_kind, *of_layer]):
        report("parts", i, len(of_kind) + L)
        added.append(divergence.of(mixed(plain, dict.fromkeys(group, SMALLEST))) - base)
    by_kind, head, by_layer = added[: len(KINDS)], added[len(KINDS)], added[len(KINDS) + 1 :]
    table_LK = torch.tensor([[more[SMALLEST][n] for n in group] for group in of_layer])
    kl_LK = fitted(table_LK, torch.tensor(by_layer), torch.tensor(by_kind))
    smallest = dict(zip(names, [*kl_LK.flatten().tolist(), max(head, kl_LK.min().item())], strict=True))
    return {n: {f: smallest[n] * _share(more[f][n], more[SMALLEST][n]) for f in FORMATS} for n in names}


def _share(noise: float, most: float) -> float:
    """Of what the smallest format adds."""
    return min(1.0, max(0.0, noise / most)) if most > 0 else 0.0


def noise_of(float32: Weights, quantized: Weights, sequences: tuple[Sequence, ...], report: Report) -> dict[str, float]:
    """Power of each matrix's noise relative to its output."""
    found = quantization_noise(float32, quantized, sequences, report)
    decibels = {
        f"layers.{i}.{'mlp' if kind in KINDS[4:] else 'self_attn'}.{kind}": layer.matrices[kind]
        for i, layer in enumerate(found.layers)
        for kind in KINDS
    }
    return {name: 10 ** (-db / 10) for name, db in (decibels | {HEAD: found.lm_head_db}).items()}


def mixed(by_format: Mapping[str, Weights], formats: Mapping[str, str]) -> Weights:
    """The model in `BEST`, but for these matrices, which are taken from the models in their formats."""
    best = by_format[BEST]
    model = copy.deepcopy(best.model, {id(p): p for p in best.model.parameters()})
    packed = dict(best.packed)
    for name, written in formats.items():
        other, weight = by_format[written], f"{name}.weight"
        linear = model.get_submodule(name)
        linear.weight = other.model.get_parameter(weight)
        if weight in other.packed:
            packed[weight] = other.packed[weight]
    return Weights(model, {}, packed)
