"""Time the linear formats that XNNPACK has, on a few layers of a shape: all in one process, in turn, so that the
ratios hold on a noisy machine.

    python -m scripts.compare_formats conf/shape/dream_7b.yaml --layers 2 --tokens 32 --kv-len 512
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from model import DreamEdge, DreamEdgeConfig
from model.checkpoint import hf_name
from recipes.lowering import lower_program
from recipes.options import Attention, Backend, Dtype, EmbeddingQuant, LinearQuant
from recipes.quantization import quantize_model
from recipes.static_program import StaticProgram, export_program, metadata
from report.terminal import table
from runtime.program import Program
from scripts.make_checkpoint import draw, read_shape, seed_of

FORMATS = {
    "int4, groups of 32": LinearQuant(4, 32),
    "int4, groups of 64": LinearQuant(4, 64),
    "int4, groups of 128": LinearQuant(4, 128),
    "int4, groups of 256": LinearQuant(4, 256),
    "int4 per channel": LinearQuant(4, None),
    "int8 per channel": LinearQuant(8, None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("shape", type=Path, help="YAML of the sizes, see conf/shape/")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=1024, help="a small one leaves the layers alone")
    parser.add_argument("--max-seq-len", type=int, default=1024)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 512])
    parser.add_argument("--kv-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--attention", nargs="+", default=["delegated"], choices=[a.value for a in Attention])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    ids = dict.fromkeys(("mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id"), args.vocab - 1)
    config = replace(read_shape(args.shape), num_hidden_layers=args.layers, vocab_size=args.vocab, **ids)
    kinds = [(name, Attention(attention)) for attention in args.attention for name in args.formats]
    with tempfile.TemporaryDirectory() as folder:
        programs = {}
        for i, (name, attention) in enumerate(track(kinds, "lowering", transient=True)):
            pte = Path(folder, f"{i}.pte")
            build(config, FORMATS[name], attention, args.max_seq_len, pte)
            programs[name, attention] = Program.open(pte)
        seconds = measure(programs, args.tokens, args.kv_len, args.repeats)
    first = next(iter(programs))
    listing = table(None, "format", "attention", *(f"T={T}, ms" for T in args.tokens), "of the first")
    for kind, times in seconds.items():
        medians = [1e3 * statistics.median(times[T]) for T in args.tokens]
        ratios = [statistics.median(times[T]) / statistics.median(seconds[first][T]) for T in args.tokens]
        listing.add_row(
            kind[0], kind[1].value, *(f"{ms:.1f}" for ms in medians), " / ".join(f"{r:.2f}" for r in ratios)
        )
    Console().print(listing)


def build(config: DreamEdgeConfig, linear: LinearQuant, attention: Attention, max_seq_len: int, pte: Path) -> None:
    model = DreamEdge(config).eval()
    for i, (name, parameter) in enumerate(model.named_parameters()):
        drawn = draw(hf_name(name), tuple(parameter.shape), config, seed_of(0, i))
        parameter.data = drawn.float()
    quantize_model(model, Dtype.float32, linear, EmbeddingQuant())
    program = StaticProgram(model, max_seq_len, Backend.xnnpack, attention)
    exported = export_program(program, 64)
    lowered = lower_program(exported, Backend.xnnpack, metadata(model, max_seq_len, 64, attention))
    with pte.open("wb") as file:
        lowered.write_to_file(file)


def measure(
    programs: dict[tuple[str, Attention], Program], tokens: list[int], kv_len: int, repeats: int
) -> dict[tuple[str, Attention], dict[int, list[float]]]:
    """Seconds by program and T; the last 32 rows get logits, and attention sees kv_len positions or more."""
    seconds: dict[tuple[str, Attention], dict[int, list[float]]] = {kind: {T: [] for T in tokens} for kind in programs}
    for T in tokens:
        seen = max(T, kv_len)
        for i in range(repeats + 2):
            for kind, program in programs.items():
                started = time.perf_counter()
                program.forward(torch.arange(T) % 100, seen - T, seen, torch.arange(max(0, T - 32), T))
                if i >= 2:  # the first calls touch memory for the first time
                    seconds[kind][T].append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
