"""Which layers of a network need not be exported, as others become the same: `recipes/unrolling.py` puts them back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor, nn

from recipes.static_program import AtenCache, StaticProgram, with_modules

FEWEST = 4  # equal layers in a row, of which the first two and the last are not all


@dataclass(frozen=True)
class Run:
    """Equal layers from number `first` to `last`, of which all between `second` and `last` are left out."""

    first: int
    second: int
    last: int

    @property
    def left_out(self) -> range:
        return range(self.second + 1, self.last)


@dataclass(frozen=True)
class LeftOut:
    """program: with all its layers."""

    program: StaticProgram
    runs: list[Run]


def runs_of(program: StaticProgram) -> list[Run]:
    """The first layer reads the embedding and the last computes rows alone, so neither becomes like another."""
    if not program.is_delegable or isinstance(program.caches[0], AtenCache):
        return []
    layers = program.model.layers
    rows = (list(run) for _, run in groupby(range(1, len(layers) - 1), lambda i: _kind(layers[i])))
    return [Run(row[0], row[1], row[-1]) for row in rows if len(row) >= FEWEST]


def shortened(program: StaticProgram, runs: Sequence[Run]) -> StaticProgram:
    """Without the layers that the runs leave out. The others keep their tensors and, in their names, their numbers."""
    left_out = {str(i) for run in runs for i in run.left_out}
    if not left_out:
        return program
    model = with_modules(program.model, program.model._modules | {"layers": _without(program.model.layers, left_out)})
    return with_modules(program, program._modules | {"model": model, "caches": _without(program.caches, left_out)})


def tensors_of(program: StaticProgram) -> dict[str, Tensor]:
    """Of all layers, by the names that torch.export gives them: torchao's in their parts."""
    tensors: dict[str, Tensor] = dict(program.named_buffers(remove_duplicate=False))
    for name, parameter in program.named_parameters(remove_duplicate=False):
        path, _, leaf = name.rpartition(".")
        parts = _parts(parameter)
        for i, part in enumerate(parts):
            whole = name if len(parts) == 1 else f"{path}.parametrizations.{leaf}.original{i}"
            tensors[whole] = nn.Parameter(part, requires_grad=False)
    return tensors


def _kind(layer: nn.Module) -> list[object]:
    """What makes layers equal: everything but the numbers in their tensors."""
    kind: list[object] = []
    for path, module in layer.named_modules():
        plain = {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
        kind += [path, type(module), plain]
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            noted = [str(getattr(tensor.data, key)) for key in getattr(tensor.data, "tensor_attribute_names", [])]
            kind += [name, noted, [(part.shape, part.dtype) for part in _parts(tensor)]]
    return kind


def _parts(tensor: Tensor) -> list[Tensor]:
    names = getattr(tensor.data, "tensor_data_names", None)
    return [getattr(tensor.data, name) for name in names] if names else [tensor]


def _without(modules: nn.ModuleList, names: set[str]) -> nn.ModuleList:
    return with_modules(modules, {name: module for name, module in modules._modules.items() if name not in names})
