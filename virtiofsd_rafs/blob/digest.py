"""Digests of chunks, by the digester number of an image."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Protocol

import blake3

from virtiofsd_rafs.errors import DigestMismatch
from virtiofsd_rafs.rafs.c_rafs_v6 import Digester

if TYPE_CHECKING:
    from virtiofsd_rafs.rafs.records import Buffer

DIGEST_SIZE = 32


class Hasher(Protocol):
    def update(self, data: Buffer, /) -> object: ...
    def digest(self) -> bytes: ...
    def hexdigest(self) -> str: ...


def new_hasher(digester: Digester) -> Hasher:
    """A running digest of 32 bytes."""
    return hashlib.sha256() if digester is Digester.SHA256 else blake3.blake3()


def digest_of(data: Buffer, digester: Digester) -> bytes:
    """The 32-byte digest of *data*."""
    hasher = new_hasher(digester)
    hasher.update(data)
    return hasher.digest()


def verify(data: Buffer, digester: Digester, expected: bytes, what: str) -> None:
    """Return when *data* has the digest *expected*, else raise DigestMismatch; *what* names the data."""
    if (found := digest_of(data, digester)) != expected:
        raise DigestMismatch(
            f"{what} has the {digester.name.lower()} digest {found.hex()} instead of {expected.hex()}"
        )
