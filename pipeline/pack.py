"""The weights of an artifact, packed ahead of its first opening on this machine."""

from __future__ import annotations

import sys
from pathlib import Path

from runtime.errors import OutputError
from runtime.limits import how_it_ended
from runtime.program import Program, ProgramError
from validation.child import run_child


def pack(artifact: Path, folder: Path) -> None:
    """As `Program.open(artifact, packed_cache=folder)` leaves them, in a process of its own.

    The artifact stays as it is. Raises `OutputError`.
    """
    child = run_child("pipeline.pack", [str(artifact.resolve()), str(folder.absolute())], lambda _: None)
    if child.returncode != 0:
        raise OutputError(f"{artifact} is whole, but its weights are not packed: {how_it_ended(child, 'opening')}")


def main() -> None:
    try:
        Program.open(sys.argv[1], packed_cache=sys.argv[2])
    except (ProgramError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
