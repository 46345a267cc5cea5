"""Seals secrets that the database keeps for others: AES-256-GCM, under a key made of SECRET_KEY (HKDF, RFC
5869)."""

from __future__ import annotations

import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import SecretStr

from app.config import Settings

VERSION = b"\x01"
NONCE_BYTES = 12


class Vault:
    """Seals with `SECRET_KEY`, and opens also what `SECRET_KEY_PREVIOUS` sealed."""

    def __init__(self, settings: Settings) -> None:
        self._ciphers = [_cipher(secret) for secret in (settings.secret_key, *settings.secret_key_previous)]

    def seal(self, secret: str, about: str) -> bytes:
        """The secret, encrypted so that it opens only for what it is `about`."""
        nonce = secrets.token_bytes(NONCE_BYTES)
        return VERSION + nonce + self._ciphers[0].encrypt(nonce, secret.encode(), about.encode())

    def open(self, sealed: bytes, about: str) -> str | None:
        """The secret; None when another server's secret sealed it, or for something else."""
        nonce, encrypted = sealed[1 : 1 + NONCE_BYTES], sealed[1 + NONCE_BYTES :]
        for cipher in self._ciphers if sealed[:1] == VERSION else ():
            try:
                return cipher.decrypt(nonce, encrypted, about.encode()).decode()
            except InvalidTag:
                continue
        return None


def _cipher(secret: SecretStr) -> AESGCM:
    derive = HKDF(SHA256(), length=32, salt=None, info=b"prompt-portal: keys of sessions")
    return AESGCM(derive.derive(secret.get_secret_value().encode()))
