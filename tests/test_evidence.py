"""An artifact's evidence travels: builds repeat themselves, changes are found out, signatures hold, devices check."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from evidence import bundle
from evidence.bundle import BUNDLE_FILE, deciding_calls, write_bundle
from evidence.integrity import ENVELOPE_FILE
from evidence.provenance import source_digest
from pipeline.config import ROOMS, source_files
from runtime.artifact import MANIFEST_FILE, PROVENANCE_FILE, REFERENCE_FILE, files_of, read_manifest, sha256
from runtime.program import executorch_runtime
from tests.checkpoints import GOLDEN, ROOT, Build
from tests.resealing import reseal
from validation.figure import TIE_MARGIN
from validation.figures import sqnr_db
from validation.reference import load_reference

Pipeline = Callable[..., tuple[int, str, str]]


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """Files of a key pair: private, public."""
    return write_keys(tmp_path, "key", ed25519.Ed25519PrivateKey.generate())


def write_keys(folder: Path, name: str, key: ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey) -> tuple[Path, Path]:
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return private, public


def built_again(tmp_path: Path, **environment: str) -> Path:
    """`gqa2-int4_xnnpack` by another process, in another folder and working directory, with nothing else changed."""
    output, checkpoint = tmp_path / "elsewhere" / "again", tmp_path / "moved" / "gqa2"
    shutil.copytree(GOLDEN / "gqa2", checkpoint)
    arguments = ["recipe=int4_xnnpack", f"checkpoint={checkpoint}", "export.max_seq_len=256"]
    command = [sys.executable, "-m", "pipeline", "run", f"output={output}", f"cache={tmp_path / 'cache'}", *arguments]
    environment |= {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return output


def test_a_build_repeats_itself(build: Build, tmp_path: Path) -> None:
    """Another process, folder, working directory, hash seed, locale, time zone, number of threads: the same bytes."""
    same_kernels = {name: value for name, value in os.environ.items() if name.startswith(("OPENBLAS_", "ATEN_"))}
    others = {"PYTHONHASHSEED": "7", "LC_ALL": "C", "TZ": "Asia/Tokyo", "OMP_NUM_THREADS": "3"}
    first, second = build("gqa2", "int4_xnnpack"), built_again(tmp_path, **others, **same_kernels)
    manifests = [read_manifest(folder) for folder in (first, second)]
    assert {"model.pte", REFERENCE_FILE, BUNDLE_FILE} <= set(manifests[0]["files"])
    for manifest in manifests:
        assert set(manifest.pop("run")) == {"created", "machine", "program_memory", "files"}
    assert manifests[0] == manifests[1]  # and with it the sha256 of every file but the report
    assert json.dumps(manifests[0]) == json.dumps(manifests[1])  # in the same order
    for name in manifests[0]["files"]:
        assert (first / name).read_bytes() == (second / name).read_bytes()
    for file in second.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file.name


def test_with_other_kernels_the_evidence_is_the_same_but_for_rounding(build: Build, tmp_path: Path) -> None:
    """Another processor's BLAS sums in another order: the program is the same, eager's logits within rounding."""
    first = build("gqa2", "int4_xnnpack")
    others = [core for core in ("Haswell", "Nehalem") if core not in read_manifest(first)["eager"]["float32 products"]]
    second = built_again(tmp_path, OPENBLAS_CORETYPE=others[0], ATEN_CPU_CAPABILITY="avx2")
    one, two = (read_manifest(folder) for folder in (first, second))
    assert others[0].lower() in two["eager"]["float32 products"].lower()
    assert one["eager"] != two["eager"]
    assert (first / "model.pte").read_bytes() == (second / "model.pte").read_bytes()
    for part in ("recipe", "export", "versions", "sizes", "expected_format", "delegation"):
        assert one[part] == two[part]
    mine, theirs = (load_reference(folder / REFERENCE_FILE) for folder in (first, second))
    compared = 0
    for name, expected in zip((s.name for s in mine.sequences), mine.expected, strict=True):
        # Which of the short calls are free of ties, and so which are chosen, may differ where two are as far from one.
        i = next((i for i, s in enumerate(theirs.sequences) if s.name == name), None)
        if i is None or not torch.equal(mine.sequences[i].calls[0].tokens, theirs.sequences[i].calls[0].tokens):
            continue
        for a, b in zip(expected, theirs.expected[i], strict=True):
            compared += 1
            free = min(a.tie_margin, b.tie_margin) > TIE_MARGIN
            assert sqnr_db(a.eager, b.eager) > (mine.floor_db if free else 30), name
    assert compared > 50


def test_a_figure_does_not_depend_on_the_threads() -> None:
    """torch adds up a large tensor in as many parts as there are threads."""
    torch.manual_seed(0)
    expected = torch.randn(1000, 1024)
    actual = expected + torch.randn(1000, 1024)  # near 0 dB the last bits of the sums are seen
    threads = torch.get_num_threads()
    try:
        figures = set()
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            figures.add(sqnr_db(expected, actual))
    finally:
        torch.set_num_threads(threads)
    assert len(figures) == 1


def test_provenance_is_a_slsa_statement(build: Build) -> None:
    artifact = build("gqa2", "int4_xnnpack")
    statement, manifest = json.loads((artifact / PROVENANCE_FILE).read_text()), read_manifest(artifact)
    assert (statement["_type"], statement["predicateType"]) == (
        "https://in-toto.io/Statement/v1",
        "https://slsa.dev/provenance/v1",
    )
    subjects = {subject["name"]: subject["digest"]["sha256"] for subject in statement["subject"]}
    assert subjects == {file.name: sha256(file) for file in artifact.iterdir() if file.name != PROVENANCE_FILE}
    definition, details = statement["predicate"]["buildDefinition"], statement["predicate"]["runDetails"]
    assert set(statement["predicate"]) == {"buildDefinition", "runDetails"}
    assert definition["externalParameters"]["recipe"] == manifest["recipe"]
    assert definition["externalParameters"]["export"] == {"max_seq_len": 256, "max_rows": 256}
    made_of = {entry["name"]: entry for entry in definition["resolvedDependencies"]}
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        assert made_of[f"checkpoint/{name}"]["digest"]["sha256"] == sha256(GOLDEN / "gqa2" / name)
    assert made_of["executorch"]["uri"] == f"pkg:pypi/executorch@{manifest['versions']['executorch']}"
    assert "+" not in made_of["torch"]["uri"]
    assert details["builder"]["version"]["python"] == manifest["versions"]["python"]
    assert details["metadata"]["finishedOn"] == manifest["run"]["created"]


def test_the_digest_of_the_code_is_what_sha256sum_says() -> None:
    """The line that docs/provenance.md gives."""
    line = (ROOT / "docs" / "provenance.md").read_text().partition("```sh\nfind ")[2].partition("```")[0]
    assert all(room in line for room in ROOMS)
    done = subprocess.run(["bash", "-c", f"find {line}"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == source_digest(source_files())


def edited_manifest(artifact: Path) -> str:
    manifest = json.loads((artifact / MANIFEST_FILE).read_text())
    manifest["recipe"]["bounds"]["fidelity_db"] = 1.0  # easier to pass
    (artifact / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
    return f"{artifact / MANIFEST_FILE}: its sha256 is not the one in provenance.json"


def edited_report(artifact: Path) -> str:
    file = artifact / "report.json"
    file.write_text(file.read_text().replace('"valid": true', '"valid":  true'))
    return f"{file}: "


def edited_reference(artifact: Path) -> str:
    file = artifact / REFERENCE_FILE
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    return f"{file}: its sha256 is not the manifest's"


def edited_manifest_and_its_digest(artifact: Path) -> str:
    """By somebody who knows of provenance.json, but not that it lists the other files too."""
    manifest = json.loads((artifact / MANIFEST_FILE).read_text())
    del manifest["run"]["files"]["report.json"]
    (artifact / MANIFEST_FILE).write_text(json.dumps(manifest))
    provenance = artifact / PROVENANCE_FILE
    statement = json.loads(provenance.read_text())
    for subject in statement["subject"]:
        if subject["name"] == MANIFEST_FILE:
            subject["digest"]["sha256"] = sha256(artifact / MANIFEST_FILE)
    provenance.write_text(json.dumps(statement))
    return f"{provenance}: names other files than manifest.json"


def no_provenance(artifact: Path) -> str:
    (artifact / PROVENANCE_FILE).unlink()
    return f"{artifact / PROVENANCE_FILE}: missing"


def broken_provenance(artifact: Path) -> str:
    (artifact / PROVENANCE_FILE).write_text('{"subject": [3]}')
    return f"{artifact / PROVENANCE_FILE}: not a provenance statement"


EDITS = [
    edited_manifest,
    edited_report,
    edited_reference,
    edited_manifest_and_its_digest,
    no_provenance,
    broken_provenance,
]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_artifact_is_not_validated(artifact: Path, pipeline: Pipeline, edit: Callable[[Path], str]) -> None:
    line = edit(artifact)
    for command in ("validate", "verify", "inspect"):
        code, out, err = pipeline(command, f"artifact={artifact}")
        assert (code, out) == (6, "")
        assert line in err
        assert err.count("\n") == 1


def added_file(artifact: Path) -> None:
    (artifact / "weights.bin").write_bytes(b"more")


def missing_file(artifact: Path) -> None:
    (artifact / BUNDLE_FILE).unlink()


def renamed_file(artifact: Path) -> None:
    (artifact / "report.json").rename(artifact / "report2.json")


def linked_file(artifact: Path) -> None:
    moved = artifact.with_name("moved.pte")
    (artifact / "model.pte").rename(moved)
    (artifact / "model.pte").symlink_to(moved)


def flipped_bit(artifact: Path) -> None:
    content = bytearray((artifact / "model.pte").read_bytes())
    content[len(content) // 2] ^= 1
    (artifact / "model.pte").write_bytes(content)


def consistent_edit(artifact: Path) -> None:
    """Somebody who brings all digests in line: only the signature tells."""
    edited_manifest(artifact)
    reseal(artifact)


def another_provenance(artifact: Path) -> None:
    (artifact / PROVENANCE_FILE).write_text((artifact / PROVENANCE_FILE).read_text().replace("finishedOn", "startedOn"))


def an_edited_envelope(artifact: Path) -> None:
    """As `consistent_edit`, and in the envelope too."""
    consistent_edit(artifact)
    envelope = json.loads((artifact / ENVELOPE_FILE).read_text())
    envelope["payload"] = base64.b64encode((artifact / PROVENANCE_FILE).read_bytes()).decode()
    (artifact / ENVELOPE_FILE).write_text(json.dumps(envelope))


def no_provenance_left(artifact: Path) -> None:
    (artifact / PROVENANCE_FILE).unlink()


def no_envelope(artifact: Path) -> None:
    (artifact / ENVELOPE_FILE).unlink()


def a_broken_envelope(artifact: Path) -> None:
    (artifact / ENVELOPE_FILE).write_text('{"payloadType": "application/vnd.in-toto+json", "payload": "?"}')


@pytest.mark.parametrize(
    ("change", "words", "without_key"),
    [
        (added_file, "weights.bin: no file of this artifact", 6),
        (missing_file, "model.bpte: missing", 6),
        (renamed_file, "report.json: missing", 6),
        (linked_file, "model.pte: a link", 6),
        (flipped_bit, "model.pte: its sha256", 6),
        (edited_manifest, "manifest.json: its sha256", 6),
        (another_provenance, "provenance.json: is not what provenance.dsse.json signs", 6),
        (consistent_edit, "provenance.json: is not what provenance.dsse.json signs", 6),
        (no_provenance_left, "provenance.json: missing", 6),
        (a_broken_envelope, "provenance.dsse.json: not a DSSE envelope", 6),
        (an_edited_envelope, "provenance.dsse.json: no signature of key", 0),
        (no_envelope, "not signed: there is no provenance.dsse.json", 0),
    ],
)
def test_a_change_after_signing_is_found(
    artifact: Path,
    pipeline: Pipeline,
    keys: tuple[Path, Path],
    change: Callable[[Path], object],
    words: str,
    without_key: int,
) -> None:
    private, public = keys
    assert pipeline("sign", f"artifact={artifact}", f"key={private}")[0] == 0
    code, out, err = pipeline("verify", f"artifact={artifact}", f"key={public}")
    assert (code, err) == (0, "")
    assert "is as it was packaged, signed with key" in out
    change(artifact)
    code, out, err = pipeline("verify", f"artifact={artifact}", f"key={public}")
    assert (code, out) == (6, "")
    assert words in err
    assert pipeline("verify", f"artifact={artifact}")[0] == without_key


def test_a_signature_is_of_one_key(artifact: Path, pipeline: Pipeline, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    code, out, _ = pipeline("verify", f"artifact={artifact}")
    assert (code, "not signed" in out) == (0, True)
    assert pipeline("sign", f"artifact={artifact}", f"key={private}")[0] == 0
    code, out, _ = pipeline("verify", f"artifact={artifact}")
    assert (code, "not checked" in out) == (0, True)
    # Another key has not signed it; signed again with that one it has, and the first has not.
    other_private, other_public = write_keys(tmp_path, "other", ed25519.Ed25519PrivateKey.generate())
    code, _, err = pipeline("verify", f"artifact={artifact}", f"key={other_public}")
    assert (code, "no signature of key" in err) == (6, True)
    assert pipeline("sign", f"artifact={artifact}", f"key={other_private}")[0] == 0
    assert pipeline("verify", f"artifact={artifact}", f"key={other_public}")[0] == 0
    assert pipeline("verify", f"artifact={artifact}", f"key={public}")[0] == 6


def test_openssl_makes_the_keys_and_checks_the_signature(artifact: Path, pipeline: Pipeline, tmp_path: Path) -> None:
    """Without a line of ours: its own keys, and DSSE's definition of what is signed."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl program")

    def openssl(*arguments: str) -> bytes:
        done = subprocess.run(["openssl", *arguments], cwd=tmp_path, capture_output=True, check=True)
        return done.stdout

    openssl("genpkey", "-algorithm", "ed25519", "-out", "key.pem")
    openssl("pkey", "-in", "key.pem", "-pubout", "-out", "key.pub.pem")
    code, out, _ = pipeline("sign", f"artifact={artifact}", f"key={tmp_path / 'key.pem'}")
    assert code == 0
    der = openssl("pkey", "-pubin", "-in", "key.pub.pem", "-outform", "DER")
    assert hashlib.sha256(der).hexdigest() in out
    envelope = json.loads((artifact / ENVELOPE_FILE).read_text())
    payload, kind = (artifact / PROVENANCE_FILE).read_bytes(), envelope["payloadType"].encode()
    assert base64.b64decode(envelope["payload"]) == payload
    (tmp_path / "signed").write_bytes(b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload))
    (tmp_path / "sig").write_bytes(base64.b64decode(envelope["signatures"][0]["sig"]))
    openssl("pkeyutl", "-verify", "-pubin", "-inkey", "key.pub.pem", "-rawin", "-in", "signed", "-sigfile", "sig")


def test_keys_that_are_none(artifact: Path, pipeline: Pipeline, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    rsa_private, rsa_public = write_keys(tmp_path, "rsa", rsa.generate_private_key(65537, 2048))
    locked = BestAvailableEncryption(b"secret")
    made = ed25519.Ed25519PrivateKey.generate()
    (tmp_path / "locked").write_bytes(made.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked))
    (tmp_path / "text").write_bytes(b"no key")
    for command, key, words in [
        ("sign", tmp_path / "nowhere", "cannot be read: No such file"),
        ("sign", tmp_path / "text", "no private key in PEM"),
        ("sign", public, "no private key in PEM"),
        ("sign", tmp_path / "locked", "is encrypted"),
        ("sign", rsa_private, "not an ed25519 key"),
        ("verify", tmp_path / "nowhere", "cannot be read: No such file"),
        ("verify", tmp_path / "text", "no public key in PEM"),
        ("verify", private, "is a private key: `verify` takes the public one"),
        ("verify", rsa_public, "not an ed25519 key"),
    ]:
        code, _, err = pipeline(command, f"artifact={artifact}", f"key={key}")
        assert code == 2
        assert words in err
        assert err.count("\n") == 1
    assert not (artifact / ENVELOPE_FILE).exists()


def test_what_is_damaged_or_out_of_bounds_is_not_signed(
    artifact: Path, pipeline: Pipeline, keys: tuple[Path, Path]
) -> None:
    manifest = json.loads((artifact / MANIFEST_FILE).read_text())
    manifest["figures"][0]["ok"] = False
    (artifact / MANIFEST_FILE).write_text(json.dumps(manifest))
    code, _, err = pipeline("sign", f"artifact={artifact}", f"key={keys[0]}")
    assert (code, "manifest.json: its sha256" in err) == (6, True)
    reseal(artifact)
    code, _, err = pipeline("sign", f"artifact={artifact}", f"key={keys[0]}")
    assert (code, "is not signed: out of bounds when it was made: fidelity_db" in err) == (5, True)
    assert not (artifact / ENVELOPE_FILE).exists()


def failing_cases(content: bytes, n: int) -> list[int]:
    """What a device does with a bundle, by executorch's own check: the cases whose outputs are not the expected."""
    executorch_runtime()
    from executorch.extension.pybindings.portable_lib import _load_bundled_program_from_buffer as load

    found = load(content)
    failing = []
    for i in range(n):
        try:
            found.verify_result_with_bundled_expected_output("forward", i, rtol=1e-3, atol=1e-3)
        except RuntimeError:
            failing.append(i)
    return failing


@pytest.mark.parametrize("recipe", ["fp32_xnnpack", "int4_xnnpack"])
def test_a_bundled_program_checks_itself(build: Build, recipe: str) -> None:
    artifact = build("gqa2", recipe)
    content, program = (artifact / BUNDLE_FILE).read_bytes(), (artifact / "model.pte").read_bytes()
    calls = deciding_calls(load_reference(artifact / REFERENCE_FILE), 320)
    assert len(calls) == (8 if recipe == "fp32_xnnpack" else 4)
    assert program in content
    held = sum(4 * expected.eager.numel() for _, expected in calls)  # bytes of the outputs
    assert len(content) < len(program) + held + 2**14
    assert failing_cases(content, len(calls)) == []
    # A case fails where a logit that is expected is another.
    for i, (_, expected) in enumerate(calls[:2]):
        wanted = expected.eager.numpy().tobytes()
        off = (expected.eager + 0.1 * torch.eye(*expected.eager.shape)).numpy().tobytes()
        assert failing_cases(content.replace(wanted, off), len(calls)) == [i]


def test_large_programs_and_undecided_calls_are_not_bundled(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = build("gqa2", "int4_xnnpack")
    reference = load_reference(artifact / REFERENCE_FILE)
    pte = tmp_path / "model.pte"
    shutil.copyfile(artifact / "model.pte", pte)
    assert deciding_calls(reference, 151_936) == []  # of a wide vocabulary only sketches are kept
    write_bundle(pte, reference, 151_936)
    monkeypatch.setattr(bundle, "MAX_PROGRAM", 1000)
    write_bundle(pte, reference, 320)
    assert not (tmp_path / BUNDLE_FILE).exists()
    monkeypatch.undo()
    write_bundle(pte, reference, 320)
    assert (tmp_path / BUNDLE_FILE).read_bytes() == (artifact / BUNDLE_FILE).read_bytes()


def test_inspect_shows_all_on_one_screen(build: Build, pipeline: Pipeline) -> None:
    artifact = build("gqa2", "int4_xnnpack")
    code, out, err = pipeline("inspect", f"artifact={artifact}")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "valid, every file as it was packaged, not signed"
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 120
    manifest = read_manifest(artifact)
    for figure in manifest["figures"]:
        assert figure["name"] in out
    for name, entry in files_of(manifest).items():
        assert any(name in line and f"{entry['bytes']:,} bytes" in line for line in lines)
    for word in ("int4_xnnpack", "gqa2", manifest["run"]["created"], manifest["versions"]["executorch"], "lower"):
        assert word in out


def test_inspect_for_machines(build: Build, pipeline: Pipeline) -> None:
    artifact = build("gqa2", "int4_xnnpack")
    code, out, err = pipeline("inspect", f"artifact={artifact}", "--json")
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    assert found["valid"]
    assert found["signatures"] == []
    assert found["manifest"] == read_manifest(artifact)
    assert found["report"] == json.loads((artifact / "report.json").read_text())
    assert found["provenance"] == json.loads((artifact / PROVENANCE_FILE).read_text())
    assert set(found["files"]) == {file.name for file in artifact.iterdir()} - {MANIFEST_FILE, PROVENANCE_FILE}
    assert pipeline("run", "--json")[0] == 2


def test_inspect_obeys_nothing_in_an_artifact(artifact: Path, pipeline: Pipeline) -> None:
    """Neither markup nor what a terminal would do."""
    manifest = json.loads((artifact / MANIFEST_FILE).read_text())
    manifest["checkpoint"]["name"] = "[red]\x1b[2Jgqa2\nvalid"
    (artifact / MANIFEST_FILE).write_text(json.dumps(manifest))
    reseal(artifact)
    (artifact / ENVELOPE_FILE).write_text(
        json.dumps(
            {
                "payload": base64.b64encode((artifact / PROVENANCE_FILE).read_bytes()).decode(),
                "payloadType": "application/vnd.in-toto+json",
                "signatures": [{"keyid": "\x1b[2J", "sig": ""}],
            }
        )
    )
    for command in ("inspect", "verify"):
        code, out, _ = pipeline(command, f"artifact={artifact}")
        assert (code, "\x1b" in out) == (0, False)
    manifest["sizes"] = None
    (artifact / MANIFEST_FILE).write_text(json.dumps(manifest))
    reseal(artifact)
    (artifact / ENVELOPE_FILE).unlink()
    code, _, err = pipeline("inspect", f"artifact={artifact}")
    assert (code, "not a manifest" in err) == (6, True)


def test_an_unreadable_folder_is_one_line(pipeline: Pipeline, keys: tuple[Path, Path], tmp_path: Path) -> None:
    for command in ("inspect", "verify", "sign"):
        arguments = [f"key={keys[0]}"] if command == "sign" else []
        code, _, err = pipeline(command, f"artifact={tmp_path / 'nowhere'}", *arguments)
        assert (code, "no such artifact folder" in err) == (6, True)
