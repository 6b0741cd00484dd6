"""What an artifact must show by itself: no checkpoint, no torchao, no Hydra needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from runtime import Program
from runtime.artifact import REFERENCE_FILE
from validation.judge import Measured
from validation.reference import load_reference


def test_files_are_those_of_the_manifest(manifest: dict[str, Any]) -> None:
    # Reading the manifest compares size and sha256 of every file that it names, and its own with provenance.json.
    assert {"model.pte", "reference.safetensors"} <= set(manifest["files"])
    assert {"report.json", "report.html"} <= set(manifest["run"]["files"])


def test_metadata_is_the_manifests(program: Program, manifest: dict[str, Any]) -> None:
    found, model, export = program.metadata, manifest["model"], manifest["export"]
    assert found.get_contract_version == manifest["contract_version"]
    assert found.get_max_seq_len == found.get_max_context_len == export["max_seq_len"]
    assert found.get_max_rows == export["max_rows"]
    assert found.get_vocab_size == model["vocab_size"]
    assert found.get_n_layers == model["num_hidden_layers"]
    assert found.get_mask_id == model["mask_token_id"]
    assert found.get_pad_id == model["pad_token_id"]
    assert found.get_bos_id == model["bos_token_id"]
    ends = model["eos_token_id"]
    assert found.get_eos_ids == (tuple(ends) if isinstance(ends, list) else (ends,))
    assert found.logits_shift == 1
    assert found.use_kv_cache
    assert found.enable_dynamic_shape
    assert found.use_sdpa_with_kv_cache == (manifest["recipe"]["attention"] == "custom_sdpa")


@pytest.mark.parametrize("group", ["fidelity", "quality", "format", "repeatability"])
def test_figures_are_within_bounds(measured: Measured, group: str) -> None:
    figures = [figure for figure in measured.figures if figure.group == group]
    assert figures
    wrong = [str(figure) for figure in figures if not figure.ok]
    assert not wrong, "; ".join(wrong)


def test_any_length_and_rows(program: Program) -> None:
    S, vocab = program.metadata.get_max_seq_len, program.metadata.get_vocab_size
    for T in sorted({1, 2, 3, S // 2, S - 1, S}):
        tokens = torch.arange(T) % vocab
        rows = torch.tensor([T - 1, 0])
        logits = program.forward(tokens, 0, T, rows)
        assert logits.shape == (1, 2, vocab)
        assert torch.isfinite(logits).all()


def test_calls_outside_the_contract_are_refused(program: Program) -> None:
    S, vocab = program.metadata.get_max_seq_len, program.metadata.get_vocab_size
    for tokens, start_pos, kv_len, rows in [
        ([0] * (S + 1), 0, S + 1, [0]),
        ([0, 0], S - 1, S + 1, [0]),
        ([0, 0], 0, 1, [0]),
        ([0, 0], -1, 2, [0]),
        ([0, 0], 0, 2, [2]),
        ([0, 0], 0, 2, []),
        ([vocab], 0, 1, [0]),
        ([], 0, 0, [0]),
    ]:
        with pytest.raises(ValueError, match=r"must|fit|a call"):
            program.forward(tokens, start_pos, kv_len, rows)


def test_state_does_not_leak_between_sequences(program: Program, artifact: Path) -> None:
    """A sequence gives the same bits on a fresh cache and on one full of other tokens."""
    sequence = load_reference(artifact / REFERENCE_FILE).sequences[0]

    def run() -> list[torch.Tensor]:
        return [program.forward(c.tokens, c.start_pos, c.kv_len, c.rows) for c in sequence.calls]

    fresh = run()
    S, vocab = program.metadata.get_max_seq_len, program.metadata.get_vocab_size
    program.forward((torch.arange(S) * 7 + 3) % vocab, 0, S, [0])
    assert all(torch.equal(a, b) for a, b in zip(fresh, run(), strict=True))
