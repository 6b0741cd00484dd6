"""The program's contract: against the golden data of the real reference, and against eager on drawn calls."""

from __future__ import annotations

import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file
from torch import Tensor

from model import DreamEdge, StaticKVCache, load_hf_model
from recipes import static_program
from runtime import CONTRACT_VERSION, Program, ProgramError
from runtime.memory import mapped
from tests.checkpoints import GOLDEN, GOLDEN_NAMES, Build

FLOAT_RECIPES = ("fp32_xnnpack", "fp32_portable")


def test_both_sides_speak_the_same_contract() -> None:
    assert static_program.CONTRACT_VERSION == CONTRACT_VERSION


@pytest.mark.parametrize(
    ("name", "recipe"), [("gqa2", "fp32_portable"), *((name, "fp32_xnnpack") for name in GOLDEN_NAMES)]
)
def test_whole_sequences_are_the_references(build: Build, name: str, recipe: str) -> None:
    """Every golden case without a mask and with plain positions: the .pte against the real Dream."""
    program = Program.open(build(name, recipe))
    tensors = load_file(GOLDEN / name / "cases.safetensors")
    cases = json.loads((GOLDEN / name / "cases.json").read_text())["cases"]
    compared = 0
    for case, entry in cases.items():
        if entry["inputs"] != ["input_ids"]:
            continue
        for row, expected in zip(tensors[f"{case}/input_ids"], tensors[f"{case}/logits"], strict=True):
            actual = program.forward(row, 0, len(row))[0]
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
            compared += 1
    assert compared >= 5


def test_a_new_sequence_looks_nothing_up(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of what is mapped takes longer than a call of a small network."""
    program = Program.open(build("gqa2", "fp32_xnnpack"))
    assert sum(n_bytes for _, n_bytes in mapped(program.path)) > 0
    monkeypatch.delattr(Path, "read_text")
    assert program.start()([1, 2], 0, 2).shape[1] == 2


@st.composite
def drawn_calls(draw: st.DrawFn, max_seq_len: int, vocab: int) -> list[tuple[Tensor, int, int, Tensor]]:
    """(tokens, start_pos, kv_len, rows): each call sees only what the calls before it wrote."""
    written, calls = 0, []
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, min(written, max_seq_len - 1)))
        n = draw(st.one_of(st.integers(1, min(8, max_seq_len - start)), st.integers(1, max_seq_len - start)))
        written = max(written, start + n)
        kv_len = draw(st.integers(start + n, written))
        rows = draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))
        seed = draw(st.integers(0, 2**31))
        tokens = torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(seed))
        calls.append((tokens, start, kv_len, torch.tensor(rows)))
    return calls


def in_eager(model: DreamEdge, cache: StaticKVCache, call: tuple[Tensor, int, int, Tensor]) -> Tensor:
    tokens, start, kv_len, rows = call
    mask = torch.ones(1, 1, len(tokens), kv_len, dtype=torch.bool)
    positions = torch.arange(start, start + len(tokens))[None]
    with torch.no_grad():
        logits, _ = model(tokens[None], mask, positions, past_key_values=cache)
    return logits[0, rows]


@pytest.mark.parametrize("recipe", FLOAT_RECIPES)
def test_any_calls_give_what_eager_gives(build: Build, recipe: str) -> None:
    """Drawn sequences of calls: any start, length, kv_len and rows, over a cache that earlier sequences filled."""
    program = Program.open(build("mqa4-sharded", recipe))
    model, _, config = load_hf_model(GOLDEN / "mqa4-sharded")
    S = program.metadata.get_max_seq_len

    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(drawn_calls(max_seq_len=64, vocab=config.vocab_size))
    def check(calls: list[tuple[Tensor, int, int, Tensor]]) -> None:
        cache = StaticKVCache(config, 1, S)
        for call in calls:
            expected = in_eager(model, cache, call)
            torch.testing.assert_close(program.forward(*call)[0], expected, rtol=0, atol=2e-4)

    check()


def test_a_plain_pte_opens_as_its_folder_does(build: Build) -> None:
    artifact = build("gqa2", "fp32_xnnpack")
    folder, file = Program.open(artifact), Program.open(artifact / "model.pte")
    assert folder.metadata == file.metadata
    assert torch.equal(folder.forward([1, 2, 3], 0, 3), file.forward([1, 2, 3], 0, 3))


def test_what_is_no_program_is_said_to_be_none(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no artifact folder"):
        Program.open(tmp_path)
    text = tmp_path / "text.pte"
    text.write_text("not a program, but long enough to hold the header of one: " + "x" * 100)
    with pytest.raises(ProgramError, match="not an ExecuTorch program"):
        Program.open(text)
    pte = artifact / "model.pte"
    whole = pte.read_bytes()
    for length in (0, 7, 39, 64, 1000, len(whole) // 2, len(whole) - 1):
        pte.write_bytes(whole[:length])
        with pytest.raises(ProgramError, match=r"truncated|not an ExecuTorch program"):
            Program.open(artifact)
    pte.write_bytes(whole[:2000] + b"\xff" * 500 + whole[2500:])
    with pytest.raises(ProgramError, match="damaged"):
        Program.open(artifact)


def test_another_contract_version_is_refused(tmp_path: Path) -> None:
    from model import DreamEdgeConfig
    from recipes.lowering import lower_program
    from recipes.options import Attention, Backend
    from recipes.static_program import StaticProgram, export_program, metadata

    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 8}
    ids = {"mask_token_id": 31, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    model = DreamEdge(DreamEdgeConfig(**sizes, **heads, **ids)).requires_grad_(False)  # type: ignore[arg-type]
    exported = export_program(StaticProgram(model, 8, Backend.portable, Attention.aten), 8)
    methods = metadata(model, 8, 8, Attention.aten) | {"get_contract_version": CONTRACT_VERSION + 1}
    newer, foreign = tmp_path / "newer.pte", tmp_path / "foreign.pte"
    with newer.open("wb") as file:
        lower_program(exported, Backend.portable, methods).write_to_file(file)
    with pytest.raises(ProgramError, match=f"contract version {CONTRACT_VERSION + 1}.*export it anew"):
        Program.open(newer)
    with foreign.open("wb") as file:
        lower_program(exported, Backend.portable, {}).write_to_file(file)
    with pytest.raises(ProgramError, match="not one that follows DreamEdge's contract"):
        Program.open(foreign)
