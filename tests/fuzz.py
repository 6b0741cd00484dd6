"""Damaged and hostile input: how a file is damaged, and what may come of it.

Shared by `tests/test_fuzz.py`, which is short, and `scripts/fuzz.py`, which is long. Inputs are judged in another
process, that may take 10 seconds and 2 GiB for each: what becomes of one is one word.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from evidence.integrity import ENVELOPE_FILE
from model import CheckpointError, ConfigError, load_hf_model
from pipeline.commands import COMMANDS
from pipeline.config import CONF, register
from pipeline.outcome import outcome, quiet
from report.page import REPORT_FILE
from runtime.artifact import MANIFEST_FILE, PROVENANCE_FILE, ArtifactError, load_manifest, read_manifest
from runtime.chat import chat_template, render_chat
from runtime.errors import PipelineError
from runtime.limits import LimitError, died_of, limited, restrict
from runtime.program import Program, ProgramError, executorch_runtime
from runtime.tokenizer import decode, encode, load_tokenizer, special_tokens
from tests.checkpoints import BUNDLED, GOLDEN
from tests.resealing import reseal
from validation.format import read_format
from validation.judge import expectations
from validation.reference import ReferenceError, load_reference

SECONDS, MEMORY = 10, 2**31
PATIENCE = 6  # times the seconds that a judge may take in all, where its CPU time decides
# What a damaged manifest or provenance makes of bringing digests in line: it stays out of line then.
NOT_TO_RESEAL = (LookupError, TypeError, ValueError, AttributeError, RecursionError, OSError)
REFUSED, TAKEN = "refused", "taken"
BAD = ("traceback", "hang", "memory", "crash", "false valid")
TEXT = "1003\n0300 <|mask|> aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa! 数独\n"
# What a file can be turned to so that one who trusts it does something else.
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2**31, 2**63, 10**30, 1.5, -0.0, float("inf"), float("nan"), "", "x" * 5000, "\0",
    "\ud800", "../../etc/passwd", "/etc/passwd", "${oc.env:HOME}", "[/bold]", "\x1b[2J", "(a+)+$", [], {}, [[]],
    {"_target_": "os.system"}, "!!python/object/apply:os.system ['true']",
)  # fmt: skip
NUMBERS = (0, 1, 0x7F, 0xFF, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)


@dataclass(frozen=True)
class Target:
    """folder: with whole files. files: those that are damaged.

    judge: takes the damaged folder, and raises one of `refusals`, or returns. detects: none that differs may be taken.
    """

    folder: Path
    files: tuple[str, ...]
    judge: Callable[[Path], object]
    refusals: tuple[type[Exception], ...]
    detects: bool = False
    seconds: int = SECONDS


# ---- How a file is damaged ----


def damage(whole: bytes, name: str, seed: int) -> bytes:
    """Another content for the file, never the same."""
    chance = random.Random(seed)
    ways = [_damaged_bytes]
    if name.endswith(".json"):
        ways += [_damaged_json] * 3
    if name.endswith(".safetensors"):
        ways += [_damaged_header] * 2
    while True:
        made = chance.choice(ways)(whole, chance)
        if made != whole:
            return made


def _damaged_bytes(whole: bytes, chance: random.Random) -> bytes:
    content = bytearray(whole)
    for _ in range(chance.choice((1, 1, 2, 5, 50))):
        # Beginnings say what the rest is: they are hit more often.
        at = chance.randrange(len(content) + 1) if chance.random() < 0.5 else min(len(content), chance.randrange(256))
        end = min(len(content), at + chance.choice((1, 4, 8, 64, 4096)))
        way = chance.randrange(8)
        if way == 0 and at < len(content):
            content[at] ^= 1 << chance.randrange(8)
        elif way == 1:
            content[at:end] = chance.randbytes(end - at)
        elif way == 2:
            size = chance.choice((1, 2, 4, 8))
            content[at : at + size] = (chance.choice(NUMBERS) % 256**size).to_bytes(size, "little")
        elif way == 3:
            del content[at:end]
        elif way == 4:
            content[at:at] = content[at:end] * chance.choice((1, 2, 100))
        elif way == 5:
            content[at:end] = bytes(end - at)
        elif way == 6 and chance.random() < 0.2:
            del content[at:]
        elif way == 7:
            content += chance.randbytes(chance.choice((1, 100, 5000)))
    return bytes(content)


def _damaged_json(whole: bytes, chance: random.Random) -> bytes:
    """One value is another, or gone, or there twice; or the text is nested too deeply."""
    if chance.random() < 0.03:
        return chance.choice((b"[", b'{"a":')) * chance.choice((100, 100_000)) + whole
    content = json.loads(whole)
    for _ in range(chance.choice((1, 1, 3))):
        holder, key = _place(content, chance)
        if holder is None:
            continue
        value = copy.deepcopy(chance.choice(VALUES))
        way = chance.randrange(4)
        if way == 0 and isinstance(holder, dict):
            holder[chance.choice(("../x", "", "_target_", "\0", f"{key}x", "a" * 300))] = value
        elif way == 1:
            del holder[key]
        elif way == 2 and isinstance(holder[key], str):
            holder[key] = chance.choice((holder[key] * 3, holder[key][:-1], "../" + holder[key], holder[key] + "\n"))
        else:
            holder[key] = value
    return json.dumps(content).encode()


def _place(content: Any, chance: random.Random) -> tuple[Any, Any]:
    """A random (list or object, its index or key), each level as likely as the next."""
    found: tuple[Any, Any] = (None, None)
    here = content
    while isinstance(here, dict | list) and here:
        key = chance.choice(list(here)) if isinstance(here, dict) else chance.randrange(len(here))
        found, here = (here, key), here[key]
        if chance.random() < 0.25:
            break
    return found


def _damaged_header(whole: bytes, chance: random.Random) -> bytes:
    """Of safetensors: JSON behind its length, which fits it or not."""
    length = int.from_bytes(whole[:8], "little")
    header, rest = whole[8 : 8 + length], whole[8 + length :]
    if chance.random() < 0.2:
        return chance.choice(NUMBERS).to_bytes(8, "little") + header + rest
    content = json.loads(header)
    notes = content.get("__metadata__", {})
    key = next((key for key, note in notes.items() if note.startswith("{")), None)
    if key is not None and chance.random() < 0.5:
        notes[key] = _damaged_json(notes[key].encode(), chance).decode()
        header = json.dumps(content).encode()
    else:
        header = _damaged_json(header, chance)
    return len(header).to_bytes(8, "little") + header + rest


# ---- What becomes of it ----


class Judge:
    """Another process that says of one damaged file after the other what the target makes of it.

    A process for each input takes many times as long. So one judges many, and what it finds bad is judged again in a
    new one, where the CPU time decides, as the machine may have more to do: that counts.
    """

    def __init__(self, target: Target, scratch: Path) -> None:
        self.again: list[str] = []  # what was bad at first
        self.largest_mib = 0
        self._target, self._scratch = target, scratch
        self._process: Any = None
        self._connection: Any = None
        shutil.copytree(target.folder, scratch)

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        shutil.rmtree(self._scratch)

    def verdict(self, name: str, seed: int) -> str:
        """One of REFUSED, TAKEN and BAD, the last with what was seen."""
        whole = (self._target.folder / name).read_bytes()
        (self._scratch / name).write_bytes(damage(whole, name, seed))
        try:
            word = self.undamaged()
        finally:
            (self._scratch / name).write_bytes(whole)
        return "false valid" if word == TAKEN and self._target.detects else word

    def undamaged(self) -> str:
        """Of the folder as it is now."""
        word = self._ask(self._target.seconds)
        if word.partition(":")[0] in BAD:
            self.again.append(word)
            self._end()
            word = self._ask(PATIENCE * self._target.seconds)
            self._end()
        return word

    def _ask(self, seconds: int) -> str:
        if self._process is None:
            self._start()
        try:
            self._connection.send(True)
            if not self._connection.poll(seconds):
                self._end()
                return f"hang: longer than {seconds} s"
            word, cpu_seconds, largest = self._connection.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            word = f"crash: {died_of(self._process.exitcode or 0)}"
            self._end()
            return word
        self.largest_mib = max(self.largest_mib, largest >> 10)
        return word if cpu_seconds <= self._target.seconds else f"hang: {cpu_seconds:.0f} s of CPU time"

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")  # what is imported here is there
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._target, self._scratch))
        self._process.start()
        theirs.close()

    def _end(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # and what it has started
        self._process.kill()
        self._process.join()
        self._connection.close()
        self._process = None


def _serve(connection: Connection, target: Target, folder: Path) -> None:
    os.setpgid(0, 0)
    faulthandler.disable()
    restrict(MEMORY)
    while connection.recv():
        before = sum(os.times()[:4])
        word = _judged(target, folder)
        largest = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        connection.send((word, sum(os.times()[:4]) - before, largest))


def _judged(target: Target, folder: Path) -> str:
    written = io.StringIO()
    try:
        with contextlib.redirect_stderr(written), contextlib.redirect_stdout(written):
            target.judge(folder)
    except target.refusals:
        return REFUSED
    except MemoryError:
        return f"memory: more than {MEMORY >> 20} MiB"
    except BaseException as error:  # noqa: BLE001 (that is what is looked for)
        return f"traceback: {type(error).__name__}: {error!s:.300}"
    return TAKEN


# ---- Who opens files ----


def targets(artifact: Path, folder: Path) -> dict[str, Target]:
    """artifact: a whole one, with a tokenizer or without. folder: for the checkpoints and tokenizers that are made."""
    # Each judge is a copy of this process: what is imported here is there.
    import pipeline.commands.inspect
    import pipeline.commands.validate  # noqa: F401

    executorch_runtime()
    chatty, signed = folder / "tokenizer", folder / "signed"
    tokenizer_json(BUNDLED, chatty)
    shutil.copytree(artifact, signed)
    key = sign(signed, folder)
    files = tuple(sorted(file.name for file in artifact.iterdir()))
    sealed = tuple(name for name in files if name != PROVENANCE_FILE)  # what only a signature covers
    of_checkpoint = ("config.json", "model.safetensors")
    of_shards = ("config.json", "model.safetensors.index.json", *_shards(GOLDEN / "mqa4-sharded"))
    of_itself = (MANIFEST_FILE, PROVENANCE_FILE, REPORT_FILE)
    of_tokenizer = ("tokenizer.json", "tokenizer_config.json")
    refusals = (ArtifactError, ProgramError, ReferenceError)
    return {
        "checkpoint": Target(GOLDEN / "gqa2", of_checkpoint, load_hf_model, (CheckpointError, ConfigError)),
        "shards": Target(GOLDEN / "mqa4-sharded", of_shards, load_hf_model, (CheckpointError, ConfigError)),
        "tokenizer": Target(chatty, of_tokenizer, use_tokenizer, (PipelineError,)),
        "manifest": Target(artifact, (MANIFEST_FILE,), use_manifest, refusals),
        "reference": Target(artifact, ("reference.safetensors",), use_reference, refusals),
        "format": Target(artifact, ("model.pte",), use_format, refusals),
        "program": Target(artifact, ("model.pte",), use_program, (*refusals, LimitError)),
        "hashes": Target(artifact, sealed, read_manifest, refusals, detects=True),
        "verify": Target(signed, files, command("verify", key=str(key)), (RefusedError,), detects=True),
        "envelope": Target(signed, (ENVELOPE_FILE,), command("verify", key=str(key)), (RefusedError,)),
        "inspect": Target(signed, files, command("inspect"), (RefusedError,), detects=True),
        "inspect resealed": Target(artifact, of_itself, resealed(command("inspect")), (RefusedError,)),
        "validate": Target(artifact, sealed, command("validate"), (RefusedError,), detects=True),
        "validate resealed": Target(
            artifact,
            ("model.pte", "reference.safetensors"),
            resealed(command("validate")),
            (RefusedError,),
            seconds=SECONDS * 12,
        ),
    }


class RefusedError(Exception):
    """The command ended with one line and a documented exit code other than 0 and 1."""


def use_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise FileNotFoundError(folder)
    decode(tokenizer, encode(tokenizer, TEXT)[:64])
    template = chat_template(folder)
    if template is not None:
        render_chat(template, [{"role": "user", "content": TEXT}], special_tokens(folder))


def use_manifest(folder: Path) -> None:
    expectations(folder, load_manifest(folder))


def use_reference(folder: Path) -> None:
    load_reference(folder / "reference.safetensors")


def use_format(folder: Path) -> None:
    read_format(folder / "model.pte")


def use_program(folder: Path) -> None:
    """Loaded and called, in one more process as validation does it: there it may crash."""
    executorch_runtime()
    limited(5, 2**30, _call, folder / "model.pte")


def _call(pte: Path) -> None:
    program = Program.open(pte)
    with contextlib.suppress(ValueError):  # its own metadata allow no such call
        program.forward([0, 1, 2], start_pos=0, kv_len=3)


def command(name: str, **values: str) -> Callable[[Path], None]:
    """The command line's judgement of an artifact, once Hydra has read it: that takes longer than most judgements."""
    config = config_of(name, "artifact=", *(f"{key}=" for key in values))

    def run(folder: Path) -> None:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), quiet():
            code, _ = outcome(lambda: COMMANDS[name](replace(config, artifact=str(folder), **values)))
        error = said.getvalue()
        if code == 0:
            return
        if code == 1 or error.count("\n") != 1 or not error.startswith("error: "):
            raise AssertionError(f"exit code {code}: {error}")
        raise RefusedError

    return run


def config_of(command: str, *arguments: str) -> Any:
    """The command's dataclass, as the command line makes it."""
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_object(compose(command, list(arguments)))


def resealed(judge: Callable[[Path], None]) -> Callable[[Path], None]:
    """With a manifest and a provenance that agree with the damaged files: only what is in them can give them away."""

    def run(folder: Path) -> None:
        whole = {name: (folder / name).read_bytes() for name in (MANIFEST_FILE, PROVENANCE_FILE)}
        with contextlib.suppress(*NOT_TO_RESEAL):
            reseal(folder)
        try:
            judge(folder)
        finally:
            for name, content in whole.items():
                (folder / name).write_bytes(content)

    return run


def sign(artifact: Path, folder: Path) -> Path:
    """By a key that is made for it, whose public part is in the file of `folder` that is returned."""
    key = Ed25519PrivateKey.generate()
    private, public = folder / "key.pem", folder / "key.pub.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with contextlib.redirect_stdout(io.StringIO()):
        command("sign", key=str(private))(artifact)
    return public


def tokenizer_json(source: Path, folder: Path) -> None:
    """A tokenizer with all that can go wrong: a pattern, a chat template, special tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads((source / "tokenizer.json").read_text())
    pattern = {"Regex": r"\p{N}|[^\p{N}]+"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    before = [split, *filter(None, [content["pre_tokenizer"]])]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": before}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _shards(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(file.name for file in folder.glob("*.safetensors") if not file.name.startswith("cases")))
