"""The routes: the calls of the OpenAI API that local tools speak, and a page that shows an answer being filled in."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import html
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from runtime.chat import chat_template
from runtime.errors import PipelineError, UsageError
from serving import responses
from serving.requests import Request, RequestError, read
from serving.turns import ClosedError, FullError, GoneError, Job, LateError, Turns
from serving.writing import Canvas, Done, Ended, Piece, Served, write

log = logging.getLogger(__name__)

MAX_BODY = 2**20  # bytes
BODY_SECONDS = 15.0  # that a body may take to come
PAGE = Path(__file__).with_name("page.html")


def application(served: Served, turns: Turns, seconds: float, hosts: list[str]) -> Starlette:
    """seconds: that a request may take, its waiting included. hosts: names by which a browser may call this server."""
    desk = _Desk(served, turns, seconds)
    routes = [
        Route("/", desk.page),
        Route("/health", desk.health),
        Route("/v1/models", desk.models),
        Route("/v1/models/{name:path}", desk.model),
        Route("/v1/chat/completions", partial(desk.answer, is_chat=True), methods=["POST"]),
        Route("/v1/completions", partial(desk.answer, is_chat=False), methods=["POST"]),
    ]
    # A page of somebody else's, under a name that leads here, is not to speak with this server.
    guard = Middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    return Starlette(routes=routes, middleware=[guard], exception_handlers={HTTPException: _http_error})


class _Desk:
    def __init__(self, served: Served, turns: Turns, seconds: float) -> None:
        self.served, self.turns, self.seconds = served, turns, seconds
        self.since = int(time.time())
        self.shown = self._page()

    def _page(self) -> HTMLResponse:
        """The same for everybody."""
        has_chat = chat_template(self.served.artifact.folder) is not None
        text = PAGE.read_text(encoding="utf-8")
        text = text.replace("MODEL", html.escape(self.served.name)).replace("HAS_CHAT", json.dumps(has_chat))
        scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
        allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
        policy = f"default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src {allowed}"
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    async def page(self, _: HttpRequest) -> Response:
        return self.shown

    async def health(self, _: HttpRequest) -> Response:
        return JSONResponse({"status": "ok", "waiting": self.turns.n_waiting})

    async def models(self, _: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: HttpRequest) -> Response:
        if request.path_params["name"] != self.served.name:
            return _refusal(RequestError(f"the model here is {self.served.name!r}", "model", 404))
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self.served.name, "object": "model", "created": self.since, "owned_by": "dreamedge"}

    async def answer(self, http: HttpRequest, is_chat: bool) -> Response:
        try:
            request = read(await _body(http), is_chat, self.served.name)
            job = Job(partial(write, self.served, request), time.monotonic() + self.seconds, asyncio.get_running_loop())
            self.turns.put(job)
        except (RequestError, FullError, ClosedError) as error:
            return _refusal(error)
        except ClientDisconnect:
            return Response(status_code=400)
        try:
            first = await self._next(http, job)
        except GoneError:
            return Response(status_code=400)  # nobody reads it
        head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.served.name,
        }
        if isinstance(first, Exception):
            return _refusal(first)
        if request.stream:
            return _Stream(self._lines(head, request, job, first), partial(self.turns.leave, job))
        return await self._whole(http, head, request, job, first)

    async def _next(self, http: HttpRequest, job: Job) -> Any:
        """The job's next event. Raises `GoneError` for a client that has hung up, whose place is free then."""
        event, gone = asyncio.ensure_future(job.events.get()), asyncio.ensure_future(_hung_up(http))
        late = max(0.0, job.deadline - time.monotonic()) + 1.0  # a step that is being computed ends by itself
        try:
            done, _ = await asyncio.wait({event, gone}, timeout=late, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not event.done():
                event.cancel()
                self.turns.leave(job)
        if event in done:
            return event.result()
        if gone in done:
            raise GoneError
        return LateError()

    async def _whole(self, http: HttpRequest, head: dict[str, Any], request: Request, job: Job, event: Any) -> Response:
        ended: list[Ended] = []
        while not isinstance(event, Done):
            if isinstance(event, Exception):
                return _refusal(event)
            if isinstance(event, Ended):
                ended.append(event)
            try:
                event = await self._next(http, job)
            except GoneError:
                return Response(status_code=400)
        return JSONResponse(responses.whole(head, request, ended, event))

    async def _lines(
        self, head: dict[str, Any], request: Request, job: Job, event: Canvas | Piece | Ended | Done | Exception
    ) -> AsyncIterator[str]:
        for chunk in responses.opening(head, request):
            yield _line(chunk)
        while not isinstance(event, Exception):
            for chunk in responses.chunks(head, request, event):
                yield _line(chunk)
            if isinstance(event, Done):
                yield "data: [DONE]\n\n"
                return
            event = await job.events.get()
        status, message, param = _said(event)
        yield _line(responses.error(message, status, param))


class _Stream(StreamingResponse):
    """leave: called at the end, also where the client hangs up before the first line."""

    def __init__(self, lines: AsyncIterator[str], leave: Callable[[], None]) -> None:
        super().__init__(lines, media_type="text/event-stream")
        self.leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.leave()


async def _body(http: HttpRequest) -> bytes:
    """Raises `RequestError` for one that is no JSON by its own words, too large, or too slow."""
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestError("the body must be of Content-Type application/json", status=415)
    too_large = RequestError(f"a body has at most {MAX_BODY} bytes", status=413)
    length = http.headers.get("content-length", "0")
    if length.isdecimal() and len(length) < 20 and int(length) > MAX_BODY:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in http.stream():
                body += part
                if len(body) > MAX_BODY:
                    raise too_large
    except TimeoutError as error:
        raise RequestError(f"the body did not come within {BODY_SECONDS:g} s", status=408) from error
    return bytes(body)


async def _hung_up(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _line(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


def _refusal(error: Exception) -> Response:
    status, message, param = _said(error)
    headers = {"Retry-After": "5"} if status in (429, 503) else {}
    return JSONResponse(responses.error(message, status, param), status, headers)


def _said(error: Exception) -> tuple[int, str, str | None]:
    """(HTTP's status, a line, the key that is wrong)"""
    if isinstance(error, RequestError):
        return error.status, str(error), error.param
    if isinstance(error, FullError):
        return 429, "too many requests wait: try again later", None
    if isinstance(error, ClosedError):
        return 503, "the server is ending", None
    if isinstance(error, LateError):
        return 408, "the answer did not come within the time that a request may take here", None
    if isinstance(error, UsageError):
        return 400, str(error), None
    log.error("%s: %s", type(error).__name__, error)
    return 500, str(error) if isinstance(error, PipelineError) else f"internal error: {type(error).__name__}", None


async def _http_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(responses.error(error.detail, error.status_code), error.status_code, error.headers)
