"""Writing with a diffusion language model: masks are filled in over several steps, the most confident first.

Shapes: B rows, L positions of the longest row with its answer, M masked positions, V vocabulary. Sources: Dream's
`diffusion_generate`, and Fast-dLLM (arXiv 2505.22618) for blocks, caches and the threshold; where we differ from
them on purpose, docs/generation.md says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from runtime import d2f
from runtime.accept import Steadiness, near_anchors, sliding, within_entropy_bound
from runtime.guards import ban_ends, ban_repetitions, end_later
from runtime.network import (
    Asked,
    Forward,
    ForwardAll,
    Network,
    Prompts,
    check_ids,
    check_prompts,
    checked_logits,
    checked_tokens,
    prompt_rows,
)
from runtime.options import OptionError, Options, check_whole
from runtime.sample import OWN, OWN_ENTROPY, entropy, most_confident, own_distributions, sample

# (step, tokens int64 [B, L]): may change them in place, or return others.
OnStep = Callable[[int, Tensor], Tensor | None]
# (step, tokens of the row int64, positions int64 [M], their logits float32 [M, V]): may return other logits.
OnLogits = Callable[[int, Tensor, Tensor, Tensor], Tensor | None]

T = TypeVar("T")
Calls = Generator[Asked, Tensor, T]  # asks for raw logits [1, K, V], call after call

MAX_STEPS = 100_000  # more than any cache has positions; the history holds the tokens of each


@dataclass(frozen=True)
class Generation:
    """What was written, and what it took.

    tokens: int64 [B, L], prompts and answers; rows with a shorter prompt are padded on the left with the pad id.
    answers: the new tokens of each row, int64; with `stop_at_eos` up to the end-of-sequence token, without it.
    logprobs: float32 of each token of the answers, if asked for: in nats, by the network's own distribution when it was
        written, before temperature and cuts; 0 for what follows an end.
    history: int64 [steps + 1, B, L], the tokens before the first step and after each; a row that ended earlier
        than others stays as it is.
    forward_calls, positions: calls of `forward`, and the tokens that they computed in all. A step that has nothing
        to write makes no call.
    """

    tokens: Tensor
    answers: tuple[Tensor, ...]
    history: Tensor
    forward_calls: int
    positions: int
    seconds: float
    logprobs: tuple[Tensor, ...] | None = None

    @property
    def tokens_per_second(self) -> float:
        return sum(len(answer) for answer in self.answers) / self.seconds


@torch.no_grad()
def generate(
    network: Network,
    prompt_ids: Prompts,
    *,
    max_new_tokens: int,
    steps: int | None = None,
    alg: str = "entropy",
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    alg_temp: float | None = None,
    eps: float = 1e-3,
    block_length: int | None = None,
    cache: Literal["prefix", "dual", "d2f"] | None = None,
    threshold: float | None = None,
    seed: int | None = None,
    stop_at_eos: bool = False,
    alpha: float | None = None,
    relaxed_threshold: float | None = None,
    radius: int = 4,
    kl_threshold: float | None = None,
    gamma: float | None = None,
    entropy_threshold: float | None = None,
    suffix_window: int | None = None,
    eos_penalty: float = 0.0,
    min_new_tokens: int = 0,
    no_repeat_ngram_size: int | None = None,
    logprobs: bool = False,
    on_step: OnStep | None = None,
    on_logits: OnLogits | None = None,
    together: ForwardAll | None = None,
) -> Generation:
    """Append `max_new_tokens` masks to each prompt, then fill every mask, those inside the prompts too.

    prompt_ids: one prompt, or several of any lengths; each row is answered as if it were alone.
    steps: how many in all, by default one a token. alg: what makes a position confident: the probability of its
        token (`maskgit_plus`), that minus the next token's (`topk_margin`), or a low entropy (`entropy`); `origin`
        picks positions at random.
    temperature, top_p, top_k: as everywhere; temperature 0 takes the best token. alg_temp: draw positions by their
        confidence instead of taking the best. eps: where the schedule of steps ends, in 0..1.
    block_length: write the answer in blocks of so many tokens, from left to right. cache: `prefix` computes only
        from the block on, `dual` only the block; each block starts with one call over everything. Blocks have the
        program's own length if none is given.
    threshold: write in each step all positions whose token has at least this probability, and the best one, whatever
        `alg` is. It is the network's own probability, before temperature, top_p and top_k.
        `steps`, if given, then says how many a step may write: without blocks masks / steps, and those that earlier
        steps did not use; in blocks all.
    alpha, relaxed_threshold with radius, kl_threshold: other rules beside a threshold; gamma, entropy_threshold: rules
    in its place (`runtime/accept.py`). With one of these the call that opens a block writes by the rule, too.
    suffix_window: of the masks behind a block so many positions are seen, and computed when it opens.
    eos_penalty: how much less likely an end token is while much of the answer is masked. min_new_tokens: before which
        the answer does not end. no_repeat_ngram_size: so many tokens in a row are not written twice (`guards.py`).
    seed: of all that is random; None takes torch's own generator. logprobs: also give those of the answers.
    stop_at_eos: cut each answer at its first end-of-sequence token, and end as soon as all before it is written.
    together: computes a call of each row at once, without a cache; what is random is then drawn in another order.

    Raises `OptionError` for a prompt or an option that cannot be, `FloatingPointError` for logits that are not
    finite.
    """
    started = time.perf_counter()
    if block_length is None and cache is not None:
        block_length = network.block_length
    if cache == "d2f" and threshold is None:
        threshold = d2f.THRESHOLD
    options = Options(
        alg=alg,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        alg_temp=alg_temp,
        eps=eps,
        block_length=block_length,
        cache=cache,
        threshold=threshold,
        stop_at_eos=stop_at_eos,
        alpha=alpha,
        relaxed_threshold=relaxed_threshold,
        radius=radius,
        kl_threshold=kl_threshold,
        gamma=gamma,
        entropy_threshold=entropy_threshold,
        suffix_window=suffix_window,
        eos_penalty=eos_penalty,
        min_new_tokens=min_new_tokens,
        no_repeat_ngram_size=no_repeat_ngram_size,
    )
    options.check()
    if together is not None and cache is not None:
        raise OptionError(f"cache {cache!r}: calls of several rows together are whole, and keep none")
    if cache != "d2f" and block_length is not None and options.goes_by_certainty:
        steps = None
    check_whole(max_new_tokens=max_new_tokens, steps=steps, seed=seed)
    prompts = prompt_rows(prompt_ids)
    check_prompts(network, prompts, max_new_tokens)
    if cache == "d2f":
        d2f.check(options, steps, prompts, network.mask_id)
    tokens_BL, lefts = _padded(network, prompts, max_new_tokens)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    run = Run(network, options, tokens_BL, lefts, max_new_tokens, generator, on_step, on_logits)
    if logprobs:
        run.logprobs_BL = torch.zeros(tokens_BL.shape)
    # One cache holds one row, and a row's blocks and steps are its own. Only the draws of `origin` go through the
    # whole batch, step by step, as in the reference.
    rows = list(range(len(prompts)))
    draws_together = alg == "origin" and block_length is None
    groups = [rows] if draws_together else [[row] for row in rows]
    if cache == "d2f" and block_length is not None:
        all_calls = [d2f.fill(run, row, block_length) for row in rows]
    else:
        all_calls = [run.blocks(group, run.plan(group, steps)) for group in groups]
    if together is not None:
        _answer_all(all_calls, together)
    else:
        for calls in all_calls:
            _answer(calls, network.start())
    return run.generation(time.perf_counter() - started)


def _answer(calls: Calls[None], forward: Forward) -> None:
    asked = next(calls, None)
    while asked is not None:
        try:
            asked = calls.send(forward(*asked))
        except StopIteration:
            return


def _answer_all(all_calls: list[Calls[None]], forward: ForwardAll) -> None:
    waiting = [(calls, asked) for calls in all_calls if (asked := next(calls, None)) is not None]
    while waiting:
        given = forward([asked for _, asked in waiting])
        still = []
        for (calls, _), logits_1KV in zip(waiting, given, strict=True):
            try:
                still.append((calls, calls.send(logits_1KV)))
            except StopIteration:
                continue
        waiting = still


@dataclass(frozen=True)
class Window:
    """Columns first .. stop-1 are computed, and see those before `seen`."""

    first: int
    stop: int
    seen: int


@dataclass
class Run:
    """The tokens as they are filled in. Columns are those of the padded rows."""

    network: Network
    options: Options
    tokens_BL: Tensor
    lefts: list[int]  # columns of padding that each row starts with
    max_new_tokens: int
    generator: torch.Generator | None
    on_step: OnStep | None
    on_logits: OnLogits | None
    forward_calls: int = 0
    positions: int = 0
    logprobs_BL: Tensor | None = None
    seen: dict[int, Steadiness] = field(default_factory=dict)  # by row, of the block that is being filled
    histories: list[list[Tensor]] = field(init=False)
    begin: int = field(init=False)  # the column where the answers begin

    def __post_init__(self) -> None:
        self.histories = [[row_L.clone()] for row_L in self.tokens_BL]
        self.begin = self.tokens_BL.shape[1] - self.max_new_tokens

    def plan(self, rows: list[int], steps: int | None) -> list[tuple[int, int, int, int]]:
        """(start, end, steps, most tokens of a step with a threshold) of each block of these rows.

        Masks inside a prompt are a first block, then comes the answer in blocks. Raises `OptionError`.
        """
        length, block_length = self.tokens_BL.shape[1], self.options.block_length
        blocks = [(0, length)]
        if block_length is not None:
            inside = torch.cat([self.masked(row, 0, self.begin) for row in rows]).tolist()
            blocks = [(min(inside), self.begin)] if inside else []
            blocks += [(start, min(start + block_length, length)) for start in range(self.begin, length, block_length)]
        n_masks = max(len(self.masked(row)) for row in rows)
        n_steps = _share(max(1, n_masks, len(blocks)) if steps is None else steps, len(blocks))
        # Fast-dLLM's threshold without blocks keeps to the pace that the steps set, if they are given.
        most = n_masks if steps is None else max(1, n_masks // steps)
        return [(start, end, n, most) for (start, end), n in zip(blocks, n_steps, strict=True)]

    def blocks(self, rows: list[int], plan: list[tuple[int, int, int, int]]) -> Calls[None]:
        for block in plan:
            yield from self.fill(rows, *block)

    def fill(self, rows: list[int], start: int, end: int, n_steps: int, most_a_step: int) -> Calls[None]:
        """Fill the masks of columns start .. end-1 in `n_steps` steps, or in as many as the rule takes.

        In blocks, the first step computes the whole row, which is what the caches start from. If there are more
        steps, it writes nothing but the block's first token (Fast-dLLM), or what the rule accepts.
        """
        options, in_blocks = self.options, self.options.block_length is not None
        by_rule = options.goes_by_certainty
        opens_alone = in_blocks and not options.writes_at_once
        n_masks = {row: len(self.masked(row, start, end)) for row in rows}
        if by_rule:
            # Each step writes a token at least: so many are enough whatever the network says.
            n_steps = opens_alone + max(1, *n_masks.values())
        times = torch.linspace(1, options.eps, n_steps + 1)
        unused = dict.fromkeys(rows, 0)  # tokens that the rule kept earlier steps from writing
        self.seen = {row: Steadiness() for row in rows}
        for i in range(n_steps):
            if options.stop_at_eos and not any(len(self.masked(row)) for row in rows):
                return
            is_last = i == n_steps - 1
            opens = opens_alone and i == 0 and not is_last
            chosen = [self.masked(row, start, start + 1 if opens else end) for row in rows]
            writes_all = is_last or opens or by_rule
            share = torch.ones(()) if writes_all else 1 - times[i + 1] / times[i]
            if options.alg == "origin" and not opens:
                chosen, share = self._drawn(chosen, share), torch.ones(())
            for row, columns_M in zip(rows, chosen, strict=True):
                n = int(len(columns_M) * share)
                goes_by_rule = by_rule and not is_last
                if goes_by_rule:
                    unused[row] += most_a_step
                    n = min(n, unused[row])
                window = self._window(row, start, end, is_whole=i == 0)
                block = n_masks[row] if goes_by_rule else None
                fills_cache = options.cache is not None and i == 0
                unused[row] -= yield from self._write(row, columns_M, n, block, window, fills_cache)
            self.after_step(rows)
            is_full = not any(len(self.masked(row, start, end)) for row in rows)
            if by_rule and i >= opens_alone and is_full:
                return

    def _window(self, row: int, start: int, end: int, is_whole: bool) -> Window:
        """What the cache knows of columns that are not computed stands."""
        beyond = self.options.suffix_window
        seen = self.tokens_BL.shape[1] if beyond is None else min(end + beyond, self.tokens_BL.shape[1])
        if is_whole or self.options.cache is None:
            return Window(self.lefts[row], seen, seen)
        return Window(max(start, self.lefts[row]), end if self.options.cache == "dual" else seen, seen)

    def _write(
        self, row: int, columns_M: Tensor, n: int, block: int | None, window: Window, fills_cache: bool
    ) -> Calls[int]:
        """Write the n most confident of these masks, or what the rule accepts of them; how many.

        block: the masks that the block had at first, where a rule decides.
        """
        left = self.lefts[row]
        if n == 0 and not fills_cache:
            return 0
        # Logits are read shifted: a token comes from the row before it, the first from its own.
        sources_M = (columns_M - 1).clamp_min(left) if n else torch.tensor([left])
        window = replace(window, first=min(window.first, int(sources_M.min())))
        logits_MV = yield from self.logits(row, window.first, window.stop, window.seen, sources_M)
        return self.choose(row, columns_M, n, block, logits_MV) if n else 0

    def choose(self, row: int, columns_M: Tensor, n: int, block: int | None, logits_MV: Tensor) -> int:
        """Write by what the network says of these masks; how many. As for `_write`; with n = 0 all that are accepted,
        and none if none is.
        """
        own_MV = logits_MV
        logits_MV = self._guarded(row, columns_M, logits_MV)
        if self.on_logits is not None:
            left = self.lefts[row]
            step, tokens_L = len(self.histories[row]) - 1, self.tokens_BL[row, left:]
            changed = self.on_logits(step, tokens_L, columns_M - left, logits_MV)
            logits_MV = logits_MV if changed is None else checked_logits(changed, logits_MV)
        options = self.options
        alg = options.alg if block is None else OWN if options.entropy_threshold is None else OWN_ENTROPY
        tokens_M, confidence_M = sample(
            logits_MV, self.network.mask_id, alg, options.temperature, options.top_p, options.top_k, self.generator
        )
        best_n = most_confident(confidence_M, n or len(columns_M), options.alg_temp, self.generator)
        if block is not None:
            is_accepted_M = self._accepted(row, columns_M, confidence_M, logits_MV, block)
            if n:
                is_accepted_M[best_n[0]] = True
            best_n = best_n[is_accepted_M[best_n]]
        self.tokens_BL[row, columns_M[best_n]] = tokens_M[best_n]
        if self.logprobs_BL is not None:
            own_nV, _ = own_distributions(own_MV[best_n], self.network.mask_id)
            written_n1 = tokens_M[best_n][:, None]
            self.logprobs_BL[row, columns_M[best_n]] = own_nV.log_softmax(-1).gather(1, written_n1)[:, 0]
        if options.stop_at_eos:
            self._cut(row)
        return len(best_n)

    def _guarded(self, row: int, columns_M: Tensor, logits_MV: Tensor) -> Tensor:
        options, network = self.options, self.network
        if not (options.eos_penalty or options.min_new_tokens or options.no_repeat_ngram_size):
            return logits_MV
        logits_MV = logits_MV.clone()  # they are the network's
        if options.eos_penalty:
            share_masked = len(self.masked(row, self.begin)) / max(1, self.max_new_tokens)
            end_later(logits_MV, network.eos_ids, options.eos_penalty, share_masked)
        if options.min_new_tokens:
            ban_ends(logits_MV, columns_M, self.begin + options.min_new_tokens, network.eos_ids)
        if options.no_repeat_ngram_size is not None:
            left, tokens_L = self.lefts[row], self.tokens_BL[row, self.lefts[row] :]
            ban_repetitions(logits_MV, tokens_L, columns_M - left, options.no_repeat_ngram_size, network.mask_id)
        return logits_MV

    def _accepted(self, row: int, columns_M: Tensor, sure_M: Tensor, logits_MV: Tensor, block: int) -> Tensor:
        """bool [M]. sure_M: the network's own probability of the token, or its negative entropy for a rule of that."""
        options = self.options
        if options.entropy_threshold is not None:
            return -sure_M <= options.entropy_threshold
        if options.gamma is not None:
            return within_entropy_bound(
                sure_M, entropy(*own_distributions(logits_MV, self.network.mask_id)), options.gamma
            )
        assert options.threshold is not None
        if options.alpha is not None:
            return sure_M >= sliding(options.threshold, options.alpha, len(columns_M) / block)
        if options.relaxed_threshold is not None:
            return near_anchors(columns_M, sure_M, options.threshold, options.relaxed_threshold, options.radius)
        if options.kl_threshold is not None:
            _, probs_MV = own_distributions(logits_MV, self.network.mask_id)
            return self.seen[row].see(columns_M, probs_MV, options.kl_threshold) & (sure_M >= options.threshold)
        return sure_M >= options.threshold

    def logits(self, row: int, first: int, stop: int, seen: int, sources_M: Tensor) -> Calls[Tensor]:
        """Raw logits [M, V] of these columns, of a call that computes columns first .. stop-1 and sees those before
        `seen`; several calls if one may not ask for so many at once.
        """
        left, tokens_T = self.lefts[row], self.tokens_BL[row, first:stop]
        logits = []
        for sources_K in sources_M.split(self.network.max_rows):
            asked = Asked(tokens_T, first - left, seen - left, sources_K - first)
            logits.append((yield asked)[0])
            self.forward_calls += 1
            self.positions += len(tokens_T)
        return torch.cat(logits) if len(logits) > 1 else logits[0]

    def _drawn(self, columns: list[Tensor], share: Tensor) -> list[Tensor]:
        """`origin`: of the masks of all rows, in order, each with probability `share`."""
        lengths = [len(columns_M) for columns_M in columns]
        is_drawn = torch.rand(sum(lengths), generator=self.generator) < share
        return [columns_M[drawn] for columns_M, drawn in zip(columns, is_drawn.split(lengths), strict=True)]

    def masked(self, row: int, start: int = 0, end: int | None = None) -> Tensor:
        """Columns [M] of the masks from `start` to before `end`."""
        start = max(start, self.lefts[row])  # the pad id may be the mask id
        return (self.tokens_BL[row, start:end] == self.network.mask_id).nonzero()[:, 0] + start

    def _cut(self, row: int) -> None:
        """Once all before the answer's first end of sequence is written, what follows it is end of sequence too."""
        found = self._eos_columns(row)
        if len(found) and not len(self.masked(row, 0, int(found[0]))):
            self.tokens_BL[row, found[0] :] = self.tokens_BL[row, found[0]].item()

    def _eos_columns(self, row: int) -> Tensor:
        is_eos = torch.isin(self.tokens_BL[row, self.begin :], torch.tensor(self.network.eos_ids))
        return is_eos.nonzero()[:, 0] + self.begin

    def after_step(self, rows: list[int]) -> None:
        if self.on_step is not None:
            changed = self.on_step(len(self.histories[rows[0]]) - 1, self.tokens_BL)
            if changed is not None:
                self.tokens_BL.copy_(checked_tokens(changed, self.tokens_BL))
            check_ids(self.network, self.tokens_BL)
        for row in rows:
            self.histories[row].append(self.tokens_BL[row].clone())

    def generation(self, seconds: float) -> Generation:
        length = max(map(len, self.histories))
        history = [torch.stack(states + states[-1:] * (length - len(states))) for states in self.histories]
        answers, logprobs = [], []
        for row in range(len(self.tokens_BL)):
            eos = self._eos_columns(row) if self.options.stop_at_eos else torch.empty(0)
            end = int(eos[0]) if len(eos) else None
            answers.append(self.tokens_BL[row, self.begin : end])
            if self.logprobs_BL is not None:
                logprobs.append(self.logprobs_BL[row, self.begin : end])
        cost = (self.forward_calls, self.positions, seconds)
        kept = None if self.logprobs_BL is None else tuple(logprobs)
        return Generation(self.tokens_BL, tuple(answers), torch.stack(history, 1), *cost, kept)


def _padded(network: Network, prompts: list[Tensor], max_new_tokens: int) -> tuple[Tensor, list[int]]:
    """Tokens [B, L] with the masks to fill, and how many columns of padding each row starts with."""
    longest = max(map(len, prompts))
    tokens_BL = torch.full((len(prompts), longest + max_new_tokens), network.mask_id)
    lefts = [longest - len(prompt) for prompt in prompts]
    for row_L, prompt, left in zip(tokens_BL, prompts, lefts, strict=True):
        row_L[:left] = network.pad_id
        row_L[left:longest] = prompt
    return tokens_BL, lefts


def _share(steps: int, n_blocks: int) -> list[int]:
    """Steps of each block; what does not divide goes to the first ones."""
    if not 1 <= steps <= MAX_STEPS:
        raise OptionError(f"steps {steps}: must be at least 1, and at most {MAX_STEPS}")
    if steps < n_blocks:
        raise OptionError(f"steps {steps}: must be at least 1 for each of the {n_blocks} blocks")
    return [steps // n_blocks + (block < steps % n_blocks) for block in range(n_blocks)]
