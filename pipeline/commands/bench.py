"""`bench`: measure an artifact, in a process that holds nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.schema import BenchConfig
from report.files import check_output, write_json
from report.tables import mib, table
from runtime.artifact import MANIFEST_FILE, ArtifactError, load_manifest
from runtime.errors import BadArtifactError, UsageError
from runtime.processor import machine
from runtime.program import MODEL_FILE
from validation.speed import Settings, run_bench


def bench(config: BenchConfig, console: Console, err: Console) -> None:
    """Shows tables, and writes the JSON if asked for. Raises `PipelineError`."""
    folder = Path(config.artifact)
    settings = _settings(folder, config)
    if config.output is not None:
        check_output(Path(config.output))
    with err.status("starting", spinner="dots") as status:
        result = run_bench(folder / MODEL_FILE, settings, status.update)
    result["artifact"] = folder.resolve().name
    result["machine"] = machine()
    _show(console, result)
    if config.output is not None:
        write_json(Path(config.output), result)


def _settings(folder: Path, config: BenchConfig) -> Settings:
    """Raises `UsageError` for what cannot be measured, before the program is loaded."""
    try:
        manifest = load_manifest(folder)
        max_seq_len = int(manifest["export"]["max_seq_len"])
    except ArtifactError as error:
        raise BadArtifactError(str(error)) from error
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadArtifactError(f"{folder / MANIFEST_FILE}: not a manifest: {type(error).__name__}: {error}") from error
    for name in ("prompt_len", "block_length", "repeats"):
        if getattr(config, name) < 1:
            raise UsageError(f"{name} {getattr(config, name)}: must be at least 1")
    if config.new_tokens < 0:
        raise UsageError(f"new_tokens {config.new_tokens}: must be 0, for no generation, or more")
    if not 0 <= config.kv_len <= max_seq_len:
        raise UsageError(f"kv_len {config.kv_len}: must be 0 to {max_seq_len}, the artifact's max_seq_len")
    if any(T < 1 for T in config.lengths):
        raise UsageError(f"lengths {config.lengths}: a call has at least 1 token")
    if config.prompt_len + config.new_tokens > max_seq_len:
        raise UsageError(
            f"prompt_len {config.prompt_len} and new_tokens {config.new_tokens} are more than the artifact's "
            f"max_seq_len, {max_seq_len}"
        )
    values = {name: getattr(config, name) for name in Settings.__dataclass_fields__} | {
        "lengths": tuple(config.lengths)
    }
    if config.packed_cache is not None:
        values["packed_cache"] = str(Path(config.packed_cache).absolute())  # it is measured in another folder
    return Settings(**values)


def _show(console: Console, result: dict[str, Any]) -> None:
    settings, memory = result["settings"], result["memory"]
    threads = f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
    facts = table(f"{result['artifact']}, {threads}", "what", "value")
    facts.add_row("load", f"{_spread(result['load_seconds'])} s")
    for name, key in (("memory, loaded", "loaded"), ("memory, after all", "after")):
        facts.add_row(name, f"{mib(memory[key]['anonymous'])} anonymous, {mib(memory[key]['file'])} of files")
    own = memory["process"]
    facts.add_row("", f"of which Python and torch {mib(own['anonymous'])} and {mib(own['file'])}")
    facts.add_row("peak memory", mib(memory["peak"]))
    console.print(facts)
    calls = table("one call, median (min - max)", "tokens", "kv_len", "rows of logits", "ms", "tokens/s")
    for call in result["calls"]:
        values = (str(call["tokens"]), str(call["kv_len"]), str(call["rows"]), _spread(call["seconds"], 1000))
        calls.add_row(*values, f"{call['tokens_per_second']:,.0f}")
    console.print(calls)
    if not result["generations"]:
        return
    title = f"{settings['new_tokens']} tokens after {settings['prompt_len']}, blocks of {settings['block_length']}"
    listing = table(title, "cache", "seconds", "tokens/s", "faster", "forward calls", "positions", "same tokens")
    uncached = result["generations"][0]["tokens_per_second"]["median"]
    for run in result["generations"]:
        listing.add_row(
            run["mode"],
            _spread(run["seconds"]),
            f"{run['tokens_per_second']['median']:.1f}",
            f"{run['tokens_per_second']['median'] / uncached:.2f}x",
            str(run["forward_calls"]),
            str(run["positions"]),
            f"{100 * run['same_tokens']:.0f} %",
        )
    console.print(listing)


def _spread(values: dict[str, float], scale: float = 1.0) -> str:
    median, low, high = (scale * values[name] for name in ("median", "min", "max"))
    return f"{median:.2f} ({low:.2f} - {high:.2f})"
