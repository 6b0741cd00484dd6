"""What executorch computes again and again while it lowers, computed once: the program is the same, byte for byte.

Each of its passes runs the whole graph on fake tensors, to learn shapes that it knew before, and compiles it to Python
that nobody calls. Without that lowering takes half the time. The adaptations hold only inside a `with`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from executorch.exir.delegate import executorch_call_delegate
from executorch.exir.lowered_backend_module import LoweredBackendModule
from executorch.exir.pass_base import _ExportPassBase
from torch._export.pass_base import _ExportPassBaseDeprecatedDoNotUse
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.traceback import NodeSource

Call = Callable[..., Any]

PLAIN = (int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
# torch's table of decompositions has it, but nothing becomes of it.
KEPT = torch.ops.aten.sym_size.int


@contextmanager
def shapes_computed_once() -> Iterator[None]:
    """An operator that gets the very tensors that it got before gives what it gave then: most do in most passes.

    So does a delegate that gets tensors of the same shapes.
    """
    known: dict[Any, Any] = {}
    bases = (_ExportPassBase, _ExportPassBaseDeprecatedDoNotUse)  # of executorch's passes, and of torch's
    of_executorch, of_torch = (patch.object(base, "_fx", _remembering(base._fx, known)) for base in bases)
    with (
        of_executorch,
        of_torch,
        # Where a node came from, pass by pass, is copied for each new node. It never changes.
        patch.object(NodeSource, "__deepcopy__", lambda source, _: source, create=True),
        patch.object(GraphModule, "recompile", _recompile_when_called),
    ):
        yield


class _Remembering:
    """A pass's interpreter. known: result and arguments by operator and what identifies the arguments."""

    def __init__(self, interpreter: Any, known: dict[Any, Any]) -> None:
        self._interpreter = interpreter
        self._known = known

    def __getattr__(self, name: str) -> Any:
        return getattr(self._interpreter, name)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        of = _looks if target is executorch_call_delegate else _identity
        key = (getattr(target, "_op", target), of(args), of(kwargs))  # the edge dialect's, or torch's
        if key not in self._known:
            # The arguments are kept, or another object could get the place in memory that identifies them.
            self._known[key] = self._interpreter.call_function(target, args, kwargs), args, kwargs
        return self._known[key][0]


def _remembering(fx: Call, known: dict[Any, Any]) -> Call:
    def remembering(self: Any, *args: Any) -> Any:
        interpreter = self.interpreter
        self.interpreter = _Remembering(interpreter, known)
        try:
            return fx(self, *args)
        finally:
            self.interpreter = interpreter

    return remembering


def _identity(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(map(_identity, value))
    if isinstance(value, dict):
        return tuple((name, _identity(one)) for name, one in value.items())
    return (type(value), value) if isinstance(value, PLAIN) else id(value)


def _looks(value: Any) -> Any:
    """Of a delegate's arguments: what it gives goes by no more than their shapes, and equal layers share partitions."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_looks, value))
    if isinstance(value, LoweredBackendModule):
        return id(value.original_module)
    return (value.dtype, str(tuple(value.shape))) if isinstance(value, torch.Tensor) else _identity(value)


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
