"""The network against the outputs of the public reference, kept in `tests/golden/`."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from model import DreamEdge, StaticKVCache
from model.dream import rope_cos_sin

GOLDEN = Path(__file__).parents[1] / "golden"
PROMPT = "prompt_then_masks"


@cache
def cases(folder: Path) -> dict[str, dict[str, Any]]:
    return json.loads((folder / "cases.json").read_text(encoding="utf-8"))["cases"]


@cache
def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "cases.safetensors")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        found = [(name, case) for name in ("gqa2", "mha-tied", "mqa4-sharded") for case in cases(GOLDEN / name)]
        if metafunc.function is test_additive_masks:
            found = [(name, case) for name, case in found if f"{case}/attention_mask" in tensors(GOLDEN / name)]
        ids = [f"{name}-{case}" for name, case in found]
        metafunc.parametrize(("golden", "case"), found, indirect=["golden"], ids=ids, scope="session")


def check(folder: Path, case: str, logits: Tensor) -> None:
    expected = tensors(folder)[f"{case}/logits"]
    atol = max(1e-4, cases(folder)[case]["checks"].get("max_abs_diff_with_float64_rope", 0.0))
    rows = tensors(folder).get(f"{case}/valid_rows", torch.ones(expected.shape[:2], dtype=torch.bool))
    assert rows.any()
    assert logits.shape == expected.shape
    torch.testing.assert_close(logits[rows], expected[rows], rtol=0, atol=atol)


def test_logits(golden: tuple[Path, DreamEdge], case: str) -> None:
    folder, network = golden
    inputs = {name: tensors(folder)[f"{case}/{name}"] for name in cases(folder)[case]["inputs"]}
    logits, no_cache = network(**inputs)
    assert no_cache is None
    check(folder, case, logits)


@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min, -1e9], ids=["inf", "min", "1e9"])
def test_additive_masks(golden: tuple[Path, DreamEdge], case: str, hidden: float) -> None:
    """An additive mask says the same as the golden bool mask, whichever large number hides a key."""
    folder, network = golden
    inputs = {name: tensors(folder)[f"{case}/{name}"] for name in cases(folder)[case]["inputs"]}
    mask = inputs.pop("attention_mask")
    if mask.dim() == 2:
        mask = mask.bool()[:, None, :, None] & mask.bool()[:, None, None, :]
    check(folder, case, network(attention_mask=torch.where(mask, 0.0, hidden), **inputs)[0])


def test_pads_see_nothing(golden: tuple[Path, DreamEdge]) -> None:
    """The golden data leaves the rows of pads open: here they are what a token gives that sees not even itself."""
    _, network = golden
    input_ids = torch.tensor([[7, 7, 1, 2, 3, 7]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 0]])
    alone, _ = network(torch.tensor([[7]]), torch.zeros(1, 1, 1, 1, dtype=torch.bool))
    expected = alone[0].expand(3, -1)
    torch.testing.assert_close(network(input_ids, mask)[0][mask == 0], expected, rtol=0, atol=1e-4)
    cache = StaticKVCache(network.config, 1, 8)
    cached, _ = network(input_ids, mask, mask.cumsum(-1) - 1, past_key_values=cache)
    torch.testing.assert_close(cached[mask == 0], expected, rtol=0, atol=1e-4)


def test_hidden_states(golden: tuple[Path, DreamEdge]) -> None:
    folder, network = golden
    watched: dict[str, nn.Module] = {"hidden_embed": network.embed_tokens, "hidden_final_norm": network.norm}
    for i, layer in enumerate(network.layers):
        watched |= {f"attn_out_layer_{i}": layer.get_submodule("self_attn"), f"hidden_after_layer_{i}": layer}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _module, _inputs, output: outputs.__setitem__(name, output)

    hooks = [module.register_forward_hook(keep(name)) for name, module in watched.items()]
    try:
        logits, _ = network(tensors(folder)[f"{PROMPT}/input_ids"])
    finally:
        for hook in hooks:
            hook.remove()
    outputs["shifted_logits"] = torch.cat((logits[:, :1], logits[:, :-1]), dim=1)
    outputs["logits"] = logits

    expected = {name.removeprefix(f"{PROMPT}/"): t for name, t in tensors(folder).items() if name.startswith(PROMPT)}
    del expected["input_ids"]
    assert outputs.keys() == expected.keys()
    for name in expected:
        difference = (outputs[name] - expected[name]).abs().max()
        assert difference <= 1e-4, f"{name}: {difference}"


def test_rope(golden: tuple[Path, DreamEdge]) -> None:
    """Angles are float32 as in the reference, so even at position 131071 they are the same numbers."""
    folder, network = golden
    position_ids = tensors(folder)["rope/position_ids"]
    cos, sin = rope_cos_sin(network.config, position_ids, torch.float32)
    # 1e-6 is for cos and sin of another math library; an angle that is rounded elsewhere is off by 1e-3 here.
    torch.testing.assert_close(cos.squeeze(2), tensors(folder)["rope/cos"], rtol=0, atol=1e-6)
    torch.testing.assert_close(sin.squeeze(2), tensors(folder)["rope/sin"], rtol=0, atol=1e-6)
