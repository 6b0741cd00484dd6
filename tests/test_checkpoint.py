"""`load_hf_model`: what it gives for good checkpoints, and what it says about bad ones."""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import CheckpointError, ConfigError, DreamEdge, DreamEdgeConfig, load_hf_model

GOLDEN = Path(__file__).parent / "golden"
MAPS = Path("/proc/self/maps")
NORM = "model.norm.weight"


class Removed:
    """Stands for a field or tensor that is taken away."""

    def __repr__(self) -> str:
        return "REMOVED"


REMOVED = Removed()


def copied(name: str, tmp_path: Path) -> Path:
    """A copy of a golden checkpoint, to be damaged."""
    folder = tmp_path / name
    shutil.copytree(GOLDEN / name, folder, ignore=shutil.ignore_patterns("cases.*", "generation.*"))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in one file, untied."""
    return copied("gqa2", tmp_path)


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return copied("mha-tied", tmp_path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return copied("mqa4-sharded", tmp_path)


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, in memory: a mapped file cannot be written over."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in read(file).items()}


def store(folder: Path, changes: dict[str, Any]) -> None:
    """Changes, adds or removes tensors of a checkpoint in one file."""
    tensors = stored(folder) | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not REMOVED}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | changes
    kept = {name: value for name, value in config.items() if value is not REMOVED}
    (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")


def index(folder: Path, **changes: Any) -> None:
    """Changes, adds or removes entries of the index: tensor name with `__` for `.` -> file."""
    file = folder / "model.safetensors.index.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    for name, value in changes.items():
        content["weight_map"][name.replace("__", ".")] = value
    content["weight_map"] = {name: value for name, value in content["weight_map"].items() if value is not REMOVED}
    file.write_text(json.dumps(content), encoding="utf-8")


def refused(folder: Path, *words: str, error: type[ValueError] = CheckpointError) -> str:
    """Asserts that loading fails with this error, and that its message has all the words; gives the message."""
    with pytest.raises(error) as caught:
        load_hf_model(folder)
    assert type(caught.value) is error
    message = str(caught.value)
    for word in words:
        assert word in message
    return message


def mapped(folder: Path) -> Callable[[Tensor], bool]:
    """Whether a tensor's memory is, now, a mapping of a file of this folder."""
    fields = [line.split(maxsplit=5) for line in MAPS.read_text(encoding="utf-8").splitlines()]
    spans = [f[0].split("-") for f in fields if len(f) == 6 and Path(f[5]).parent == folder.resolve()]
    return lambda tensor: any(int(start, 16) <= tensor.data_ptr() < int(stop, 16) for start, stop in spans)


# ---- What loads ----


@pytest.mark.parametrize("name", ["gqa2", "mha-tied", "mqa4-sharded"])
def test_every_tensor_is_in_its_place(name: str) -> None:
    model, kind, config = load_hf_model(GOLDEN / name)
    assert isinstance(model, DreamEdge)
    assert kind == "Dream"
    assert config is model.config
    assert config == DreamEdgeConfig.from_hf(json.loads((GOLDEN / name / "config.json").read_text(encoding="utf-8")))
    expected = {name.removeprefix("model."): tensor for name, tensor in stored(GOLDEN / name).items()}
    if config.tie_word_embeddings:
        assert model.lm_head.weight is model.embed_tokens.weight
        expected["lm_head.weight"] = expected["embed_tokens.weight"]
    else:
        assert model.lm_head.weight is not model.embed_tokens.weight
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_the_model_is_ready_for_inference(folder: Path) -> None:
    model, _, _ = load_hf_model(str(folder))  # a path may be a string
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gqa2", "mha-tied"])
def test_dtypes(tmp_path: Path, name: str, held: torch.dtype, wanted: torch.dtype | None) -> None:
    """The weights come in the dtype asked for, rounded once from what is stored; None keeps it."""
    folder = copied(name, tmp_path)
    store(folder, {key: tensor.to(held) for key, tensor in stored(folder).items()})
    model, _, config = load_hf_model(folder, dtype=wanted)
    actual = model.state_dict()
    for key, tensor in stored(folder).items():
        loaded = actual[key.removeprefix("model.")]
        assert loaded.dtype == (wanted or held)
        assert torch.equal(loaded, tensor.to(wanted or held))
    assert (model.lm_head.weight is model.embed_tokens.weight) == config.tie_word_embeddings
    assert model(torch.tensor([[1, 2, 3]]))[0].isfinite().all()


def test_each_tensor_keeps_its_own_dtype(folder: Path) -> None:
    store(folder, {NORM: stored(folder)[NORM].half(), "lm_head.weight": stored(folder)["lm_head.weight"].bfloat16()})
    model, _, _ = load_hf_model(folder, dtype=None)
    assert model.norm.weight.dtype == torch.float16
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.embed_tokens.weight.dtype == torch.float32


def test_float32_is_the_default(folder: Path) -> None:
    store(folder, {key: tensor.bfloat16() for key, tensor in stored(folder).items()})
    assert {p.dtype for p in load_hf_model(folder)[0].parameters()} == {torch.float32}


@pytest.mark.skipif(not MAPS.exists(), reason="says which memory maps a file on Linux only")
@pytest.mark.parametrize("name", ["gqa2", "mha-tied", "mqa4-sharded"])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16], ids=str)
def test_weights_of_the_stored_dtype_are_not_copied(tmp_path: Path, name: str, held: torch.dtype) -> None:
    folder = copied(name, tmp_path)
    for file in folder.glob("model*.safetensors"):
        save_file({key: tensor.to(held) for key, tensor in read(file).items()}, file)
    for dtype in (None, held):
        model, _, _ = load_hf_model(folder, dtype=dtype)
        assert all(map(mapped(folder), model.parameters()))
    model, _, _ = load_hf_model(folder, dtype=torch.float16)
    assert not any(map(mapped(folder), model.parameters()))


def test_a_redundant_lm_head_of_a_tied_checkpoint(tied: Path) -> None:
    expected = load_hf_model(tied)[0]
    store(tied, {"lm_head.weight": stored(tied)["model.embed_tokens.weight"].clone()})
    model, _, _ = load_hf_model(tied)
    assert model.lm_head.weight is model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight)


def test_other_files_do_not_matter(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    (folder / "generation_config.json").unlink()
    (folder / "tokenizer.json").write_text("not JSON", encoding="utf-8")
    load_hf_model(folder)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_optimize_cpu(folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many threads as there are physical cores, and a line in the log; nothing of it unless asked for."""
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 6 if logical else 3)
    monkeypatch.setattr(logging.getLogger("model.checkpoint"), "disabled", False)  # Hydra disables all that are there
    caplog.set_level(logging.INFO)
    torch.set_num_threads(2)
    load_hf_model(folder)
    assert torch.get_num_threads() == 2
    assert not caplog.records
    load_hf_model(folder, optimize_cpu=True)
    assert torch.get_num_threads() == 3
    assert [record.getMessage() for record in caplog.records] == ["torch uses 3 threads, one for each physical core"]


@pytest.mark.usefixtures("threads")
def test_optimize_cpu_where_physical_cores_are_unknown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 6 if logical else None)
    load_hf_model(folder, optimize_cpu=True)
    assert torch.get_num_threads() >= 1


# ---- The folder and its config ----


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "absent", "no such folder")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Dream-org/Dream-v0-Instruct-7B", "Dream-org/Dream-v0-Instruct-7B"),
        ("https://hub.example/Dream-org/Dream-v0-Instruct-7B", "Dream-org/Dream-v0-Instruct-7B"),
    ],
)
def test_a_name_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    refused(Path(path), "no such folder", f"hf download {name} --local-dir DIR", "checkpoint=DIR")
    (tmp_path / "models").mkdir()  # more likely a slip
    for other in ("models/dream", "dream", "/Dream-org/dream", "../Dream-org/dream", "a/b/c"):
        assert "hf download" not in refused(Path(other), "no such folder")


def test_the_hubs_cache_by_its_own_name(tmp_path: Path) -> None:
    """The folder that holds the snapshots is none."""
    (tmp_path / "models--x" / "snapshots" / "5fa1").mkdir(parents=True)
    refused(tmp_path / "models--x", "no config.json", "snapshots/5fa1")


def test_a_file_in_place_of_the_folder(folder: Path) -> None:
    refused(folder / "model.safetensors", "model.safetensors", "not a folder")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, str(folder), "no config.json", "Hugging Face")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"model_type": "Dream",}', b"\xff\xfe\x00", b"PK\x03\x04", b'{"a":' * 100_000],
    ids=["empty", "open", "comma", "no UTF-8", "zip", "deep"],
)
def test_config_is_not_json(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    refused(folder, str(folder / "config.json"), "not readable as JSON")


@pytest.mark.parametrize(("content", "found"), [("[]", "list"), ('"Dream"', "str"), ("null", "NoneType"), ("7", "int")])
def test_config_is_no_object(folder: Path, content: str, found: str) -> None:
    (folder / "config.json").write_text(content, encoding="utf-8")
    refused(folder, "config.json", "a JSON object is expected", f"found {found}")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, ["model_type 'qwen2'", "'Qwen2ForCausalLM'"]),
        ({"model_type": "dream"}, ["model_type 'dream'"]),
        ({"model_type": REMOVED}, ["no model_type", "'DreamModel'"]),
        ({"model_type": None, "architectures": REMOVED}, ["no model_type"]),
        ({"model_type": ["Dream"]}, ["model_type ['Dream']"]),
        ({"model_type": "llada"}, ["that is LLaDA, another body"]),
        ({"model_type": "llada2_moe"}, ["that is LLaDA"]),
        ({"model_type": "sdar"}, ["that is SDAR", "from block to block"]),
        ({"model_type": "Fast_dLLM_Qwen"}, ["that is Fast-dLLM v2"]),
        ({"model_type": "qwen2"}, ["that is an autoregressive model"]),
    ],
)
def test_not_dream(folder: Path, changes: dict[str, Any], found: list[str]) -> None:
    configure(folder, **changes)
    refused(folder, "config.json", "not a Dream checkpoint", "expected model_type 'Dream'", *found, error=ConfigError)


UNSUPPORTED: list[dict[str, Any]] = [
    {"hidden_act": "gelu"},
    {"hidden_act": None},
    {"use_sliding_window": True},
    {"sliding_window": 4096, "use_sliding_window": REMOVED},
    {"layer_types": ["full_attention", "sliding_attention"]},
    {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "default", "factor": 2.0}},
    {"rope_scaling": 2.0},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e6}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}},
    {"rope_scaling": {"type": "default", "partial_rotary_factor": 0.25}},
    {"rope_scaling": {"rope_type": "default", "type": "yarn"}},
    {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 1e6}}},
    {"partial_rotary_factor": 0.5},
    {"use_mrope": True},
    {"attention_bias": "no"},
    {"mlp_bias": True},
    {"head_dim": 32},
    {"head_dim": 0},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"num_experts": 8},
    {"logit_scale": 0.5},
]


@pytest.mark.parametrize("changes", UNSUPPORTED, ids=lambda changes: "-".join(map(str, changes.items())))
def test_unsupported(folder: Path, changes: dict[str, Any]) -> None:
    configure(folder, **changes)
    name, value = next(iter(changes.items()))
    refused(folder, "config.json", f"unsupported: {name} = {value!r}", error=ConfigError)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 1},
        {"layer_types": ["full_attention"] * 2},
        {"layer_types": None},
        {"rope_scaling": {"type": "default"}},
        {"rope_theta": REMOVED, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
        {"rope_theta": None, "rope_scaling": {"type": "default", "rope_theta": 1e6}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 1e6}, "rope_parameters": {"rope_theta": 1000000}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 1.0}},
        {"partial_rotary_factor": 1.0},
        {"torch_dtype": REMOVED, "dtype": "bfloat16"},
        {"torch_dtype": "bfloat16", "dtype": "torch.bfloat16"},
        {"torch_dtype": "bfloat16", "dtype": None},
        {"attention_bias": False},
        {"attention_bias": True, "mlp_bias": False, "use_mrope": False},
        {"head_dim": 16},
        {"head_dim": None, "quantization_config": None, "num_experts": None, "logit_scale": 1.0},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_fields_that_ask_for_plain_dream(folder: Path, changes: dict[str, Any]) -> None:
    """The same network, however the config says so."""
    expected = load_hf_model(folder)[2]
    configure(folder, **changes)
    assert load_hf_model(folder)[2] == expected


@pytest.mark.parametrize(
    "name",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rope_theta",
        "rms_norm_eps",
        "mask_token_id",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    ],
)
def test_missing_field(folder: Path, name: str) -> None:
    """No default stands in for a shape that the file forgot."""
    (folder / "generation_config.json").unlink()
    configure(folder, **{name: REMOVED})
    message = refused(folder, "config.json", error=ConfigError)
    assert message.endswith(f"the config lacks {name}")


def test_missing_fields_are_all_listed(folder: Path) -> None:
    configure(folder, vocab_size=REMOVED, rope_theta=REMOVED, mask_token_id=REMOVED)
    refused(folder, "the config lacks vocab_size, rope_theta, mask_token_id", error=ConfigError)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 6}, ["hidden_size 64 is not a multiple of num_attention_heads 6"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads 4 is not a multiple of num_key_value_heads 3"]),
        ({"num_key_value_heads": 8}, ["num_attention_heads 4 is not a multiple of num_key_value_heads 8"]),
        ({"num_attention_heads": 64}, ["head_dim 1 is odd"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "at least 1", "got 0"]),
        ({"intermediate_size": 2**30 + 2}, ["intermediate_size must be at most 1073741824, got 1073741826"]),
        ({"hidden_size": 10**40}, ["hidden_size must be at most 1073741824, got a number of more than 30 digits"]),
        ({"hidden_size": "64"}, ["hidden_size", "whole number", "got '64'"]),
        ({"intermediate_size": 160.0}, ["intermediate_size", "whole number", "got 160.0"]),
        ({"num_key_value_heads": None}, ["num_key_value_heads", "got None"]),
        ({"vocab_size": True}, ["vocab_size", "got True"]),
        ({"rope_theta": 0}, ["rope_theta must be a finite number above 0, got 0"]),
        ({"rms_norm_eps": -1e-6}, ["rms_norm_eps must be a finite number above 0", "-1e-06"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps", "nan"]),
        ({"rms_norm_eps": "1e-6"}, ["rms_norm_eps", "'1e-6'"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings must be true or false, got 'yes'"]),
        ({"mask_token_id": 320}, ["mask_token_id", "0..319", "got 320"]),
        ({"eos_token_id": -1}, ["eos_token_id", "got -1"]),
    ],
    ids=lambda value: "-".join(map(str, value.items())) if isinstance(value, dict) else "",
)
def test_impossible_values(folder: Path, changes: dict[str, Any], words: list[str]) -> None:
    configure(folder, **changes)
    refused(folder, "config.json", *words, error=ConfigError)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": float("inf")},
        {"rms_norm_eps": float("inf")},
        {"layer_types": 5},
        {"layer_types": [["full_attention"]]},
        {"head_dim": 16, "hidden_size": "64"},
        {"head_dim": 16, "num_attention_heads": "4"},
    ],
    ids=lambda changes: "-".join(map(str, changes.items())),
)
def test_odd_values(folder: Path, changes: dict[str, Any]) -> None:
    configure(folder, **changes)
    refused(folder, "config.json", next(iter(changes)), error=ConfigError)


@pytest.mark.parametrize(
    ("changes", "places"),
    [
        ({"rope_parameters": {"rope_theta": 1e4}}, ["rope_theta 1000000.0", "rope_parameters.rope_theta 10000.0"]),
        ({"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}}, ["rope_theta 1000000.0", "rope_scaling.rope_"]),
        (
            {"rope_theta": None, "rope_scaling": {"rope_theta": 5e5}, "rope_parameters": {"rope_theta": 1e6}},
            ["rope_scaling.rope_theta 500000.0", "rope_parameters.rope_theta 1000000.0"],
        ),
        ({"torch_dtype": "float16", "dtype": "bfloat16"}, ["torch_dtype 'float16'", "dtype 'bfloat16'"]),
    ],
)
def test_two_values_of_one_thing(folder: Path, changes: dict[str, Any], places: list[str]) -> None:
    """Readers differ in which they take: one of them would run another network."""
    configure(folder, **changes)
    refused(folder, "config.json", "differ", *places, error=ConfigError)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 1.0}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_scaling": {"type": "default", "rope_theta": 5e5}, "rope_parameters": None},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_the_theta_is_the_one_that_transformers_reads(folder: Path, changes: dict[str, Any]) -> None:
    from transformers import Qwen2Config

    configure(folder, **{"rope_theta": REMOVED, **changes})
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert load_hf_model(folder)[2].rope_theta == Qwen2Config(**content).rope_parameters["rope_theta"] == 5e5


# ---- End tokens ----


def test_end_tokens_of_both_configs(folder: Path) -> None:
    """Each that one of the two names ends a text."""
    generation = folder / "generation_config.json"
    for own, more, expected in [
        ([7, 9, 7], REMOVED, (7, 9)),
        ([7], REMOVED, (7,)),
        (7, 9, (7, 9)),
        (7, [9, 7, 8], (7, 9, 8)),
        (REMOVED, [9, 8], (9, 8)),
        (None, 9, (9,)),
        ([7, 9], None, (7, 9)),
    ]:
        configure(folder, eos_token_id=own)
        generation.write_text(json.dumps({} if more is REMOVED else {"eos_token_id": more}), encoding="utf-8")
        model, _, config = load_hf_model(folder)
        assert (model.eos_ids, config.eos_ids) == (expected, expected), (own, more)
        assert DreamEdgeConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    generation.unlink()
    assert load_hf_model(folder)[0].eos_ids == (7, 9)


@pytest.mark.parametrize("wrong", [320, -1, "7", 7.0, True, [], [7, 320], [7, None], [[7]], {"id": 7}], ids=str)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_wrong_end_tokens(folder: Path, name: str, wrong: Any) -> None:
    if name == "config.json":
        configure(folder, eos_token_id=wrong)
    else:
        (folder / name).write_text(json.dumps({"eos_token_id": wrong}), encoding="utf-8")
    message = refused(folder, name, "eos_token_id", "0..319", error=ConfigError)
    assert len(message) < len(str(folder)) + 200


def test_a_broken_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{", encoding="utf-8")
    refused(folder, "generation_config.json", "not readable as JSON")


# ---- The tensors ----


@pytest.mark.parametrize("name", [NORM, "lm_head.weight", "model.layers.1.self_attn.k_proj.bias"])
def test_missing_tensor(folder: Path, name: str) -> None:
    shape = list(stored(folder)[name].shape)
    store(folder, {name: REMOVED})
    refused(folder, "1 wrong tensor", f"missing: {name} {shape}")


def test_a_config_that_denies_the_biases(folder: Path) -> None:
    """`attention_bias: false` is a class's default there: the tensors decide, and none may be missing."""
    expected = load_hf_model(folder)[0].state_dict()
    configure(folder, attention_bias=False)
    actual = load_hf_model(folder)[0].state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    store(folder, {name: REMOVED for name in stored(folder) if name.endswith("_proj.bias")})
    message = refused(folder, "6 wrong tensor", "missing: model.layers.0.self_attn.q_proj.bias [64]", "and 3 more")
    assert message.endswith("a network without biases of q, k and v is not Dream's")


@pytest.mark.parametrize("name", ["model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"])
def test_frequencies_are_no_weights(folder: Path, name: str) -> None:
    """A buffer that older code saved: it follows from `rope_theta`."""
    store(folder, {name: torch.ones(8)})
    load_hf_model(folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "_orig_mod.module.", "net.a-b."])
def test_a_prefix_of_all_names(folder: Path, prefix: str) -> None:
    """As wrappers leave it: said in one line, not once a tensor."""
    tensors = stored(folder)
    changes = dict.fromkeys(tensors, REMOVED) | {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    store(folder, changes | {"extra": torch.ones(2)})
    message = refused(folder, f"begin with {prefix!r}", f"{len(tensors)} of {len(tensors) + 1} tensors'", "without it")
    assert len(message) < len(str(folder)) + 250


def test_names_without_the_prefix_that_is_due(folder: Path) -> None:
    """As `save_file(model.model.state_dict())` writes them."""
    tensors = stored(folder)
    changes = dict.fromkeys(tensors, REMOVED)
    store(folder, changes | {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    message = refused(folder, "lack 'model.'", f"{len(tensors) - 1} of {len(tensors)} tensors")
    assert len(message) < len(str(folder)) + 250


def test_long_lists_are_cut(folder: Path) -> None:
    """Of each kind the first few, and how many more there are; nor is a name ever long."""
    tensors = {name: REMOVED for name in stored(folder) if "layers.1" in name and "norm" not in name}
    extra: dict[str, Any] = {f"extra.{i}.{'x' * 5000}": torch.ones(2) for i in range(50)}
    store(folder, tensors | extra | {"model.norm.weight": torch.ones(3)})
    message = refused(folder, "61 wrong tensor", "wrong shape: model.norm.weight", "7 more missing", "47 more surplus")
    assert len(message) < len(str(folder)) + 2000


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.o_proj.bias", "model.layers.2.mlp.up_proj.weight", "lora.weight", "lm_head.bias"]
)
def test_surplus_tensor(folder: Path, name: str) -> None:
    store(folder, {name: torch.zeros(3, 5)})
    message = refused(folder, "1 wrong tensor", "surplus: ", "[3, 5]")
    assert name in message


@pytest.mark.parametrize("shape", [(63,), (65,), (1, 64), (), (0,)])
def test_misshapen_tensor(folder: Path, shape: tuple[int, ...]) -> None:
    store(folder, {NORM: torch.ones(shape)})
    refused(folder, "1 wrong tensor", f"wrong shape: {NORM} is {list(shape)}, the config asks for [64]")


def test_a_config_of_another_shape(folder: Path) -> None:
    """A transposed matrix, or a wider config, is never bent into place."""
    gate = "model.layers.0.mlp.gate_proj.weight"
    store(folder, {gate: stored(folder)[gate].T.contiguous()})
    refused(folder, f"wrong shape: {gate} is [64, 160], the config asks for [160, 64]")
    configure(folder, num_hidden_layers=3)
    refused(folder, "13 wrong tensor", "missing: model.layers.2.", "9 more missing", f"wrong shape: {gate}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_that_are_not_finite(folder: Path, held: torch.dtype, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weight = stored(folder)[name].to(held)
    weight[100, 7] = value
    store(folder, {name: weight})
    message = refused(folder, "1 wrong tensor", f"NaN or infinite values: {name}")
    assert NORM not in message


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.float64, torch.float8_e4m3fn], ids=str
)
def test_other_dtypes(folder: Path, dtype: torch.dtype) -> None:
    store(folder, {NORM: stored(folder)[NORM].to(dtype)})
    refused(folder, "1 wrong tensor", f"wrong type: {NORM} is {dtype}", "float32, float16 or bfloat16")


def test_all_that_is_wrong_is_listed(folder: Path) -> None:
    bad = torch.full((64,), torch.nan)
    store(
        folder,
        {
            "lm_head.weight": REMOVED,
            "model.layers.0.self_attn.q_proj.bias": REMOVED,
            NORM: torch.ones(63),
            "model.layers.0.input_layernorm.weight": bad,
            "model.layers.1.input_layernorm.weight": bad.clone(),
            "model.layers.1.self_attn.v_proj.bias": torch.ones(32, dtype=torch.int32),
            "model.extra": torch.ones(2),
            "model.layers.9.extra": torch.ones(3),
        },
    )
    refused(
        folder,
        str(folder),
        "8 wrong tensor",
        "missing: lm_head.weight [320, 64]",
        "missing: model.layers.0.self_attn.q_proj.bias [64]",
        f"wrong shape: {NORM} is [63]",
        "NaN or infinite values: model.layers.0.input_layernorm.weight",
        "NaN or infinite values: model.layers.1.input_layernorm.weight",
        "wrong type: model.layers.1.self_attn.v_proj.bias is torch.int32",
        "surplus: model.extra [2]",
        "surplus: model.layers.9.extra [3]",
    )


def test_a_tied_checkpoint_with_another_lm_head(tied: Path) -> None:
    head = stored(tied)["model.embed_tokens.weight"].clone()
    head[3, 5] += 1
    store(tied, {"lm_head.weight": head})
    refused(tied, "tie_word_embeddings is true", "lm_head.weight differs from model.embed_tokens.weight")
    store(tied, {"lm_head.weight": head[:-1]})
    refused(tied, "lm_head.weight differs")


def test_a_tied_checkpoint_with_the_lm_head_alone(tied: Path) -> None:
    store(tied, {"lm_head.weight": stored(tied)["model.embed_tokens.weight"], "model.embed_tokens.weight": REMOVED})
    refused(tied, "missing: model.embed_tokens.weight [512, 96]", "surplus: lm_head.weight [512, 96]")


def test_an_untied_checkpoint_without_lm_head(tied: Path) -> None:
    configure(tied, tie_word_embeddings=False)
    refused(tied, "1 wrong tensor", "missing: lm_head.weight [512, 96]", 'must say "tie_word_embeddings": true')


@pytest.mark.parametrize(("name", "real"), [("norm.weight", NORM), ("model.lm_head.weight", "lm_head.weight")])
def test_names_are_the_checkpoints_own(folder: Path, name: str, real: str) -> None:
    """With a prefix too few or too many it is another tensor."""
    store(folder, {real: REMOVED, name: stored(folder)[real]})
    refused(folder, f"missing: {real}", f"surplus: {name}")


def test_values_beyond_the_range_of_the_dtype(folder: Path) -> None:
    store(folder, {NORM: torch.full((64,), 1e38)})
    with pytest.raises(CheckpointError, match=NORM):
        load_hf_model(folder, dtype=torch.float16)


# ---- The files ----


class Creates:
    """Unpickled, creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.file), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_never_opened(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    witness, probe = tmp_path / "witness", tmp_path / "probe"
    pickle.loads(pickle.dumps(Creates(probe))).close()
    assert probe.exists()  # such a pickle does what it is made for
    (folder / name).write_bytes(pickle.dumps(Creates(witness)))
    refused(folder, "no model.safetensors and no model.safetensors.index.json", name, "never opened")
    assert not witness.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pkl"])
def test_an_index_that_names_a_pickle(sharded: Path, tmp_path: Path, name: str) -> None:
    witness = tmp_path / "witness"
    (sharded / name).write_bytes(pickle.dumps(Creates(witness)))
    index(sharded, model__norm__weight=name)
    refused(sharded, "model.safetensors.index.json", f"'{name}' is not a safetensors file")
    assert not witness.exists()


def test_a_pickle_named_safetensors(folder: Path, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    (folder / "model.safetensors").write_bytes(pickle.dumps(Creates(witness)))
    refused(folder, "damaged or truncated")
    assert not witness.exists()


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    message = refused(folder, str(folder), "no model.safetensors and no model.safetensors.index.json")
    assert "pickled" not in message


def header_length(data: bytes) -> int:
    return 8 + struct.unpack("<Q", data[:8])[0]


@pytest.mark.parametrize("where", ["empty", "1", "7", "8", "9", "in header", "header", "header+1", "half", "last"])
def test_truncated(folder: Path, where: str) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    header = header_length(data)
    lengths = {"empty": 0, "in header": header - 1, "header": header, "header+1": header + 1}
    lengths |= {"half": len(data) // 2, "last": len(data) - 1}
    file.write_bytes(data[: lengths[where] if where in lengths else int(where)])
    refused(folder, str(file), "damaged or truncated safetensors file")


def with_header(data: bytes, header: dict[str, Any]) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[header_length(data) :]


@pytest.mark.parametrize(
    "damage",
    ["noise", "zeros", "no JSON", "a list", "too long", "bytes after the end", "offset", "overlap", "shape", "dtype"],
)
def test_garbage(folder: Path, damage: str) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    header: dict[str, Any] = json.loads(data[8 : header_length(data)])
    norm = header[NORM]
    if damage == "noise":
        bad = bytes(torch.randint(256, (4096,), generator=torch.Generator().manual_seed(0)).tolist())
    elif damage == "zeros":
        bad = bytes(4096)
    elif damage == "no JSON":
        bad = data[:8] + b"{" * (header_length(data) - 8) + data[header_length(data) :]
    elif damage == "a list":
        bad = struct.pack("<Q", 2) + b"[]"
    elif damage == "too long":
        bad = struct.pack("<Q", 2**62) + data[8:]
    elif damage == "bytes after the end":
        bad = data + b"x"
    else:
        start, stop = norm["data_offsets"]
        norm |= {
            "offset": {"data_offsets": [start + len(data), stop + len(data)]},
            "overlap": {"data_offsets": [start - 4, stop - 4]},
            "shape": {"shape": [65]},
            "dtype": {"dtype": "F31"},
        }[damage]
        bad = with_header(data, header)
    file.write_bytes(bad)
    refused(folder, str(file), "damaged or truncated safetensors file")


def test_a_damaged_shard_is_named(sharded: Path) -> None:
    file = sharded / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    message = refused(sharded, str(file), "damaged or truncated")
    assert "00001" not in message


# ---- The index ----


def test_one_file_beside_shards(sharded: Path) -> None:
    """Either could be the checkpoint. An index whose shards are all gone is only left over."""
    tensors = stored(sharded)
    save_file(tensors, sharded / "model.safetensors", metadata={"format": "pt"})
    refused(sharded, "both model.safetensors and model.safetensors.index.json", "model-00001-of-00003.safetensors")
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refused(sharded, "both model.safetensors and model.safetensors.index.json")
    for shard in sharded.glob("model-*.safetensors"):
        shard.unlink()
    assert torch.equal(load_hf_model(sharded)[0].norm.weight, tensors[NORM])
    index(sharded, **dict.fromkeys(tensors, "model.safetensors"))
    load_hf_model(sharded)


def test_shards_without_an_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    refused(sharded, "no model.safetensors and no model.safetensors.index.json", *shards, "the index is missing")
    for i in range(100):
        shutil.copy(sharded / shards[0], sharded / f"x-{i:03}.safetensors")
    message = refused(sharded, shards[0], "and 100 more")
    assert "x-050" not in message


def test_missing_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refused(sharded, "index.json names model-00002-of-00003.safetensors", "not there")


def test_an_index_that_names_a_shard_too_many(sharded: Path) -> None:
    index(sharded, model__norm__weight="model-00004-of-00003.safetensors")
    refused(sharded, "names model-00004-of-00003.safetensors", "not there")


@pytest.mark.parametrize("name", ["../x.safetensors", "sub/x.safetensors", "ABSOLUTE", "..", ""])
def test_an_index_with_a_path(sharded: Path, tmp_path: Path, name: str) -> None:
    """Only files of the folder itself are opened, even if the path leads to a good file."""
    name = str(tmp_path / "x.safetensors") if name == "ABSOLUTE" else name
    (sharded / "sub").mkdir()
    for good in (tmp_path, sharded / "sub"):
        shutil.copy(sharded / "model-00003-of-00003.safetensors", good / "x.safetensors")
    index(sharded, model__norm__weight=name)
    refused(sharded, "index.json", f"{name!r} is not a safetensors file of this folder")


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    file = sharded / "model-00001-of-00003.safetensors"
    save_file(read(file) | {NORM: torch.ones(128)}, file)
    refused(sharded, NORM, "in both", "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors")


def test_an_index_that_names_another_shard(sharded: Path) -> None:
    index(sharded, model__norm__weight="model-00001-of-00003.safetensors")
    refused(sharded, f"index.json says that {NORM} is in model-00001-of-00003.safetensors, but it is not")


def test_an_index_of_a_tensor_that_is_nowhere(sharded: Path) -> None:
    index(sharded, model__extra="model-00001-of-00003.safetensors")
    refused(sharded, "index.json says that model.extra is in model-00001-of-00003.safetensors, but it is not")


def test_an_index_that_forgot_a_shard(sharded: Path) -> None:
    file = sharded / "model-00003-of-00003.safetensors"
    index(sharded, **{name.replace(".", "__"): REMOVED for name in read(file)})
    names = set(read(file))
    message = refused(sharded, f"{len(names)} wrong tensor")
    assert set(re.findall(r"missing: (\S+)", message)) <= names


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not readable as JSON"),
        ("[]", "a JSON object is expected"),
        ("{}", "weight_map must map tensor names to files"),
        ('{"weight_map": ["model-00001-of-00003.safetensors"]}', "weight_map must map"),
        ('{"weight_map": {"model.norm.weight": 3}}', "weight_map must map"),
        ('{"weight_map": {"model.norm.weight": ["model-00003-of-00003.safetensors"]}}', "weight_map must map"),
        ('{"weight_map": {}}', "39 wrong tensor(s): missing: model.embed_tokens.weight"),
    ],
)
def test_a_bad_index(sharded: Path, content: str, words: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    refused(sharded, words)


def test_a_download_is_links_into_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    """snapshots/REVISION holds links to ../../blobs/SHA256; transformers 5 has other words for the same config."""
    hub = tmp_path / "models--Dream-org--Dream"
    snapshot, blobs = hub / "snapshots" / "0123abc", hub / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    config = json.loads((folder / "config.json").read_text())
    end = config.pop("eos_token_id")
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    config |= {"dtype": config.pop("torch_dtype", None), "attention_bias": False}
    contents = {
        "config.json": json.dumps(config).encode(),
        "generation_config.json": json.dumps({"eos_token_id": [end]}).encode(),
        "model.safetensors": (folder / "model.safetensors").read_bytes(),
    }
    for i, (name, content) in enumerate(contents.items()):
        (blobs / f"{i:064d}").write_bytes(content)
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / f"{i:064d}")
    (found, _, found_config), (expected, _, expected_config) = load_hf_model(snapshot), load_hf_model(folder)
    assert found_config == expected_config
    theirs = dict(expected.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in found.named_parameters())
