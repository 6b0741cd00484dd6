"""What a device does: open a .pte, run it, read and write text with it. Knows torch and ExecuTorch, nothing else here.

torch is imported by those who ask for what needs it: `--help` must answer at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.generation import Generation, generate
    from runtime.network import Network
    from runtime.options import OptionError
    from runtime.program import CONTRACT_VERSION, Metadata, Program, ProgramError
    from runtime.threads import use_threads

__all__ = [
    "CONTRACT_VERSION",
    "Generation",
    "Metadata",
    "Network",
    "OptionError",
    "Program",
    "ProgramError",
    "generate",
    "use_threads",
]

if not TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'runtime' has no attribute {name!r}")
        from runtime import generation, network, options, program, threads

        modules = (generation, network, options, program, threads)
        return next(getattr(module, name) for module in modules if hasattr(module, name))
