"""Messages to a prompt, by the checkpoint's chat template: jinja2, in a sandbox and a process of its own."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from reprlib import repr as short
from typing import TYPE_CHECKING, Any

from runtime.errors import InputError, UsageError
from runtime.limits import LimitError, limited
from runtime.tokenizer import special_tokens
from runtime.tokenizer_files import CONFIG, in_one_line, read_object, read_text

if TYPE_CHECKING:
    from jinja2 import Template
    from tokenizers import Tokenizer

TEMPLATE_SECONDS, TEMPLATE_BYTES = 10, 2**28  # that a chat template may take


def render_chat(template: str, messages: list[dict[str, str]], special_tokens: dict[str, str]) -> str:
    """The prompt for the assistant's next message. Raises `UsageError`, and `InputError` for a broken template."""
    import jinja2  # noqa: F401 (here, so that it is not imported for each text)

    if not messages:
        raise UsageError("a chat needs at least one message")
    try:
        # A template may count to infinity, or to a string of that length.
        return limited(TEMPLATE_SECONDS, TEMPLATE_BYTES, _render, template, messages, special_tokens)
    except LimitError as error:
        raise InputError(f"the chat template is broken: {error}") from error


def _render(template: str, messages: list[dict[str, str]], special_tokens: dict[str, str]) -> str:
    compiled = _compiled(template)
    try:
        return compiled.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **special_tokens
        )
    except MemoryError:
        raise
    except Exception as error:
        raise UsageError(f"the chat template does not take these messages: {in_one_line(error)}") from error


def _compiled(template: str) -> Template:
    """Raises `InputError`."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """Some templates mark what the assistant wrote, for training: {% generation %} … {% endgeneration %}."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    try:
        return environment.from_string(template)
    except MemoryError:
        raise
    except Exception as error:  # also what Python says of the code that jinja2 makes
        raise InputError(f"the chat template is broken: {in_one_line(error)}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own would escape for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def chat_template(folder: Path) -> str | None:
    """From chat_template.jinja, else from tokenizer_config.json. Raises `InputError`."""
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    template = read_object(folder / CONFIG).get("chat_template")
    if isinstance(template, list):
        try:
            template = {entry["name"]: entry["template"] for entry in template}["default"]
        except (KeyError, TypeError) as error:
            raise InputError(f'{folder / CONFIG}: chat_template: no "default" in the list') from error
    if template is not None and not isinstance(template, str):
        raise InputError(f"{folder / CONFIG}: chat_template: {short(template)} is no text")
    return template


def end_tokens(folder: Path, tokenizer: Tokenizer | None) -> list[int]:
    """Ids of the tokens that end an answer: the tokenizer's `eos_token`, its `pad_token`, with which DiffuCoder fills
    what is left of an answer, and the chat template's end of turn.

    None without a tokenizer. Raises `InputError` for files or a template that are broken.
    """
    template = chat_template(folder)
    if tokenizer is None:
        return []
    names = special_tokens(folder)
    kinds = ("eos_token", "pad_token") if names.get("pad_token") != names.get("mask_token") else ("eos_token",)
    ids = [tokenizer.token_to_id(token) for token in dict.fromkeys(names[kind] for kind in kinds if kind in names)]
    if template is not None:
        ids.append(_end_of_turn(folder, template, names, tokenizer))
    return [i for i in ids if i is not None]


def _end_of_turn(folder: Path, template: str, names: dict[str, str], tokenizer: Tokenizer) -> int | None:
    """The added token that the template writes after what an assistant said; None if there is none."""
    answer = "An answer like no other."
    turns = [("user", "A question."), ("assistant", answer), ("user", "Another.")]
    try:
        chat = render_chat(template, [{"role": role, "content": content} for role, content in turns], names)
    except UsageError:  # a template for other messages
        return None
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    after = chat.rpartition(answer)[2].lstrip() if answer in chat else ""
    added = {token.content: index for index, token in tokenizer.get_added_tokens_decoder().items()}
    return added.get(max((token for token in added if after.startswith(token)), key=len, default=""))
