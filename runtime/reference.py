"""Recorded calls and what eager gave for them: `reference.safetensors`, all that validation needs of a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from runtime.logits import Summary


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


@dataclass(frozen=True)
class Expected:
    """What one call should give.

    eager: from the same model in eager, the `vector` of a `Summary`. float32: from the float32 model, for whole
        sequences, by which quality is judged. columns: int64 [K, C], those of its values.
    tie_margin: how far the nearest quantized activation is from a rounding tie, in steps of its int8 grid
    (0..0.5); infinite without quantized activations.
    """

    eager: Tensor
    float32: Summary | None
    columns: Tensor | None
    tie_margin: float


@dataclass(frozen=True)
class Task:
    """Prompts, int64 [P] each, to write `n_new` tokens after: one a step, or all above the threshold."""

    prompts: tuple[Tensor, ...]
    n_new: int
    threshold: float | None


@dataclass(frozen=True)
class Reference:
    """expected[i][j] belongs to sequences[i].calls[j]."""

    sequences: tuple[Sequence, ...]
    expected: tuple[tuple[Expected, ...], ...]
    task: Task | None = None


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
            if logits.float32 is not None and logits.columns is not None:
                tensors[prefix + "columns"] = logits.columns
                for field, tensor in vars(logits.float32).items():
                    tensors[f"{prefix}float32/{field}"] = tensor.contiguous()
            margin = None if logits.tie_margin == float("inf") else logits.tie_margin
            calls.append({"start_pos": call.start_pos, "kv_len": call.kv_len, "tie_margin": margin})
        listing.append({"name": sequence.name, "calls": calls})
    header: dict[str, object] = {"sequences": listing}
    if reference.task is not None:
        tensors["task/prompts"] = torch.cat(reference.task.prompts)
        tensors["task/lengths"] = torch.tensor([len(prompt) for prompt in reference.task.prompts])
        header["task"] = {"n_new": reference.task.n_new, "threshold": reference.task.threshold}
    # Sorted, so that the same content is the same bytes.
    save_file(
        {name: tensor.clone() for name, tensor in sorted(tensors.items())},
        file,
        metadata={"reference": json.dumps(header)},
    )


def load_reference(file: Path) -> Reference:
    """Raises `ReferenceError`."""
    try:
        with safe_open(file, framework="pt") as opened:
            header = json.loads(opened.metadata()["reference"])
            names = set(opened.keys())
            sequences, expected = [], []
            for entry in header["sequences"]:
                calls, logits = [], []
                for i, call in enumerate(entry["calls"]):
                    prefix = f"{entry['name']}/{i}/"
                    tokens, rows = opened.get_tensor(prefix + "tokens"), opened.get_tensor(prefix + "rows")
                    calls.append(Call(tokens, call["start_pos"], call["kv_len"], rows))
                    margin = float("inf") if call["tie_margin"] is None else call["tie_margin"]
                    eager, float32, columns = opened.get_tensor(prefix + "eager"), None, None
                    if eager.dim() != 2 or len(eager) != len(rows):
                        raise ValueError(f"{prefix}: logits of another shape")
                    if prefix + "columns" in names:
                        columns = opened.get_tensor(prefix + "columns")
                        kept = [f.name for f in fields(Summary)]
                        float32 = Summary(**{f: opened.get_tensor(f"{prefix}float32/{f}") for f in kept})
                        if float32.vector.shape != eager.shape or len(columns) != len(rows):
                            raise ValueError(f"{prefix}: logits of another shape")
                    elif entry["name"].startswith("whole"):
                        raise ValueError(f"{prefix}: no logits of the float32 model")
                    if not isinstance(margin, float):
                        raise ValueError(f"{prefix}: tie_margin {margin!r}")
                    logits.append(Expected(eager, float32, columns, margin))
                sequences.append(Sequence(entry["name"], tuple(calls)))
                expected.append(tuple(logits))
            task = header.get("task")
            if task is not None:
                lengths = opened.get_tensor("task/lengths").tolist()
                prompts = opened.get_tensor("task/prompts").to(torch.int64).split(lengths)
                task = Task(tuple(prompts), task["n_new"], task["threshold"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ReferenceError(f"{file}: not readable as recorded calls: {error}") from error
    # A file that was cut down must not pass: each use of the contract is there.
    kinds = {name.rstrip("0123456789").rstrip("-") for name in (sequence.name for sequence in sequences)}
    if missing := KINDS - kinds:
        raise ReferenceError(f"{file}: lacks the recorded calls {', '.join(sorted(missing))}")
    return Reference(tuple(sequences), tuple(expected), task)
