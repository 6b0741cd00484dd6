"""Write a random Dream checkpoint of any shape, in Hugging Face layout: bfloat16 in shards, the same for the same seed.

    python scripts/make_checkpoint.py conf/shape/dream_0_5b.yaml /tmp/dream_0_5b --tokenizer assets/dream_english

With a tokenizer it reads text as a real one does, so that calibration and validation of this size are the real ones.
One shard at a time is in memory, and float32 of a slice of one tensor.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import torch
from omegaconf import OmegaConf
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from model import ConfigError, DreamEdge, DreamEdgeConfig
from model.checkpoint import hf_name
from model.checkpoint_files import INDEX, read_config

SHARD_BYTES = 2 * 1024**3
IDS = ("mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id")
SLICE = 2**22  # numbers that are drawn at once

Shapes = dict[str, tuple[int, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("shape", type=Path, help="YAML of the sizes, see conf/shape/")
    parser.add_argument("output", type=Path, help="folder of the checkpoint; must not exist or be empty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, help="a checkpoint whose tokenizer is taken, and its ids")
    args = parser.parse_args()
    try:
        config = read_shape(args.shape)
        if args.tokenizer:
            config = with_ids_of(config, args.tokenizer)
        write_checkpoint(config, args.output, args.seed)
        if args.tokenizer:
            copy_tokenizer(args.tokenizer, args.output)
    except (ConfigError, OSError) as error:
        sys.exit(f"make_checkpoint: {error}")


def read_shape(file: Path) -> DreamEdgeConfig:
    """Raises `ConfigError` that names the file and what is wrong in it, and `OSError`."""
    try:
        content = OmegaConf.to_container(OmegaConf.create(file.read_text(encoding="utf-8")))
    except OSError:
        raise
    except Exception as error:
        raise ConfigError(f"{file}: not readable as YAML: {' '.join(str(error).split())}") from error
    known = {field.name for field in fields(DreamEdgeConfig)}
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: keys and values are expected")
    unknown = [str(key) for key in content if key not in known]
    if unknown:
        raise ConfigError(f"{file}: no such size: {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    try:
        return DreamEdgeConfig(**{str(key): value for key, value in content.items()})
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def with_ids_of(config: DreamEdgeConfig, checkpoint: Path) -> DreamEdgeConfig:
    """Raises `ConfigError` where the vocabulary is too small for them."""
    other = read_config(checkpoint)
    return replace(config, **{key: getattr(other, key) for key in IDS})


def copy_tokenizer(checkpoint: Path, output: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(checkpoint / name, output / name)


def write_checkpoint(config: DreamEdgeConfig, output: Path, seed: int, shard_bytes: int = SHARD_BYTES) -> None:
    """Raises `FileExistsError` if `output` holds anything."""
    output.mkdir(parents=True, exist_ok=True)
    if any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty")
    tensors = shapes(config)
    seeds = {name: seed_of(seed, i) for i, name in enumerate(tensors)}
    shards = list(split(tensors, shard_bytes))
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(track(shards, "shards", transient=True), start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        drawn = {name: draw(name, shape, config, seeds[name]) for name, shape in shard.items()}
        save_file(drawn, output / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    total = sum(n_bytes(shape) for shape in tensors.values())
    _write_json(output / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_json(output / "config.json", {**config.to_hf(), "torch_dtype": "bfloat16"})


def shapes(config: DreamEdgeConfig) -> Shapes:
    """Of all tensors that a checkpoint file holds, by their names there."""
    with torch.device("meta"):
        model = DreamEdge(config)
    # A parameter that is tied to another is listed once.
    return {hf_name(name): tuple(parameter.shape) for name, parameter in model.named_parameters()}


def split(tensors: Shapes, shard_bytes: int) -> Iterator[Shapes]:
    shard: Shapes = {}
    for name, shape in tensors.items():
        if shard and sum(map(n_bytes, shard.values())) + n_bytes(shape) > shard_bytes:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def n_bytes(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * torch.bfloat16.itemsize


def seed_of(seed: int, i: int) -> int:
    """Of tensor i, so that what is drawn does not depend on how the tensors are sharded."""
    return int(torch.randint(2**62, (i + 1,), generator=torch.Generator().manual_seed(seed))[i])


def draw(name: str, shape: tuple[int, ...], config: DreamEdgeConfig, seed: int) -> Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    std = std_of(name, shape, config)
    for part in tensor.view(-1).split(SLICE):
        part.copy_(torch.randn(part.shape, generator=generator) * std)
    return tensor


def std_of(name: str, shape: tuple[int, ...], config: DreamEdgeConfig) -> float:
    """So that activations keep their size through any number of layers."""
    if "embed_tokens" in name:
        return 1.0
    if name.endswith("bias"):
        return 0.02
    std = 1 / math.sqrt(shape[1])
    is_added = name.endswith(("o_proj.weight", "down_proj.weight"))  # what each layer adds to its input
    return std / math.sqrt(2 * config.num_hidden_layers) if is_added else std


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
