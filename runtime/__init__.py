"""What a device does: open a .pte, run it, write with it. Knows torch and ExecuTorch, nothing of the pipeline."""

from runtime.generate import Generation, Network, OptionError, generate
from runtime.program import CONTRACT_VERSION, Metadata, Program, ProgramError

__all__ = [
    "CONTRACT_VERSION",
    "Generation",
    "Metadata",
    "Network",
    "OptionError",
    "Program",
    "ProgramError",
    "generate",
]
