"""Where the tokens of recorded calls lie in the one stream that goes through a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from validation.reference import Call, Sequence

LONG = 256  # tokens of a call, from which on it matters whether they are the same
NOT_WRITTEN, OWN = -2, -1  # what a position of the cache holds, where it is no token before


class Everywhere(Call):
    """Its one token stands for as many of them as it sees."""


@dataclass(frozen=True)
class Again(Call):
    """Has no tokens of its own: it gives what an equal call gave, that saw the same in its cache. same: its tokens."""

    same: slice


def once_each(sequences: tuple[Sequence, ...]) -> tuple[Sequence, ...]:
    """The same calls, of which each that was there before is an `Again`: a use of the contract begins as others do.

    What a call gives depends on its tokens, where they are, and what else of its cache it sees.
    """
    found: dict[tuple[int | tuple[int, ...], ...], slice] = {}
    made, at = [], 0
    for sequence in sequences:
        held = [NOT_WRITTEN] * max(call.kv_len for call in sequence.calls)  # by position, the token of the stream
        calls: list[Call] = []
        for call in map(everywhere, sequence.calls):
            T = len(call.tokens)
            if isinstance(call, Everywhere):
                held[: call.kv_len] = [at] * call.kv_len
            else:
                slots = slice(call.start_pos, call.start_pos + T)
                held[slots] = [OWN] * T
                key = (call.start_pos, tuple(call.tokens.tolist()), tuple(held[: call.kv_len]))
                same = found.setdefault(key, slice(at, at + T))
                if same.start < at:
                    call = Again(call.tokens[:0], call.start_pos, call.kv_len, call.rows, same)
                held[slots] = range(same.start, same.stop)
            at += len(call.tokens)
            calls.append(call)
        made.append(Sequence(sequence.name, tuple(calls)))
    return tuple(made)


def everywhere(call: Call) -> Call:
    """A long call of one token again and again gives, but for rounding, the same for all of them wherever they are.

    The values that attention averages are the same. So one is computed, at position 0, and its key and value stand
    everywhere.
    """
    T = len(call.tokens)
    if T < LONG or call.start_pos > 0 or call.kv_len > T or (call.tokens != call.tokens[0]).any():
        return call
    return Everywhere(call.tokens[:1], 0, T, torch.zeros_like(call.rows))


def places(sequences: tuple[Sequence, ...]) -> list[list[slice]]:
    """Of each sequence's calls in order their tokens in the stream."""
    found: list[list[slice]] = []
    at = 0
    for sequence in sequences:
        found.append([])
        for call in sequence.calls:
            found[-1].append(call.same if isinstance(call, Again) else slice(at, at + len(call.tokens)))
            at += len(call.tokens)
    return found
