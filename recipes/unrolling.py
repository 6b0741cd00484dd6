"""The layers that an exported program leaves out, put back when their likes are lowered: the program is the same, byte
for byte, as if all had been exported.

Lowering takes a second for each layer, and what becomes of equal layers differs in nothing but weights. So of a run of
them what became of the second is repeated for those left out. That the first of the run became the same is checked: so
would any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import recipes.exporter  # noqa: F401 - first

# isort: split
import torch
from executorch.backends.xnnpack import xnnpack_preprocess
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir.backend.backend_details import CompileSpec, PreprocessResult
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten

from recipes.equal_layers import Run

NUMBERED = re.compile(r"\b(layers|caches)\.(\d+)\.")  # in the name of a tensor


class UnlikeError(Exception):
    """Equal layers became different."""


@dataclass(frozen=True)
class Delegate:
    """How to make one: a partition after XNNPACK's passes, where layers get other numbers (renumbered), and all nodes
    come `later` in the program, by executorch's debug handles."""

    partition: ExportedProgram
    renumbered: dict[int, int] = field(default_factory=dict)
    later: int = 0


@contextmanager
def partitions_kept() -> Iterator[list[ExportedProgram]]:
    """Yields what will be the delegates' partitions, in order, as XNNPACK's passes leave them.

    Delegates are left empty: `unrolled` makes them.
    """
    kept: list[ExportedProgram] = []
    manager = xnnpack_preprocess.XNNPACKPassManager

    def keeping(program: ExportedProgram, passes: Any = None) -> Any:
        def transform() -> ExportedProgram:
            kept.append(manager(program, passes).transform())
            return kept[-1]

        return SimpleNamespace(transform=transform)

    with (
        patch.object(xnnpack_preprocess, "XNNPACKPassManager", keeping),
        patch.object(xnnpack_preprocess, "get_node_visitors", lambda *_: _Passers()),
    ):
        yield kept


class _Passers(dict[str, Any]):
    """In place of what writes the nodes of a delegate."""

    def __contains__(self, name: object) -> bool:
        return True

    def __getitem__(self, name: str) -> Any:
        return SimpleNamespace(define_node=lambda *_: None)


def unrolled(
    program: ExportedProgram, partitions: Sequence[ExportedProgram], runs: Sequence[Run], tensors: Mapping[str, Tensor]
) -> ExportedProgram:
    """The program with all its layers. program: of delegates, without the layers that the runs leave out; it is used
    up. partitions: of its delegates. tensors: of all layers, as `equal_layers.tensors_of` names them.

    Raises `UnlikeError`.
    """
    unrolling = _Unrolling(program, partitions, tensors)
    for run in runs:
        unrolling.repeat(run)
    return unrolling.done()


class _Unrolling:
    """A program on the way to its length.

    Between the first use of a layer's cache and of the next one's lies a period: attention and MLP of a layer, and what
    the next does before its attention.
    """

    def __init__(
        self, program: ExportedProgram, partitions: Sequence[ExportedProgram], tensors: Mapping[str, Tensor]
    ) -> None:
        self.program = program
        self.graph = program.graph
        self.tensors = tensors
        self.state: dict[str, Any] = dict(program.state_dict)
        signature = program.graph_signature
        self.inputs = dict(zip(self.graph.find_nodes(op="placeholder"), signature.input_specs, strict=True))
        self.outputs = list(zip(self.graph.output_node().args[0], signature.output_specs, strict=True))
        self.delegates = {f"lowered_module_{i}": Delegate(partition) for i, partition in enumerate(partitions)}

    def repeat(self, run: Run) -> None:
        starts = [self._first_use(i) for i in (run.first, run.second, run.last)]
        nodes = list(self.graph.nodes)
        first, second, rest = nodes[starts[0] : starts[1]], nodes[starts[1] : starts[2]], nodes[starts[2] : -1]
        later = self._check_alike(run, first, second)
        self._add_inputs(run)
        constants = [node for node, spec in self.inputs.items() if _is_constant(spec) and {*node.users} <= {*second}]
        latest = {node: node for node in (*constants, *second)}
        for i in run.left_out:
            renumbered = {run.second: i, run.last: i + 1}
            made = self._inputs_of(renumbered) | self._add_constants(constants, i, latest)
            made |= {node: latest[like] for node, like in zip(first, second, strict=True)}
            for node in second:
                with self.graph.inserting_before(rest[0]):
                    made[node] = self.graph.node_copy(node, lambda x, made=made: made.get(x, x))
                if node.op == "get_attr":
                    like = self.delegates[node.target]
                    moved = Delegate(like.partition, renumbered, like.later + later * (i - run.second))
                    made[node].target = self._added(moved, node.target)
            self._put_out({latest[node]: made[node] for node in second}, i)
            latest = made
        renumbered = {run.last: run.second + 1}
        own = self._inputs_of(renumbered)
        for node in second:
            node.args, node.kwargs = map_arg((node.args, node.kwargs), lambda x: own.get(x, x))
            node.replace_all_uses_with(latest[node], lambda user: user in rest)
            if node.op == "get_attr":
                self.delegates[node.target] = replace(self.delegates[node.target], renumbered=renumbered)
        for node in rest:
            if node.op == "get_attr":
                moved = self.delegates[node.target]
                self.delegates[node.target] = replace(moved, later=moved.later + later * len(run.left_out))

    def done(self) -> ExportedProgram:
        old, module = self.program, self.program.graph_module
        for name, delegate in self.delegates.items():
            setattr(module, name, _lowered(delegate, getattr(module, name), self.tensors))
        self.graph.output_node().args = (tuple(node for node, _ in self.outputs),)
        inputs = [self.inputs[node] for node in self.graph.find_nodes(op="placeholder")]
        return ExportedProgram(
            root=module,
            graph=self.graph,
            graph_signature=ExportGraphSignature(inputs, [spec for _, spec in self.outputs]),
            state_dict=self.state,
            range_constraints=old.range_constraints,
            module_call_graph=old.module_call_graph,
            constants=old.constants,
            verifiers=[old.verifier],
        )

    def _added(self, delegate: Delegate, like: str) -> str:
        """Name of one more delegate."""
        name = f"lowered_module_{len(self.delegates)}"
        self.delegates[name] = delegate
        setattr(self.program.graph_module, name, getattr(self.program.graph_module, like))
        return name

    def _first_use(self, layer: int) -> int:
        """Place in the graph of what first uses a layer's cache."""
        caches = {node for node, spec in self.inputs.items() if (spec.target or "").startswith(f"caches.{layer}.")}
        return next(i for i, node in enumerate(self.graph.nodes) if caches.intersection(node.all_input_nodes))

    def _add_inputs(self, run: Run) -> None:
        """Those that the second layer has, for the layers that are left out: before the last one's."""
        for kind in ("layers", "caches"):
            like, last = (
                [node for node, spec in self.inputs.items() if _layer(spec.target) == (kind, number)]
                for number in (run.second, run.last)
            )
            for i in run.left_out:
                for node in like:
                    target = _of_layer(self.inputs[node].target, {run.second: i})
                    self.state[target] = self.tensors[target]
                    self._input(node, f"{node.name}_{i}", target, self.graph.inserting_before(last[0]))

    def _inputs_of(self, renumbered: dict[int, int]) -> dict[Node, Node]:
        """What has the place of a layer's inputs in another."""
        by_target = {spec.target: node for node, spec in self.inputs.items() if _layer(spec.target)}
        moved = {node: _of_layer(target, renumbered) for target, node in by_target.items()}
        return {node: by_target[target] for node, target in moved.items() if target in by_target}

    def _add_constants(self, likes: list[Node], layer: int, latest: dict[Node, Node]) -> dict[Node, Node]:
        made: dict[Node, Node] = {}
        after = latest[likes[-1]] if likes else None
        for like in likes:
            target = f"{self.inputs[like].target}_{layer}"
            self.state[target] = self.state[str(self.inputs[like].target)]
            after = made[like] = self._input(like, f"{like.name}_{layer}", target, self.graph.inserting_after(after))
        return made

    def _input(self, like: Node, name: str, target: str, there: AbstractContextManager[Any]) -> Node:
        with there:
            node = self.graph.placeholder(name)
        node.meta = dict(like.meta)
        self.inputs[node] = replace(self.inputs[like], arg=TensorArgument(node.name), target=target)
        return node

    def _put_out(self, made: dict[Node, Node], layer: int) -> None:
        """What is written into caches is put out by the program: here, after what the layer before puts out."""
        before = [(i, node, spec) for i, (node, spec) in enumerate(self.outputs) if node in made]
        place = before[-1][0] + 1
        self.outputs[place:place] = [
            (made[node], replace(spec, arg=TensorArgument(made[node].name), target=_of_layer(spec.target, one_on)))
            for one_on in [{layer - 1: layer}]
            for _, node, spec in before
        ]

    def _check_alike(self, run: Run, first: list[Node], second: list[Node]) -> int:
        """By how much the debug handles of the second period are later. Raises `UnlikeError`."""
        renumbered = {run.second: run.first, run.last: run.second}
        places = ({node: i for i, node in enumerate(period)} for period in (first, second))
        in_first, in_second = places

        def same(x: Any, y: Any) -> bool:
            if not isinstance(y, Node):
                return type(x) is type(y) and bool(x == y)
            if y in in_second or y in in_first:
                return in_first.get(x) == in_second.get(y) and x not in self.inputs
            if y not in self.inputs or x not in self.inputs:
                return x is y
            of_x, of_y = self.inputs[x], self.inputs[y]
            if _layer(of_y.target):
                return of_x.target == _of_layer(of_y.target, renumbered)
            return x is y or (_is_constant(of_y) and torch.equal(self.state[of_x.target], self.state[of_y.target]))

        steps = set()
        if len(first) != len(second):
            raise UnlikeError(f"layer {run.second} became {len(second)} operators, layer {run.first} {len(first)}")
        for one, other in zip(first, second, strict=True):
            if one.op == other.op == "get_attr":
                mine, delegate = (self.delegates[str(node.target)] for node in (one, other))
                steps.add(step := _handle(delegate.partition) - _handle(mine.partition))
                again = replace(delegate, renumbered=renumbered, later=mine.later - step)
                specs = getattr(self.program.graph_module, str(one.target)).compile_specs
                made = (_processed(it, specs, self.tensors).processed_bytes for it in (mine, again))
                if len(set(made)) == 1:
                    continue
            elif (one.op, one.target) == (other.op, other.target):
                (of_one, form), (of_other, other_form) = (
                    tree_flatten((node.args, node.kwargs)) for node in (one, other)
                )
                if form == other_form and all(map(same, of_one, of_other)):
                    continue
            raise UnlikeError(f"{other} of layer {run.second} is not as {one} of layer {run.first}")
        if len(steps) > 1:
            raise UnlikeError(f"the delegates of layer {run.second} are not all as much later")
        return steps.pop() if steps else 0


def _lowered(delegate: Delegate, like: LoweredBackendModule, tensors: Mapping[str, Tensor]) -> LoweredBackendModule:
    specs = like.compile_specs
    result = _processed(delegate, specs, tensors)
    made = LoweredBackendModule(
        like.original_module, like.backend_id, result.processed_bytes, specs, result.data_store_output
    )
    made.meta = like.meta
    return made


def _processed(delegate: Delegate, specs: list[CompileSpec], tensors: Mapping[str, Tensor]) -> PreprocessResult:
    partition, state = delegate.partition, {}
    for name, tensor in partition.state_dict.items():
        target = _of_layer(name, delegate.renumbered)
        if target not in tensors and target != name:
            raise UnlikeError(f"there is no {target} as there is {name}")
        state[name] = tensor if target == name else tensors[target]
    nodes = [node for node in partition.graph.nodes if "debug_handle" in node.meta]
    handles = [node.meta["debug_handle"] for node in nodes]
    program = ExportedProgram(
        root=partition.graph_module,
        graph=partition.graph,
        graph_signature=partition.graph_signature,
        state_dict=state,
        range_constraints=partition.range_constraints,
        module_call_graph=partition.module_call_graph,
        constants=partition.constants,
        verifiers=[partition.verifier],
    )
    try:
        for node, handle in zip(nodes, handles, strict=True):
            node.meta["debug_handle"] = handle + delegate.later
        with patch.object(xnnpack_preprocess, "XNNPACKPassManager", _none_left):
            return XnnpackBackend.preprocess(program, specs)
    finally:
        for node, handle in zip(nodes, handles, strict=True):
            node.meta["debug_handle"] = handle


def _none_left(program: ExportedProgram, **_: Any) -> Any:
    """In place of XNNPACK's passes."""
    return SimpleNamespace(transform=lambda: program)


def _handle(partition: ExportedProgram) -> int:
    return min(node.meta["debug_handle"] for node in partition.graph.nodes if node.op == "call_function")


def _is_constant(spec: InputSpec) -> bool:
    """A number that tracing made a tensor."""
    return spec.kind is not InputKind.USER_INPUT and _layer(spec.target) is None


def _layer(target: str | None) -> tuple[str, int] | None:
    """(layers or caches, number) of a tensor's name."""
    found = NUMBERED.search(target or "")
    return (found[1], int(found[2])) if found else None


def _of_layer(target: str | None, renumbered: dict[int, int]) -> str:
    return NUMBERED.sub(lambda found: f"{found[1]}.{renumbered.get(int(found[2]), found[2])}.", target or "")
