"""Ed25519 signatures of manifests, with `cryptography` (extra `sign`).

A signature holds its public key, so it says who signed; whether to trust them is for whoever takes the collection in."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from kvilt.errors import MissingExtra, UserError


def sign(data: bytes, path: Path) -> bytes:
    """The signature file of some bytes, made with a private key in PEM (openssl genpkey -algorithm ed25519).

    Raises UserError for what is no such key."""
    try:
        key = _crypto("serialization").load_pem_private_key(path.read_bytes(), password=None)
        signature, public = key.sign(data), key.public_key().public_bytes_raw()
        _crypto("asymmetric.ed25519").Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no private Ed25519 key in PEM that can be read without a password.") from error
    return json.dumps({"algorithm": "Ed25519", "public_key": public.hex(), "signature": signature.hex()}).encode()


def signed_by(data: bytes, signature: bytes | None, trusted: str, where: str) -> str:
    """The public key, in hex, that signed some bytes. With `trusted` (hex, or a PEM file) it must be that one.

    Raises UserError where nothing is signed but should be, the signature is wrong, or it is somebody else's."""
    if signature is None:
        raise UserError(f"{where} is not signed.")
    try:
        given = json.loads(signature)
        public = str(given["public_key"]).lower()
        key = _crypto("asymmetric.ed25519").Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(bytes.fromhex(given["signature"]), data)
    except (
        ValueError,
        TypeError,
        LookupError,
        importlib.import_module("cryptography.exceptions").InvalidSignature,
    ) as e:
        raise UserError(f"{where}: the signature does not match its manifest, so it was altered. Get it anew.") from e
    if trusted and public != _public(trusted):
        raise UserError(f"{where} is signed by {public}, not by the key you trust.")
    return public


def _public(trusted: str) -> str:
    try:
        if not Path(trusted).is_file():
            return bytes.fromhex(trusted).hex()
        key = _crypto("serialization").load_pem_public_key(Path(trusted).read_bytes())
        return str(key.public_bytes_raw().hex())
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{trusted} is no public Ed25519 key: give a PEM file or 64 hex digits.") from error


def _crypto(module: str) -> Any:
    try:
        return importlib.import_module(f"cryptography.hazmat.primitives.{module}")
    except ImportError as error:
        raise MissingExtra("cryptography", "sign") from error
