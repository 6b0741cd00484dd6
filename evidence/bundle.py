"""`model.bpte`: the program with calls of its own to make and what they should give, for a device to check itself."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch

from validation.figure import TIE_MARGIN
from validation.reference import Call, Expected, Reference

BUNDLE_FILE = "model.bpte"
MAX_PROGRAM = 2**26  # bytes; a bundle holds the program once more, and executorch makes it in memory
KINDS = ("short", "whole")
N_CALLS = 4  # of each kind


def write_bundle(pte: Path, reference: Reference, vocab_size: int) -> None:
    """Beside the program, where that is small and there are calls that can decide. Raises `OSError`."""
    calls = deciding_calls(reference, vocab_size)
    if not calls or pte.stat().st_size > MAX_PROGRAM:
        return
    from executorch.devtools.bundled_program.config import MethodTestCase, MethodTestSuite
    from executorch.devtools.bundled_program.core import BundledProgram
    from executorch.devtools.bundled_program.serialize import serialize_from_bundled_program_to_flatbuffer

    cases = [
        MethodTestCase(
            inputs=(call.tokens[None], torch.tensor([call.start_pos]), torch.tensor([call.kv_len]), call.rows),
            expected_outputs=(expected.eager[None],),
        )
        for call, expected in calls
    ]
    bundled = BundledProgram(None, [MethodTestSuite("forward", cases)], str(pte))
    pte.with_name(BUNDLE_FILE).write_bytes(serialize_from_bundled_program_to_flatbuffer(bundled))


def deciding_calls(reference: Reference, vocab_size: int) -> list[tuple[Call, Expected]]:
    """Calls that stand alone, whose logits are kept whole, and are free of rounding ties: any device agrees on them.

    A bundle's cases may be run one by one, so none may need what an earlier one has left in the cache.
    """
    alone = [
        (sequence.name.partition("-")[0], sequence.calls[0], expected[0])
        for sequence, expected in zip(reference.sequences, reference.expected, strict=True)
        if len(sequence.calls) == 1
    ]
    deciding = [
        (kind, call, expected)
        for kind, call, expected in alone
        if expected.tie_margin > TIE_MARGIN and expected.eager.shape[1] == vocab_size
    ]
    return [pair for kind in KINDS for pair in islice(((c, e) for k, c, e in deciding if k == kind), N_CALLS)]
