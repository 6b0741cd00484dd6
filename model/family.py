"""Whose checkpoint it is, of those that have Dream's network; others are refused by name, with what would be needed."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass


@dataclass(frozen=True)
class Other:
    """prefixes: of `model_type`, in lower case, without - and _."""

    name: str
    prefixes: tuple[str, ...]
    why: str


OTHERS = (
    Other("LLaDA", ("llada",), "another body, LLaMA's, and logits that are not shifted"),
    Other(
        "SDAR",
        ("sdar",),
        "Qwen3's body with norms of queries and keys, and attention that is causal from block to block",
    ),
    Other("Fast-dLLM v2", ("fastdllm",), "Qwen2's body with attention that is causal from block to block"),
    Other(
        "Dream-VL",
        ("dreamvl", "dreamqwen2vl", "dream25vl"),
        "it reads images, too: a vision tower before Dream's network",
    ),
    Other("DreamReasoner", ("dreamreasoner",), "attention that is causal from block to block"),
    Other(
        "an autoregressive model",
        ("qwen", "llama", "mistral", "gpt"),
        "it is trained to write one token after another, not to fill in masks",
    ),
)


@dataclass(frozen=True)
class Member:
    """name: whose checkpoint it is. by: what says so."""

    name: str
    by: str


# By tokens that no other member has, as the tokenizers of the hub hold them; the first that is there.
BY_TOKEN = {"<|expand|>": "DreamOn", "<|dlm_pad|>": "DiffuCoder"}
# By the token that the config begins texts with.
BY_BOS = {"<|beginoftext|>": "Dream-Coder"}


def member(tokens: Container[str], bos: str | None, has_chat: bool, adapter: str | None) -> Member:
    """tokens: the tokenizer's. bos: the text of the config's. adapter: "LoRA" or "D2F", if one was merged."""
    token = next((token for token in BY_TOKEN if token in tokens), None)
    if token is not None:
        found = Member(BY_TOKEN[token], token)
    elif bos in BY_BOS:
        found = Member(BY_BOS[bos], f"its first token, {bos}")
    elif has_chat:
        found = Member("Dream, for chats", "its chat template")
    else:
        found = Member("Dream, base", "it has no chat template")
    return found if adapter is None else Member(f"{found.name}, with a {adapter} adapter", found.by)


def other_model(model_type: str) -> Other | None:
    plain = model_type.lower().replace("-", "").replace("_", "").replace(".", "")
    return next((other for other in OTHERS if plain.startswith(other.prefixes)), None)


def table() -> str:
    """In Markdown."""
    rows = [f"| {other.name} | {other.why} |" for other in OTHERS]
    return "\n".join(["| model | what it is |", "|---|---|", *rows])
