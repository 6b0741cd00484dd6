"""What executorch computes again and again while it lowers, computed once: the program is the same, byte for byte.

Each of its passes runs the whole graph on fake tensors, to learn shapes that it knew before, and compiles it to Python
that nobody calls. Without that lowering takes half the time. The adaptations hold only inside a `with`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

from recipes.exporter import by_inductor  # first

# isort: split
import torch
import torch.export._remove_auto_functionalized_pass as functionalized
from executorch.exir.lowered_backend_module import LoweredBackendModule
from executorch.exir.pass_base import _ExportPassBase
from torch._export import utils
from torch._export.pass_base import _ExportPassBaseDeprecatedDoNotUse
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.traceback import NodeSource
from torch.utils._pytree import tree_leaves

Call = Callable[..., Any]

PLAIN = (int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
# torch's table of decompositions has it, but nothing becomes of it.
KEPT = torch.ops.aten.sym_size.int


@contextmanager
def shapes_computed_once() -> Iterator[None]:
    """An operator that gets tensors that look as others did before gives what it gave then: most do in most passes."""
    known: dict[Any, Any] = {}
    bases = (_ExportPassBase, _ExportPassBaseDeprecatedDoNotUse)  # of executorch's passes, and of torch's
    of_executorch, of_torch = (patch.object(base, "_fx", _remembering(base._fx, known)) for base in bases)
    with (
        of_executorch,
        of_torch,
        # Where a node came from, pass by pass, is copied for each new node. It never changes.
        patch.object(NodeSource, "__deepcopy__", lambda source, _: source, create=True),
        patch.object(GraphModule, "recompile", _recompile_when_called),
        patch.object(functionalized, "decompose_auto_functionalized", _in_place_again),
        # All operators of all libraries are looked up anew for each library.
        patch.object(utils, "_materialize_cpp_cia_ops", cache(utils._materialize_cpp_cia_ops)),
    ):
        yield


class _Remembering:
    """A pass's interpreter. known: result and arguments by operator and what the arguments are, or how they look.

    A number that is read from a tensor is the same for the very same tensor alone.
    """

    def __init__(self, interpreter: Any, known: dict[Any, Any]) -> None:
        self._interpreter = interpreter
        self._known = known

    def __getattr__(self, name: str) -> Any:
        return getattr(self._interpreter, name)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        op = getattr(target, "_op", target)  # the edge dialect's, or torch's
        keys = []
        for look in (id, _look):
            keys.append((op, _parts(args, look), _parts(kwargs, look)))
            if keys[-1] in self._known:
                return self._known[keys[-1]][0]
        result = self._interpreter.call_function(target, args, kwargs)
        reads_lengths = torch.Tag.dynamic_output_shape in getattr(op, "tags", ())
        if reads_lengths or not all(isinstance(part, torch.Tensor) for part in tree_leaves(result)):
            keys.pop()
        # The arguments are kept, or another object could get the place in memory that identifies them.
        self._known.update(dict.fromkeys(keys, (result, args, kwargs)))
        return result


def _remembering(fx: Call, known: dict[Any, Any]) -> Call:
    def remembering(self: Any, *args: Any) -> Any:
        interpreter = self.interpreter
        self.interpreter = _Remembering(interpreter, known)
        try:
            return fx(self, *args)
        finally:
            self.interpreter = interpreter

    return remembering


def _parts(value: Any, look: Call) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_parts(one, look) for one in value)
    if isinstance(value, dict):
        return tuple((name, _parts(one, look)) for name, one in value.items())
    return (type(value), value) if isinstance(value, PLAIN) else look(value)


def _look(value: Any) -> Any:
    """All that the shape of a result goes by: those of equal layers are computed once."""
    if isinstance(value, FakeTensor) and value.constant is None:
        sizes = (tuple(map(_length, numbers)) for numbers in (value.shape, value.stride(), [value.storage_offset()]))
        return value.dtype, *sizes, value.device, value.requires_grad, id(value.fake_mode)
    return id(value.original_module if isinstance(value, LoweredBackendModule) else value)  # equal layers share it


def _length(value: int | torch.SymInt) -> Any:
    return value.node.expr if isinstance(value, torch.SymInt) else value


def _in_place_again(graph: Graph) -> None:
    """What writes into whole tensors does so once more; inductor, which torch asks, would trace each of them anew."""
    nodes = graph.find_nodes(op="call_function", target=torch.ops.higher_order.auto_functionalized_v2)
    older = graph.find_nodes(op="call_function", target=torch.ops.higher_order.auto_functionalized)
    if older or not all(map(_writes_whole_tensors, nodes)):
        by_inductor(graph)
        return
    for node in nodes:
        op, given, bases = node.args[0], dict(node.kwargs), node.kwargs["_all_bases"]
        names = [argument.name for argument in op._schema.arguments]
        given |= {name: bases[given[_base_of(name)]] for name in names if _base_of(name) in given}
        with graph.inserting_before(node):
            made = graph.call_function(op, tuple(given[name] for name in names))
        made.meta = node.meta | {"val": node.meta["val"][0]}
        for user in list(node.users):
            user.replace_all_uses_with((made, *bases)[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)


def _writes_whole_tensors(node: Node) -> bool:
    schema, given = node.args[0]._schema, node.kwargs  # type: ignore[union-attr]
    names = [argument.name for argument in schema.arguments if not argument.kwarg_only]
    bases = [given[base] for base in map(_base_of, names) if base in given]
    known = {*names, *map(_base_of, names), "_all_bases"}
    return (
        len(names) == len(schema.arguments)
        and len(schema.returns) <= 1
        and all(isinstance(base, int) for base in bases)
        and known.issuperset(given)
        and all(user.target is operator.getitem for user in node.users)
    )


def _base_of(name: str) -> str:
    """Where torch says which of the tensors an argument is that is written into; of a part of one it says more."""
    return f"_{name}_base_index"


_recompile = GraphModule.recompile


def _recompile_when_called(module: GraphModule) -> None:
    def forward(module: GraphModule, *args: Any, **kwargs: Any) -> Any:
        _recompile(module)
        return module(*args, **kwargs)

    type(module).forward = forward  # each graph module has a class of its own
    module._code = ""  # executorch prints it into a log that nobody reads
    if isinstance(module.graph._codegen, _PyTreeCodeGen):
        module._in_spec, module._out_spec = module.graph._codegen.pytree_info[1:]


@contextmanager
def decomposed_once() -> Iterator[None]:
    """executorch makes a program functional, decomposes it but for what XNNPACK wants whole, and then what that is not
    wanted whole after all, and traces all of it each time. The second does the first too; the third mostly nothing.
    """
    run = ExportedProgram.run_decompositions
    done: list[ExportedProgram] = []

    def decomposed(program: ExportedProgram, table: Any = None) -> ExportedProgram:
        if type(table) is dict and not table:
            return program
        is_done = any(program is one for one in done)
        if is_done and not any(node.target in table and node.target is not KEPT for node in program.graph.nodes):
            return program
        done.append(run(program, table))
        return done[-1]

    with patch.object(ExportedProgram, "run_decompositions", decomposed):
        yield
