"""One block step of an artifact against llama.cpp: a model of the same shape in Q4_0, on the same cores, in turn.

    CMAKE_ARGS=-DCMAKE_CXX_FLAGS=-fno-dse pip install "dreamedge[llama]"   # built for this processor in ten minutes
    python -m scripts.compare_llama_cpp ARTIFACT --tokens 32 --kv-len 512

Both compute the logits of all their tokens, which are the last of kv_len positions. Each runs in a process of its own
and waits while the other one computes. Weights are random: what they are does not change the time. Without -fno-dse
GCC 12 drops most of AMX's configuration (its _tile_loadconfig declares 8 of 64 bytes), and llama.cpp ends with SIGILL.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from model import DreamEdgeConfig
from report.files import write_json
from report.terminal import table
from runtime.artifact import load_manifest
from runtime.processor import machine
from runtime.program import Program
from runtime.threads import thread_count
from validation.speed import spread

BLOCK_BYTES, BLOCK = 18, 32  # of Q4_0: a float16 scale and 16 bytes for 32 weights
Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--kv-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, help="a JSON file for what was measured")
    args = parser.parse_args()
    manifest = load_manifest(args.artifact)
    result = compare(args.artifact, DreamEdgeConfig.from_hf(manifest["model"]), args.tokens, args.kv_len, args.repeats)
    if args.output is not None:
        write_json(args.output, result)
    listing = table(None, "", "ms, median (min - max)", "of llama.cpp")
    for name in ("llama.cpp", "program"):
        taken = result[name]
        ms = "{median:,.1f} ({min:,.1f} - {max:,.1f})".format(**{key: 1000 * taken[key] for key in taken})
        listing.add_row(name, ms, f"{taken['median'] / result['llama.cpp']['median']:.2f}")
    Console().print(listing)


def compare(artifact: Path, config: DreamEdgeConfig, T: int, kv_len: int, repeats: int) -> dict[str, Any]:
    """Seconds of one step of each as {median, min, max}."""
    spreads = in_turn({"program": artifact}, config, T, kv_len, repeats)
    return {"tokens": T, "kv_len": kv_len, "repeats": repeats, "machine": machine()} | spreads


def in_turn(
    artifacts: dict[str, Path], config: DreamEdgeConfig, T: int, kv_len: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Seconds of one step of llama.cpp, and of each of these artifacts of the same shape, as {median, min, max}."""
    with tempfile.TemporaryDirectory(dir=next(iter(artifacts.values())).parent) as folder:
        gguf = Path(folder) / "model.gguf"
        write_gguf(config, gguf)
        sides = {"llama.cpp": Process("llama.cpp", llama_step, gguf, T, kv_len, thread_count())}
        sides |= {name: Process(name, program_step, artifact, T, kv_len) for name, artifact in artifacts.items()}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for i in range(repeats + 1):
            for name, side in sides.items():
                taken = side.step()
                if i:  # the first step touches memory for the first time
                    seconds[name].append(taken)
        for side in sides.values():
            side.close()
    return {name: spread(taken) for name, taken in seconds.items()}


class Process:
    """A process that makes a step, and then runs it whenever it is asked to."""

    def __init__(self, name: str, make: Callable[..., Step], *args: Any) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")  # threads of one runtime are not those of the other
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, args), daemon=True)
        self.process.start()
        theirs.close()

    def close(self) -> None:
        """Its memory is free then."""
        self.connection.close()
        self.process.join()

    def step(self) -> float:
        """Seconds."""
        self.connection.send(None)
        try:
            return float(self.connection.recv())
        except (EOFError, ConnectionError):
            self.process.join()
            sys.exit(f"compare_llama_cpp: {self.name} ended with {self.process.exitcode}")


def _serve(connection: Connection, make: Callable[..., Step], args: tuple[Any, ...]) -> None:
    step = make(*args)
    with contextlib.suppress(EOFError):  # the other side has ended
        while True:
            connection.recv()
            started = time.perf_counter()
            step()
            connection.send(time.perf_counter() - started)


def program_step(artifact: Path, T: int, kv_len: int) -> Step:
    program = Program.open(artifact)
    before = kv_len - T
    if before:
        program.forward(torch.arange(before), 0, before, torch.tensor([before - 1]))

    def step() -> None:
        program.forward(torch.arange(T), before, kv_len, torch.arange(T))

    return step


def llama_step(gguf: Path, T: int, kv_len: int, threads: int) -> Step:
    import llama_cpp as llama

    quiet = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(quiet, None)
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(str(gguf).encode(), llama.llama_model_default_params())
    settings = llama.llama_context_default_params()
    settings.n_ctx = settings.n_batch = kv_len
    settings.n_ubatch = min(kv_len, 512)
    settings.n_threads = settings.n_threads_batch = threads
    context = llama.llama_init_from_model(model, settings)
    assert context
    memory = llama.llama_get_memory(context)

    def run(start: int, n: int, all_logits: bool) -> None:
        batch = llama.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for i in range(n):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = i, start + i, 1, 0
            batch.logits[i] = all_logits or i == n - 1
        assert llama.llama_decode(context, batch) == 0
        llama.llama_synchronize(context)
        llama.llama_batch_free(batch)

    before = kv_len - T
    if before:
        run(0, before, False)

    def step(_: object = quiet) -> None:  # llama.cpp keeps no more than its address
        llama.llama_memory_seq_rm(memory, 0, before, -1)
        run(before, T, True)

    return step


def write_gguf(config: DreamEdgeConfig, file: Path) -> None:
    """Qwen2's layout, all matrices random Q4_0."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(file, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    random = np.random.default_rng(0)
    tile = random.integers(0, 256, (2**16, BLOCK_BYTES), dtype=np.uint8)
    tile[:, :2] = (random.random((len(tile), 1)) * 0.01).astype(np.float16).view(np.uint8)
    shapes = gguf_shapes(config)
    for name, shape in shapes.items():
        if len(shape) == 2:
            packed = (shape[0], shape[1] // BLOCK * BLOCK_BYTES)
            n_bytes = packed[0] * packed[1]
            writer.add_tensor_info(name, packed, np.dtype(np.uint8), n_bytes, GGMLQuantizationType.Q4_0)
        else:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for shape in shapes.values():
        if len(shape) == 2:
            writer.write_tensor_data(np.resize(tile, (shape[0] * shape[1] // BLOCK, BLOCK_BYTES)))
        else:
            writer.write_tensor_data(np.ones(shape, np.float32))
    writer.close()


def gguf_shapes(config: DreamEdgeConfig) -> dict[str, tuple[int, ...]]:
    """Of all tensors, by llama.cpp's names."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    q, kv = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (V, D), "output_norm": (D,)}
    if not config.tie_word_embeddings:
        shapes["output"] = (V, D)
    for i in range(config.num_hidden_layers):
        layer = {"attn_norm": (D,), "ffn_norm": (D,), "attn_q": (q, D), "attn_k": (kv, D), "attn_v": (kv, D)}
        layer |= {"attn_output": (D, q), "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
        shapes |= {f"blk.{i}.attn_{kind}.bias": (n,) for kind, n in (("q", q), ("k", kv), ("v", kv))}
    return {name if name.endswith(".bias") else f"{name}.weight": shape for name, shape in shapes.items()}


if __name__ == "__main__":
    main()
