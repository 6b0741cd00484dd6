"""Programs are run in processes of their own: a crash there is a verdict here."""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

# A process that is started in this folder with `-m` finds the rooms where this process has found them.
HOME = Path(__file__).resolve().parent.parent


def run_child(module: str, arguments: list[str], on_line: Callable[[str], None]) -> subprocess.CompletedProcess[str]:
    """`main` of a module with these arguments, to its end, however that comes, in a copy of the fork server.

    on_line: is given its stdout as it writes it.
    """
    command = [module, *arguments]
    complaints: list[str] = []
    server = _running_server()
    try:
        stdout, stderr = _ask(server, command)
        with stdout, stderr:
            # Both pipes are read at once: a full one would stop it. A file would count as what it may write.
            reader = threading.Thread(target=complaints.extend, args=(stderr,), daemon=True)
            reader.start()
            try:
                for line in stdout:
                    on_line(line)
            except BaseException:
                _stop(server)  # and the child with it, so that its pipes end
                raise
            finally:
                reader.join()
        answer = server.connection.recv(16)
    except BaseException:
        _stop(server)  # or its answer would be taken for the next one's
        raise
    if not answer:
        complaints.append(_stop(server))
    return subprocess.CompletedProcess(command, int(answer or 1), "", "".join(complaints))


# Variables that libraries read when a process starts, by how their names begin.
AT_START = ("OMP_", "GOMP_", "KMP_", "OPENBLAS_", "MKL_", "LD_", "MALLOC_", "GLIBC_", "PYTHON")


@dataclass(frozen=True)
class _Server:
    """pid: of the process that started it. at_start: what it started with."""

    pid: int
    at_start: dict[str, str]
    process: subprocess.Popen[bytes]
    connection: socket.socket
    stderr: IO[bytes]


_servers: list[_Server] = []  # at most one


def start_ahead() -> None:
    """So that what the first child needs is imported when it is asked for."""
    _running_server()


def _running_server() -> _Server:
    """The one there is, if it is this process's, and would start now as it did."""
    at_start = {name: value for name, value in os.environ.items() if name.startswith(AT_START)}
    if _servers and (_servers[0].pid, _servers[0].at_start) != (os.getpid(), at_start):
        _stop(_servers[0])
    if not _servers:
        ours, theirs = socket.socketpair()
        stderr = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as it)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "validation.forkserver", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                cwd=HOME,
                pass_fds=[theirs.fileno()],
            )
        _servers.append(_Server(os.getpid(), at_start, process, ours, stderr))
    return _servers[0]


def _ask(server: _Server, command: list[str]) -> tuple[IO[str], IO[str]]:
    """What the child writes to its stdout and stderr."""
    pipes = [os.pipe() for _ in range(2)]
    stdout, stderr = (os.fdopen(end, encoding="utf-8", errors="replace") for end, _ in pipes)
    with tempfile.TemporaryFile() as request:
        request.write(json.dumps([command, dict(os.environ)]).encode())
        request.flush()
        try:
            socket.send_fds(server.connection, [b"run"], [*(end for _, end in pipes), request.fileno()])
        except BrokenPipeError:
            pass  # it has ended: so do these
        finally:
            for _, end in pipes:
                os.close(end)
    return stdout, stderr


def _stop(server: _Server) -> str:
    """Its last words, if it has ended by itself."""
    if server not in _servers:
        return ""
    _servers.remove(server)
    server.connection.close()  # which it notices, and ends its child
    if server.pid != os.getpid():
        return ""  # of the process that this one is a copy of
    server.process.wait()
    with server.stderr:
        server.stderr.seek(0)
        return server.stderr.read().decode("utf-8", "replace")


@atexit.register
def _stop_all() -> None:
    for server in list(_servers):
        _stop(server)
