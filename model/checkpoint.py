"""Dream checkpoints in HF layout: `config.json` and safetensors, one file or shards with an index."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.checkpoint_files import INDEX, MAX_JSON, CheckpointError, read_config, read_weight_map, weight_files
from model.config import DreamEdgeConfig
from model.dream import DreamEdge
from model.pages import release

log = logging.getLogger(__name__)

FREQUENCIES = "rotary_emb.inv_freq"  # a buffer that older code saved: it follows from rope_theta
LISTED = 3  # wrong tensors of a kind that a message names
_STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


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

    Strict: raises `CheckpointError` for missing, surplus, misshapen or non-finite tensors, naming the first few of
    each kind, or the file that is damaged, and `ConfigError` for a config that is not supported. Only safetensors
    are ever opened. End tokens are those of both configs; `pipeline.load` adds its tokenizer's.
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
        if tensor.dtype != stored.dtype and not is_finite(tensor):
            raise CheckpointError(f"{folder}: {hf_name(name)} has values beyond the range of {tensor.dtype}")
        set_parameter(model, name, tensor)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval(), "Dream", config


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
    for key, shard in (read_weight_map(folder) or {}).items():
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
    """Drops what is redundant from `found`: a tied lm_head, frequencies.

    Raises `CheckpointError` that says what is wrong, of each kind the first few.
    """
    _check_names(folder, shapes, found)
    wrong: dict[str, list[str]] = {
        kind: [] for kind in ("missing", "wrong shape", "wrong type", "NaN or infinite values")
    }
    for key, shape in shapes.items():
        tensor = found.get(key)
        if tensor is None:
            wrong["missing"].append(f"{key} {list(shape)}")
        elif tuple(tensor.shape) != shape:
            wrong["wrong shape"].append(f"{key} is {list(tensor.shape)}, the config asks for {list(shape)}")
        elif tensor.dtype not in _STORED_DTYPES:
            wrong["wrong type"].append(f"{key} is {tensor.dtype}, expected float32, float16 or bfloat16")
        elif not is_finite(tensor):
            wrong["NaN or infinite values"].append(key)
        if tensor is not None:
            release(tensor)
    head, embedding = found.get("lm_head.weight"), found.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and head is not None and embedding is not None:
        if torch.equal(head, embedding):
            del found["lm_head.weight"]
        else:
            wrong["tie_word_embeddings is true, but"] = ["lm_head.weight differs from model.embed_tokens.weight"]
    for key in [key for key in found if key.endswith(FREQUENCIES)]:
        del found[key]
    wrong["surplus"] = [f"{key} {list(found[key].shape)}" for key in found if key not in shapes]
    if any(wrong.values()):
        raise CheckpointError(f"{folder}: {_wrong_tensors(wrong)}{_remedy(shapes, found)}")


def _wrong_tensors(wrong: dict[str, list[str]]) -> str:
    listed = []
    for kind, tensors in wrong.items():
        # A name may be as long as its file.
        listed += [f"{kind}: {name if len(name) <= 120 else f'{name[:120]}…'}" for name in tensors[:LISTED]]
        listed += [f"and {len(tensors) - LISTED} more {kind}"] if len(tensors) > LISTED else []
    return f"{sum(map(len, wrong.values()))} wrong tensor(s): " + "; ".join(listed)


def _remedy(shapes: Iterable[str], found: Iterable[str]) -> str:
    """What a known set of missing tensors means."""
    missing = set(shapes).difference(found)
    if missing == {"lm_head.weight"}:
        return (
            '; if the output layer shares the weight of the embedding, config.json must say "tie_word_embeddings": true'
        )
    if missing and all(name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")) for name in missing):
        return "; a network without biases of q, k and v is not Dream's"
    return ""


def _check_names(folder: Path, expected: Iterable[str], found: Iterable[str]) -> None:
    """Raises `CheckpointError` where most names have a prefix too many, as wrappers leave it, or one too few."""
    expected, found = {*expected, "lm_head.weight"}, set(found)
    for names, others, said, remedy in (
        (
            found,
            expected,
            "begin with",
            "save the network without its wrapper, or the tensors by their names without it",
        ),
        (expected, found, "lack", "save the whole network, or the tensors by their names with it"),
    ):
        prefix, n = next(iter(_prefixes(names, others).most_common(1)), ("", 0))
        if 2 * n > len(found):
            raise CheckpointError(f"{folder}: {n} of {len(found)} tensors' names {said} {prefix[:120]!r}: {remedy}")


def _prefixes(names: Iterable[str], others: set[str]) -> Counter[str]:
    """How many names are each prefix, up to some dot, and then a name of the others."""
    longest = max(map(len, others), default=0)  # names may be as long as their file
    return Counter(
        name[:at]
        for name in names
        for at in range(max(1, len(name) - longest), len(name))
        if name[at - 1] == "." and name[at:] in others
    )


def is_finite(tensor: Tensor) -> bool:
    return all(math.isfinite(end) for end in tensor.aminmax())  # makes no mask of the tensor's size


def hf_name(name: str) -> str:
    """The checkpoint's name of a parameter of `DreamEdge`."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def set_parameter(model: DreamEdge, name: str, tensor: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, torch.nn.Parameter(tensor, requires_grad=False))


def _physical_cores() -> int:
    import psutil

    return psutil.cpu_count(logical=False) or os.cpu_count() or 1
