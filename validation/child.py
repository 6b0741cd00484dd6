"""Programs are run in processes of their own: a crash there is a verdict here."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A child that is started in this folder with `-m` finds the rooms where this process has found them.
HOME = Path(__file__).resolve().parent.parent

# In its environment: its words are read as UTF-8, whatever streams this process has.
UTF8 = {"PYTHONIOENCODING": "utf-8"}


def run_child(
    arguments: list[str], on_line: Callable[[str], None], environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python` with these arguments, to its end, however that comes. on_line: is given its stdout as it writes it."""
    command = [sys.executable, *arguments]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    env = os.environ | UTF8 | (environment or {})
    complaints: list[str] = []
    with subprocess.Popen(command, **pipes, errors="replace", cwd=HOME, env=env) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        # Both pipes are read at once: a full one would stop it. A file would count as what it may write.
        reader = threading.Thread(target=complaints.extend, args=(child.stderr,), daemon=True)
        reader.start()
        try:
            for line in child.stdout:
                on_line(line)
        except BaseException:
            child.kill()
            raise
        finally:
            reader.join()
    return subprocess.CompletedProcess(command, child.returncode, "", "".join(complaints))
