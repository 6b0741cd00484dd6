"""A LoRA adapter is merged as PEFT merges it, to the bit; a run with it makes what a merged checkpoint makes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model import CheckpointError, DreamEdge, load_hf_model
from model.checkpoint import hf_name
from model.checkpoint_files import weight_files
from model.lora import ADAPTER, ADAPTER_CONFIG, merge, read_adapter
from runtime.defaults import own_defaults
from tests.checkpoints import GOLDEN

Pipeline = Callable[..., tuple[int, str, str]]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Published(nn.Module):
    """The network with the names that its public code has: what PEFT writes begins with them."""

    def __init__(self, network: DreamEdge) -> None:
        super().__init__()
        self.lm_head = network.lm_head
        del network.lm_head
        self.model = network


def stored_in(dtype: torch.dtype, folder: Path) -> Path:
    """gqa2, with its weights in another type."""
    shutil.copytree(GOLDEN / "gqa2", folder)
    for file in weight_files(folder):
        save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return folder


def write_adapter(checkpoint: Path, folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> DreamEdge:
    """Writes it as PEFT does, and returns the network that PEFT merges it to."""
    torch.manual_seed(0)
    network = load_hf_model(checkpoint, dtype=None)[0]
    asked: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "init_lora_weights": False} | options
    published: Any = Published(network)
    made = get_peft_model(published, LoraConfig(**asked), autocast_adapter_dtype=dtype == torch.float32)
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            parameter.data = (0.05 * torch.randn(parameter.shape)).to(dtype)
    made.save_pretrained(str(folder))
    merged: Any = made.merge_and_unload()
    network.lm_head = merged.lm_head
    return network


CASES: dict[str, dict[str, Any]] = {
    "attention": {},
    "all": {"target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj", "lm_head"]},
    "rsLoRA": {"use_rslora": True, "r": 8},
    "own ranks": {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 6}, "alpha_pattern": {"o_proj": 3}},
}


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_it_is_merged_as_peft_merges(case: str, adapter: torch.dtype, stored: torch.dtype, tmp_path: Path) -> None:
    checkpoint = stored_in(stored, tmp_path / "checkpoint")
    expected = write_adapter(checkpoint, tmp_path / "adapter", adapter, **CASES[case])
    before = {n: p.clone() for n, p in load_hf_model(checkpoint, dtype=None)[0].named_parameters()}
    model = load_hf_model(checkpoint, dtype=None)[0]
    merge(model, read_adapter(tmp_path / "adapter", model), tmp_path / "kept")
    theirs = dict(expected.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.dtype == stored
        assert torch.equal(parameter, theirs[name]), name
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert len(changed) == 2 * 4 if case != "all" else 2 * 7 + 1


def test_what_is_merged_is_kept_and_used_again(tmp_path: Path) -> None:
    checkpoint = stored_in(torch.bfloat16, tmp_path / "checkpoint")
    write_adapter(checkpoint, tmp_path / "adapter")
    written = []
    for _ in range(2):
        model = load_hf_model(checkpoint, dtype=None)[0]
        merge(model, read_adapter(tmp_path / "adapter", model), tmp_path / "kept")
        written.append({file.name: file.stat().st_mtime_ns for file in (tmp_path / "kept").iterdir()})
    assert written[0] == written[1]
    assert set(written[0]) == {"layers.0.safetensors", "layers.1.safetensors"}
    theirs = {name: parameter.clone() for name, parameter in model.named_parameters()}
    damaged = tmp_path / "kept" / "layers.0.safetensors"
    whole = damaged.read_bytes()
    damaged.unlink()  # it is mapped
    damaged.write_bytes(whole[:100])
    again = load_hf_model(checkpoint, dtype=None)[0]
    merge(again, read_adapter(tmp_path / "adapter", again), tmp_path / "kept")
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in again.named_parameters())


def test_an_embedding_that_peft_saved_unchanged_is_no_matter(tmp_path: Path) -> None:
    write_adapter(GOLDEN / "gqa2", tmp_path / "adapter")
    model = load_hf_model(GOLDEN / "gqa2", dtype=None)[0]
    saved = {EMBEDDING: model.embed_tokens.weight.data.clone(), HEAD: model.lm_head.weight.data.clone()}
    renamed(tmp_path / "adapter", lambda tensors: tensors.update(saved))
    assert len(read_adapter(tmp_path / "adapter", model).scales) == 8


def test_an_output_layer_that_is_the_embedding_is_not_adapted(tmp_path: Path) -> None:
    write_adapter(GOLDEN / "gqa2", tmp_path / "adapter", target_modules=["lm_head"])
    model = load_hf_model(GOLDEN / "mha-tied", dtype=None)[0]
    with pytest.raises(CheckpointError, match="the output layer is the embedding"):
        read_adapter(tmp_path / "adapter", model)


def changed(folder: Path, **values: Any) -> None:
    file = folder / ADAPTER_CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def renamed(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / ADAPTER)
    change(tensors)
    save_file(tensors, folder / ADAPTER)


HEAD = "base_model.model.lm_head.base_layer.weight"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
EMBEDDING = "base_model.model.model.embed_tokens.weight"
WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda folder: (folder / ADAPTER_CONFIG).unlink(), "no adapter_config.json; a LoRA adapter as PEFT"),
    "no tensors": (lambda folder: (folder / ADAPTER).unlink(), "no adapter_model.safetensors"),
    "no JSON": (lambda folder: (folder / ADAPTER_CONFIG).write_text("{"), "not readable as JSON"),
    "DoRA": (lambda folder: changed(folder, use_dora=True), "use_dora true: only false can be merged here"),
    "PiSSA": (
        lambda folder: changed(folder, init_lora_weights="pissa_niter_4"),
        "changed the weights that the adapter",
    ),
    "aLoRA": (lambda folder: changed(folder, alora_invocation_tokens=[1]), "alora_invocation_tokens [1]"),
    "endless": (lambda folder: changed(folder, lora_alpha=10**400), "lora_alpha must be a number above 0"),
    "no rank": (
        lambda folder: renamed(folder, lambda t: t.update({FIRST: torch.ones(0, 64)})),
        "do not fit its [64, 64]",
    ),
    "IA3": (lambda folder: changed(folder, peft_type="IA3"), 'peft_type "IA3"'),
    "modules": (lambda folder: changed(folder, modules_to_save=["lm_head"]), 'modules_to_save ["lm_head"]'),
    "bias": (lambda folder: changed(folder, bias="all"), 'bias "all"'),
    "rank": (lambda folder: changed(folder, r=3), "has rank 3 here, and 4 in adapter_model.safetensors"),
    "alpha": (lambda folder: changed(folder, lora_alpha="x"), "lora_alpha must be a number above 0"),
    "pattern": (lambda folder: changed(folder, alpha_pattern={"(a+)+$": 2}), "only names can be read, not patterns"),
    "half": (lambda folder: renamed(folder, lambda t: t.pop(FIRST)), "q_proj has lora_B alone"),
    "shape": (lambda folder: renamed(folder, lambda t: t.update({FIRST: torch.ones(4, 3)})), "do not fit its [64, 64]"),
    "NaN": (lambda folder: renamed(folder, lambda t: t[FIRST].fill_(torch.nan)), "not finite"),
    "name": (
        lambda folder: renamed(folder, lambda t: t.update({FIRST.replace("layers.0", "layers.9"): t[FIRST].clone()})),
        "layers.9.self_attn.q_proj.lora_A.weight is for no matrix of the network",
    ),
    "huge": (lambda folder: changed(folder, lora_alpha=1e40), "beyond the range of"),
    "embedding": (
        lambda folder: renamed(folder, lambda t: t.update({EMBEDDING: torch.ones(320, 64)})),
        "embed_tokens.weight is for no matrix of the network: adapters of the embedding",
    ),
    "cut": (lambda folder: (folder / ADAPTER).write_bytes((folder / ADAPTER).read_bytes()[:100]), "truncated"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_adapter_is_one_line(name: str, tmp_path: Path, pipeline: Pipeline) -> None:
    damage, said = WRONG[name]
    write_adapter(GOLDEN / "gqa2", tmp_path / "adapter")
    damage(tmp_path / "adapter")
    model = load_hf_model(GOLDEN / "gqa2", dtype=None)[0]
    with pytest.raises(CheckpointError) as raised:
        merge(model, read_adapter(tmp_path / "adapter", model), tmp_path / "kept")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    if name in ("DoRA", "huge"):
        paths = [f"lora={tmp_path / 'adapter'}", f"output={tmp_path / 'out'}", f"cache={tmp_path / 'cache'}"]
        code, out, err = pipeline("run", f"checkpoint={GOLDEN / 'gqa2'}", *paths, "export.max_seq_len=64")
        assert (code, out) == (3, "")
        assert said in err.splitlines()[-1]
        assert not (tmp_path / "out").exists()


def test_a_run_with_an_adapter_makes_what_the_merged_checkpoint_makes(tmp_path: Path, pipeline: Pipeline) -> None:
    checkpoint = stored_in(torch.bfloat16, tmp_path / "checkpoint")
    network = write_adapter(checkpoint, tmp_path / "D2F_adapter")
    whole = stored_in(torch.bfloat16, tmp_path / "merged")
    merged = {hf_name(name): parameter.data for name, parameter in network.named_parameters()}
    for file in weight_files(whole):
        save_file({name: merged[name].contiguous() for name in load_file(file)}, file, metadata={"format": "pt"})
    common = [f"cache={tmp_path / 'cache'}", "export.max_seq_len=64", "recipe=int8_xnnpack"]
    made, same = tmp_path / "made", tmp_path / "same"
    assert pipeline("run", f"checkpoint={whole}", f"output={same}", *common)[0] == 0
    adapted = (f"checkpoint={checkpoint}", f"lora={tmp_path / 'D2F_adapter'}")
    code, _, err = pipeline("run", *adapted, f"output={made}", *common)
    assert code == 0, err
    assert (made / "model.pte").read_bytes() == (same / "model.pte").read_bytes()
    assert own_defaults(made) == {"cache": "d2f"}, "by its name"
    assert "cache" not in own_defaults(same)
    manifest = json.loads((made / "manifest.json").read_text())
    assert {"lora/adapter_config.json", "lora/adapter_model.safetensors"} <= set(manifest["checkpoint"]["sha256"])
    provenance = (made / "provenance.json").read_text()
    assert "checkpoint/lora/adapter_model.safetensors" in provenance
    code, out, err = pipeline("validate", f"artifact={made}", *adapted)
    assert code == 0, err
    assert "exports_that_differ" in out
    code, _, err = pipeline("validate", f"artifact={made}", adapted[0])
    assert (code, err) == (2, f"error: {made} was made with a LoRA adapter: give lora=DIR\n")
