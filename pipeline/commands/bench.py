"""`bench`: measure an artifact, in a process that holds nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from pipeline.console import warn_out_of_bounds
from pipeline.schema import BenchConfig
from report.files import check_output, write_json
from report.terminal import mib, show, table
from runtime.artifact import MANIFEST_FILE, MODEL_FILE, ArtifactError, load_manifest
from runtime.errors import BadArtifactError, UsageError
from runtime.processor import machine
from validation.speed import Settings, run_bench

LENGTHS, PROMPT_LEN, NEW_TOKENS = (1, 8, 32, 128), 128, 256  # where none are given


def bench(config: BenchConfig, console: Console, err: Console) -> None:
    """Shows tables, and writes the JSON if asked for. Raises `PipelineError`."""
    folder = Path(config.artifact)
    manifest = _manifest(folder)
    max_seq_len = manifest["export"]["max_seq_len"]
    settings = _settings(config, max_seq_len)
    if config.output is not None:
        check_output(Path(config.output))
    warn_out_of_bounds(err, folder, manifest)
    if cut := _cut(config, settings):
        err.print(f"note: what fits into the artifact's max_seq_len, {max_seq_len}, is measured: {cut}", markup=False)
    with err.status("starting", spinner="dots") as status:
        result = run_bench(folder / MODEL_FILE, settings, status.update)
    result["artifact"] = folder.resolve().name
    result["machine"] = machine()
    _show(console, result)
    if config.output is not None:
        write_json(Path(config.output), result)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = load_manifest(folder)
        manifest["export"]["max_seq_len"] = int(manifest["export"]["max_seq_len"])
        return manifest
    except ArtifactError as error:
        raise BadArtifactError(str(error)) from error
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadArtifactError(f"{folder / MANIFEST_FILE}: not a manifest: {type(error).__name__}: {error}") from error


def _settings(config: BenchConfig, S: int) -> Settings:
    """S: the artifact's max_seq_len, which cuts what the user has not given.

    Raises `UsageError` for what cannot be measured, before the program is loaded.
    """
    lengths = [T for T in LENGTHS if T <= S] if config.lengths is None else config.lengths
    prompt_len, new_tokens = _fitting(config.prompt_len, config.new_tokens, S)
    for name, value in (("prompt_len", prompt_len), ("block_length", config.block_length), ("repeats", config.repeats)):
        if value < 1:
            raise UsageError(f"{name} {value}: must be at least 1")
    if new_tokens < 0:
        raise UsageError(f"new_tokens {new_tokens}: must be 0, for no generation, or more")
    if not 0 <= config.kv_len <= S:
        raise UsageError(f"kv_len {config.kv_len}: must be 0 to {S}, the artifact's max_seq_len")
    if not all(1 <= T <= S for T in lengths):
        raise UsageError(f"lengths {lengths}: a call has at least 1 token, and at most {S}, the artifact's max_seq_len")
    if prompt_len + new_tokens > S:
        raise UsageError(
            f"prompt_len {prompt_len} and new_tokens {new_tokens} are more than the artifact's max_seq_len, {S}"
        )
    values = {name: getattr(config, name) for name in Settings.__dataclass_fields__}
    values |= {"lengths": tuple(lengths), "prompt_len": prompt_len, "new_tokens": new_tokens}
    if config.packed_cache is not None:
        values["packed_cache"] = str(Path(config.packed_cache).absolute())  # it is measured in another folder
    return Settings(**values)


def _fitting(prompt_len: int | None, new_tokens: int | None, S: int) -> tuple[int, int]:
    """What is given as it is; the rest as it is by default, or as much of it as leaves room for the other."""
    if prompt_len is None:
        room = S // 2 if new_tokens is None else S - new_tokens
        prompt_len = max(1, min(PROMPT_LEN, room))
    if new_tokens is None:
        new_tokens = max(0, min(NEW_TOKENS, S - prompt_len))
    return prompt_len, new_tokens


def _cut(config: BenchConfig, settings: Settings) -> str:
    """What is less than its default, though it was not given."""
    defaults = {"prompt_len": PROMPT_LEN, "new_tokens": NEW_TOKENS, "lengths": LENGTHS}
    used = {name: getattr(settings, name) for name in defaults if getattr(config, name) is None}
    return ", ".join(f"{name} {value}" for name, value in used.items() if value != defaults[name])


def _show(console: Console, result: dict[str, Any]) -> None:
    settings, memory = result["settings"], result["memory"]
    threads = f"{result['threads']} thread{'s' * (result['threads'] > 1)}"
    facts = table(escape(f"{result['artifact']}, {threads}"), "what", "value")
    facts.add_row("load", f"{_spread(result['load_seconds'])} s")
    for name, key in (("memory, loaded", "loaded"), ("memory, after all", "after")):
        facts.add_row(name, f"{mib(memory[key]['anonymous'])} anonymous, {mib(memory[key]['file'])} of files")
    own = memory["process"]
    facts.add_row("", f"of which Python and torch {mib(own['anonymous'])} and {mib(own['file'])}")
    facts.add_row("peak memory", mib(memory["peak"]))
    show(console, facts)
    calls = table("one call, median (min - max)", "tokens", "kv_len", "rows of logits", "ms", "tokens/s")
    for call in result["calls"]:
        values = (str(call["tokens"]), str(call["kv_len"]), str(call["rows"]), _spread(call["seconds"], 1000))
        calls.add_row(*values, f"{call['tokens_per_second']:,.0f}")
    show(console, calls)
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
    show(console, listing)


def _spread(values: dict[str, float], scale: float = 1.0) -> str:
    median, low, high = (scale * values[name] for name in ("median", "min", "max"))
    return f"{median:.2f} ({low:.2f} - {high:.2f})"
