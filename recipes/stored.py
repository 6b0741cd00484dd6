"""A quantized model on disk: its weights in the very bytes that the program will hold.

One safetensors file for each of the network's parts (embedding, each layer, norm, output layer), written when the part
is whole. So a run that was killed is taken up at the part where it was, and lowering needs no weight in memory: it
copies them from these files into the `.pte`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchao.quantization import IntxUnpackedToInt8Tensor

from model import DreamEdge
from model.pages import large, read_ahead, release
from recipes.options import Backend, LinearQuant, Recipe
from recipes.packing import dequantized, pack_int4, packed_digests
from recipes.quantization import (
    INT8_ACTIVATIONS,
    InputsByLayer,
    QuantizationError,
    check_sizes,
    quant_of,
    quantize_module,
)
from recipes.regions import Region, digest_of, regions_of
from recipes.rescaling import transformed
from recipes.rotation import check_rotation


@dataclass(frozen=True)
class Weights:
    """A model as its recipe made it, by parameter name.

    model: with torchao's tensors. An int4 linear of a model on disk has its true shape and scales, but its integers
        were never filled in: they are in `packed`, two to a byte, [out, in / 2].
    regions: where linear weights and their scales (NAME.scale) are on disk.
    digests: sha256 that the bytes of a parameter may have in a `.pte`.
    made: gives a parameter in place of the model's, see `transformed_floats`.
    """

    model: DreamEdge
    digests: dict[str, list[str]]
    packed: dict[str, Tensor] = field(default_factory=dict)
    regions: dict[str, Region] = field(default_factory=dict)
    made: Callable[[str], Tensor] | None = None

    def rows(self, name: str, rows: slice | Tensor = slice(None), dtype: torch.dtype | None = None) -> Tensor:
        """Rows of a parameter as eager computes with them: floats, dequantized if need be; None for its own dtype."""
        found = self._rows(name, rows)
        if dtype is None or dtype == found.dtype:
            return found
        return large(found.shape, dtype).copy_(found)

    def _rows(self, name: str, rows: slice | Tensor) -> Tensor:
        if self.made is not None:
            return self.made(name)[rows]
        parameter = self.model.get_parameter(name)
        if not isinstance(parameter.data, IntxUnpackedToInt8Tensor):
            return parameter.data[rows]
        quantized = parameter.data
        integers = self.packed.get(name, quantized.qdata)[rows]
        return dequantized(integers, quantized.scale[rows], quantized.dtype, is_packed=name in self.packed)

    def release(self, prefix: str = "") -> None:
        """Give back the memory of what `rows` has read, where it is a mapping of a file."""
        release(*self._held(prefix))

    def read_ahead(self, prefix: str) -> None:
        """Have read on the side what `rows` will be asked for, where it is a mapping of a file."""
        read_ahead(*self._held(prefix))

    def _held(self, prefix: str) -> Iterator[Tensor]:
        for name, parameter in self.model.named_parameters():
            if name.startswith(prefix):
                inner = getattr(parameter.data, "tensor_data_names", None)
                yield from (getattr(parameter.data, part) for part in inner) if inner else (parameter.data,)
                yield from (self.packed[name],) if name in self.packed else ()


def in_memory(model: DreamEdge, backend: Backend) -> Weights:
    return Weights(model, packed_digests(model, backend))


def parts(model: DreamEdge) -> dict[str, nn.Module]:
    """The network's parts by name. A tied output layer is the embedding's."""
    named: dict[str, nn.Module] = {"embed_tokens": model.embed_tokens}
    named |= {f"layers.{i}": layer for i, layer in enumerate(model.layers)}
    named["norm"] = model.norm
    if model.lm_head.weight is not model.embed_tokens.weight:
        named["lm_head"] = model.lm_head
    return named


def store(
    model: DreamEdge,
    recipe: Recipe,
    folder: Path,
    inputs_of: Callable[[str, nn.Module], InputsByLayer] | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[str, bool]]:
    """Quantize the parts of `model` into `folder`, yielding each one's name, and whether it was there already.

    `model` is left as it is; its weights may be mappings of a checkpoint file. inputs_of: of the linear layers in a
    part, given its name and its floats, when all parts before it are stored. inputs: as `transformed` takes them.
    Raises `QuantizationError` before anything is written.
    """
    check_sizes(model, recipe.linear, recipe.embedding)
    check_rotation(model.config, recipe.rotate)
    if recipe.linear is not None and recipe.backend is not Backend.xnnpack:
        raise QuantizationError(f"linear: only XNNPACK computes quantized weights, not backend {recipe.backend.value}")
    folder.mkdir(parents=True, exist_ok=True)
    untie(model, recipe)
    for name, part in parts(model).items():
        file = folder / f"{name}.safetensors"
        done = is_whole(file)
        if not done:
            made = _floats_of(name, part, model, recipe, inputs)
            layer_inputs = inputs_of(name, made) if inputs_of is not None else None
            for path, module in made.named_modules(prefix=name):
                quantize_module(path, module, recipe.dtype, recipe.linear, recipe.embedding, layer_inputs)
            _save(made, name, recipe.backend, file)
            release(*part.parameters())
        yield name, done


def _floats_of(
    name: str, part: nn.Module, model: DreamEdge, recipe: Recipe, inputs: Mapping[str, Tensor] | None
) -> nn.Module:
    if not (recipe.fold or recipe.rotate):
        return _copied(part)
    quant = recipe.linear or LinearQuant()  # what stays float can do with any factors
    return transformed(name, part, model, recipe.fold, recipe.rotate, inputs, quant.weight_bits, quant.group_size)


def rewrite(model: DreamEdge, recipe: Recipe) -> None:
    """As the recipe folds and rotates, in place and in float32; factors go by weights. Raises `QuantizationError`."""
    check_rotation(model.config, recipe.rotate)
    untie(model, recipe)
    if recipe.fold or recipe.rotate:
        for name, made in [(name, _floats_of(name, part, model, recipe, None)) for name, part in parts(model).items()]:
            model.set_submodule(name, made)


def transformed_floats(model: DreamEdge, recipe: Recipe, inputs: Mapping[str, Tensor] | None) -> Weights:
    """The network as the recipe rescales and rotates it, float32. model: untied.

    A part is made when it is asked for, and kept until the next one is.
    """
    named = parts(model)

    @lru_cache(maxsize=1)
    def part_of(name: str) -> nn.Module:
        made = _floats_of(name, named[name], model, recipe, inputs)
        release(*named[name].parameters())
        return made

    def parameter(full: str) -> Tensor:
        name = next(name for name in named if full.startswith(f"{name}."))
        return part_of(name).get_parameter(full.removeprefix(f"{name}.")).data

    return Weights(model, {}, made=parameter)


def untie(model: DreamEdge, recipe: Recipe) -> None:
    """The embedding and the output layer are quantized, or transformed, differently."""
    if recipe.linear is not None or recipe.embedding is not None or recipe.fold or recipe.rotate:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.data, requires_grad=False)


def is_whole(file: Path) -> bool:
    """Every tensor of it has the sha256 that was noted when it was written."""
    try:
        return all(digest_of(region) == region.sha256 for region in regions_of(file).values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return False


def open_stored(folder: Path, like: DreamEdge, recipe: Recipe, only: str | None = None) -> Weights:
    """like: the model that was stored, of which only sizes and names are read. only: one of its parts; the others have
    no weights then.

    Raises `OSError`, `SafetensorError`.
    """
    with torch.device("meta"):
        model = DreamEdge(like.config)
    untie(model, recipe)
    weights = Weights(model.eval(), {})
    wanted = {name: part for name, part in parts(model).items() if only in (None, name)}
    files = {name: folder / f"{name}.safetensors" for name in wanted}
    found = {name: regions_of(file) for name, file in files.items()}
    most = max(
        (r.n_bytes for regions in found.values() for name, r in regions.items() if name.endswith(".scale")), default=0
    )
    zero_points = torch.zeros(most, dtype=torch.int8)  # of all weights
    for name, part in wanted.items():
        # Never filled in, so they take no memory: whoever asks for these integers is given their region. One piece for
        # a part: small ones would be made of what the allocator has left over, and that is memory.
        unfilled = torch.empty(2 * sum(region.n_bytes for region in found[name].values()), dtype=torch.int8)
        with safe_open(files[name], framework="pt") as opened:
            weights.digests.update(json.loads(opened.metadata()["noted"])["digests"])
            for full, module, leaf in _parameters(name, part):
                tensor = opened.get_tensor(full)
                if isinstance(module, nn.Linear) and leaf == "weight":
                    weights.regions.update(
                        {key: found[name][key] for key in (full, f"{full}.scale") if key in found[name]}
                    )
                if f"{full}.scale" in found[name]:
                    if tensor.dtype == torch.uint8:
                        weights.packed[full] = tensor
                        rows, columns = tensor.shape[0], 2 * tensor.shape[1]
                        tensor, unfilled = unfilled[: rows * columns].view(rows, columns), unfilled[rows * columns :]
                    quant = quant_of(full.removesuffix(".weight"), recipe.linear)
                    bits = quant.weight_bits if isinstance(module, nn.Linear) and quant else _embedding_bits(recipe)
                    scale = opened.get_tensor(f"{full}.scale")
                    tensor = _quantized(tensor, scale, zero_points, isinstance(module, nn.Linear), bits, recipe)
                setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
    if model.lm_head.weight.is_meta and only is None:  # tied
        model.lm_head.weight = model.embed_tokens.weight
    return weights


def _parameters(name: str, part: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """(full name, module, name in the module) of each parameter."""
    modules = part.named_modules(prefix=name)
    return [(f"{path}.{leaf}", m, leaf) for path, m in modules for leaf, _ in m.named_parameters(recurse=False)]


def _embedding_bits(recipe: Recipe) -> int:
    assert recipe.embedding is not None
    return recipe.embedding.weight_bits


def _quantized(
    integers: Tensor, scale: Tensor, zero_points: Tensor, is_linear: bool, bits: int, recipe: Recipe
) -> Tensor:
    return IntxUnpackedToInt8Tensor(
        qdata=integers,
        scale=scale,
        zero_point=zero_points[: scale.numel()].view(scale.shape),
        target_dtype=getattr(torch, f"int{bits}"),
        block_size=(1, integers.shape[1] // scale.shape[1]),
        dtype=getattr(torch, recipe.dtype.value),
        activation_quantization=INT8_ACTIVATIONS if is_linear else None,
    )


def _copied(part: nn.Module) -> nn.Module:
    """The module tree with the same tensors."""
    return copy.deepcopy(part, {id(parameter): parameter for parameter in part.parameters()})


def _save(part: nn.Module, name: str, backend: Backend, file: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for full, module, leaf in _parameters(name, part):
        data = module.get_parameter(leaf).data
        if isinstance(data, IntxUnpackedToInt8Tensor):
            assert not data.zero_point.any(), "symmetric quantization has no zero points"
            is_int4_linear = isinstance(module, nn.Linear) and str(data.target_dtype) == "torch.int4"
            tensors[full] = pack_int4(data.qdata) if is_int4_linear else data.qdata
            tensors[f"{full}.scale"] = data.scale
        else:
            tensors[full] = data.contiguous()
    sha256 = {full: hashlib.sha256(_bytes(tensor)).hexdigest() for full, tensor in tensors.items()}
    digests = {f"{name}.{rest}": found for rest, found in packed_digests(part, backend).items()}
    noted = {"sha256": sha256, "digests": digests}  # in one entry: safetensors writes several in any order
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata={"noted": json.dumps(noted)})
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
