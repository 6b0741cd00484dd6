"""Every fault that validation must catch, the check that must catch it, and what that must say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pipeline.config import load_recipe
from recipes.static_program import StaticProgram
from tests.faults import files, network, weights
from tests.faults.judge import (
    FOLDER,
    RUNTIME,
    Right,
    Verdict,
    copied,
    export_with,
    judge_folder,
    judge_program,
    quantized,
)

# (the right artifact, a file to write) -> what validation says
Injection = Callable[[Right, Path], Verdict]


@dataclass(frozen=True)
class Fault:
    """check: a figure of `docs/validation.md`, or `artifact` or `runtime`. says: a regular expression, in its words.

    checkpoint: of `tests/golden/`.
    """

    group: str
    name: str
    inject: Injection
    check: str
    says: str
    recipe: str = "int4_xnnpack"
    checkpoint: str = "gqa2"

    @property
    def is_flip(self) -> bool:
        return self.name.startswith("bit ")


def program(**changes: Any) -> Injection:
    """A program made with `changes`, as `export_with` takes them."""

    def inject(right: Right, pte: Path) -> Verdict:
        export_with(right, pte, **changes)
        return judge_program(right, pte)

    return inject


def network_of(change: network.Change) -> Injection:
    return program(program=change)


def weights_of(change: weights.Change) -> Injection:
    return program(weights=change)


def folder(damage: files.Damage) -> Injection:
    def inject(right: Right, pte: Path) -> Verdict:
        artifact = copied(right, pte.with_suffix(""))
        damage(artifact)
        return judge_folder(artifact)

    return inject


def section_of_another(right: Right, pte: Path) -> Verdict:
    other = pte.with_suffix(".other")
    export_with(right, other, weights=weights.of_another_checkpoint)
    return folder(partial(files.section_of_another, other=other))(right, pte)


def int8_labelled_int4(right: Right, pte: Path) -> Verdict:
    export_with(replace(right, model=quantized(right.checkpoint, load_recipe("int8_xnnpack"))), pte)
    return judge_program(right, pte)


def static_length(made: StaticProgram, max_rows: int) -> torch.export.ExportedProgram:
    """T is what it is in the example."""
    example = (torch.zeros(1, 4, dtype=torch.int64), torch.tensor([0]), torch.tensor([4]), torch.arange(3))
    K = torch.export.Dim("K", min=1, max=4)
    made.requires_grad_(False)
    shapes = {"tokens": None, "start_pos": None, "kv_len": None, "rows": {0: K}}
    with torch.no_grad():
        return torch.export.export(made, example, dynamic_shapes=shapes)


EVERY_OUTPUT = r"every layer is wrong: output -?[\d.]+ dB"
EVERY_KEY = r"every layer is wrong: keys -?[\d.]+ dB"
ONE_LAYER = rf"; layer {network.LAYER} "

FAULTS = (
    # network
    Fault("network", "causal mask", network_of(network.caches_of(network.Causal)), "fidelity_db", EVERY_OUTPUT),
    Fault("network", "wrong rope_theta", network_of(network.wrong_rope_theta), "fidelity_db", EVERY_KEY),
    Fault("network", "interleaved RoPE", network_of(network.interleaved_rope), "fidelity_db", EVERY_KEY),
    Fault("network", "RoPE one position off", network_of(network.rope_one_off), "changed_weights", r"rope\.cos"),
    Fault(
        "network",
        "RoPE one off, queries only",
        network_of(network.rope_one_off_for_queries),
        "fidelity_db",
        EVERY_OUTPUT,
    ),
    Fault(
        "network",
        "RoPE from the call's start",
        network_of(network.rope_from_start),
        "fidelity_db",
        "append|block|one-|call [1-9]",
    ),
    *(
        Fault(
            "network", f"{name}'s bias dropped", network_of(network.bias_dropped(name)), "fidelity_exact_db", ONE_LAYER
        )
        for name in ("q_proj", "k_proj", "v_proj")
    ),
    Fault("network", "biases of k and v swapped", network_of(network.biases_swapped), "fidelity_exact_db", ONE_LAYER),
    Fault("network", "RMSNorm without eps", network_of(network.wrong_eps(0.0)), "changed_weights", r"\(norms\.eps\)"),
    Fault("network", "RMSNorm's eps 1e-5", network_of(network.wrong_eps(1e-5)), "changed_weights", r"\(norms\.eps\)"),
    Fault(
        "network",
        "norm's weight before the cast",
        network_of(network.weight_before_the_cast),
        "exports_that_differ",
        "exports_that_differ",
        "fp16_xnnpack",
    ),
    Fault(
        "network",
        "GQA groups in another order",
        network_of(network.caches_of(network.RepeatedWrong)),
        "fidelity_db",
        EVERY_OUTPUT,
    ),
    Fault(
        "network",
        "attention without its scale",
        network_of(network.caches_of(network.Unscaled)),
        "fidelity_db",
        EVERY_OUTPUT,
    ),
    Fault("network", "gate and up swapped", network_of(network.gate_and_up_swapped), "fidelity_exact_db", ONE_LAYER),
    Fault(
        "network",
        "tied weights untied",
        network_of(network.untied),
        "fidelity_exact_db",
        r"layer 3 \(or the norm and output layer after it\) is wrong: output",
        "fp32_xnnpack",
        "mha-tied",
    ),
    Fault(
        "network",
        "logits shifted",
        network_of(network.logits_shifted),
        "fidelity_db",
        r"layer 1 \(or the norm and output layer",
    ),
    Fault("network", "a layer skipped", network_of(network.in_order(0)), "fidelity_db", "layer 1 is missing"),
    Fault("network", "a layer twice", network_of(network.in_order(0, 1, 1)), "fidelity_db", "layer 1 is run twice"),
    Fault(
        "network", "two layers swapped", network_of(network.in_order(1, 0)), "fidelity_db", "layers 0 and 1 are swapped"
    ),
    Fault(
        "network",
        "mask's embedding zeroed",
        network_of(network.mask_row_zeroed),
        "changed_weights",
        r"embed_tokens\.weight",
    ),
    # cache
    Fault(
        "cache",
        "written one position late",
        network_of(network.longer_caches(network.OneLate)),
        "fidelity_db",
        EVERY_OUTPUT,
    ),
    Fault(
        "cache", "not written again", network_of(network.caches_of(network.NoRewrite)), "fidelity_db", "rewrite|inside"
    ),
    Fault(
        "cache",
        "a row beyond kv_len seen",
        network_of(network.longer_caches(network.StaleRows)),
        "fidelity_db",
        EVERY_OUTPUT,
    ),
    Fault(
        "cache",
        "rows below start_pos not seen",
        network_of(network.caches_of(network.HiddenPrefix)),
        "fidelity_db",
        EVERY_OUTPUT,
    ),
    Fault(
        "cache", "kv_len ignored", network_of(network.caches_of(network.KvLenIgnored)), "fidelity_db", "rewrite|inside"
    ),
    Fault("cache", "shared by two layers", network_of(network.cache_shared), "fidelity_db", "layer 0 is wrong: output"),
    Fault(
        "cache",
        "earlier calls survive in it",
        network_of(network.caches_of(network.Surviving)),
        "fidelity_db",
        EVERY_KEY,
    ),
    # weights
    Fault(
        "weights",
        "one group's scale doubled",
        weights_of(weights.scale_doubled),
        "changed_weights",
        r"layers\.1\.mlp\.up_proj\.weight\.scale",
    ),
    Fault(
        "weights",
        "one block of int4 zeroed",
        weights_of(weights.block_zeroed),
        "changed_weights",
        r"layers\.1\.self_attn\.v_proj\.weight",
    ),
    Fault(
        "weights",
        "nibbles swapped",
        weights_of(weights.nibbles_swapped),
        "changed_weights",
        r"layers\.1\.mlp\.down_proj\.weight",
    ),
    Fault(
        "weights",
        "a square matrix transposed",
        weights_of(weights.transposed),
        "changed_weights",
        r"layers\.1\.self_attn\.q_proj\.weight",
    ),
    Fault(
        "weights",
        "of another checkpoint",
        weights_of(weights.of_another_checkpoint),
        "changed_weights",
        r"embed_tokens\.weight",
    ),
    Fault(
        "weights",
        "NaN in one row",
        weights_of(weights.nan_in_a_row),
        "fidelity_exact_db",
        "layer 1 .*output nan dB",
        "fp32_xnnpack",
    ),
    Fault(
        "weights",
        "NaN in a scale of int4",
        weights_of(weights.nan_in_a_scale),
        RUNTIME,
        "XNNCompiler.*Failed to define tensor",
    ),
    Fault(
        "weights",
        "lm_head quantized",
        weights_of(weights.lm_head_quantized),
        "wrong_linear_weights",
        r"qcint8 \[320, 64\]",
        "fp32_xnnpack",
    ),
    Fault("weights", "int8 labelled int4", int8_labelled_int4, "wrong_linear_weights", "no qbint4 weight"),
    # export
    Fault(
        "export",
        "max_seq_len one short",
        program(max_seq_len=255),
        RUNTIME,
        r"max-length, call 0 \(256 tokens from 0, kv_len 256, 8 rows\)",
    ),
    Fault(
        "export", "one length only", program(export=static_length), RUNTIME, r"whole-000, call 0 \(\d+ tokens from 0"
    ),
    Fault("export", "room for fewer rows", program(max_rows=8), RUNTIME, r"whole-000, call 0 \(.* \d\d rows\)"),
    Fault(
        "export",
        "wrong mask id in the metadata",
        program(methods={"get_mask_id": 0}),
        "wrong_metadata",
        r"\(get_mask_id\)",
    ),
    Fault(
        "export",
        "an operator outside the delegate",
        network_of(network.norm_outside),
        "unexpected_operators",
        "aten::mean",
    ),
    # file
    *(
        Fault("file", f"bit {i} flipped", folder(files.bit_flipped(i)), FOLDER, r"model\.pte: its sha256")
        for i in range(100)
    ),
    Fault("file", "cut short", folder(files.truncated), FOLDER, r"model\.pte: \d+ bytes, the manifest says \d+"),
    Fault("file", "a section of another program", section_of_another, FOLDER, r"model\.pte: its sha256"),
    Fault("file", "manifest edited", folder(files.manifest_edited), FOLDER, r"manifest\.json: its sha256"),
    Fault("file", "reference edited", folder(files.reference_edited), FOLDER, r"reference\.safetensors: its sha256"),
    Fault("file", "report edited", folder(files.report_edited), FOLDER, r"report\.json: its sha256|bytes"),
)
