"""Dream checkpoints in HF layout: `config.json` and safetensors, one file or shards with an index."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.config import ConfigError, DreamEdgeConfig
from model.dream import DreamEdge
from model.pages import release

log = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_JSON = 2**24  # bytes of a JSON file, and of a safetensors header; Python makes up to 25 times as many of them
_STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded. The message says what is wrong, and in which file."""


def load_hf_model(
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    optimize_cpu: bool = False,
) -> tuple[DreamEdge, str, DreamEdgeConfig]:
    """Load a Dream checkpoint folder: (model in eval mode, without gradients; "Dream"; its config).

    dtype: of the weights in memory; None keeps each as stored. A tensor already stored in `dtype` is not
        copied: it stays a mapping of the file.
    optimize_cpu: sets torch's threads to the physical cores, and logs it.

    Strict: raises `CheckpointError` that lists every missing, surplus, misshapen or non-finite tensor, or
    names the file that is damaged, and `ConfigError` for a config that is not supported. Only safetensors
    are ever opened.
    """
    folder = Path(path)
    config = read_config(folder)
    if optimize_cpu:
        threads = _physical_cores()
        torch.set_num_threads(threads)
        log.info("torch uses %d threads, one for each physical core", threads)
    found = _read_tensors(folder)
    # A number that is plainly wrong must not first be built, layer by layer.
    if config.num_hidden_layers > max(100, len(found)):
        raise CheckpointError(
            f"{folder}: the config asks for {config.num_hidden_layers} layers, the files hold {len(found)} tensors"
        )
    with torch.device("meta"):
        model = DreamEdge(config)
    # Tied weights share one parameter: the state dict lists it twice, the file holds it once.
    names = [n for n in model.state_dict() if not (config.tie_word_embeddings and n == "lm_head.weight")]
    shapes = {hf_name(name): tuple(model.get_parameter(name).shape) for name in names}
    _check(folder, config, shapes, found)
    for name in names:
        stored = found.pop(hf_name(name))
        tensor = stored.to(device=device, dtype=dtype or stored.dtype)
        if tensor.dtype != stored.dtype and not _is_finite(tensor):
            raise CheckpointError(f"{folder}: {hf_name(name)} has values beyond the range of {tensor.dtype}")
        _set_parameter(model, name, tensor)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval(), "Dream", config


def read_config(folder: Path) -> DreamEdgeConfig:
    """The config of a checkpoint folder. Raises `CheckpointError` or `ConfigError`."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder" if not folder.exists() else f"{folder}: not a folder")
    _check_links(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder}: no config.json; a checkpoint folder in Hugging Face layout is expected")
    config = _read_json(file)
    try:
        return DreamEdgeConfig.from_hf(config)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _check_links(folder: Path) -> None:
    """Raises `CheckpointError` for a file that is a link to elsewhere: its content is not the checkpoint's.

    Hugging Face's cache keeps the files of `snapshots/REVISION/` as links into `blobs/` beside it.
    """
    here = folder.resolve()
    homes = [here, *([here.parent.parent / "blobs"] if here.parent.name == "snapshots" else [])]
    with os.scandir(folder) as entries:
        links = sorted(entry.name for entry in entries if entry.is_symlink())
    for file in map(folder.joinpath, links):
        if file.suffix in (".json", ".safetensors", ".txt", ".jinja"):
            try:
                target = file.resolve()
            except (OSError, RuntimeError) as error:  # a link to itself
                raise CheckpointError(f"{file}: a link that leads nowhere: {error}") from error
            if not any(target.is_relative_to(home) for home in homes):
                raise CheckpointError(f"{file}: a link out of the checkpoint's folder, to {target}")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, in order. Raises `CheckpointError`."""
    index = folder / INDEX
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not index.is_file():
        pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        hint = f"; {', '.join(pickles)} may hold pickled code and is never opened: convert it" if pickles else ""
        raise CheckpointError(f"{folder}: no {WEIGHTS} and no {INDEX}{hint}")
    names = sorted(set(_weight_map(index).values()))
    with os.scandir(folder) as entries:
        present = {entry.name for entry in entries if entry.is_file()}
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {name!r} is not a safetensors file of this folder")
        if name not in present:
            raise CheckpointError(f"{index} names {name}, which is not there")
    return [folder / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to files")
    return weight_map


def _read_json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > MAX_JSON:
            raise CheckpointError(f"{file}: {file.stat().st_size} bytes of JSON, more than {MAX_JSON}")
        content = json.loads(file.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: a JSON object is expected, found {type(content).__name__}")
    return content


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder, by their names there, as mappings of their files."""
    tensors: dict[str, Tensor] = {}
    files: dict[str, Path] = {}
    for file in weight_files(folder):
        _check_header(file)
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (safe_open is no mapping)
                    if key in tensors:
                        raise CheckpointError(f"{key} stands in both {files[key].name} and {file.name}")
                    tensors[key], files[key] = opened.get_tensor(key), file
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: damaged or truncated safetensors file: {error}") from error
    if not (folder / WEIGHTS).is_file():
        for key, shard in _weight_map(folder / INDEX).items():
            if key not in files or files[key].name != shard:
                raise CheckpointError(f"{folder / INDEX} says that {key} is in {shard}, but it is not")
    return tensors


def _check_header(file: Path) -> None:
    """Before memory is taken for what it claims. Raises `CheckpointError`."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
    if length > MAX_JSON:
        raise CheckpointError(f"{file}: damaged or truncated safetensors file: a header of {length} bytes")


def _check(folder: Path, config: DreamEdgeConfig, shapes: dict[str, tuple[int, ...]], found: dict[str, Tensor]) -> None:
    """Drops a redundant tied lm_head from `found`; raises `CheckpointError` that lists all that is wrong."""
    wrong = []
    for key, shape in shapes.items():
        tensor = found.get(key)
        if tensor is None:
            wrong.append(f"missing: {key} {list(shape)}")
        elif tuple(tensor.shape) != shape:
            wrong.append(f"wrong shape: {key} is {list(tensor.shape)}, the config asks for {list(shape)}")
        elif tensor.dtype not in _STORED_DTYPES:
            wrong.append(f"wrong type: {key} is {tensor.dtype}, expected float32, float16 or bfloat16")
        elif not _is_finite(tensor):
            wrong.append(f"NaN or infinite values: {key}")
        if tensor is not None:
            release(tensor)
    head, embedding = found.get("lm_head.weight"), found.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and head is not None and embedding is not None:
        if torch.equal(head, embedding):
            del found["lm_head.weight"]
        else:
            wrong.append("tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight")
    wrong += [f"surplus: {key} {list(found[key].shape)}" for key in found if key not in shapes]
    if wrong:
        raise CheckpointError(f"{folder}: {len(wrong)} wrong tensor(s): " + "; ".join(wrong))


def _is_finite(tensor: Tensor) -> bool:
    return all(math.isfinite(end) for end in tensor.aminmax())  # makes no mask of the tensor's size


def hf_name(name: str) -> str:
    """The checkpoint's name of a parameter of `DreamEdge`."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def _set_parameter(model: DreamEdge, name: str, tensor: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, torch.nn.Parameter(tensor, requires_grad=False))


def _physical_cores() -> int:
    import psutil

    return psutil.cpu_count(logical=False) or os.cpu_count() or 1
