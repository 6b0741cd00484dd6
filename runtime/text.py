"""An artifact that takes text: its program and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from runtime.artifact import MANIFEST_FILE, ArtifactError, load_manifest
from runtime.defaults import own_defaults, with_defaults
from runtime.errors import BadArtifactError, InputError, UsageError
from runtime.generation import Generation, OnStep, generate
from runtime.infill import Infilled, infill
from runtime.options import OptionError
from runtime.program import Program, ProgramError
from runtime.threads import use_threads
from runtime.tokenizer import TOKENIZER_FILE, decode, encode, load_tokenizer, special_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EXPAND = "<|expand|>"  # the token that makes a checkpoint one of DreamOn's


@dataclass(frozen=True)
class TextArtifact:
    folder: Path
    manifest: dict[str, Any]
    program: Program
    tokenizer: Tokenizer
    new_tokens: int  # what the task of its validation takes
    own: dict[str, Any]  # options that the checkpoint sets: `runtime.defaults`


def open_text_artifact(folder: Path, packed_cache: str | None = None, threads: int | None = None) -> TextArtifact:
    """packed_cache: as for `Program.open`. threads: as for `use_threads`.

    Raises `BadArtifactError`; `UsageError` for one without a tokenizer.
    """
    try:
        manifest = load_manifest(folder)
        tokenizer = load_tokenizer(folder)
        if tokenizer is None:
            raise UsageError(f"{folder} has no {TOKENIZER_FILE}: its checkpoint had no tokenizer, so it takes no text")
        use_threads(threads)
        program, new_tokens = Program.open(folder, packed_cache), int(manifest["task"]["new_tokens"])
        if not 1 <= new_tokens <= program.max_seq_len:
            raise ValueError(f"task.new_tokens is {new_tokens}")
        largest = max(tokenizer.get_vocab().values(), default=0)
        if largest >= program.vocab_size:
            raise BadArtifactError(
                f"{folder}: its tokenizer has id {largest}, its program knows 0..{program.vocab_size - 1}"
            )
        return TextArtifact(folder, manifest, program, tokenizer, new_tokens, own_defaults(folder))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadArtifactError(f"{folder / MANIFEST_FILE}: not a manifest: {type(error).__name__}: {error}") from error
    except (ArtifactError, ProgramError, InputError, FileNotFoundError) as error:
        raise BadArtifactError(str(error)) from error
    except OSError as error:
        raise BadArtifactError(f"{error.filename}: cannot be read: {error.strerror or error}") from error


def cut_at(text: str, stop: Sequence[str]) -> str:
    """What is before the first of these texts."""
    return text[: min((at for at in map(text.find, filter(None, stop)) if at >= 0), default=len(text))]


def _stopped_at(artifact: TextArtifact, answer_T: Tensor, stop: Sequence[str]) -> int | None:
    """How many tokens of an answer are written without a gap, if there is one of these texts in them."""
    masks = (answer_T == artifact.program.mask_id).nonzero()[:, 0]
    n = int(masks[0]) if len(masks) else len(answer_T)
    text = decode(artifact.tokenizer, answer_T[:n].tolist()) if stop else ""
    return n if cut_at(text, stop) != text else None


def write(
    artifact: TextArtifact,
    ids: list[int],
    max_new_tokens: int,
    options: dict[str, Any],
    on_step: OnStep | None = None,
    stop: Sequence[str] = (),
) -> Generation:
    """`runtime.generate` with these options, None where the checkpoint's own count, before ours.

    stop: texts; writing ends where all before one, and it, is written.

    Raises `UsageError`, and `BadArtifactError` for a program that fails.
    """

    def after_step(step: int, tokens_BL: Tensor) -> Tensor | None:
        changed_BL = None
        if (end := _stopped_at(artifact, tokens_BL[0, len(ids) :], stop)) is not None:
            changed_BL = tokens_BL.clone()
            changed_BL[0, len(ids) + end :] = (artifact.program.eos_ids or (artifact.program.pad_id,))[0]
        if on_step is not None:
            on_step(step, tokens_BL if changed_BL is None else changed_BL)
        return changed_BL

    hook = after_step if stop else on_step
    options = with_defaults(options, artifact.own)
    options |= {"stop_at_eos": True} if stop else {}  # so that nothing is computed behind it
    with _told(artifact):
        return generate(artifact.program, ids, max_new_tokens=max_new_tokens, on_step=hook, **options)


def fill_in(
    artifact: TextArtifact,
    prefix: str,
    suffix: str,
    options: dict[str, Any],
    on_step: Callable[[int, Tensor, slice], None] | None = None,
) -> Infilled:
    """`runtime.infill` with these options. on_step: as there, and where in the canvas the middle is.

    Raises `UsageError`, also for a checkpoint that is none of DreamOn's; `BadArtifactError` for a program that fails.
    """
    program, tokenizer = artifact.program, artifact.tokenizer
    expand_id = tokenizer.token_to_id(EXPAND)
    if expand_id is None:
        raise UsageError(
            f"{artifact.folder}: its tokenizer has no {EXPAND}: the checkpoint is none of DreamOn's, "
            "and fills no gap of unknown length"
        )
    bos_id = tokenizer.token_to_id(special_tokens(artifact.folder).get("bos_token", ""))
    prefix_ids, suffix_ids = encode(tokenizer, prefix), encode(tokenizer, suffix)

    def after_step(step: int, canvas_L: Tensor) -> None:
        if on_step is not None:
            on_step(step, canvas_L, slice(1 + len(prefix_ids), len(canvas_L) - len(suffix_ids) - 1))

    with _told(artifact):
        return infill(
            program,
            prefix_ids,
            suffix_ids,
            bos_id=program.metadata.get_bos_id if bos_id is None else bos_id,
            expand_id=expand_id,
            delete_id=(program.eos_ids or (program.pad_id,))[0],
            on_step=after_step,
            **options,
        )


@contextmanager
def _told(artifact: TextArtifact) -> Iterator[None]:
    """What cannot be written, as an error of the pipeline."""
    try:
        yield
    except OptionError as error:
        raise UsageError(str(error)) from error
    except (ProgramError, FloatingPointError) as error:
        raise BadArtifactError(f"{artifact.folder}: {error}") from error
