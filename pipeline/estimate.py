"""What a run will need, worked out from sizes before any weight is read: memory of each stage, and disk.

Constants are what was measured on Linux with the pinned versions (docs/memory.md); `tests/test_fullsize.py` and
`scripts/fullsize.py` hold the estimate to within 20% of what a run then takes.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from rich.console import Console
from torch import nn

from model import CheckpointError, ConfigError, DreamEdge, DreamEdgeConfig
from model.checkpoint_files import read_config, weight_files
from pipeline.calibrate import calibration_tokens, needs_text
from pipeline.export import lengths
from pipeline.schema import RunConfig
from recipes.gptq import hessian_blocks
from recipes.options import Attention, EmbeddingQuant, LinearQuant, Recipe
from recipes.quantization import QuantizationError, linear_bytes, quant_of
from report.terminal import mib, show, table
from runtime.errors import InputError, OutputError, RecipeError, ResourceError
from validation.eager import TOKENS
from validation.expected_format import largest_plan
from validation.output_layer import ROWS, VOCAB

MIB = 2**20
PROCESS = 385 * MIB  # Python, torch, torchao and executorch, imported
GRAPH, GRAPH_PER_WEIGHT = 7.4 * MIB, 0.044  # of a layer, exported, and for each of its weights
DELEGATE = 18 * MIB  # of a layer, lowered
CHILD = 240 * MIB  # the process that runs the program, without it


@dataclass(frozen=True)
class Estimate:
    """memory: bytes by stage, the most at once; `program`: of the process that validation runs the program in.

    cache: bytes on disk of the quantized weights. output: of the program, if it held its weights and nothing else.
    """

    memory: dict[str, int]
    cache: int
    output: int

    @property
    def most(self) -> int:
        """Bytes of memory at once: the program runs beside this process."""
        return max(*self.memory.values(), self.memory["export"] + self.memory["program"])


def estimate(config: RunConfig) -> Estimate:
    """Raises `InputError` for a checkpoint without a readable config, and `RecipeError` for impossible lengths and for
    formats that there are not.
    """
    folder = Path(config.checkpoint)
    try:
        shape = read_config(folder)
        checkpoint_bytes = sum(file.stat().st_size for file in weight_files(folder))
    except (CheckpointError, ConfigError, OSError) as error:
        raise InputError(str(error)) from error
    if shape.num_hidden_layers > max(1000, checkpoint_bytes // shape.hidden_size):
        raise InputError(
            f"{folder}: the config asks for {shape.num_hidden_layers} layers, the files hold {checkpoint_bytes} bytes"
        )
    max_seq_len, max_rows = lengths(shape, config.export)
    reads = (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()
    calibrates = reads and needs_text(config.recipe)
    try:
        return of_sizes(shape, checkpoint_bytes, config.recipe, max_seq_len, max_rows, calibrates)
    except QuantizationError as error:
        raise RecipeError(f"recipe {config.recipe.name}: {error}") from error


def of_sizes(
    config: DreamEdgeConfig,
    checkpoint_bytes: int,
    recipe: Recipe,
    max_seq_len: int,
    max_rows: int,
    calibrates: bool = False,
) -> Estimate:
    """calibrates: rounding goes by a text."""
    with torch.device("meta"):
        model = DreamEdge(replace(config, num_hidden_layers=1))  # the others are alike
    itemsize = getattr(torch, recipe.dtype.value).itemsize
    in_layer = sum(p.numel() for p in model.layers.parameters())
    numbers = sum(p.numel() for p in model.parameters()) + (config.num_hidden_layers - 1) * in_layer
    in_file = checkpoint_bytes / numbers  # bytes of a number
    rewrites = bool(recipe.fold or recipe.rotate)
    V, D, L, S = config.vocab_size, config.hidden_size, config.num_hidden_layers, max_seq_len

    def quant_in(name: str, module: nn.Module) -> LinearQuant | None:
        return quant_of(name, recipe.linear) if isinstance(module, nn.Linear) else None

    def stored(name: str, module: nn.Module) -> float:
        own = dict(module.named_parameters(recurse=False))
        n_bytes = 0.0
        quant = quant_in(name, module)
        if quant is not None:
            rows, columns = own.pop("weight").shape
            n_bytes = linear_bytes(rows, columns, quant)
        elif isinstance(module, nn.Embedding) and recipe.embedding is not None:
            # One to a byte until executorch packs them.
            n_bytes = _embedding_bytes(own.pop("weight"), recipe.embedding, 8)
        return n_bytes + sum(p.numel() for p in own.values()) * itemsize

    def unpacked(name: str, module: nn.Module) -> float:
        quant = quant_in(name, module)
        is_int4 = quant is not None and quant.weight_bits == 4
        return sum(p.numel() for p in module.parameters(recurse=False)) if is_int4 else 0

    def in_part(name: str, part: nn.Module) -> float:
        return sum(stored(*named) for named in part.named_modules(prefix=name))

    def quantizing(name: str, part: nn.Module) -> float:
        """The mapped weights, the integers of a part one to a byte, what is stored, and copies of it to hash."""
        integers = sum(unpacked(*named) for named in part.named_modules(prefix=name))
        copies = 2.0 if integers else 1.5 if recipe.linear is not None else 1.0
        own = sum(p.numel() for p in part.parameters()) * in_file + integers + copies * in_part(name, part)
        if rewrites:  # in float32, and what a factor is tried on
            own += 4 * sum(p.numel() for p in part.parameters()) + in_part(name, part)
        return own + (_calibrating(config, recipe, part) if calibrates else 0.0)

    layer = model.layers[0]
    layers = {i: in_part(f"layers.{i}", layer) for i in range(L)}
    keeps = recipe.linear is None and recipe.embedding is None and not rewrites
    tied = config.tie_word_embeddings and keeps
    head = 0.0 if tied else stored("lm_head", model.lm_head)
    embedding = stored("embed_tokens", model.embed_tokens)
    cache = embedding + sum(layers.values()) + stored("norm", model.norm) + head
    output = cache
    if recipe.embedding is not None:
        output += _embedding_bytes(model.embed_tokens.weight, recipe.embedding, recipe.embedding.weight_bits)
        output -= embedding
    largest = max(p.numel() for p in model.parameters()) * in_file
    arena = largest_plan(config, recipe.attention, S, max_rows, itemsize)
    graph = PROCESS + L * (GRAPH + GRAPH_PER_WEIGHT * in_layer)
    # executorch holds the embedding, its copy, and some of a third while it lays out the program; the first is mapped
    # besides where it was quantized. Measured: 2.9 to 3.8 times at 28 layers of Dream-7B.
    lowering = PROCESS + L * DELEGATE + (2.2 if recipe.embedding is None else 3.3) * embedding
    packed = output - embedding
    # While it loads, or in a call of max_seq_len tokens: an MLP's activations, or a layer's scores.
    matrices = [
        *(named for i in range(L) for named in layer.named_modules(prefix=f"layers.{i}")),
        ("lm_head", model.lm_head),
    ]
    loading = arena + embedding + max(stored(*named) for named in matrices)
    scores = config.num_attention_heads * S * S if recipe.attention is Attention.delegated else 0
    calling = arena + itemsize * max(5 * S * config.intermediate_size, 2 * scores)
    program = CHILD + packed + max(loading, calling)
    # One layer in float32 and what it is made of, its activations, or logits, a slice of the output layer, and both
    # models' mapped ones.
    activations = 4 * TOKENS * config.intermediate_size * 8 + 4 * S * D * 8
    logits = 4 * V * ROWS * 3 + 8 * VOCAB * D + V * D * in_file + head
    eager = graph + max(in_layer * (4 + in_file) + activations, logits)
    if rewrites:  # the embedding or the output layer once more, in float32: what noise is held against
        eager += 4 * V * D
    memory = {
        "load": PROCESS + largest,
        "quantize": PROCESS
        + max(
            quantizing(*named)
            for named in (("embed_tokens", model.embed_tokens), ("layers.0", layer), ("lm_head", model.lm_head))
        ),
        "export": graph,
        "lower": lowering,
        "validate": eager,
        "program": program,
    }
    return Estimate({stage: int(n) for stage, n in memory.items()}, int(cache), int(output))


def _calibrating(config: DreamEdgeConfig, recipe: Recipe, part: nn.Module) -> float:
    """Bytes: a part in float32, the Hessians of its inputs, one of them inverted in float64, and the texts' stream."""
    linears = [module for module in part.modules() if isinstance(module, nn.Linear)]
    if not linears:
        return 0.0
    blocks = [
        (b.stop - b.start) ** 2
        for width in {linear.in_features for linear in linears}
        for b in hessian_blocks(width, recipe.linear.group_size if recipe.linear else None)
    ]
    weights = 4 * sum(linear.weight.numel() for linear in linears)
    stream = 4 * calibration_tokens(config) * config.hidden_size * 6
    return weights + 4 * 2 * sum(blocks) + 24 * max(blocks) + stream


def _embedding_bytes(weight: torch.Tensor, quant: EmbeddingQuant, weight_bits: int) -> float:
    """With its scales, which are float32."""
    rows, columns = weight.shape
    groups = columns // quant.group_size if quant.group_size else 1
    return rows * columns * weight_bits / 8 + rows * groups * 4


def check_resources(config: RunConfig, needs: Estimate, console: Console) -> None:
    """Shows the estimate. Raises `ResourceError` if less is free, unless `force` is given, and `OutputError`."""
    cache = _writable("cache", Path(config.cache), Path(config.cache))
    # It is made beside what it replaces.
    output = _writable("output", Path(config.output), Path(config.output).resolve().parent)
    free_memory, disk = available_memory(), shutil.disk_usage
    peak = max(needs.memory, key=lambda stage: needs.memory[stage])
    disks = {cache: needs.cache, output: needs.output}
    same = cache.stat().st_dev == output.stat().st_dev
    if same:
        disks = {output: needs.cache + needs.output}
    if needs.memory[peak] > 2**30 or sum(disks.values()) > 2**30:
        listing = table(None, "estimate", *needs.memory, "disk")
        listing.add_row("needed", *(mib(n) for n in needs.memory.values()), mib(sum(disks.values())))
        listing.add_row("free", *[mib(free_memory)] * len(needs.memory), mib(min(disk(path).free for path in disks)))
        show(console, listing)
    wrong = []
    if needs.most > free_memory:
        wrong.append(f"{mib(needs.most)} of memory are needed, {mib(free_memory)} are free")
    for path, n_bytes in disks.items():
        if n_bytes > disk(path).free:
            wrong.append(f"{path} needs {mib(n_bytes)} of disk, {mib(disk(path).free)} are free")
    if wrong and not config.force:
        raise ResourceError(f"{'; '.join(wrong)} (force=true starts anyway)")


def available_memory() -> int:
    """Bytes: of the machine, or what a control group leaves of it."""
    free = psutil.virtual_memory().available
    for root, limit, used, prefix in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", ""),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        try:
            most, taken = (int(Path(root, name).read_text()) for name in (limit, used))
            stat = dict(line.split() for line in Path(root, "memory.stat").read_text().splitlines())
            # Pages of files are counted as used, and dropped when others are wanted.
            droppable = sum(int(stat[f"{prefix}{kind}_file"]) for kind in ("active", "inactive"))
            free = min(free, max(0, most - taken + droppable))
        except (OSError, ValueError, KeyError):
            continue  # no such group, or no limit ("max")
    return int(free)


def _writable(what: str, path: Path, folder: Path) -> Path:
    """The nearest folder of `folder` that is there already. Raises `OutputError` where nothing can be made in it."""
    try:
        folder = _existing(folder)
    except OSError as error:  # a name too long, a folder that may not be looked into
        raise OutputError(f"{what} {path} cannot be written: {error.strerror or error}") from error
    try:
        Path(tempfile.mkdtemp(dir=folder, prefix=".dreamedge-")).rmdir()
    except OSError as error:
        raise OutputError(
            f"{what} {path} cannot be written: nothing can be made in {folder}: {error.strerror or error}"
        ) from error
    return folder


def _existing(path: Path) -> Path:
    """The nearest folder that is there already."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path
