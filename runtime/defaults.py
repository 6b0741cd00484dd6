"""How a checkpoint asks to be written with: its own `generation_config.json`, where nobody says otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime.errors import InputError
from runtime.options import IN_PLACE, OptionError, Options, check_whole
from runtime.tokenizer_files import read_object

GENERATION_CONFIG = "generation_config.json"
# As Dream's own generation config names them, and what `generate` does where neither says. `cache` is ours: a run with
# a D2F adapter writes it.
OWN: dict[str, Any] = {
    "steps": None,
    "alg": "entropy",
    "temperature": 0.0,
    "top_p": None,
    "top_k": None,
    "alg_temp": None,
    "eps": 1e-3,
    "cache": None,
}


def own_defaults(folder: Path) -> dict[str, Any]:
    """Options of `runtime.generate` that the checkpoint sets; empty without the file. Raises `InputError`.

    `alg: origin` is not among them: it is what Dream's class holds where nobody chose, and writes in random order.
    """
    file = folder / GENERATION_CONFIG
    content = read_object(file)
    found = {name: content[name] for name in OWN if content.get(name) is not None}
    try:
        check_whole(steps=found.get("steps"))
        if found.get("steps", 1) < 1:
            raise OptionError(f"steps {found['steps']}: must be at least 1")
        chosen = OWN | found
        del chosen["steps"]
        Options(**chosen, block_length=None, threshold=None, stop_at_eos=True).check()
    except OptionError as error:
        raise InputError(f"{file}: {error}") from error
    if found.get("alg") == "origin":
        del found["alg"]
    return found


def with_defaults(given: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """given: options of `runtime.generate`, None where nobody said; of the cache, "none" where somebody wants none.

    own: `own_defaults`.
    """
    given = dict.fromkeys(OWN) | given
    chosen = {name: (OWN | own).get(name) if value is None else value for name, value in given.items()}
    # A rule says how many tokens a step writes, which the checkpoint's number of steps would limit.
    by_rule = any(given.get(name) is not None for name in ("threshold", *IN_PLACE))
    if by_rule or chosen["cache"] == "d2f":
        chosen["steps"] = given["steps"]
    return chosen | ({"cache": None} if chosen["cache"] == "none" else {})
