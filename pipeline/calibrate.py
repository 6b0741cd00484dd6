"""What calibration text makes of a network that is being quantized, part by part: the inputs of its linear layers."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model import DreamEdge, DreamEdgeConfig
from model.dream import DecoderLayer
from pipeline.load import Loaded
from recipes.gptq import add_squares, hessian_blocks, inputs_by_layer
from recipes.options import Recipe, Rounding
from recipes.quantization import InputsByLayer, quant_of
from recipes.stored import Weights, open_stored
from runtime.artifact import sha256
from validation.eager import embed, run_layers
from validation.effort import layer_weights
from validation.output_layer import normed_rows
from validation.products import product
from validation.progress import Report, silent
from validation.reference import Call, Sequence, n_tokens
from validation.texts import hidden_of, read_texts, tokens_of, windows

log = logging.getLogger(__name__)

TOKENS_AT_ONCE = 512  # whose squares are summed together
WINDOW = 256  # tokens of a text that are read together
FEW = 1024  # tokens, below which a text is warned of
TOKENS = 2**15  # in all
# A large network reads less of it, for each token goes through all of it: Dream-7B 7,700.
OPERATIONS = 2e14
INPUTS = ("q_proj", "o_proj", "gate_proj", "down_proj")  # the kinds whose inputs factors are chosen by
# Layers that are given the same input: by the kind whose Hessian is theirs.
SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@dataclass(frozen=True)
class Calibration:
    """Masked texts, all rows asked. source: the file's name. sha256: of the file."""

    sequences: tuple[Sequence, ...]
    source: str
    sha256: str

    @property
    def noted(self) -> dict[str, Any]:
        """For the manifest."""
        return {"source": self.source, "sha256": self.sha256, "tokens": n_tokens(self.sequences)}


def calibration_tokens(config: DreamEdgeConfig) -> int:
    return min(TOKENS, max(WINDOW, int(OPERATIONS / (4 * layer_weights(config)))))


def rounds_by_text(recipe: Recipe) -> bool:
    return recipe.linear is not None and recipe.linear.rounding is Rounding.gptq


def needs_text(recipe: Recipe) -> bool:
    return rounds_by_text(recipe) or bool(recipe.fold)


def calibration_of(loaded: Loaded, recipe: Recipe, given: str | None, bundled: Path) -> Calibration | None:
    """Of the file that is given, else of the bundled text, as a diffusion model sees it: with masks of all ratios.

    None for a recipe that needs none, and for a checkpoint that reads no text. Raises `UsageError`.
    """
    if not needs_text(recipe):
        return None
    file = Path(given) if given is not None else bundled
    if loaded.tokenizer is None:
        log.info("recipe %s: the checkpoint has no tokenizer to read calibration text with", recipe.name)
        return None
    texts = tokens_of(loaded.tokenizer, read_texts(file, "calibration", loaded.folder), f"calibration: {file}", least=1)
    generator = torch.Generator().manual_seed(0)
    pieces, n, sequences = windows(texts, min(WINDOW, loaded.config.max_seq_len)), 0, []
    enough = calibration_tokens(loaded.config)
    for i, k in enumerate(torch.randperm(len(pieces), generator=generator).tolist()):
        text, ratio = pieces[k], float(torch.rand((), generator=generator))
        tokens = text.masked_fill(hidden_of(len(text), ratio, i % 3, generator), loaded.config.mask_token_id)
        sequences.append(Sequence(f"text-{i}", (Call(tokens, 0, len(tokens), torch.arange(len(tokens))),)))
        n += len(tokens)
        if n >= enough:
            break
    if n < FEW:
        log.warning("calibration: %s holds %d tokens: so few may be worse than none, some thousands are usual", file, n)
    return Calibration(tuple(sequences), file.name, sha256(file))


def input_rms(model: DreamEdge, calibration: Calibration, report: Report = silent) -> dict[str, Tensor]:
    """The root mean square of each input channel of the network in float32, float32 [in], by the name of the layer."""
    squares: dict[str, Tensor] = {}

    def note(name: str, _: nn.Linear, x_1ND: Tensor, __: Tensor) -> None:
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] in INPUTS:
            found = squares.setdefault(layer, torch.zeros(x_1ND.shape[2], dtype=torch.float64))
            for part_ND in x_1ND[0].split(TOKENS_AT_ONCE):
                found += part_ND.double().square().sum(0)

    for _ in run_layers(Weights(model, {}), calibration.sequences, torch.float32, None, report, watch=note):
        pass
    n = n_tokens(calibration.sequences)
    return {layer: (found / n).sqrt().float() for layer, found in squares.items()}


@dataclass
class Stream:
    """The calibration text on its way through the parts that are stored.

    x_1ND: what has come out of the first `done` layers, of the weights as they are quantized; None before the first.
    """

    calibration: Calibration
    model: DreamEdge
    recipe: Recipe
    folder: Path
    x_1ND: Tensor | None = None
    done: int = 0

    def inputs_of(self, name: str, part: nn.Module) -> InputsByLayer:
        """Of the linear layers of a part with these floats; all parts before it are stored."""
        hessians: dict[str, list[Tensor]] = {}
        if name == "lm_head":
            self._advance(self.model.config.num_hidden_layers)
            assert self.x_1ND is not None
            norm = open_stored(self.folder, self.model, self.recipe, only="norm")
            x_RD, _ = normed_rows(norm, self.calibration.sequences, self.x_1ND, None)
            self._add(hessians, name, x_RD.float())
        elif name.startswith("layers."):
            i = int(name.partition(".")[2])
            self._advance(i)
            for _ in run_layers(
                Weights(_with_inputs_alone(self.model, i, part), {}),
                self.calibration.sequences,
                torch.float32,
                None,
                given=lambda _: self.x_1ND,
                watch=lambda name, _, x_1ND, __: self._add(hessians, name.removesuffix(".weight"), x_1ND[0]),
                order=[i],
                multiply=product,
            ):
                pass
        found = inputs_by_layer(hessians)
        linears = (full for full, module in part.named_modules(prefix=name) if isinstance(module, nn.Linear))
        return {full: found[_shared(full)] for full in linears}

    def _add(self, hessians: dict[str, list[Tensor]], name: str, x_ND: Tensor) -> None:
        """A piece of a layer's input: rows of it are added in order, so that no number of threads changes a sum."""
        if _shared(name) != name:
            return
        quant = quant_of(name, self.recipe.linear)
        blocks = hessian_blocks(x_ND.shape[1], quant.group_size if quant else None)
        if name not in hessians:
            hessians[name] = [torch.zeros(b.stop - b.start, b.stop - b.start) for b in blocks]
        for hessian, block in zip(hessians[name], blocks, strict=True):
            add_squares(hessian, x_ND[:, block])

    def _advance(self, to: int) -> None:
        sequences = self.calibration.sequences
        if self.x_1ND is None:
            embedding = open_stored(self.folder, self.model, self.recipe, only="embed_tokens")
            self.x_1ND = embed(embedding, sequences, None)
        for i in range(self.done, to):
            layer = open_stored(self.folder, self.model, self.recipe, only=f"layers.{i}")
            runs = run_layers(layer, sequences, None, None, given=lambda _: self.x_1ND, order=[i], multiply=product)
            (run,) = runs
            self.x_1ND = run.x_1ND
        self.done = max(self.done, to)


def _shared(name: str) -> str:
    start, _, kind = name.rpartition(".")
    return f"{start}.{SHARED[kind]}" if kind in SHARED else name


def _with_inputs_alone(like: DreamEdge, i: int, layer: nn.Module) -> DreamEdge:
    """A model of this layer, to see what its matrices are given. What the last one gives nobody asks for: of its rows,
    a quarter of the work, one is multiplied.
    """
    with torch.device("meta"):
        model = DreamEdge(like.config)
        model.layers[i] = DecoderLayer(like.config)
    for path, parameter in layer.named_parameters():
        parent, _, leaf = path.rpartition(".")
        kept = parameter[:1] if parent.endswith("down_proj") else parameter
        setattr(model.layers[i].get_submodule(parent), leaf, nn.Parameter(kept, requires_grad=False))
    return model
