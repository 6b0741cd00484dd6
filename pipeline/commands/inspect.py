"""`inspect`: what is in an artifact, on one screen or as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from evidence.device import DELEGATES, cmake_lines
from evidence.integrity import as_it_stands, check_signatures, check_whole, signed_by
from model.family import Member, member
from pipeline.schema import InspectConfig
from report.page import REPORT_FILE
from report.terminal import bound_text, least_width, mib, show, table, verdict_text
from runtime.artifact import MANIFEST_FILE, ArtifactError, figures_of, files_of, read_small
from runtime.chat import chat_template
from runtime.defaults import own_defaults
from runtime.errors import BadArtifactError, InputError
from runtime.tokenizer import load_tokenizer
from validation.figure import Figure

SIDE_BY_SIDE = 116  # characters of a terminal that holds two tables beside each other


def inspect(config: InspectConfig, console: Console) -> None:
    """Nothing is run. Raises `BadArtifactError` for an artifact that is not as it was packaged."""
    folder = Path(config.artifact)
    try:
        found = contents(folder)
        left, right = _tables(found)
    except OSError as error:
        raise BadArtifactError(f"{error.filename}: cannot be read: {error.strerror or error}") from error
    except ArtifactError as error:
        raise BadArtifactError(str(error)) from error
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise BadArtifactError(f"{folder / MANIFEST_FILE}: not a manifest: {type(error).__name__}: {error}") from error
    # Not before all of it could be made: nothing is called valid, and then refused.
    if config.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    elif config.device:
        show(console, _needs(found["manifest"]))
        for line in cmake_lines(found["manifest"]["device"]):
            console.print(_text(line), soft_wrap=True)
    else:
        _show(console, found, left, right)


def contents(folder: Path) -> dict[str, Any]:
    """All that an artifact says of itself. signatures: ids of keys, none checked."""
    manifest, provenance = as_it_stands(folder)
    check_whole(folder, manifest, provenance)
    signatures = check_signatures(folder, provenance)
    return {
        "artifact": str(folder),
        "member": asdict(_member(folder, manifest)),
        "valid": all(figure["ok"] for figure in figures_of(manifest)),
        "signatures": [key for key, _ in signatures],
        "signed": signed_by(signatures),
        "files": files_of(manifest),
        "manifest": manifest,
        "report": json.loads(read_small(folder / REPORT_FILE)),
        "provenance": json.loads(provenance),
    }


def _tables(found: dict[str, Any]) -> tuple[list[Table], list[Table]]:
    left = [_facts(found["manifest"], Member(**found["member"])), _files(found)]
    return left, [_figures(found["manifest"]), _stages(found["report"])]


def _show(console: Console, found: dict[str, Any], left: list[Table], right: list[Table]) -> None:
    verdict = "[bold green]valid[/]" if found["valid"] else "[bold red]OUT OF BOUNDS[/]"
    console.print(f"{verdict}, every file as it was packaged, ", Text(found["signed"]), sep="", soft_wrap=True)
    widths = [max(least_width(console, listing) for listing in side) for side in (left, right)]
    if console.width < max(SIDE_BY_SIDE, sum(widths) + 1):
        show(console, *left, *right)
        return
    grid = Table.grid(padding=(0, 1))
    grid.add_column()
    grid.add_column(min_width=widths[1])  # nothing in it can be broken
    grid.add_row(Group(*left), Group(*right))
    console.print(grid)


def _member(folder: Path, manifest: dict[str, Any]) -> Member:
    """Of the Dream family."""
    try:
        tokenizer = load_tokenizer(folder)
        has_chat, own = chat_template(folder) is not None, own_defaults(folder)
    except InputError as error:
        raise ArtifactError(str(error)) from error
    is_merged = any(name.startswith("lora/") for name in manifest["checkpoint"]["sha256"])
    adapter = "D2F" if own.get("cache") == "d2f" else "LoRA" if is_merged else None
    if tokenizer is None:
        return Member("Dream's network", "model_type; there is no tokenizer")
    bos = tokenizer.id_to_token(int(manifest["model"]["bos_token_id"]))
    return member(tokenizer.get_vocab(), bos, has_chat, adapter)


def _facts(manifest: dict[str, Any], member: Member) -> Table:
    recipe, sizes, delegation = manifest["recipe"], manifest["sizes"], manifest["delegation"]
    model, export, versions = manifest["model"], manifest["export"], manifest["versions"]
    inside, outside = sum(delegation["inside"].values()), sum(delegation["outside"].values())
    rows = {
        "made": manifest["run"]["created"],
        "checkpoint": f"{manifest['checkpoint']['name']}, {mib(sizes['checkpoint'])}",
        "recognised as": f"{member.name}, by {member.by}",
        "network": f"{model['num_hidden_layers']} layers, {model['hidden_size']} wide, {model['vocab_size']} tokens",
        "recipe": recipe["name"],
        "bits": _bits(recipe),
        "program": f"{mib(sizes['program'])}, {sizes['program'] / sizes['ideal_program']:.3f} of the ideal",
        "lengths": f"{export['max_seq_len']} tokens, {export['max_rows']} rows of logits a call",
        "memory plan": mib(sum(manifest["memory_plan"])),
        "delegation": f"{delegation['delegates']} delegates, {inside} operators inside, {outside} outside",
        "contract": f"version {manifest['contract_version']}",
        "made with": f"executorch {versions['executorch']}, torch {versions['torch']}",
        "": f"torchao {versions['torchao']}, Python {versions['python']}",
    }
    return _listing("what it is", rows)


def _needs(manifest: dict[str, Any]) -> Table:
    """What a device needs."""
    device = manifest["device"]
    rows = {
        "program": f"flatbuffer {device['file_identifier']}, schema {device['program_schema']}, "
        f"contract {manifest['contract_version']}",
        "runtimes tried": f"executorch {', '.join(device['runtimes'])}",
        "delegates": ", ".join(DELEGATES.get(name, name) for name in device["delegates"]) or "none",
    }
    rows |= {library: ", ".join(operators) for library, operators in device["operators"].items()}
    planned, file = sum(manifest["memory_plan"]), manifest["sizes"]["program"]
    rows["memory"] = (
        f"{mib(manifest['run']['program_memory'])}, {mib(planned)} of it planned; and its file, mapped: {mib(file)}"
    )
    for core in manifest["cores"]:
        right = "right" if all(figure["ok"] for figure in core["figures"]) else "WRONG"
        rows[core["core"]] = f"{right}; {', '.join(core['features']) or 'no extensions'}"
    return _listing("what it needs on a device", rows)


def _bits(recipe: dict[str, Any]) -> str:
    def one(quant: dict[str, Any] | None) -> str:
        return f"int{quant['weight_bits']}" if quant is not None else str(recipe["dtype"])

    return f"{one(recipe['linear'])} linear, {one(recipe['embedding'])} embedding, {recipe['dtype']} between"


def _figures(manifest: dict[str, Any]) -> Table:
    listing = table("validation", "figure", "value", "bound", "")
    listing.columns[-1].no_wrap = True
    for figure in manifest["figures"]:
        bound = None if figure["bound"] is None else float(figure["bound"])
        kept = Figure("", "", float(figure["value"]), bound, bool(figure["at_least"]))
        verdict = verdict_text(kept) if figure["ok"] == kept.ok else "[bold red]FAILED[/]"
        listing.add_row(_text(figure["name"]), f"{kept.value:.5g}", bound_text(kept, 5), verdict)
    if manifest["solved"] is not None:
        solved = manifest["solved"]
        listing.add_row(
            _text(f"{solved['task']}, n={solved['n']}"),
            f"{solved['program']:.1%}",
            "float32",
            f"{solved['float32']:.1%}",
        )
    return listing


def _files(found: dict[str, Any]) -> Table:
    return _listing("files", {name: f"{entry['bytes']:,} bytes" for name, entry in sorted(found["files"].items())})


def _stages(report: dict[str, Any]) -> Table:
    listing = table("the run that made it", "stage", "seconds", "peak memory")
    listing.columns[-1].no_wrap = True
    for stage in report["stages"]:
        listing.add_row(_text(stage["name"]), f"{stage['seconds']:.1f}", mib(stage["peak_rss"]))
    return listing


def _listing(title: str, rows: dict[str, str]) -> Table:
    listing = table(title, "", "")
    listing.show_header = False
    for name, value in rows.items():
        listing.add_row(_text(name), _text(value))
    return listing


def _text(value: object) -> Text:
    """An artifact is anybody's: no markup of it, and nothing that a terminal obeys."""
    return Text("".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(value)))
