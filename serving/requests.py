"""What a body of the OpenAI API asks for. Whatever is wrong with it is a `RequestError` that names the key."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from runtime.conversation import Message

MAX_CHOICES = 16
MAX_STOPS = 16
LARGEST = 2**53  # of a number
# Options of `runtime.generate` beside the API's own, in the same body (`extra_body` of the Python client).
OPTIONS = (
    "steps", "alg", "top_k", "alg_temp", "eps", "block_length", "cache", "threshold", "alpha", "relaxed_threshold",
    "radius", "kl_threshold", "gamma", "entropy_threshold", "suffix_window", "eos_penalty", "min_new_tokens",
    "no_repeat_ngram_size",
)  # fmt: skip
OWN = ("temperature", "top_p")
SHARED = ("model", "n", "max_tokens", "stop", "seed", "stream", "stream_options", "logprobs", *OWN, *OPTIONS)
OF_CHAT = ("messages", "max_completion_tokens", "top_logprobs", "response_format", "tools", "tool_choice", *SHARED)
OF_TEXT = ("prompt", "best_of", "echo", "suffix", *SHARED)
# What tools send along, and what changes nothing here.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
# What is not there, and the values that ask for nothing.
NOTHING: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, None), "presence_penalty": (0, None), "logit_bias": ({}, None), "tools": ([], None),
    "tool_choice": ("none", "auto", None), "response_format": ({"type": "text"}, None), "echo": (False, None),
    "suffix": ("", None), "top_logprobs": (0, None), "modalities": (["text"], None), "audio": (None,),
}  # fmt: skip


class RequestError(ValueError):
    """status: HTTP's. param: the key, if it is one."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status


@dataclass(frozen=True)
class Request:
    """prompts: texts, token ids, or one list of messages. options: of `runtime.generate`, None where nobody said.

    canvas: also say after each step what is written, masks and all.
    """

    prompts: list[str | list[int] | list[Message]]
    is_chat: bool
    n: int = 1
    best_of: int | None = None
    max_new_tokens: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    stop: list[str] = field(default_factory=list)
    stream: bool = False
    include_usage: bool = False
    canvas: bool = False
    logprobs: bool = False


def read(body: bytes, is_chat: bool, model: str) -> Request:
    """model: the name of the one that is there. Raises `RequestError`."""
    try:
        content = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not JSON: {error}"[:200]) from error
    if not isinstance(content, dict):
        raise RequestError("expected a JSON object")
    known = OF_CHAT if is_chat else OF_TEXT
    for key, value in content.items():
        if key in NOTHING and not any(value == nothing and type(value) is type(nothing) for nothing in NOTHING[key]):
            raise RequestError(f"{key} is not supported", key)
        if key not in known and key not in IGNORED and key not in NOTHING:
            raise RequestError(f"there is no {key[:64]!r}", key[:64])
    if content.get("model") not in (None, model):
        raise RequestError(f"there is no model {str(content['model'])[:64]!r} here, but {model!r}", "model", 404)
    stream = _truth(content, "stream")
    best_of = _whole(content, "best_of", 1, MAX_CHOICES)
    if stream and best_of is not None:
        raise RequestError("which is the best is known at the end: give best_of without stream", "best_of")
    extra = content.get("stream_options")
    if extra is not None and (not isinstance(extra, dict) or not set(extra) <= {"include_usage", "canvas"}):
        raise RequestError("stream_options holds include_usage or canvas", "stream_options")
    return Request(
        prompts=[_messages(content.get("messages"))] if is_chat else _prompts(content.get("prompt")),
        is_chat=is_chat,
        n=_whole(content, "n", 1, MAX_CHOICES) or 1,
        best_of=best_of,
        max_new_tokens=_most(content),
        options=_options(content),
        stop=_stops(content.get("stop")),
        stream=stream,
        include_usage=_truth(extra or {}, "include_usage"),
        canvas=_truth(extra or {}, "canvas"),
        logprobs=_wants_logprobs(content, is_chat),
    )


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _truth(content: dict[str, Any], key: str) -> bool:
    value = content.get(key)
    if value not in (None, True, False) or isinstance(value, int) is not isinstance(value, bool):
        raise RequestError(f"{key} must be true or false", key)
    return bool(value)


def _whole(content: dict[str, Any], key: str, low: int, high: int) -> int | None:
    value = content.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{key} must be a whole number from {low} to {high}", key)
    return value


def _most(content: dict[str, Any]) -> int | None:
    both = [_whole(content, key, 1, LARGEST) for key in ("max_completion_tokens", "max_tokens")]
    return next((n for n in both if n is not None), None)


def _wants_logprobs(content: dict[str, Any], is_chat: bool) -> bool:
    if is_chat:
        return _truth(content, "logprobs")
    asked = content.get("logprobs")
    return asked is not None and asked is not False and _whole(content, "logprobs", 0, 5) is not None


def _options(content: dict[str, Any]) -> dict[str, Any]:
    options = {key: content.get(key) for key in (*OWN, *OPTIONS)}
    for key, value in options.items():
        if isinstance(value, int | float) and not -LARGEST <= value <= LARGEST:
            raise RequestError(f"{key} is beyond {LARGEST}", key)
        if key not in ("alg", "cache") and value is not None and not isinstance(value, int | float):
            raise RequestError(f"{key} must be a number", key)
    return options | {"seed": _whole(content, "seed", -LARGEST, LARGEST)}


def _stops(value: Any) -> list[str]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    is_listed = isinstance(stops, list) and all(isinstance(stop, str) and stop for stop in stops)
    if not is_listed or len(stops) > MAX_STOPS:
        raise RequestError(f"stop must be a text, or up to {MAX_STOPS} of them", "stop")
    return stops


def _prompts(value: Any) -> list[str | list[int] | list[Message]]:
    """A text, texts, ids, or lists of ids."""
    listed = [value] if isinstance(value, str) or (isinstance(value, list) and _are_ids(value)) else value
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_CHOICES:
        raise RequestError(f"prompt must be a text or token ids, or up to {MAX_CHOICES} of them", "prompt")
    if not all(isinstance(one, str) or (isinstance(one, list) and _are_ids(one)) for one in listed):
        raise RequestError("prompt must be a text or token ids, or a list of such", "prompt")
    return listed


def _are_ids(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in value)


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RequestError("messages must be a list of messages", "messages")
    return [_message(i, message) for i, message in enumerate(value)]


def _message(i: int, message: Any) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RequestError(f"messages[{i}] must be an object with a role and a content", "messages")
    content = message.get("content")
    if isinstance(content, list):  # in parts, of which texts are known here
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        is_text = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
        content = "".join(map(str, texts)) if is_text else None
    if not isinstance(content, str):
        raise RequestError(f"messages[{i}].content must be a text, or parts that are texts", "messages")
    return {"role": message["role"], "content": content}
