"""A process that has torch and the runtime in it, and runs programs in copies of itself.

A copy starts in 0.01 s; a new process takes 1.5 s to import both (measured). No program is ever opened in this one.
It ends with whoever started it: `python -m validation.forkserver FD`, the number of its end of a socket.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from typing import NoReturn

from runtime.memory import collect_seldom


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started it, and for the copies
    collect_seldom()
    with socket.socket(fileno=int(sys.argv[1])) as client:
        import validation.replay  # noqa: F401 - with torch, and most that a program's copy will ask for
        from runtime.program import executorch_runtime

        executorch_runtime()
        while _serve(client):
            pass
    os._exit(0)  # what is left to take apart takes a sixth of a second, for which whoever asked waits


def _serve(client: socket.socket) -> bool:
    """One request: what are to be a program's stdout and stderr, and a file that says what to run. False at the end.

    The answer is its exit code, negative for a signal.
    """
    request, files, _, _ = socket.recv_fds(client, 16, 3)
    if not request:
        return False
    ended, held = os.pipe()
    child = os.fork()
    if child == 0:
        client.close()
        os.close(ended)
        _run(*files)
    for end in (held, *files):
        os.close(end)
    ready, _, _ = select.select([client.fileno(), ended], [], [])
    is_alone = client.fileno() in ready  # nothing is asked before the answer: whoever asked is gone
    if is_alone:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(ended)
    if is_alone:
        return False
    client.send(str(os.waitstatus_to_exitcode(status)).encode())
    return True


def _run(stdout: int, stderr: int, request: int) -> NoReturn:
    """`main` of a module, in this copy, as Python would run it with `-m`. request: command and environment in JSON."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    # Whatever streams the parent has: what is said here is read as UTF-8.
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    with os.fdopen(request, "rb") as file:
        file.seek(0)
        sys.argv, environment = json.load(file)
    os.environ.clear()
    os.environ.update(environment)
    code: object = 0
    try:
        importlib.import_module(sys.argv[0]).main()
    except SystemExit as ended:
        code = ended.code
    except BaseException:  # noqa: BLE001 (the last words of a process)
        code = traceback.format_exc()
    if isinstance(code, str):
        sys.stderr.write(f"{code}\n")
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    main()
