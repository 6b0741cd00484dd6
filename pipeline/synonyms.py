"""What others call our keys."""

from __future__ import annotations

# What transformers, Dream, LLaDA, lm-eval and others call our keys; a command has the first of those that it has.
_NEW_TOKENS = ("max_new_tokens", "new_tokens")
_LENGTH = ("max_new_tokens", "export.max_seq_len", "new_tokens")
SYNONYMS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gen_length", "gen_len", "max_gen_len", "max_gen_toks", "max_tokens", "num_tokens"), _NEW_TOKENS),
    **dict.fromkeys(("max_length", "max_len"), _LENGTH),
    **dict.fromkeys(("context_length", "max_context", "max_seq_length", "seq_len"), ("export.max_seq_len",)),
    **dict.fromkeys(("diffusion_steps", "num_steps", "num_inference_steps"), ("steps",)),
    **dict.fromkeys(("algorithm", "remasking"), ("alg",)),
    **dict.fromkeys(("block_size", "block_len"), ("block_length",)),
    "confidence_threshold": ("threshold",),
    **dict.fromkeys(("limit", "num_samples", "n_samples"), ("n",)),
    **dict.fromkeys(("model", "model_path", "ckpt"), ("checkpoint", "artifact")),
    **dict.fromkeys(("output_dir", "out_dir", "output_path"), ("output",)),
    **dict.fromkeys(("quantization", "quant", "qmode"), ("recipe",)),
    **dict.fromkeys(("text", "input"), ("prompt",)),
}
