"""A `.pte` opened in the ExecuTorch runtime, by the contract of its one `forward`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import tempfile
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.artifact import MODEL_FILE
from runtime.memory import mapped, unpin
from runtime.packed import PackedError, packed_weights

CONTRACT_VERSION = 1
open_programs: weakref.WeakSet[Program] = weakref.WeakSet()


class ProgramError(RuntimeError):
    """A file that is no program, is damaged, or was made for another contract; or a call that failed inside."""


@dataclass(frozen=True)
class Metadata:
    """The constant methods of a program, by their names there."""

    get_contract_version: int
    get_max_seq_len: int
    get_max_context_len: int
    get_max_rows: int
    get_vocab_size: int
    get_n_layers: int
    get_bos_id: int
    get_eos_ids: tuple[int, ...]
    get_pad_id: int
    get_mask_id: int
    get_block_length: int
    logits_shift: int
    use_kv_cache: bool
    use_sdpa_with_kv_cache: bool
    enable_dynamic_shape: bool


class Program:
    """`Program.open(artifact folder or .pte)`, then `forward`. The cache inside lives as long as the object.

    before_call: is told the number of tokens of each call.
    """

    def __init__(self, path: Path, forward: Any, metadata: Metadata, keep: Any) -> None:
        self.path = path
        self.metadata = metadata
        self._forward = forward
        self.before_call: Callable[[int], None] | None = None
        self._keep = keep  # the loaded program owns the memory of its methods
        # Looked up once: the list is long, and takes more time than the call of a small network.
        self._mapped = mapped(path)
        unpin(self._mapped)
        open_programs.add(self)

    @classmethod
    def open(cls, path: str | os.PathLike[str], packed_cache: str | os.PathLike[str] | None = None) -> Program:
        """Load a program and check its contract. Raises `ProgramError`, or `FileNotFoundError`.

        packed_cache: a folder for the packed weights, which makes all times but the first fast (`runtime/packed.py`).
        """
        file = program_file(path)
        _check_size(file)
        lines: list[str] = []
        try:
            with captured_stderr() as lines:
                program = executorch_runtime().load_program(file)
                metadata = _read_metadata(file, program)
                with _packed(file, packed_cache):
                    forward = program.load_method("forward")
        except PackedError as error:
            raise ProgramError(str(error)) from error
        except (RuntimeError, ValueError) as error:
            raise ProgramError(
                f"{file}: damaged, or not an ExecuTorch program: {' | '.join([*lines, str(error)])}"
            ) from error
        return cls(file, forward, metadata, program)

    @property
    def max_seq_len(self) -> int:
        return self.metadata.get_max_seq_len

    @property
    def max_rows(self) -> int:
        return self.metadata.get_max_rows

    @property
    def vocab_size(self) -> int:
        return self.metadata.get_vocab_size

    @property
    def mask_id(self) -> int:
        return self.metadata.get_mask_id

    @property
    def pad_id(self) -> int:
        return self.metadata.get_pad_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self.metadata.get_eos_ids

    @property
    def block_length(self) -> int:
        return self.metadata.get_block_length

    def start(self) -> Callable[..., Tensor]:
        """`forward`: there is one cache, which a new sequence takes over."""
        unpin(self._mapped)  # the rows of the embedding that the last one read
        return self.forward

    def forward(
        self, tokens: Tensor | Sequence[int], start_pos: int, kv_len: int, rows: Tensor | Sequence[int] | None = None
    ) -> Tensor:
        """Run T tokens at cache positions start_pos .. start_pos+T-1, seeing positions 0 .. kv_len-1.

        tokens: int64 [T] or [1, T]. rows: which of the T get logits, int64 [K], all by default.
        Returns raw, unshifted logits, float32 [1, K, vocab]. Raises `ValueError` for a call outside the contract.
        """
        meta = self.metadata
        tokens_1T = torch.as_tensor(tokens, dtype=torch.int64).reshape(1, -1)
        T = tokens_1T.shape[1]
        rows_K = torch.arange(T) if rows is None else torch.as_tensor(rows, dtype=torch.int64).reshape(-1)
        if not 1 <= T <= meta.get_max_seq_len:
            raise ValueError(f"tokens: 1 to {meta.get_max_seq_len} (max_seq_len) fit in a call, got {T}")
        if not 0 <= int(tokens_1T.min()) <= int(tokens_1T.max()) < meta.get_vocab_size:
            raise ValueError(f"tokens: ids must be in 0..{meta.get_vocab_size - 1}")
        if not (start_pos >= 0 and start_pos + T <= kv_len <= meta.get_max_seq_len):
            raise ValueError(
                f"0 <= start_pos and start_pos + T <= kv_len <= max_seq_len must hold, got start_pos {start_pos}, "
                f"T {T}, kv_len {kv_len}, max_seq_len {meta.get_max_seq_len}"
            )
        if not 1 <= rows_K.numel() <= meta.get_max_rows:
            raise ValueError(f"rows: 1 to {meta.get_max_rows} a call, got {rows_K.numel()}")
        if not 0 <= int(rows_K.min()) <= int(rows_K.max()) < T:
            raise ValueError(f"rows: must be in 0..{T - 1}, the tokens of this call")
        inputs = (tokens_1T, torch.tensor([start_pos]), torch.tensor([kv_len]), rows_K)
        if self.before_call is not None:
            self.before_call(T)
        try:
            with _one_torch_thread():
                logits: Tensor = self._forward.execute(inputs)[0]
        except RuntimeError as error:
            raise ProgramError(f"{self.path}: forward failed in the runtime: {error}") from error
        return logits


def _packed(file: Path, folder: str | os.PathLike[str] | None) -> contextlib.AbstractContextManager[None]:
    if folder is None:
        return contextlib.nullcontext()
    return packed_weights(file, Path(folder), executorch_folder() / "lib")


def program_file(path: str | os.PathLike[str]) -> Path:
    """The `.pte` of an artifact folder, or the file itself."""
    file = Path(path)
    if file.is_dir():
        file = file / MODEL_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no artifact folder with a {MODEL_FILE}, and no .pte file")
    return file


def _check_size(file: Path) -> None:
    """The extended header says how long a program is: a shorter file was cut off."""
    with file.open("rb") as opened:
        head = opened.read(64)
    if len(head) < 40 or head[4:6] != b"ET" or head[8:12] != b"eh00":
        raise ProgramError(f"{file}: not an ExecuTorch program")
    program_size, segment_offset = (int.from_bytes(head[i : i + 8], "little") for i in (16, 24))
    segments_size = int.from_bytes(head[32:40], "little")
    expected = max(program_size, segment_offset + segments_size)
    if file.stat().st_size < expected:
        raise ProgramError(f"{file}: truncated: {file.stat().st_size} bytes of {expected}")


def executorch_runtime() -> Any:
    """The process's runtime, with the kernels that our programs call."""
    import warnings

    with warnings.catch_warnings(), without_exporter():
        warnings.simplefilter("ignore")  # "this API is experimental"
        from executorch.runtime import Runtime

        for library in ("kernels/quantized/*quantized_ops_aot_lib.*", "extension/llm/custom_ops/*custom_ops_aot_lib.*"):
            (file,) = executorch_folder().glob(library)
            torch.ops.load_library(file)
    return Runtime.get()


@contextlib.contextmanager
def without_exporter() -> Iterator[None]:
    """Importing parts of executorch that need nothing of its exporter, without the whole of it, and torchao.

    That takes 5 s and 130 MB (measured), and no device has it. In its place stand empty packages of these names.
    """
    import executorch.backends  # noqa: F401 - light, and asked for by those inside it

    absent = [name for name in ("executorch.exir", "executorch.backends.xnnpack") if name not in sys.modules]
    for name in absent:
        package = types.ModuleType(name)
        package.__path__ = [str(executorch_folder().joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]  # whoever wants the exporter imports the real one


def executorch_folder() -> Path:
    spec = importlib.util.find_spec("executorch")
    assert spec is not None
    return Path(next(iter(spec.submodule_search_locations or [])))


@contextlib.contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The runtime computes in threads of its own, only the copy of the logits runs in torch's.

    After a parallel copy those spin for milliseconds, on the cores that the next call needs (measured: 6.3 ms in
    place of 4.7 for 32 positions of a small model).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _read_metadata(file: Path, program: Any) -> Metadata:
    if "get_contract_version" not in program.method_names or "forward" not in program.method_names:
        raise ProgramError(f"{file}: an ExecuTorch program, but not one that follows DreamEdge's contract")
    version = program.load_method("get_contract_version").execute([])[0]
    if version != CONTRACT_VERSION:
        raise ProgramError(
            f"{file}: made for contract version {version}, this runtime speaks {CONTRACT_VERSION}: export it anew"
        )
    missing = [f.name for f in fields(Metadata) if f.name not in program.method_names]
    if missing:
        raise ProgramError(f"{file}: the program lacks the metadata {', '.join(missing)}")
    values = {f.name: program.load_method(f.name).execute([]) for f in fields(Metadata)}
    values = {name: tuple(v) if name == "get_eos_ids" else v[0] for name, v in values.items()}
    return Metadata(**values)


@contextlib.contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """What goes to stderr inside is kept from it: importing and loading log what no user asked for.

    The list gets the lines at the end: where loading fails, they hold the cause.
    """
    lines: list[str] = []
    sys.stderr.flush()
    # Some of it is written by Python, some past it.
    with tempfile.TemporaryFile("w+", errors="replace") as log, contextlib.redirect_stderr(log):
        saved = os.dup(2)
        os.dup2(log.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            log.seek(0)
            lines += [line for line in log.read().splitlines() if "cpuinfo" not in line]
