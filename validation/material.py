"""What validation reads: a task's prompts, texts, or random tokens; and the sequences that quality is measured on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model import DreamEdgeConfig
from recipes.stored import Weights
from runtime.errors import UsageError
from runtime.tokenizer import encode
from validation.eager import run_by_layer
from validation.effort import effort_for
from validation.progress import Report, within
from validation.reference import Call, Sequence, Task
from validation.settings import MIN_PROMPTS, TaskConfig, ValidationConfig
from validation.tasks import read_prompts
from validation.texts import SHORTEST, TOKENS_PER_CHARACTER, hidden_of, read_texts, tokens_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PROMPT = 24  # tokens of a random one, and of a text that begins a call
LEAST_RATIO = 0.1  # of the tokens of a text, that are hidden: from so many to all


@dataclass(frozen=True)
class Material:
    """prompts: int64 [P] each, for every use of the contract. texts: int64 [T] each, whose tokens are hidden and asked
    for; empty where the model answers prompts of a task, or where nothing can be read.

    source: the name of the texts' file. is_random: the prompts are random tokens, of which no quality can be told.
    """

    prompts: list[Tensor]
    texts: list[Tensor] = field(default_factory=list)
    source: str = ""
    is_random: bool = False


def material_of(
    checkpoint: Path,
    tokenizer: Tokenizer | None,
    config: DreamEdgeConfig,
    task: TaskConfig,
    validation: ValidationConfig,
    max_seq_len: int,
    bundled: Path,
) -> Material:
    """By the checkpoint's own tokenizer: `validation.prompts`, else the task's prompts, else the bundled text.

    Prompts are cut to half of max_seq_len, so that there is room for an answer. Raises `UsageError`.
    """
    room = max(1, max_seq_len // 2)
    texts, source = _texts(checkpoint, tokenizer, task, validation, bundled)
    effort = effort_for(config)
    length = min(effort.text, max_seq_len)
    texts = [tokens[:length] for tokens in texts[: validation.n_prompts]]
    if task.prompts is not None and tokenizer is not None:
        n = max(validation.n_prompts, task.n_solve)
        encoded = [encode(tokenizer, text)[:room] for text in read_prompts(Path(task.prompts))[:n]]
        usable = [torch.tensor(ids) for ids in encoded if ids]
        if len(usable) < MIN_PROMPTS:
            raise UsageError(f"{task.prompts}: {len(usable)} prompts that hold text, at least {MIN_PROMPTS} are needed")
        return Material(usable, texts, source)
    if texts:
        return Material([tokens[: min(room, PROMPT)] for tokens in texts], texts, source)
    generator = torch.Generator().manual_seed(validation.seed)
    vocab = torch.arange(config.vocab_size)
    vocab = vocab[vocab != config.mask_token_id]
    n, length = min(validation.n_prompts, effort.random), min(room, PROMPT)
    drawn = [vocab[torch.randint(len(vocab), (length,), generator=generator)] for _ in range(n)]
    return Material(drawn, is_random=True)


def _texts(
    checkpoint: Path, tokenizer: Tokenizer | None, task: TaskConfig, validation: ValidationConfig, bundled: Path
) -> tuple[list[Tensor], str]:
    if validation.prompts is not None:
        if tokenizer is None:
            raise UsageError(f"validation.prompts: {checkpoint} has no tokenizer to read {validation.prompts} with")
        file, key = Path(validation.prompts), "validation.prompts"
        return tokens_of(tokenizer, read_texts(file, key, checkpoint), f"{key}: {file}", MIN_PROMPTS), file.name
    if task.prompts is not None or tokenizer is None:
        return [], ""
    usable = []
    for text in read_texts(bundled, "validation.prompts", checkpoint):
        try:
            ids = encode(tokenizer, text)
        except UsageError:  # the vocabulary has no token for a character of it
            continue
        if SHORTEST <= len(ids) <= TOKENS_PER_CHARACTER * len(text):
            usable.append(torch.tensor(ids))
    return (usable, bundled.name) if len(usable) >= MIN_PROMPTS else ([], "")


def task_of(tokenizer: Tokenizer | None, prompts: list[Tensor], task: TaskConfig, max_seq_len: int) -> Task | None:
    """The prompts that are to be solved, if the checkpoint can read the task."""
    if not task.n_solve or task.prompts is None or tokenizer is None:
        return None
    chosen = [prompt for prompt in prompts[: task.n_solve] if len(prompt) + task.new_tokens <= max_seq_len]
    return Task(tuple(chosen), task.new_tokens, task.threshold) if chosen else None


def whole_sequences(
    float32: Weights,
    material: Material,
    n_new: int,
    settings: ValidationConfig,
    max_seq_len: int,
    max_rows: int,
    report: Report,
) -> tuple[tuple[Sequence, ...], dict[str, Tensor]]:
    """(what quality is measured over, by name the tokens that the rows of texts predict): texts, else answers."""
    if material.texts:
        return hidden_texts(material.texts, float32.model.config.mask_token_id, settings.seed, max_rows)
    return half_written_answers(float32, material.prompts, n_new, settings, max_seq_len, max_rows, report), {}


def hidden_texts(
    texts: list[Tensor], mask_id: int, seed: int, max_rows: int
) -> tuple[tuple[Sequence, ...], dict[str, Tensor]]:
    """(sequences, by name the tokens [K] that their rows predict): texts of which some to all tokens are hidden.

    From a tenth to all, one after another anywhere, at the end, and in the middle.
    """
    generator = torch.Generator().manual_seed(seed)
    sequences, targets = [], {}
    for i, text in enumerate(texts):
        ratio = LEAST_RATIO + (1 - LEAST_RATIO) * i / max(1, len(texts) - 1)
        hidden = hidden_of(len(text), ratio, i % 3, generator)
        positions = hidden.nonzero()[:, 0]
        positions = positions[torch.linspace(0, len(positions) - 1, min(len(positions), max_rows)).long()]
        name = f"whole-{i:03d}"
        tokens = text.masked_fill(hidden, mask_id)
        sequences.append(Sequence(name, (Call(tokens, 0, len(tokens), positions - 1),)))
        targets[name] = text[positions]
    return tuple(sequences), targets


def half_written_answers(
    float32: Weights,
    prompts: list[Tensor],
    new_tokens: int,
    settings: ValidationConfig,
    S: int,
    max_rows: int,
    report: Report,
) -> tuple[Sequence, ...]:
    """Prompts with half-written answers, from all masks to few, as generation sees them.

    Rows are those that are read: the one before a mask predicts it. The answers are the model's own before it was
    quantized, all of their tokens written at once.
    """
    mask_id = float32.model.config.mask_token_id
    generator = torch.Generator().manual_seed(settings.seed)
    asked = []
    for prompt in prompts[: settings.n_prompts]:
        n_new = min(new_tokens, S - len(prompt))
        tokens = torch.cat([prompt, torch.full((n_new,), mask_id)])
        rows = torch.arange(len(prompt) - 1, len(tokens) - 1)
        asked.append(Sequence("answer", (Call(tokens, 0, len(tokens), rows),)))

    def write(i: int, _: int, logits_KV: Tensor) -> None:
        logits_KV[:, mask_id] = -torch.inf
        asked[i].calls[0].tokens[-len(logits_KV) :] = logits_KV.argmax(-1)

    run_by_layer(float32, tuple(asked), write, torch.float32, within("answers", report))
    sequences = []
    for i, sequence in enumerate(asked):
        tokens, n_new = sequence.calls[0].tokens, len(sequence.calls[0].rows)
        P = len(tokens) - n_new
        hidden = torch.rand(n_new, generator=generator) < 1 - i / len(asked)
        hidden[int(torch.randint(n_new, (1,), generator=generator))] = True
        tokens[P:][hidden] = mask_id
        rows = (hidden.nonzero()[:, 0] + P - 1)[:max_rows]
        sequences.append(Sequence(f"whole-{i:03d}", (Call(tokens, 0, len(tokens), rows),)))
    return tuple(sequences)
