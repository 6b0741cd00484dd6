"""A signed payload: DSSE envelopes, by ed25519 keys in PEM files. https://github.com/secure-systems-lab/dsse"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import BadArtifactError, UsageError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
MAX_KEY_BYTES = 2**16


def seal(payload: bytes, key: Ed25519PrivateKey) -> dict[str, Any]:
    signature = {"keyid": key_id(key.public_key()), "sig": _base64(key.sign(_signed_bytes(payload)))}
    return {"payload": _base64(payload), "payloadType": PAYLOAD_TYPE, "signatures": [signature]}


def open_envelope(file: Path, content: bytes) -> tuple[bytes, list[tuple[str, bytes]]]:
    """(payload, signatures, each with the key id that it names), nothing of it checked. Raises `BadArtifactError`."""
    try:
        envelope = json.loads(content)
        if envelope["payloadType"] != PAYLOAD_TYPE:
            raise ValueError(f"payloadType {envelope['payloadType']!r:.60}, not {PAYLOAD_TYPE}")
        payload = base64.b64decode(envelope["payload"], validate=True)
        signatures = [
            (str(signature.get("keyid", "")), base64.b64decode(signature["sig"], validate=True))
            for signature in envelope["signatures"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadArtifactError(f"{file}: not a DSSE envelope: {type(error).__name__}: {error}") from error
    return payload, signatures


def is_signed(payload: bytes, signature: bytes, key: Ed25519PublicKey) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, _signed_bytes(payload))
    except InvalidSignature:
        return False
    return True


def private_key(file: Path) -> Ed25519PrivateKey:
    """Raises `UsageError`."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = _read_key(file)
    try:
        key = load_pem_private_key(content, password=None)
    except TypeError as error:
        raise UsageError(f"key {file}: is encrypted: give one without a passphrase") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"key {file}: no private key in PEM (docs/provenance.md says how to make one)") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"key {file}: not an ed25519 key")
    return key


def public_key(file: Path) -> Ed25519PublicKey:
    """Raises `UsageError`."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    content = _read_key(file)
    if b"PRIVATE KEY" in content:
        raise UsageError(f"key {file}: is a private key: `verify` takes the public one")
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"key {file}: no public key in PEM") from error
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"key {file}: not an ed25519 key")
    return key


def key_id(key: Ed25519PublicKey) -> str:
    """sha256 of the public key in DER, as `openssl pkey -pubin -in FILE -outform DER | sha256sum` gives it."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def _read_key(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(MAX_KEY_BYTES)
    except OSError as error:
        raise UsageError(f"key {file}: cannot be read: {error.strerror or error}") from error


def _signed_bytes(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: the type is signed with the payload."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
