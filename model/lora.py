"""A LoRA adapter in PEFT's layout, merged into a checkpoint's weights: W += (alpha / r) B A, to the bit as PEFT merges.

A slice of a matrix is in memory as float32, the matrices of a layer as they are stored; what is merged is kept in
files, one a layer, and mapped from there.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.checkpoint import hf_name, is_finite
from model.checkpoint_files import CheckpointError, read_json
from model.dream import DreamEdge
from model.pages import release

ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SLICE = 2**24  # numbers whose float32 is in memory at once
PARTS = {"lora_A.weight": "A", "lora_B.weight": "B"}
# What PEFT can do besides, by the key that says so and the value that says not: each is refused by name.
ONLY: dict[str, Any] = {
    "peft_type": "LORA",
    "use_dora": False,
    "fan_in_fan_out": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "use_bdlora": None,
}
# Ways to begin an adapter that change the checkpoint's own weights: W of the merge is then another.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")
LARGEST = 1e300


@dataclass(frozen=True)
class Adapter:
    """scales, a_rN, b_Mr: by the checkpoint's name of the matrix, W += scale * b a. folder: where it lies."""

    folder: Path
    scales: dict[str, float]
    a_rN: dict[str, Tensor]
    b_Mr: dict[str, Tensor]


def adapter_files(folder: Path) -> list[Path]:
    """Raises `CheckpointError`."""
    files = [folder / ADAPTER_CONFIG, folder / ADAPTER]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{folder}: no {file.name}; a LoRA adapter as PEFT saves it is expected")
    return files


def is_d2f(folder: Path) -> bool:
    """Whether it makes a network block-causal, by its name: PEFT's files say nothing of it."""
    return any("d2f" in part.lower() for part in folder.resolve().parts[-3:])  # a hub's: models--NAME, snapshots, hash


def read_adapter(folder: Path, model: DreamEdge) -> Adapter:
    """Raises `CheckpointError` that names what the adapter does and this merge does not, or what does not fit."""
    config_file, file = adapter_files(folder)
    config = _read_config(config_file)
    shapes = {name: module.weight.shape for name, module in _linears(model)}
    found: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                name, part = _place(key)
                if part is None and _is_as_it_was(model, name, opened.get_tensor(key)):
                    continue  # PEFT saves the embedding and the output layer, too, where it adapts one of them
                if name == "lm_head" and model.config.tie_word_embeddings:
                    raise CheckpointError(f"{file}: {key}: the output layer is the embedding, and not adapted here")
                if part is None or name not in shapes:
                    raise CheckpointError(f"{file}: {key} is for no matrix of the network{_why(key)}")
                found.setdefault(name, {})[part] = opened.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: damaged or truncated safetensors file: {error}") from error
    if not found:
        raise CheckpointError(f"{file}: holds no matrix")
    scales = {}
    for name, parts in found.items():
        _check(file, name, parts, tuple(shapes[name]))
        scales[name] = _scale(config_file, config, name, len(parts["A"]))
    return Adapter(folder, scales, {n: p["A"] for n, p in found.items()}, {n: p["B"] for n, p in found.items()})


def merge(model: DreamEdge, adapter: Adapter, kept: Path) -> None:
    """Replace the matrices of `model` by merged ones. kept: a folder for their files; those that are there are used.

    Raises `CheckpointError` for a matrix that is no longer finite, and `OSError`.
    """
    kept.mkdir(parents=True, exist_ok=True)
    modules = dict(_linears(model))
    for part in dict.fromkeys(map(_part_of, adapter.scales)):
        names = [name for name in adapter.scales if _part_of(name) == part]
        file = kept / f"{part}.safetensors"
        if (merged := _kept(file, names)) is None:
            made = {name: merged_weight(modules[name].weight.data, adapter, name) for name in names}
            partial = file.with_suffix(f".{os.getpid()}.partial")
            try:
                save_file(made, partial)
                partial.replace(file)
            except SafetensorError as error:  # a full disk, too
                partial.unlink(missing_ok=True)
                raise OSError(f"{file}: cannot be written: {error}") from error
            merged = _kept(file, names)
        for name, tensor in (merged or {}).items():
            modules[name].weight = nn.Parameter(tensor, requires_grad=False)


def _kept(file: Path, names: list[str]) -> dict[str, Tensor] | None:
    """As mappings of the file; None where it is not there, or damaged."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in names}
    except SafetensorError:
        return None


def merged_weight(weight_MN: Tensor, adapter: Adapter, name: str) -> Tensor:
    """As PEFT merges: the product in float32, rounded to the adapter's type if that is narrower, then added
    in float32 and rounded to the checkpoint's.
    """
    a_rN, b_Mr = adapter.a_rN[name], adapter.b_Mr[name]
    merged_MN = torch.empty_like(weight_MN)
    for rows in torch.arange(len(weight_MN)).split(max(1, SLICE // weight_MN.shape[1])):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        delta_mN = (b_Mr[part].float() @ a_rN.float()).mul_(adapter.scales[name]).to(a_rN.dtype)
        merged_MN[part] = weight_MN[part].float() + delta_mN.float()
    release(weight_MN)
    if not is_finite(merged_MN):
        raise CheckpointError(f"{adapter.folder}: {name}, merged, is beyond the range of {weight_MN.dtype}")
    return merged_MN


def _linears(model: DreamEdge) -> list[tuple[str, nn.Linear]]:
    """By the checkpoint's names."""
    return [
        (hf_name(f"{name}.weight").removesuffix(".weight"), module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]


def _is_as_it_was(model: DreamEdge, name: str, tensor: Tensor) -> bool:
    ours = {hf_name(own): parameter for own, parameter in model.named_parameters()}.get(name)
    return ours is not None and ours.shape == tensor.shape and torch.equal(ours, tensor.to(ours.dtype))


def _part_of(name: str) -> str:
    """`layers.3` of `model.layers.3.mlp.up_proj`."""
    return ".".join(name.removeprefix("model.").split(".")[:2])


def _read_config(file: Path) -> dict[str, Any]:
    config = read_json(file)
    for key, only in ONLY.items():
        value = config.get(key, only)
        if value != only and not (only in (None, False) and not value):
            raise CheckpointError(
                f"{file}: {key} {json.dumps(value)}: only {json.dumps(only)} can be merged here: merge it with PEFT, "
                "and give the merged checkpoint"
            )
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(CHANGE_THE_BASE):
        raise CheckpointError(
            f"{file}: init_lora_weights {json.dumps(begun[:120])} changed the weights that the adapter goes with: "
            "merge it with PEFT, and give the merged checkpoint"
        )
    for key in ("r", "lora_alpha"):
        if not _is_number(config.get(key)):
            raise CheckpointError(f"{file}: {key} must be a number above 0, found {str(config.get(key))[:120]}")
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= LARGEST


def _place(key: str) -> tuple[str, str | None]:
    """(the checkpoint's name of the matrix, A or B)"""
    for ending, part in PARTS.items():
        if key.startswith(PREFIX) and key.endswith(f".{ending}"):
            return key[len(PREFIX) : -len(ending) - 1], part
    return key.removeprefix(PREFIX).replace(".base_layer.", "."), None


def _why(key: str) -> str:
    if "lora_embedding" in key or "embed_tokens" in key:
        return ": adapters of the embedding are not merged here"
    if "modules_to_save" in key:
        return ": whole modules (modules_to_save) are not merged here"
    return ""


def _check(file: Path, name: str, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
    if len(parts) < 2:
        raise CheckpointError(f"{file}: {name} has lora_{next(iter(parts))} alone")
    a_rN, b_Mr = parts["A"], parts["B"]
    shapes = [list(a_rN.shape), list(b_Mr.shape)]
    if (
        0 in (*shapes[0], *shapes[1])
        or a_rN.dim() != 2
        or b_Mr.dim() != 2
        or (len(b_Mr), a_rN.shape[1]) != shape
        or len(a_rN) != b_Mr.shape[1]
    ):
        raise CheckpointError(f"{file}: {name}: A {shapes[0]} and B {shapes[1]} do not fit its {list(shape)}")
    for part, tensor in parts.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise CheckpointError(f"{file}: {name}: lora_{part} is {tensor.dtype}")
        if not is_finite(tensor):
            raise CheckpointError(f"{file}: {name}: lora_{part} has values that are not finite")


def _scale(file: Path, config: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r); both may be the matrix's own."""
    r, alpha = (
        _of_module(file, config, *keys, name) for keys in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    if r != rank:
        raise CheckpointError(f"{file}: {name} has rank {r:g} here, and {rank} in {ADAPTER}")
    return float(alpha / math.sqrt(r) if config.get("use_rslora") else alpha / r)


def _of_module(file: Path, config: Mapping[str, Any], patterns: str, default: str, name: str) -> float:
    """The value of the first pattern that the matrix's name ends with, as PEFT looks it up."""
    given = config.get(patterns) or {}
    if not isinstance(given, dict):
        raise CheckpointError(f"{file}: {patterns} must map names to numbers")
    for pattern, value in given.items():
        plain = pattern.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if re.search(r"[^\w.]", plain):
            raise CheckpointError(f"{file}: {patterns}: {pattern[:120]!r}: only names can be read, not patterns")
        if not _is_number(value):
            raise CheckpointError(f"{file}: {patterns}: {pattern[:120]!r}: must be a number above 0")
        if name == plain or (not pattern.startswith("^") and name.endswith(f".{plain}")):
            return float(value)
    return float(config[default])
