"""`serve`: an artifact behind the OpenAI API, on this machine alone unless told otherwise."""

from __future__ import annotations

import ipaddress
import signal
import socket
from importlib.util import find_spec
from types import FrameType

from rich.console import Console

from pipeline.decoding import decoding_options
from pipeline.opening import opened
from pipeline.schema import ServeConfig
from runtime.errors import UsageError

NEEDED = ("starlette", "uvicorn")
BESIDE = 64  # connections, beside those that wait: who asks for the page, or whether the server is well
GRACE = 600  # seconds that the answer which is being written has when the server is told to end


def serve(config: ServeConfig, err: Console) -> None:
    """Until Ctrl-C or SIGTERM. Raises `PipelineError`."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise UsageError(f"serve needs {' and '.join(missing)}: pip install 'dreamedge[serve]'")
    _check(config)
    listening = _bound(config.host, config.port)
    try:
        _serve(config, listening, err)
    finally:
        listening.close()


def _check(config: ServeConfig) -> None:
    if not 0 <= config.port <= 65535:
        raise UsageError(f"port {config.port}: is from 0, which takes a free one, to 65535")
    if not 1 <= config.max_queue <= 10_000:
        raise UsageError(f"max_queue {config.max_queue}: must be from 1 to 10000")
    if not 0 < config.timeout <= 10**6:
        raise UsageError(f"timeout {config.timeout:g}: are seconds, above 0")
    if config.max_new_tokens is not None and config.max_new_tokens < 1:
        raise UsageError(f"max_new_tokens {config.max_new_tokens}: must be at least 1")


def _bound(host: str, port: int) -> socket.socket:
    """Before the program is opened, which may take a while. Raises `UsageError`."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(2048)  # from the moment that the address is said
    except OSError as error:
        raise UsageError(f"host={host} port={port}: cannot listen there: {error.strerror or error}") from error
    return listening


def _serve(config: ServeConfig, listening: socket.socket, err: Console) -> None:
    import uvicorn

    from serving.app import application
    from serving.turns import Turns
    from serving.writing import Served

    artifact = opened(config, err)
    options = {k: v for k, v in decoding_options(config, config.cache).items() if v is not None and k != "stop_at_eos"}
    held = artifact.program.max_seq_len
    most = held if config.max_new_tokens is None else config.max_new_tokens
    served, turns = Served(artifact.folder.resolve().name, artifact, options, most), Turns(config.max_queue)

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            turns.close()
            super().handle_exit(sig, frame)

    app = application(served, turns, config.timeout, _names(config.host))
    server = Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            loop="asyncio",
            http="h11",
            server_header=False,
            limit_concurrency=config.max_queue + BESIDE,
            timeout_graceful_shutdown=GRACE,
        )
    )
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    if not ipaddress.ip_address(host).is_loopback:
        err.print(f"warning: whoever reaches {shown}:{port} may write with it; nothing is encrypted", style="yellow")
    err.print(f"{served.name}: http://{shown}:{port}/ (OpenAI API: http://{shown}:{port}/v1)", markup=False)
    # uvicorn raises the signal again when it has ended well; there is nothing left to end.
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, lambda *_: None)
    server.run(sockets=[listening])
    turns.close()


def _names(host: str) -> list[str]:
    """That a request may call this server by: any, where it is open to others."""
    loopback = ["127.0.0.1", "localhost", "[::1]", "::1"]
    try:
        return loopback if ipaddress.ip_address(host).is_loopback else ["*"]
    except ValueError:
        return loopback if host == "localhost" else ["*"]
