"""The layers that an exported program leaves out, put back when their likes are lowered: the program is the same, byte
for byte, as if all had been exported.

Lowering takes a second for each layer, and what becomes of equal layers differs in nothing but weights. So of a run of
them what became of the second is repeated for those left out. That the first of the run became the same is checked: so
would any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import recipes.exporter  # noqa: F401 - first

# isort: split
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten

from recipes.equal_layers import Run
from recipes.partitions import NUMBERED, Delegate, UnlikeError, first_handle, lowered, of_layer, processed


def unrolled(
    program: ExportedProgram, partitions: Sequence[ExportedProgram], runs: Sequence[Run], tensors: Mapping[str, Tensor]
) -> ExportedProgram:
    """The program with all its layers. program: of delegates, without the layers that the runs leave out; it is used
    up. partitions: of its delegates. tensors: of all layers, as `equal_layers.tensors_of` names them.

    Raises `UnlikeError`.
    """
    try:
        unrolling = _Unrolling(program, partitions, tensors)
        for run in runs:
            unrolling.repeat(run)
        return unrolling.done()
    except (LookupError, StopIteration, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise UnlikeError(f"{type(error).__name__}: {error}") from error


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
        names = sorted(node.target for node in self.graph.find_nodes(op="get_attr"))
        self.delegates = {f"lowered_module_{i}": Delegate(partition) for i, partition in enumerate(partitions)}
        if names != sorted(self.delegates):
            raise UnlikeError(f"delegates {', '.join(names)} of {len(partitions)} partitions")

    def repeat(self, run: Run) -> None:
        starts = [self._first_use(i) for i in (run.first, run.second, run.last)]
        nodes = list(self.graph.nodes)
        first, second, rest = nodes[starts[0] : starts[1]], nodes[starts[1] : starts[2]], nodes[starts[2] : -1]
        self._check_own_tensors(run.second)
        later = self._check_alike(run, first, second)
        self._add_inputs(run)
        own = (node for node in self.inputs if node.users and {*node.users} <= {*second})
        constants = [node for node in own if _is_constant(self.inputs[node])]
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
        renumbered, behind = {run.last: run.second + 1}, {*rest}
        its_own = self._inputs_of(renumbered)
        for node in second:
            node.args, node.kwargs = map_arg((node.args, node.kwargs), lambda x: its_own.get(x, x))
            node.replace_all_uses_with(latest[node], lambda user: user in behind)
            if node.op == "get_attr":
                self.delegates[node.target] = replace(self.delegates[node.target], renumbered=renumbered)
        for node in rest:
            if node.op == "get_attr":
                moved = self.delegates[node.target]
                self.delegates[node.target] = replace(moved, later=moved.later + later * len(run.left_out))

    def done(self) -> ExportedProgram:
        old, module = self.program, self.program.graph_module
        for name, delegate in self.delegates.items():
            setattr(module, name, lowered(delegate, getattr(module, name), self.tensors))
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
                    target = of_layer(self.inputs[node].target, {run.second: i})
                    self.state[target] = self.tensors[target]
                    self._input(node, f"{node.name}_{i}", target, self.graph.inserting_before(last[0]))

    def _inputs_of(self, renumbered: dict[int, int]) -> dict[Node, Node]:
        """What has the place of a layer's inputs in another."""
        by_target = {spec.target: node for node, spec in self.inputs.items() if _layer(spec.target)}
        moved = {node: of_layer(target, renumbered) for target, node in by_target.items()}
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
        one_on = {layer - 1: layer}
        self.outputs[place:place] = [
            (made[node], replace(spec, arg=TensorArgument(made[node].name), target=of_layer(spec.target, one_on)))
            for _, node, spec in before
        ]

    def _check_own_tensors(self, layer: int) -> None:
        """Each tensor of the layer is there by its name: one that was folded into another could not be exchanged."""
        there = {str(spec.target) for spec in self.inputs.values()}
        there = there.union(*(delegate.partition.state_dict for delegate in self.delegates.values()))
        if folded := [name for name in self.tensors if _layer(name) == ("layers", layer) and name not in there]:
            raise UnlikeError(f"{folded[0]} became part of another tensor")

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
                return of_x.target == of_layer(of_y.target, renumbered)
            return x is y or (_is_constant(of_y) and torch.equal(self.state[of_x.target], self.state[of_y.target]))

        steps = set()
        if len(first) != len(second):
            raise UnlikeError(f"layer {run.second} became {len(second)} operators, layer {run.first} {len(first)}")
        for one, other in zip(first, second, strict=True):
            if one.op == other.op == "get_attr":
                mine, delegate = (self.delegates[str(node.target)] for node in (one, other))
                steps.add(step := first_handle(delegate.partition) - first_handle(mine.partition))
                again = replace(delegate, renumbered=renumbered, later=mine.later - step)
                specs = getattr(self.program.graph_module, str(one.target)).compile_specs
                made = (processed(it, specs, self.tensors).processed_bytes for it in (mine, again))
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


def _is_constant(spec: InputSpec) -> bool:
    """A number that tracing made a tensor."""
    return spec.kind is not InputKind.USER_INPUT and _layer(spec.target) is None


def _layer(target: str | None) -> tuple[str, int] | None:
    """(layers or caches, number) of a tensor's name."""
    found = NUMBERED.search(target or "")
    return (found[1], int(found[2])) if found else None
