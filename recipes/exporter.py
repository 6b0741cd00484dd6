"""executorch's exporter, imported before anything of it: a third of its import is one table that it reads slowly, and
another all of torch's inductor, of which it calls one function.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import yaml
from ruamel.yaml import YAML


def _read(_: YAML, text: str) -> object:
    """The same with libyaml, a dozen times faster."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


POST_GRAD, LOWERING = "torch._inductor.fx_passes.post_grad", "torch._inductor.lowering"


def by_inductor(graph: Any) -> None:
    """What executorch asks inductor: for programs that are not as ours, of which `recipes.retracing` takes care."""
    from torch._inductor.fx_passes.post_grad import decompose_auto_functionalized

    decompose_auto_functionalized(graph)


@contextmanager
def without_inductor() -> Iterator[None]:
    """executorch imports all of torch's compiler, a second or two, to call one function of it (`by_inductor`), and to
    tell it of two operators of its own. While inside, what it asks for stands in its place, if it is not there.
    """
    post_grad, lowering = ModuleType(POST_GRAD), ModuleType(LOWERING)
    vars(post_grad).update(decompose_auto_functionalized=by_inductor)
    vars(lowering).update(lowerings={}, register_lowering=lambda *_, **__: lambda function: function)
    stand_ins = [
        module for module in (post_grad, lowering) if sys.modules.setdefault(module.__name__, module) is module
    ]
    try:
        yield
    finally:
        for module in stand_ins:
            del sys.modules[module.__name__]


with patch.object(YAML, "load", _read), without_inductor():
    import executorch.exir.dialects.edge._ops  # noqa: F401


@contextmanager
def garbage_of_now_only() -> Iterator[None]:
    """What is there already is left out of garbage collections, and those are few. Inside another one it does nothing.

    Tracing makes so many objects that Python looks through the million of the imports again and again: a tenth of the
    time of exporting and lowering.
    """
    if gc.get_freeze_count():
        yield
        return
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


@contextmanager
def without_stack_traces() -> Iterator[None]:
    """A node of a graph does not note which lines of which files made it: nobody asks, and to look takes its time."""
    with patch("torch.fx.config.do_not_emit_stack_traces", True):
        yield
