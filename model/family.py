"""Diffusion language models that are not Dream's network: refused by name, with what would be needed."""

from __future__ import annotations

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


def other_model(model_type: str) -> Other | None:
    plain = model_type.lower().replace("-", "").replace("_", "").replace(".", "")
    return next((other for other in OTHERS if plain.startswith(other.prefixes)), None)


def table() -> str:
    """In Markdown."""
    rows = [f"| {other.name} | {other.why} |" for other in OTHERS]
    return "\n".join(["| model | what it is |", "|---|---|", *rows])
