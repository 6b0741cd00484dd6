"""What validation runs: calls in every use of the contract, and what eager gives for them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from model import DreamEdge
from pipeline.config import TaskConfig, ValidationConfig
from pipeline.errors import UsageError
from pipeline.load import Loaded
from pipeline.tasks import load_checker, read_prompts
from pipeline.tokenizer import encode
from runtime.generate import generate
from runtime.reference import Call, Expected, Reference, Sequence, Task

MAX_BLOCK = 32
MIN_PROMPTS = 8
N_SHORT, N_SHORT_CANDIDATES = 5, 48  # of each kind


def check_settings(task: TaskConfig, settings: ValidationConfig) -> None:
    """Before the long work. Raises `UsageError` for settings that nothing can be validated with."""
    if settings.n_prompts < MIN_PROMPTS:
        raise UsageError(f"validation.n_prompts {settings.n_prompts}: at least {MIN_PROMPTS} make a figure of quality")
    if not 0 <= settings.seed < 2**63:
        raise UsageError(f"validation.seed {settings.seed}: must be from 0 to 2**63 - 1")
    if task.new_tokens < 1:
        raise UsageError(f"task.new_tokens {task.new_tokens}: must be at least 1")
    if task.n_solve < 0:
        raise UsageError(f"task.n_solve {task.n_solve}: must be at least 0")
    if task.threshold is not None and not 0 <= task.threshold <= 1:
        raise UsageError(f"task.threshold {task.threshold}: is a probability, 0 to 1")
    if task.n_solve and (task.prompts is None or task.checker is None):
        raise UsageError(f"task.n_solve {task.n_solve}: solving takes task.prompts and task.checker")
    if task.checker is not None:
        load_checker(Path(task.checker))
    if task.prompts is not None:
        read_prompts(Path(task.prompts))


def prompts_of(loaded: Loaded, task: TaskConfig, validation: ValidationConfig, max_seq_len: int) -> list[Tensor]:
    """Prompts of the task, int64 [P] each, by the checkpoint's own tokenizer; random tokens without one.

    Cut to half of max_seq_len, so that there is room for an answer.
    """
    n = max(validation.n_prompts, task.n_solve)
    room = max(1, max_seq_len // 2)
    if task.prompts is not None and loaded.tokenizer is not None:
        encoded = [encode(loaded.tokenizer, text)[:room] for text in read_prompts(Path(task.prompts))[:n]]
        return [torch.tensor(ids) for ids in encoded if ids]
    generator = torch.Generator().manual_seed(validation.seed)
    vocab = torch.arange(loaded.config.vocab_size)
    vocab = vocab[vocab != loaded.config.mask_token_id]
    length = min(room, 24)
    return [vocab[torch.randint(len(vocab), (length,), generator=generator)] for _ in range(validation.n_prompts)]


def whole_sequences(
    float32: DreamEdge, prompts: list[Tensor], new_tokens: int, settings: ValidationConfig, S: int, max_rows: int
) -> list[Sequence]:
    """Prompts with half-written answers, from all masks to few, as generation sees them.

    Rows are those that are read: the one before a mask predicts it. The answers are the float32 model's own.
    """
    mask_id = float32.config.mask_token_id
    generator = torch.Generator().manual_seed(settings.seed)
    sequences = []
    for i, prompt in enumerate(prompts[: settings.n_prompts]):
        n_new = min(new_tokens, S - len(prompt))
        tokens = generate(float32, prompt, max_new_tokens=n_new, alg="maskgit_plus").tokens[0]
        hidden = torch.rand(n_new, generator=generator) < 1 - i / settings.n_prompts
        hidden[int(torch.randint(n_new, (1,), generator=generator))] = True
        tokens[len(prompt) :][hidden] = mask_id
        rows = (hidden.nonzero()[:, 0] + len(prompt) - 1)[:max_rows]
        sequences.append(Sequence(f"whole-{i:03d}", (Call(tokens, 0, len(tokens), rows),)))
    return sequences


def contract_sequences(prompts: list[Tensor], mask_id: int, S: int, max_rows: int) -> list[Sequence]:
    """Every other use of the contract, on the first prompt; S, max_seq_len, is at least 4."""
    L = min(len(prompts[0]) + MAX_BLOCK, S)
    tokens = torch.cat([prompts[0], torch.full((L,), mask_id)])[:L]
    P = L - min(MAX_BLOCK, L // 2)  # the block is [P, L)
    middle = (P + L) // 2
    other = prompts[-1].repeat(L)[: middle - P]

    def block(start: int, tokens: Tensor, kv_len: int) -> Call:
        return Call(tokens, start, kv_len, torch.arange(len(tokens))[:max_rows])

    def rows(*rows: int) -> Call:
        return Call(tokens, 0, L, torch.tensor(rows))

    whole, last = block(0, tokens, L), block(P, tokens[P:], L)
    prefill = Call(tokens[:P], 0, P, torch.tensor([P - 1]))
    longest = torch.cat([*prompts, torch.full((S,), mask_id)])[:S]
    spread = torch.linspace(0, S - 1, min(8, max_rows)).long()
    return [
        Sequence("prefill-then-block", (prefill, last, last)),
        Sequence("rewrite-inside", (whole, block(P, other, L), block(P, tokens[P:middle], L))),
        Sequence("suffix-hidden", (whole, block(P, other, middle), block(middle, tokens[middle:], L))),
        Sequence("rows-subset", (rows(L - 1, 0, L // 2), rows(1))),
        Sequence("one-token", tuple(block(i, tokens[i : i + 1], i + 1) for i in range(4))),
        Sequence("one-inside", (whole, block(P - 1, tokens[:1], L), block(0, tokens[P : P + 1], L))),
        Sequence("max-length", (Call(longest, 0, S, spread), block(S - 1, longest[-1:], S))),
    ]


@torch.no_grad()
def short_sequences(model: DreamEdge, prompts: list[Tensor]) -> list[Sequence]:
    """A few tokens, chosen so that no activation comes near a rounding tie: here a single wrong weight shows.

    In longer calls of a quantized model some activation always sits so near a tie that float32 rounding moves it
    to another integer, and one such step drowns the effect of a wrong weight. See docs/validation.md. Three kinds:
    two to four tokens at once; two tokens, then more after them; four tokens, then some of them again.
    """
    found: dict[str, list[tuple[float, tuple[Call, ...]]]] = {"short": [], "short-append": [], "short-rewrite": []}
    for i in range(N_SHORT_CANDIDATES):
        tokens = prompts[i % len(prompts)].roll(-5 * i).repeat(4)[:4]
        n, m = 2 + i % 3, 1 + i % 2

        def call(tokens: Tensor, start: int, kv_len: int) -> Call:
            return Call(tokens, start, kv_len, torch.arange(len(tokens)))

        kinds = {
            "short": (call(tokens[:n], 0, n),),
            "short-append": (call(tokens[:2], 0, 2), call(tokens[2 : 2 + m], 2, 2 + m)),
            "short-rewrite": (call(tokens, 0, 4), call(tokens[:m], 1, 4)),
        }
        for kind, calls in kinds.items():
            forward = model.start(4)
            with TieMargin(model) as ties:
                for made in calls:
                    forward(made.tokens, made.start_pos, made.kv_len, made.rows)
            found[kind].append((ties.margin, calls))
    return [
        Sequence(f"{kind}-{k:02d}", calls)
        for kind, candidates in found.items()
        for k, (_, calls) in enumerate(sorted(candidates, key=lambda c: -c[0])[:N_SHORT])
    ]


@torch.no_grad()
def record(
    model: DreamEdge, float32: DreamEdge, sequences: tuple[Sequence, ...], task: Task | None, S: int
) -> Reference:
    """Run every call in eager through the (quantized) model and the float32 one."""
    expected = []
    for sequence in sequences:
        forwards = [m.start(S) for m in (model, float32)]
        logits = []
        # Over the whole sequence: what a call leaves in the cache is as uncertain as the call.
        with TieMargin(model) as ties:
            for call in sequence.calls:
                eager, wide = (f(call.tokens, call.start_pos, call.kv_len, call.rows)[0] for f in forwards)
                logits.append(Expected(eager, wide, ties.margin))
        expected.append(tuple(logits))
    return Reference(sequences, tuple(expected), task)


class TieMargin:
    """While open, how near any dynamically quantized activation of `model` comes to a rounding tie.

    margin: in steps of the int8 grid, 0 (a tie) to 0.5. An activation nearer to a tie than float32 rounding can
    move it may become another integer on the device than in eager; both are right. torchao's grid: int8 for
    each token, from min(x, 0) to max(x, 0).
    """

    def __init__(self, model: nn.Module) -> None:
        self.margin = float("inf")
        self._linears = [m for m in model.modules() if isinstance(m, nn.Linear) and type(m.weight) is not nn.Parameter]
        self._linears = [m for m in self._linears if hasattr(m.weight, "activation_quantization")]
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> TieMargin:
        self._hooks = [linear.register_forward_pre_hook(self._look) for linear in self._linears]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _look(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].double()
        low = x.amin(-1, keepdim=True).clamp_max(0)
        high = x.amax(-1, keepdim=True).clamp_min(0)
        scale = ((high - low) / 255).clamp_min(torch.finfo(torch.float32).eps)
        for steps in (x / scale, low / scale):
            distance = (steps - steps.floor() - 0.5).abs().min().item()
            self.margin = min(self.margin, distance)


def task_of(loaded: Loaded, prompts: list[Tensor], task: TaskConfig, max_seq_len: int) -> Task | None:
    """The prompts that are to be solved, if the checkpoint can read the task."""
    if not task.n_solve or task.prompts is None or loaded.tokenizer is None:
        return None
    chosen = [prompt for prompt in prompts[: task.n_solve] if len(prompt) + task.new_tokens <= max_seq_len]
    return Task(tuple(chosen), task.new_tokens, task.threshold) if chosen else None
