"""`pipeline.export_model`: the same recipes from Python."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import DreamEdgeConfig, load_hf_model
from pipeline import export_model
from runtime import Program
from runtime.errors import RecipeError
from tests.checkpoints import GOLDEN, Build
from validation.figures import sqnr_db

TOKENS = torch.tensor([[5, 6, 7, 8, 317, 317]])


@pytest.mark.parametrize(("quantization", "db"), [(None, 100.0), ("fp16", 40.0), ("int8", 25.0), ("int4", 10.0)])
def test_export_model(tmp_path: Path, quantization: str | None, db: float) -> None:
    model, _, _ = load_hf_model(GOLDEN / "gqa2")
    expected = model(TOKENS)[0]
    output = export_model(model, (TOKENS,), tmp_path / "model.pte", quantization)  # type: ignore[arg-type]
    assert output == tmp_path / "model.pte"
    assert list(tmp_path.iterdir()) == [output]
    assert sqnr_db(expected, Program.open(output).forward(TOKENS, 0, 6)) > db
    assert torch.equal(model(TOKENS)[0], expected)  # the model was left as it is


def test_it_is_the_pipelines_program(build: Build, tmp_path: Path) -> None:
    model, _, config = load_hf_model(GOLDEN / "gqa2")
    model.config = replace(config, max_position_embeddings=256)  # the length of the tests' artifacts
    output = export_model(model, (TOKENS,), tmp_path / "model.pte", "int4")
    assert output.read_bytes() == (build("gqa2", "int4_xnnpack") / "model.pte").read_bytes()


def test_refusals(tmp_path: Path) -> None:
    model, _, _ = load_hf_model(GOLDEN / "gqa2")
    output = tmp_path / "model.pte"
    with pytest.raises(ValueError, match="quantization must be None, 'fp16', 'int8' or 'int4', got 'int2'"):
        export_model(model, (TOKENS,), output, "int2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="example_inputs must be"):
        export_model(model, (TOKENS[0],), output)
    from model import DreamEdge

    odd = DreamEdge(
        DreamEdgeConfig(64, 48, 64, 1, 2, 1, 64, mask_token_id=1, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    )
    with pytest.raises(RecipeError, match="q_proj is 48 wide"):
        export_model(odd, (TOKENS % 64,), output, "int4")
    assert list(tmp_path.iterdir()) == []
