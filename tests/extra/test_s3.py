"""A registry in a bucket: a real S3 server on this machine, spoken to over HTTP."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from evidence.registry import open_registry, verify_all
from tests.test_registry import tree

Pipeline = Callable[..., tuple[int, str, str]]
BUCKET = "models"


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (tmp_path / "server.log").open("w") as log:
        words = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
        server = subprocess.Popen(words, stdout=log, stderr=log)
    try:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        for _ in range(300):
            with socket.socket() as asked:
                if asked.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir(BUCKET)
        yield f"s3://{BUCKET}/dream"
    finally:
        server.kill()
        server.wait()


def test_a_bucket_is_a_registry(pipeline: Pipeline, artifact: Path, url: str, tmp_path: Path) -> None:
    code, out, err = pipeline("publish", str(artifact), f"registry={url}")
    assert (code, err) == (0, "")
    id_ = out.split()[3]
    assert "was there already" in pipeline("publish", str(artifact), f"registry={url}")[1]
    assert pipeline("fetch", f"registry={url}")[1].count(id_[:12]) == 1
    assert pipeline("fetch", artifact.name, f"registry={url}", f"output={tmp_path / 'out'}")[0] == 0
    assert tree(tmp_path / "out") == tree(artifact)
    assert pipeline("verify", f"registry={url}")[0] == 0
    registry = open_registry(url)
    assert all(name.endswith(".json") for name in registry.fs.ls(registry.path("entries"), detail=False))

    # What is changed, and what goes missing.
    digest = next(d for name, (d, _) in verify_all(registry).entries[0].files.items() if name == "model.pte")
    blob = registry.path("blobs", digest)
    content = registry.fs.cat_file(blob)
    registry.fs.pipe_file(blob, content[:-1] + b"x")
    code, out, err = pipeline("verify", f"registry={url}")
    assert (code, err.count("\n"), f"{digest}: its sha256 is another" in out) == (6, 1, True)
    code, _, err = pipeline("fetch", id_[:10], f"registry={url}", f"output={tmp_path / 'damaged'}")
    assert (code, err.count("\n"), (tmp_path / "damaged").exists()) == (6, 1, False)
    registry.fs.rm_file(blob)
    code, out, _ = pipeline("verify", f"registry={url}")
    assert (code, f"{digest}: missing" in out) == (6, True)


def test_without_a_bucket_it_is_a_line(pipeline: Pipeline, artifact: Path, url: str) -> None:
    code, _, err = pipeline("publish", str(artifact), "registry=s3://nowhere/x")
    assert (code, err.count("\n")) == (7, 1), err
    assert not fsspec.filesystem("s3", skip_instance_cache=True).exists("nowhere"), "no bucket is made"
    code, _, err = pipeline("verify", "registry=s3://nowhere/x")
    assert (code, err.count("\n")) == (6, 1)


def test_an_upload_that_is_killed_leaves_no_entry(artifact: Path, url: str, tmp_path: Path) -> None:
    """While a file of many parts is on its way."""
    with (artifact / "model.pte").open("ab") as file:
        file.write(b"x" * 2**27)
    code = """
import sys
from pathlib import Path
from evidence import registry
registry.check_whole = lambda *_: None
print("begins", flush=True)
registry.publish(registry.open_registry(sys.argv[2]), Path(sys.argv[1]))
"""
    child = subprocess.Popen([sys.executable, "-c", code, str(artifact), url], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "begins\n"
    registry = open_registry(url)
    for _ in range(600):
        if registry.fs.isdir(registry.path("blobs")):
            break
        time.sleep(0.02)
    child.kill()
    assert child.wait() == -9
    blobs = registry.fs.ls(registry.path("blobs"), detail=False)
    assert blobs
    assert not registry.fs.isdir(registry.path("entries"))
    for blob in blobs:  # each is whole
        assert registry.fs.size(blob) in {file.stat().st_size for file in artifact.iterdir()}
