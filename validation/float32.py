"""What the float32 model gives: one and the same for all recipes of a checkpoint, so it can be kept."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from recipes.stored import Weights
from runtime.network import Asked
from validation.eager import run_by_layer
from validation.effort import effort_for
from validation.greedy import NEW, PROMPT, write_greedily
from validation.logits import Summary, summarize, top_columns
from validation.material import Material, whole_sequences
from validation.progress import Report, silent, within
from validation.reference import Call, Greedy, Sequence, Task
from validation.replay import Answers, solve_prompts
from validation.settings import ValidationConfig

TOGETHER = 2**26  # bytes of activations of the prompts that go through a layer together
DIGEST = 32  # bytes of the sha256 that a kept file begins with


@dataclass(frozen=True)
class Request:
    """What validation asks of it. n_new: tokens of an answer. max_seq_len, max_rows: of the program."""

    material: Material
    task: Task | None
    n_new: int
    settings: ValidationConfig
    max_seq_len: int
    max_rows: int


@dataclass(frozen=True)
class Float32:
    """whole: what quality is measured over, one call each. targets: by name the tokens that the rows of texts predict.

    logits: by name the float32 model's, and the columns of their values. greedy: where there are texts. answers: to the
    task, if any.
    """

    whole: tuple[Sequence, ...]
    targets: dict[str, Tensor]
    logits: dict[str, tuple[Summary, Tensor]]
    greedy: Greedy | None = None
    answers: Answers | None = None


def enough(request: Request) -> Request:
    """Of the smallest program of which the float32 model gives the same: most programs are longer than anything that it
    is asked.
    """
    material, n_new = request.material, request.n_new
    longest = max(len(tokens) for tokens in (*material.prompts, *material.texts)) + n_new
    return replace(
        request,
        max_seq_len=min(request.max_seq_len, max(longest, 2 * NEW, PROMPT + NEW)),
        max_rows=min(request.max_rows, max(longest, NEW)),
    )


def run_float32(float32: Weights, request: Request, report: Report) -> Float32:
    material, lengths = request.material, (request.max_seq_len, request.max_rows)
    answers = None if request.task is None else task_answers(float32, request.task, within("float32", report))
    whole, targets = whole_sequences(float32, material, request.n_new, request.settings, *lengths, report)
    prompts = material.texts[: effort_for(float32.model.config).greedy]
    greedy = greedy_answers(float32, prompts, *lengths, report) if prompts else None
    return Float32(whole, targets, logits_of(float32, whole, targets, report), greedy, answers)


def logits_of(
    float32: Weights, whole: tuple[Sequence, ...], targets: dict[str, Tensor], report: Report = silent
) -> dict[str, tuple[Summary, Tensor]]:
    found: dict[str, tuple[Summary, Tensor]] = {}

    def keep(i: int, _: int, logits_KV: Tensor) -> None:
        columns_KC = top_columns(logits_KV, targets.get(whole[i].name))
        found[whole[i].name] = summarize(logits_KV, columns_KC), columns_KC

    run_by_layer(float32, whole, keep, torch.float32, within("float32", report))
    return found


def greedy_answers(float32: Weights, texts: list[Tensor], max_seq_len: int, max_rows: int, report: Report) -> Greedy:
    """What the float32 model writes after texts."""
    n_new = min(NEW, max_rows, max_seq_len // 2)
    prompts = tuple(text[: min(PROMPT, max_seq_len - n_new)] for text in texts)
    run = partial(whole_calls, float32, within("answers", report))
    return Greedy(prompts, write_greedily(run, prompts, n_new, float32.model.config.mask_token_id))


def task_answers(float32: Weights, task: Task, report: Report) -> Answers:
    """The float32 model's, many prompts at a time, so that its weights are read once for all of them."""
    bytes_a_token = 4 * 8 * float32.model.config.hidden_size
    groups: list[list[Tensor]] = [[]]
    for prompt in task.prompts:
        if groups[-1] and sum(len(p) + task.n_new for p in (*groups[-1], prompt)) * bytes_a_token > TOGETHER:
            groups.append([])
        groups[-1].append(prompt)
    found, n_done = [], 0
    for group in groups:

        def together(asked: list[Asked]) -> list[Tensor]:
            calls = [Call(*arguments) for arguments in asked]
            return [logits_KV[None] for logits_KV in whole_calls(float32, silent, calls)]

        report("prompts", n_done, len(task.prompts))
        found.append(solve_prompts(float32.model, group, task, together))
        n_done += len(group)
    return Answers(torch.cat([answers.tokens for answers in found]), torch.cat([answers.steps for answers in found]))


def whole_calls(float32: Weights, report: Report, calls: list[Call]) -> list[Tensor]:
    """Logits [K, V] of calls that see nothing but their own tokens, in float32."""
    found: dict[int, Tensor] = {}

    def keep(i: int, _: int, logits_KV: Tensor) -> None:
        found[i] = logits_KV

    asked = tuple(Sequence("alone", (call,)) for call in calls)
    run_by_layer(float32, asked, keep, torch.float32, report)
    return [found[i] for i in range(len(calls))]


def save_float32(found: Float32, file: Path) -> None:
    """In one step: a process that is killed leaves the file as it was. Raises `OSError`."""
    tensors: dict[str, Tensor] = {}
    for sequence in found.whole:
        (call,), name = sequence.calls, sequence.name
        summary, columns = found.logits[name]
        tensors |= {f"{name}/tokens": call.tokens, f"{name}/rows": call.rows, f"{name}/columns": columns}
        tensors |= {f"{name}/{field}": tensor for field, tensor in vars(summary).items()}
        if name in found.targets:
            tensors[f"{name}/targets"] = found.targets[name]
    if found.greedy is not None:
        tensors |= {f"greedy/prompts/{i:03d}": prompt for i, prompt in enumerate(found.greedy.prompts)}
        tensors["greedy/tokens"] = found.greedy.tokens
    if found.answers is not None:
        tensors |= {f"answers/{field}": tensor for field, tensor in vars(found.answers).items()}
    content = save({name: tensor.clone() for name, tensor in tensors.items()})
    half = file.with_suffix(f".{os.getpid()}.partial")
    try:
        half.write_bytes(hashlib.sha256(content).digest() + content)
        half.rename(file)
    finally:
        half.unlink(missing_ok=True)


def load_float32(file: Path) -> Float32 | None:
    """None for one that is not there, or is not as it was written. Raises `OSError`."""
    try:
        kept = file.read_bytes()
    except FileNotFoundError:
        return None
    digest, content = kept[:DIGEST], kept[DIGEST:]
    if hashlib.sha256(content).digest() != digest:
        return None
    tensors = load(content)
    whole, targets, logits = [], {}, {}
    for name in sorted({key.partition("/")[0] for key in tensors if key.startswith("whole")}):
        tokens = tensors[f"{name}/tokens"]
        whole.append(Sequence(name, (Call(tokens, 0, len(tokens), tensors[f"{name}/rows"]),)))
        summary = Summary(**{f.name: tensors[f"{name}/{f.name}"] for f in fields(Summary)})
        logits[name] = summary, tensors[f"{name}/columns"]
        if f"{name}/targets" in tensors:
            targets[name] = tensors[f"{name}/targets"]
    greedy, answers = None, None
    if "greedy/tokens" in tensors:
        prompts = sorted(key for key in tensors if key.startswith("greedy/prompts/"))
        greedy = Greedy(tuple(tensors[key] for key in prompts), tensors["greedy/tokens"])
    if "answers/tokens" in tensors:
        answers = Answers(**{f.name: tensors[f"answers/{f.name}"] for f in fields(Answers)})
    return Float32(tuple(whole), targets, logits, greedy, answers)
