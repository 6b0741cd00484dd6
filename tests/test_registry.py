"""A registry: what is published is there whole or not at all, and every change of it is found."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from evidence import registry as registries
from evidence.registry import entries_of, open_registry, publish, verify_all
from runtime.errors import BadArtifactError, OutputError
from tests.checkpoints import ROOT, Build

Pipeline = Callable[..., tuple[int, str, str]]


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Of an empty registry, on a file system and where objects are seen at once."""
    if request.param == "local":
        yield str(tmp_path / "registry")
        return
    yield "memory://registry"
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


def tree(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_out_of_it_comes_what_went_in(
    pipeline: Pipeline, artifact: Path, build: Build, url: str, tmp_path: Path
) -> None:
    other = build("mha-tied", "fp32_xnnpack")
    code, out, err = pipeline("publish", str(artifact), str(other), f"registry={url}")
    assert (code, err, out.count("published ")) == (0, "", 2)
    (id_, name) = (out.split()[3], other.name)
    assert pipeline("publish", str(artifact), f"registry={url}")[1] == f"{artifact} was there already: {id_}\n"
    words = "cd $1; LC_ALL=C sha256sum * | sha256sum"
    counted = subprocess.run(["bash", "-c", words, "bash", str(artifact)], capture_output=True, text=True, check=True)
    assert counted.stdout.split()[0] == id_
    for wanted, source in ((id_, artifact), (id_[:8], artifact), (name, other)):
        output = tmp_path / f"fetched-{wanted}"
        assert pipeline("fetch", wanted, f"registry={url}", f"output={output}")[0] == 0
        assert tree(output) == tree(source)
    code, out, _ = pipeline("fetch", f"registry={url}")
    assert code == 0
    assert [line.split()[1] for line in out.splitlines() if artifact.name in line.split()] == [id_[:12]]
    code, out, err = pipeline("verify", f"registry={url}")
    assert (code, err) == (0, "")
    assert "2 artifacts as they were published" in out
    assert len(verify_all(open_registry(url)).entries) == 2


def test_of_a_name_the_newest_is_taken(pipeline: Pipeline, artifact: Path, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    pipeline("publish", str(artifact), f"registry={registry}")
    (old,) = (registry / "entries").iterdir()
    old.write_text(json.dumps(json.loads(old.read_text()) | {"published": "2001-01-01T00:00:00Z"}))
    (artifact / "provenance.json").write_text((artifact / "provenance.json").read_text() + "\n")
    code, out, _ = pipeline("publish", str(artifact), f"registry={registry}")
    newest = out.split()[3]
    assert code == 0
    code, out, _ = pipeline("fetch", artifact.name, f"registry={registry}", f"output={tmp_path / 'out'}")
    assert (code, out.split(":")[0]) == (0, newest)
    assert len(list((registry / "entries").iterdir())) == 2


@pytest.fixture
def published(artifact: Path, tmp_path: Path) -> Path:
    registry = tmp_path / "registry"
    publish(open_registry(str(registry)), artifact)
    return registry


def blob_of(published: Path, name: str) -> Path:
    (entry,) = (published / "entries").iterdir()
    return published / "blobs" / str(json.loads(entry.read_text())["files"][name]["sha256"])


def test_each_change_is_found(pipeline: Pipeline, published: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(published, whole)

    def changed(change: Callable[[], object], words: str, fetch_fails: bool = True) -> None:
        change()
        code, out, err = pipeline("verify", f"registry={published}")
        assert (code, err.count("\n")) == (6, 1), err
        assert words in out
        assert words in err
        code, _, err = pipeline("fetch", "artifact", f"registry={published}", f"output={tmp_path / 'out'}")
        assert (code in (2, 6)) == fetch_fails, err
        assert err.count("\n") == fetch_fails
        assert (tmp_path / "out").exists() != fetch_fails
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(published)
        shutil.copytree(whole, published)

    pte = blob_of(published, "model.pte")
    (entry,) = (published / "entries").iterdir()
    said = json.loads(entry.read_text())

    def with_files(**files: object) -> Callable[[], object]:
        return lambda: entry.write_text(json.dumps(said | {"files": said["files"] | files}))

    def as_a_folder() -> None:
        pte.unlink()
        pte.mkdir()

    changed(lambda: pte.write_bytes(pte.read_bytes()[:-1]), f"{pte.name}: its sha256 is another")
    changed(lambda: pte.write_bytes(pte.read_bytes() + b"x"), f"{pte.name}: more than")
    changed(pte.unlink, f"{pte.name}: missing")
    changed(as_a_folder, f"{pte.name}: missing, or not a file")
    changed(lambda: entry.write_text("{"), "not an entry")
    changed(lambda: entry.write_text("[" * 10**5), "not an entry")
    changed(with_files(**{"../x": said["files"]["model.pte"]}), "is no file of an artifact")
    changed(with_files(**{"x": {"sha256": "../../etc/passwd", "bytes": 1}}), "is no file of an artifact")
    changed(with_files(**{"x": said["files"]["model.pte"]}), "have another ID")
    changed(lambda: (published / "blobs" / "x").write_text(""), "blobs/x: no file of a registry", fetch_fails=False)
    changed(lambda: (published / "x").write_text(""), "x: no file of a registry", fetch_fails=False)
    assert pipeline("verify", f"registry={published}")[0] == 0


def test_publishing_again_mends(pipeline: Pipeline, published: Path, artifact: Path, tmp_path: Path) -> None:
    """A byte of a file, a file that is gone, an entry that is none."""
    model = blob_of(published, "model.pte")
    content = bytearray(model.read_bytes())
    content[100] ^= 1
    model.write_bytes(content)
    blob_of(published, "manifest.json").unlink()
    (entry,) = (published / "entries").iterdir()
    entry.write_text("")
    assert pipeline("verify", f"registry={published}")[0] == 6
    assert pipeline("publish", str(artifact), f"registry={published}")[0] == 0
    assert pipeline("verify", f"registry={published}")[0] == 0
    assert pipeline("fetch", entry.stem, f"registry={published}", f"output={tmp_path / 'back'}")[0] == 0


def test_what_a_killed_signer_left_is_no_file_of_it(pipeline: Pipeline, artifact: Path, tmp_path: Path) -> None:
    (artifact / ".provenance.dsse.json.123.partial").write_text("half")
    assert pipeline("verify", f"artifact={artifact}")[0] == 0
    assert pipeline("publish", str(artifact), f"registry={tmp_path / 'r'}")[0] == 0
    (entry,) = (tmp_path / "r" / "entries").iterdir()
    assert ".partial" not in entry.read_text()
    assert pipeline("fetch", entry.stem, f"registry={tmp_path / 'r'}", f"output={tmp_path / 'back'}")[0] == 0


@pytest.mark.parametrize("n_bytes", ["1e999", '"x"', "-1"])
def test_sizes_of_an_entry_are_numbers(pipeline: Pipeline, published: Path, n_bytes: str) -> None:
    (entry,) = (published / "entries").iterdir()
    entry.write_text(re.sub(r'"bytes": \d+', f'"bytes": {n_bytes}', entry.read_text(), count=1))
    code, _, err = pipeline("verify", f"registry={published}")
    assert code == 6
    assert entry.name in err


def test_an_entry_may_not_lead_out(pipeline: Pipeline, published: Path, tmp_path: Path) -> None:
    """Its name is anybody's: it is no place to write to."""
    (entry,) = (published / "entries").iterdir()
    entry.write_text(json.dumps(json.loads(entry.read_text()) | {"name": "../../x\x1b[2J"}))
    code, out, _ = pipeline("fetch", f"registry={published}")
    assert (code, "\x1b" in out) == (0, False)
    code, _, err = pipeline("fetch", entry.stem, f"registry={published}")
    assert (code, "give output=DIR" in err) == (2, True)


def test_what_is_not_whole_is_not_published(pipeline: Pipeline, artifact: Path, tmp_path: Path) -> None:
    (artifact / "model.pte").write_bytes(b"")
    code, _, err = pipeline("publish", str(artifact), f"registry={tmp_path / 'registry'}")
    assert (code, "model.pte" in err) == (6, True)
    assert not (tmp_path / "registry").exists()


def test_where_no_registry_is(pipeline: Pipeline, tmp_path: Path) -> None:
    for command in (["verify"], ["fetch"], ["fetch", "x"]):
        code, _, err = pipeline(*command, f"registry={tmp_path / 'nowhere'}")
        assert (code, "no registry is there" in err) == (6, True)
    (tmp_path / "file").write_text("")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_full_disk_is_a_line(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    registry = open_registry(str(tmp_path / "registry"))
    monkeypatch.setattr(type(registry.fs), "put_file", full)
    with pytest.raises(OutputError, match="cannot be written: OSError: No space left on device"):
        publish(registry, artifact)
    assert [file for file in (tmp_path / "registry").rglob("*") if file.is_file()] == []


def test_killed_at_any_write_nothing_counts_that_is_not_whole(artifact: Path, tmp_path: Path) -> None:
    """A real `kill -9`, before and after each write and each rename; then the same is published, and is whole."""
    code = """
import os, signal, sys
from pathlib import Path
from evidence.registry import open_registry, publish
from fsspec.implementations.local import LocalFileSystem as Local
left = int(sys.argv[3])
def counted(name):
    real = getattr(Local, name)
    def call(self, *words, **more):
        global left
        left -= 1
        if left == 0:
            if name == "put_file":  # half of it is written
                Path(words[1]).write_bytes(Path(words[0]).read_bytes()[:100])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *words, **more)
    setattr(Local, name, call)
for name in ("put_file", "pipe_file", "mv"):
    counted(name)
print(publish(open_registry(sys.argv[2]), Path(sys.argv[1]))[0])
"""
    n_files = len(list(artifact.iterdir()))
    writes = 2 * (n_files + 1)
    for nth in (1, 2, 3, writes - 2, writes - 1, writes):
        folder = tmp_path / f"registry-{nth}"
        words = [sys.executable, "-c", code, str(artifact), str(folder), str(nth)]
        killed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        registry = open_registry(str(folder))
        (folder / "entries").mkdir(exist_ok=True)
        assert entries_of(registry) == ([], [])
        found = verify_all(registry)
        assert (found.entries, found.wrong) == ([], [])
        assert found.left, "what was written is named"
        publish(registry, artifact)
        found = verify_all(registry)
        assert (len(found.entries), found.wrong) == (1, [])


def test_many_at_once_lose_nobodys(artifact: Path, build: Build, tmp_path: Path) -> None:
    registry = open_registry(str(tmp_path / "registry"))
    copies = [tmp_path / f"copy-{i}" for i in range(6)]
    for i, copy in enumerate(copies):
        shutil.copytree(artifact, copy)
        (copy / "provenance.json").write_text((copy / "provenance.json").read_text() + "\n" * i)
    failures: list[BaseException] = []

    def work(copy: Path) -> None:
        try:
            publish(registry, copy)
        except BaseException as error:  # noqa: BLE001 (told by the main thread)
            failures.append(error)

    threads = [threading.Thread(target=work, args=(copy,)) for copy in (*copies, *copies)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    found = verify_all(registry)
    assert (sorted(entry.name for entry in found.entries), found.wrong, found.left) == (
        [copy.name for copy in copies],
        [],
        [],
    )


def test_a_key_is_asked_of_each(pipeline: Pipeline, published: Path, artifact: Path, tmp_path: Path) -> None:
    for name in ("mine", "another"):
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(tmp_path / name)], check=True)
        words = ["openssl", "pkey", "-in", str(tmp_path / name), "-pubout", "-out", str(tmp_path / f"{name}.pub")]
        subprocess.run(words, check=True)
    mine, another = (f"key={tmp_path / name}.pub" for name in ("mine", "another"))
    code, _, err = pipeline("verify", f"registry={published}", mine)
    assert (code, "not signed" in err, os.sep + "tmp" in err.replace(str(published), "")) == (6, True, False)
    shutil.rmtree(published)
    pipeline("sign", f"artifact={artifact}", f"key={tmp_path / 'mine'}")
    assert pipeline("publish", str(artifact), f"registry={published}")[0] == 0
    assert pipeline("verify", f"registry={published}", mine)[0] == 0
    assert pipeline("verify", f"registry={published}", another)[0] == 6
    fetched = ["fetch", artifact.name, f"registry={published}", f"output={tmp_path / 'out'}"]
    assert pipeline(*fetched, another)[0] == 6
    assert not (tmp_path / "out").exists()
    assert pipeline(*fetched, mine)[0] == 0


def test_an_entry_is_read_to_a_limit(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registries, "MAX_JSON", 100)
    entries, wrong = entries_of(open_registry(str(published)))
    assert (entries, len(wrong)) == ([], 1)
    assert "larger than 100 bytes" in wrong[0]
    with pytest.raises(BadArtifactError, match="no registry is there"):
        entries_of(open_registry(str(published / "blobs")))
