"""Signatures over manifests: Ed25519 for files that travel, HMAC-SHA256 for files that stay in one house.

The kind of the key decides the algorithm, never the file: so a public key cannot be passed off as an HMAC secret.
"""

import binascii
import dataclasses
import hashlib
import hmac
from typing import Any, Literal

from aidefend._core.checks import refuse
from aidefend._core.errors import MissingExtra
from aidefend.artifacts.files import unsafe

Algorithm = Literal["ed25519", "hmac-sha256"]
MIN_SECRET = 16
_DOMAIN = b"aidefend.manifest.signature/1\x00"
_ENCODED_KEYS = (b"-----BEGIN", b"ssh-", b"\x30\x2a\x30\x05\x06\x03\x2b\x65\x70", b"untrusted comment:")


@dataclasses.dataclass(frozen=True)
class Signature:
    """Algorithm, a short name of the public key ("" for HMAC, whose keys have no public part), value in hex."""

    algorithm: Algorithm
    key_id: str
    value: str


def sign_bytes(message: bytes, key: Any) -> Signature:
    """Sign with an Ed25519 private key or with the bytes of an HMAC key."""
    if isinstance(key, bytes | bytearray):
        return Signature("hmac-sha256", "", _authenticate(message, _check_secret(bytes(key))))
    private, public = _key_types()
    if isinstance(key, public):
        raise refuse("a private key to sign with", "key", "Ed25519PublicKey", "Keep it for verify(path, key=...)")
    if not isinstance(key, private):
        raise refuse("an Ed25519 private key or bytes", "key", type(key).__name__, _KEY_CURE)
    value = key.sign(_frame("ed25519", message)).hex()
    return Signature("ed25519", _key_id(key.public_key()), value)


def verify_bytes(message: bytes, signature: Signature | None, key: Any) -> None:
    """Refuse anything but a valid signature by the trusted key; unsigned needs no key, and takes none."""
    if signature is None and key is None:
        return
    if signature is None:
        cure = "Sign it with manifest.sign(key), or verify without a key if its origin is trusted"
        raise unsafe("a signed manifest", "signature", None, cure)
    if key is None:
        cure = "Pass the public key or secret that you trust: verify(path, key=...)"
        raise unsafe("a trusted key for a signed manifest", "key", None, cure)
    algorithm = _algorithm_of(key)
    if signature.algorithm != algorithm:
        cure = "Use the key that belongs to the signer, or have it signed again"
        raise unsafe(f"a signature of kind {algorithm}, as the trusted key", "algorithm", signature.algorithm, cure)
    if not _is_valid(message, signature, key):
        cure = "The manifest was changed or signed by someone else; fetch it again from its author"
        raise unsafe("a signature by the trusted key", "signature", signature.key_id or "hmac-sha256", cure)


def _algorithm_of(key: Any) -> Algorithm:
    if isinstance(key, bytes | bytearray):
        _check_secret(bytes(key))
        return "hmac-sha256"
    private, public = _key_types()
    if isinstance(key, private):
        raise refuse("a public key to verify with", "key", "Ed25519PrivateKey", "Pass key.public_key()")
    if not isinstance(key, public):
        raise refuse("an Ed25519 public key or bytes", "key", type(key).__name__, _KEY_CURE)
    return "ed25519"


_KEY_CURE = "Use cryptography's Ed25519 keys, or at least 16 secret bytes for HMAC"


def _is_valid(message: bytes, signature: Signature, key: Any) -> bool:
    try:
        value = binascii.unhexlify(signature.value)
    except (binascii.Error, ValueError):
        return False
    if signature.algorithm == "hmac-sha256":
        return hmac.compare_digest(bytes.fromhex(_authenticate(message, bytes(key))), value)
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(value, _frame("ed25519", message))
    except InvalidSignature:
        return False
    return signature.key_id == _key_id(key)


def _authenticate(message: bytes, secret: bytes) -> str:
    return hmac.new(secret, _frame("hmac-sha256", message), hashlib.sha256).hexdigest()


def _frame(algorithm: Algorithm, message: bytes) -> bytes:
    """What is signed: bound to this purpose and algorithm, so that no signature serves for another."""
    return _DOMAIN + algorithm.encode() + b"\x00" + message


def _check_secret(secret: bytes) -> bytes:
    if any(secret.startswith(start) for start in _ENCODED_KEYS):
        cure = "Load it as an Ed25519 key with cryptography's serialization functions"
        raise refuse("secret bytes, not an encoded key", "key", f"{len(secret)} bytes", cure)
    if len(secret) < MIN_SECRET:
        cure = "Make one with secrets.token_bytes(32)"
        raise refuse(f"an HMAC key of at least {MIN_SECRET} random bytes", "key", f"{len(secret)} bytes", cure)
    return secret


def _key_id(public: Any) -> str:
    return hashlib.sha256(public.public_bytes_raw()).hexdigest()[:16]


def _key_types() -> tuple[type[Any], type[Any]]:
    try:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    except ImportError as error:
        raise MissingExtra("cryptography", "sign") from error
    return Ed25519PrivateKey, Ed25519PublicKey
