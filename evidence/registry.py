"""A registry of artifacts: a folder, or a bucket that fsspec reaches, with one layout for both.

blobs/SHA256 are the files of all artifacts, each once. entries/ID.json says which of them an artifact is made of. An ID
is the sha256 of what `sha256sum *` says of the artifact's files. An entry is written last and once: what it names is
there, and what no entry names is in no artifact. Writers know nothing of each other, and need not.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from evidence.integrity import check_packaged, files_of_artifact
from runtime.artifact import MANIFEST_FILE, MAX_JSON, PROVENANCE_FILE, out_of_bounds, sha256
from runtime.errors import BadArtifactError, OutputError, PipelineError, UsageError, ValidationError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

ENTRIES, BLOBS, PARTIAL = "entries", "blobs", ".partial"
DIGEST = re.compile("[0-9a-f]{64}")
AT_ONCE = {"s3", "s3a", "gs", "gcs", "abfs", "az", "memory"}  # their objects are seen when they are whole
CHUNK = 2**20  # bytes that are read at once
SHORTEST = 6  # digits of an ID that stand for it


@dataclass(frozen=True)
class Entry:
    """files: (sha256, bytes) by name. published: in UTC, when it was first."""

    id: str
    name: str
    published: str
    files: dict[str, tuple[str, int]]


@dataclass(frozen=True)
class Registry:
    """url: as it was given, for people."""

    fs: AbstractFileSystem
    root: str
    url: str

    def path(self, *parts: str) -> str:
        return "/".join((self.root.rstrip("/"), *parts))


def open_registry(url: str) -> Registry:
    """Nothing is read yet. Raises `UsageError` for a URL of no file system that is installed."""
    from fsspec.core import url_to_fs

    try:
        fs, root = url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
    except ImportError as error:
        raise UsageError(
            f"registry {url}: {error}; for s3:// that is the extra: pip install 'dreamedge[s3]'"
        ) from error
    except ValueError as error:
        raise UsageError(f"registry {url}: {error}") from error
    return Registry(fs, str(root), url)


def publish(registry: Registry, folder: Path) -> tuple[str, bool]:
    """(the ID, whether it is new there). Blobs first, the entry last: killed at any time, it is there whole or not.

    Raises `BadArtifactError` for an artifact that is not whole, `ValidationError` for one out of bounds, `OutputError`.
    """
    manifest = check_packaged(folder)
    if wrong := out_of_bounds(manifest):
        raise ValidationError(f"{folder} is not published: out of bounds when it was made: {', '.join(wrong)}")
    names = sorted(name for name in files_of_artifact(manifest) if (folder / name).is_file())
    files = {name: (sha256(folder / name), (folder / name).stat().st_size) for name in names}
    id_ = id_of(files)
    with _writing(registry):
        for name, (digest, n_bytes) in files.items():
            _put_blob(registry, folder / name, digest, n_bytes)
        if _is_entry(registry, f"{id_}.json"):
            return id_, False
        entry = {
            "id": id_,
            "name": folder.resolve().name,
            "published": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "files": {name: {"sha256": digest, "bytes": n_bytes} for name, (digest, n_bytes) in files.items()},
        }
        _put(registry, (json.dumps(entry, indent=2) + "\n").encode(), ENTRIES, f"{id_}.json")
    return id_, True


def id_of(files: dict[str, tuple[str, int]]) -> str:
    lines = (f"{digest}  {name}\n" for name, (digest, _) in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def entries_of(registry: Registry) -> tuple[list[Entry], list[str]]:
    """(the entries, the oldest first; what is wrong with others). Raises `BadArtifactError` where no registry is."""
    entries, wrong = [], []
    with _reading(registry):
        if not registry.fs.isdir(registry.path(ENTRIES)):
            raise BadArtifactError(f"registry {registry.url}: no registry is there, or an empty one: no {ENTRIES}/")
        for name in _names(registry, ENTRIES):
            if name.endswith(PARTIAL):
                continue
            try:
                entries.append(_read_entry(registry, name))
            except BadArtifactError as error:
                wrong.append(str(error))
    return sorted(entries, key=lambda entry: (entry.published, entry.id)), wrong


def find(registry: Registry, wanted: str) -> Entry:
    """By an ID, the beginning of one, or a name: of several of that name the newest. Raises `UsageError` for none."""
    entries, _ = entries_of(registry)
    by_id = [entry for entry in entries if len(wanted) >= SHORTEST and entry.id.startswith(wanted)]
    found = by_id or [entry for entry in entries if entry.name == wanted]
    if len(by_id) > 1:
        raise UsageError(f"registry {registry.url}: {len(by_id)} IDs begin with {wanted}: give more of it")
    if not found:
        names = ", ".join(sorted({entry.name for entry in entries})) or "nothing"
        raise UsageError(f"registry {registry.url}: no artifact {wanted!r}; there is {names}")
    return found[-1]


def copy_out(registry: Registry, entry: Entry, folder: Path) -> None:
    """Its files into an empty folder, each compared with its sha256. Raises `BadArtifactError`, `OSError`."""
    for name, (digest, n_bytes) in entry.files.items():
        with (folder / name).open("wb") as file:
            for chunk in _blob(registry, digest, n_bytes):
                file.write(chunk)
    check_packaged(folder)


@dataclass(frozen=True)
class Verified:
    """wrong: what is damaged, missing, or of no registry. left: files of no entry, of a writer that is at work or was
    killed."""

    entries: list[Entry]
    wrong: list[str]
    left: list[str]


def verify_all(registry: Registry) -> Verified:
    """Every file is read once. Raises `BadArtifactError` where there is no registry."""
    entries, wrong = entries_of(registry)
    left = []
    with _reading(registry):
        sizes = {digest: n for entry in entries for digest, n in entry.files.values()}
        names = _names(registry, BLOBS)
        for digest in sorted({*sizes, *(name for name in names if DIGEST.fullmatch(name))}):
            if digest not in names:
                users = ", ".join(sorted({e.name for e in entries if digest in {d for d, _ in e.files.values()}}))
                wrong.append(f"{BLOBS}/{digest}: missing; {users} cannot be fetched")
                continue
            try:
                for _ in _blob(registry, digest, sizes.get(digest)):
                    pass
            except BadArtifactError as error:
                wrong.append(str(error))
            if digest not in sizes:
                left.append(f"{BLOBS}/{digest}")
        for folder in ("", BLOBS, ENTRIES):
            for name in _names(registry, folder):
                path = f"{folder}/{name}".lstrip("/")
                if name.endswith(PARTIAL):
                    left.append(path)
                elif not (DIGEST.fullmatch(name) if folder == BLOBS else folder == ENTRIES or name in (ENTRIES, BLOBS)):
                    wrong.append(f"{path}: no file of a registry: it was added")
    return Verified(entries, wrong, left)


def blob_bytes(registry: Registry, entry: Entry, name: str) -> bytes:
    """Of a small file. Raises `BadArtifactError`."""
    digest, n_bytes = entry.files[name]
    if n_bytes > MAX_JSON:
        raise BadArtifactError(f"{BLOBS}/{digest}: {name} of {entry.name}: larger than {MAX_JSON} bytes")
    with _reading(registry):
        return b"".join(_blob(registry, digest, n_bytes))


def _read_entry(registry: Registry, name: str) -> Entry:
    """Raises `BadArtifactError` for what is no entry, or has another content than its name says."""
    path = registry.path(ENTRIES, name)
    if not registry.fs.isfile(path):
        raise BadArtifactError(f"{ENTRIES}/{name}: not a file")
    with registry.fs.open(path, "rb") as file:
        content = file.read(MAX_JSON + 1)
    try:
        if len(content) > MAX_JSON:
            raise ValueError(f"larger than {MAX_JSON} bytes")
        said = json.loads(content)
        files = {str(name): (str(one["sha256"]), int(one["bytes"])) for name, one in said["files"].items()}
        if {MANIFEST_FILE, PROVENANCE_FILE} - files.keys():
            raise ValueError(f"names no {MANIFEST_FILE} or no {PROVENANCE_FILE}")
        for file_name, (digest, n_bytes) in files.items():
            is_name = Path(file_name).name == file_name and file_name not in ("", "..") and "\0" not in file_name
            if not is_name or not DIGEST.fullmatch(digest) or n_bytes < 0:
                raise ValueError(f"{file_name!r:.60} with {digest!r:.80} is no file of an artifact")
        if name != f"{id_of(files)}.json":
            raise ValueError("its files have another ID: it was changed")
        return Entry(id_of(files), str(said["name"]), str(said["published"]), files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ArithmeticError) as error:
        raise BadArtifactError(f"{ENTRIES}/{name}: not an entry: {type(error).__name__}: {error}") from error


def _blob(registry: Registry, digest: str, n_bytes: int | None) -> Iterator[bytes]:
    """In chunks; never more than it should have. Raises `BadArtifactError` after the last one if it is another."""
    hashed, left = hashlib.sha256(), n_bytes
    path = registry.path(BLOBS, digest)
    with _reading(registry):
        if not registry.fs.isfile(path):
            raise BadArtifactError(f"{BLOBS}/{digest}: missing, or not a file")
        with registry.fs.open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                hashed.update(chunk)
                if left is not None and (left := left - len(chunk)) < 0:
                    raise BadArtifactError(f"{BLOBS}/{digest}: more than {n_bytes} bytes: it was changed")
                yield chunk
    if hashed.hexdigest() != digest:
        raise BadArtifactError(f"{BLOBS}/{digest}: its sha256 is another: it was changed")


def _is_entry(registry: Registry, name: str) -> bool:
    try:
        return registry.fs.exists(registry.path(ENTRIES, name)) and bool(_read_entry(registry, name))
    except BadArtifactError:
        return False


def _put_blob(registry: Registry, file: Path, digest: str, n_bytes: int) -> None:
    """Not again where it is and whole, which is read for it; else in place of what is there."""
    try:
        for _ in _blob(registry, digest, n_bytes):
            pass
    except BadArtifactError:
        _put(registry, file, BLOBS, digest)


def _put(registry: Registry, content: Path | bytes, *parts: str) -> None:
    """Whole or not at all: where a file grows as it is written, it gets its name at last."""
    fs, path = registry.fs, registry.path(*parts)
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else {*fs.protocol}
    aside = path
    if not protocols & AT_ONCE:  # those have no folders, and s3fs would make a bucket of a name that is misspelt
        aside = registry.path(*parts[:-1], f".{parts[-1]}.{uuid.uuid4().hex}{PARTIAL}")
        fs.makedirs(registry.path(*parts[:-1]), exist_ok=True)
    try:
        if isinstance(content, bytes):
            fs.pipe_file(aside, content)
        else:
            fs.put_file(str(content), aside)
        if aside != path:
            fs.mv(aside, path)
    except BaseException:
        if aside != path and fs.exists(aside):
            fs.rm_file(aside)
        raise


def _names(registry: Registry, folder: str) -> list[str]:
    path = registry.path(folder) if folder else registry.root
    if not registry.fs.isdir(path):
        return []
    listed = registry.fs.ls(path, detail=False, refresh=True)
    return sorted(name for name in (str(entry).rstrip("/").rpartition("/")[2] for entry in listed) if name)


@contextmanager
def _writing(registry: Registry) -> Iterator[None]:
    with _of_storage(registry, OutputError, "written"):
        yield


@contextmanager
def _reading(registry: Registry) -> Iterator[None]:
    with _of_storage(registry, BadArtifactError, "read"):
        yield


@contextmanager
def _of_storage(registry: Registry, failed: type[PipelineError], doing: str) -> Iterator[None]:
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:  # each storage has errors of its own, of no common kind
        reason = getattr(error, "strerror", None) or error
        raise failed(f"registry {registry.url} cannot be {doing}: {type(error).__name__}: {reason}") from error
