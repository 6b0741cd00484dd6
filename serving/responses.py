"""What the OpenAI API says: whole answers, pieces of them, and errors."""

from __future__ import annotations

from typing import Any

from serving.requests import Request
from serving.writing import Canvas, Done, Ended, Piece


def whole(head: dict[str, Any], request: Request, ended: list[Ended], done: Done) -> dict[str, Any]:
    """head: id, created and model."""
    kind = "chat.completion" if request.is_chat else "text_completion"
    return {**head, "object": kind, "choices": [_choice(request, one) for one in ended], "usage": usage(done)}


def _choice(request: Request, one: Ended) -> dict[str, Any]:
    said: dict[str, Any] = {"index": one.index, "finish_reason": one.finish_reason, "logprobs": _logprobs(request, one)}
    if request.is_chat:
        return said | {"message": {"role": "assistant", "content": one.text, "refusal": None}}
    return said | {"text": one.text}


def chunks(head: dict[str, Any], request: Request, event: Canvas | Piece | Ended | Done) -> list[dict[str, Any]]:
    """What a stream says of an event."""
    head = {**head, "object": "chat.completion.chunk" if request.is_chat else "text_completion"}
    if isinstance(event, Done):
        return [{**head, "choices": [], "usage": usage(event)}] if request.include_usage else []
    empty: dict[str, Any] = {"index": event.index, "finish_reason": None, "logprobs": None}
    empty["delta" if request.is_chat else "text"] = {} if request.is_chat else ""
    if isinstance(event, Canvas):
        shown = {"step": event.step, "masks_left": event.masks_left, "runs": event.runs}
        return [{**head, "choices": [{**empty, "canvas": shown}]}]
    if isinstance(event, Piece):
        text = {"delta": {"content": event.text}} if request.is_chat else {"text": event.text}
        return [{**head, "choices": [{**empty, **text}]}]
    last = {"finish_reason": event.finish_reason, "logprobs": _logprobs(request, event)}
    return [{**head, "choices": [{**empty, **last}]}]


def opening(head: dict[str, Any], request: Request) -> list[dict[str, Any]]:
    """What a stream of a chat begins with: who speaks."""
    if not request.is_chat:
        return []
    choices = [
        {"index": i, "delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}
        for i in range(request.n)
    ]
    return [{**head, "object": "chat.completion.chunk", "choices": [choice]} for choice in choices]


def usage(done: Done) -> dict[str, int]:
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.new_tokens,
        "total_tokens": done.prompt_tokens + done.new_tokens,
    }


def error(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


def _logprobs(request: Request, one: Ended) -> dict[str, Any] | None:
    if one.logprobs is None:
        return None
    if request.is_chat:
        entries = [
            {"token": token, "logprob": nats, "bytes": _bytes(token), "top_logprobs": []}
            for token, nats in one.logprobs
        ]
        return {"content": entries, "refusal": None}
    tokens, nats = [token for token, _ in one.logprobs], [nats for _, nats in one.logprobs]
    offsets = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
    return {"tokens": tokens, "token_logprobs": nats, "top_logprobs": None, "text_offset": offsets}


def _bytes(token: str) -> list[int] | None:
    """None for a part of a character, which no text is."""
    return None if "\N{REPLACEMENT CHARACTER}" in token else list(token.encode())
