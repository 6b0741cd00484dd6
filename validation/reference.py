"""Recorded calls and what eager gave for them: `reference.safetensors`, all that validation needs of a checkpoint."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from validation.logits import Summary

MAX_HEADER = 2**24  # bytes
MAX_NEW = 2**16  # tokens of a greedy answer


class ReferenceError(RuntimeError):
    """A reference file that cannot be read."""


# Every reference holds sequences of each of these; numbered ones are named KIND-00, KIND-01, …
KINDS = {"whole", "prefill-then-block", "rewrite-inside", "suffix-hidden", "rows-subset", "one-token", "one-inside"}
KINDS |= {"max-length", "short", "short-append", "short-rewrite"}


@dataclass(frozen=True)
class Call:
    """One `forward`. tokens: int64 [T]. rows: int64 [K]."""

    tokens: Tensor
    start_pos: int
    kv_len: int
    rows: Tensor


@dataclass(frozen=True)
class Sequence:
    """Calls in order on one cache. Each sees only positions that the sequence has written."""

    name: str
    calls: tuple[Call, ...]

    @property
    def kind(self) -> str:
        """Its name without a number: one of `KINDS`, where it was recorded."""
        return self.name.rstrip("0123456789").rstrip("-")


def calls_of(sequences: tuple[Sequence, ...]) -> list[Call]:
    return [call for sequence in sequences for call in sequence.calls]


def n_tokens(sequences: tuple[Sequence, ...]) -> int:
    return sum(len(call.tokens) for call in calls_of(sequences))


@dataclass(frozen=True)
class Expected:
    """What one call should give.

    eager: from the same model in eager, the `vector` of a `Summary`. float32: from the float32 model, for whole
        sequences, by which quality is judged. columns: int64 [K, C], those of its values.
    divergence: float32 [K], nats, of the quantized model in eager from the float32 model, where that is recorded.
    plain: float32 [K], the same of weights that are rounded to the nearest, where the recipe does otherwise.
    targets: int64 [K], the tokens of the text that the rows predict, where there is one; among the columns.
    tie_margin: how far the nearest quantized activation is from a rounding tie, in steps of its int8 grid
    (0..0.5); infinite without quantized activations.
    floor_db: decibels to which a tie may bring a right program in this very call; infinite where the recipe's bound is
        enough: `validation.tied_calls`.
    """

    eager: Tensor
    float32: Summary | None
    columns: Tensor | None
    divergence: Tensor | None
    tie_margin: float
    plain: Tensor | None = None
    targets: Tensor | None = None
    floor_db: float = math.inf


@dataclass(frozen=True)
class Task:
    """Prompts, int64 [P] each, to write `n_new` tokens after: one a step, or all above the threshold."""

    prompts: tuple[Tensor, ...]
    n_new: int
    threshold: float | None


@dataclass(frozen=True)
class Greedy:
    """What the float32 model writes after prompts, int64 [P] each: `validation.greedy`. tokens: int64 [N, n_new]."""

    prompts: tuple[Tensor, ...]
    tokens: Tensor


@dataclass(frozen=True)
class Reference:
    """expected[i][j] belongs to sequences[i].calls[j].

    floor_db: decibels to which rounding alone may bring a right program in these very calls; infinite where that was
    not measured. No bound of fidelity is above.
    """

    sequences: tuple[Sequence, ...]
    expected: tuple[tuple[Expected, ...], ...]
    floor_db: float
    task: Task | None = None
    greedy: Greedy | None = None


def save_reference(reference: Reference, file: Path) -> None:
    tensors: dict[str, Tensor] = {}
    listing = []
    for sequence, expected in zip(reference.sequences, reference.expected, strict=True):
        calls = []
        for i, (call, logits) in enumerate(zip(sequence.calls, expected, strict=True)):
            prefix = f"{sequence.name}/{i}/"
            tensors[prefix + "tokens"] = call.tokens
            tensors[prefix + "rows"] = call.rows
            tensors[prefix + "eager"] = logits.eager.contiguous()
            if logits.float32 is not None and logits.columns is not None and logits.divergence is not None:
                tensors[prefix + "columns"] = logits.columns
                tensors[prefix + "divergence"] = logits.divergence
                kept = {"plain": logits.plain, "targets": logits.targets}
                tensors |= {prefix + name: tensor for name, tensor in kept.items() if tensor is not None}
                for field, tensor in vars(logits.float32).items():
                    tensors[f"{prefix}float32/{field}"] = tensor.contiguous()
            numbers = {"tie_margin": logits.tie_margin, "floor_db": logits.floor_db}
            kept_numbers = {name: None if value == math.inf else value for name, value in numbers.items()}
            calls.append({"start_pos": call.start_pos, "kv_len": call.kv_len, **kept_numbers})
        listing.append({"name": sequence.name, "calls": calls})
    floor_db = None if reference.floor_db == math.inf else reference.floor_db
    header: dict[str, object] = {"sequences": listing, "floor_db": floor_db}
    if reference.task is not None:
        tensors["task/prompts"] = torch.cat(reference.task.prompts)
        tensors["task/lengths"] = torch.tensor([len(prompt) for prompt in reference.task.prompts])
        header["task"] = {"n_new": reference.task.n_new, "threshold": reference.task.threshold}
    if reference.greedy is not None:
        tensors["greedy/prompts"] = torch.cat(reference.greedy.prompts)
        tensors["greedy/lengths"] = torch.tensor([len(prompt) for prompt in reference.greedy.prompts])
        tensors["greedy/tokens"] = reference.greedy.tokens
    # Sorted, so that the same content is the same bytes; not by save_file, whose files only their owner can read.
    in_order = {name: tensor.clone() for name, tensor in sorted(tensors.items())}
    file.write_bytes(save(in_order, metadata={"reference": json.dumps(header)}))


def load_reference(file: Path) -> Reference:
    """Raises `ReferenceError` for anything that `save_reference` does not write."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
        if length > MAX_HEADER:
            raise ValueError(f"a header of {length} bytes, more than {MAX_HEADER}")
        with safe_open(file, framework="pt") as opened:
            header = json.loads(opened.metadata()["reference"])
            names = set(opened.keys())
            sequences, expected = [], []
            for entry in header["sequences"]:
                calls, logits = [], []
                for i, call in enumerate(entry["calls"]):
                    prefix = f"{entry['name']}/{i}/"
                    calls.append(_call(opened, prefix, call))
                    logits.append(_expected(opened, prefix, call, len(calls[-1].rows), names))
                if not calls or (entry["name"].startswith("whole") and any(e.float32 is None for e in logits)):
                    raise ValueError(f"{entry['name']}: no calls, or no logits of the float32 model")
                sequences.append(Sequence(str(entry["name"]), tuple(calls)))
                expected.append(tuple(logits))
            task = None if header.get("task") is None else _task(opened, header["task"])
            greedy = _greedy(opened) if "greedy/tokens" in names else None
            floor_db = _decibels(header["floor_db"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        # A RuntimeError is also what deep nesting raises.
        raise ReferenceError(f"{file}: not readable as recorded calls: {error}") from error
    # A file that was cut down must not pass: each use of the contract is there.
    found = [sequence.name for sequence in sequences]
    kinds = {sequence.kind for sequence in sequences}
    if missing := KINDS - kinds:
        raise ReferenceError(f"{file}: lacks the recorded calls {', '.join(sorted(missing))}")
    if kinds != KINDS or len(set(found)) < len(found):
        raise ReferenceError(f"{file}: holds recorded calls of no known kind, or of the same name")
    return Reference(tuple(sequences), tuple(expected), floor_db, task, greedy)


def _call(opened: Any, prefix: str, entry: dict[str, Any]) -> Call:
    tokens, rows = _tensor(opened, prefix + "tokens", torch.int64, 1), _tensor(opened, prefix + "rows", torch.int64, 1)
    start_pos, kv_len = entry["start_pos"], entry["kv_len"]
    if type(start_pos) is not int or type(kv_len) is not int or not 0 <= start_pos < kv_len < 2**31:
        raise ValueError(f"{prefix}: start_pos {start_pos!r}, kv_len {kv_len!r}")
    if not len(tokens) or not len(rows):
        raise ValueError(f"{prefix}: no tokens, or no rows")
    return Call(tokens, start_pos, kv_len, rows)


def _decibels(value: Any) -> float:
    if value is None:
        return math.inf
    if not isinstance(value, float) or math.isnan(value):
        raise ValueError(f"floor_db {value!r}")
    return value


def _expected(opened: Any, prefix: str, entry: dict[str, Any], n_rows: int, names: set[str]) -> Expected:
    margin, floor_db = entry["tie_margin"], _decibels(entry["floor_db"])
    if margin is not None and not (isinstance(margin, float) and margin >= 0):
        raise ValueError(f"{prefix}: tie_margin {margin!r}")
    margin = math.inf if margin is None else margin
    eager = _tensor(opened, prefix + "eager", torch.float32, 2, n_rows)
    if prefix + "columns" not in names:
        return Expected(eager, None, None, None, margin, floor_db=floor_db)
    columns = _tensor(opened, prefix + "columns", torch.int64, 2, n_rows)
    kept = {
        "vector": (torch.float32, 2),
        "top1": (torch.int64, 1),
        "values": (torch.float32, 2),
        "rest": (torch.float32, 1),
    }
    float32 = Summary(**{f: _tensor(opened, f"{prefix}float32/{f}", *kind, n_rows) for f, kind in kept.items()})
    is_whole = columns.shape[1] == 0  # then the values are those of all columns
    if float32.vector.shape != eager.shape or float32.values.shape != (eager if is_whole else columns).shape:
        raise ValueError(f"{prefix}: logits of another shape")
    divergence = _tensor(opened, prefix + "divergence", torch.float32, 1, n_rows)
    plain = _tensor(opened, prefix + "plain", torch.float32, 1, n_rows) if prefix + "plain" in names else None
    if not all(nats.isfinite().all() for nats in (divergence, plain) if nats is not None):
        raise ValueError(f"{prefix}: a divergence that is not finite")
    targets = _tensor(opened, prefix + "targets", torch.int64, 1, n_rows) if prefix + "targets" in names else None
    if targets is not None:
        is_kept = (targets >= 0) & (targets < eager.shape[1]) if is_whole else (columns == targets[:, None]).any(1)
        if not is_kept.all():
            raise ValueError(f"{prefix}: a target that is none of the columns")
    return Expected(eager, float32, columns, divergence, margin, plain, targets, floor_db)


def _task(opened: Any, entry: dict[str, Any]) -> Task:
    n_new, threshold = entry["n_new"], entry["threshold"]
    if type(n_new) is not int or not 0 < n_new < 2**31 or not isinstance(threshold, float | int | None):
        raise ValueError(f"task: n_new {n_new!r}, threshold {threshold!r}")
    return Task(_prompts(opened, "task"), n_new, threshold)


def _greedy(opened: Any) -> Greedy:
    prompts = _prompts(opened, "greedy")
    tokens = _tensor(opened, "greedy/tokens", torch.int64, 2, len(prompts))
    if not 0 < tokens.shape[1] <= MAX_NEW:
        raise ValueError(f"greedy: {tokens.shape[1]} new tokens")
    return Greedy(prompts, tokens)


def _prompts(opened: Any, of: str) -> tuple[Tensor, ...]:
    lengths = _tensor(opened, f"{of}/lengths", torch.int64, 1).tolist()
    prompts = _tensor(opened, f"{of}/prompts", torch.int64, 1)
    if not lengths or min(lengths) < 1 or sum(lengths) != len(prompts):
        raise ValueError(f"{of}: prompts of another length")
    return prompts.split(lengths)


def _tensor(opened: Any, name: str, dtype: torch.dtype, n_dims: int, length: int | None = None) -> Tensor:
    """length: of the first dimension."""
    tensor: Tensor = opened.get_tensor(name)
    if tensor.dtype != dtype or tensor.dim() != n_dims or (length is not None and len(tensor) != length):
        raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)}")
    return tensor
