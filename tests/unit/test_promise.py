"""Chunk information that the bootstrap lacks: where it may come from, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from virtiofsd_rafs.cache.promise import check_verifiable, complete_blob
from virtiofsd_rafs.errors import BadImage, DigestMismatch, UnverifiedImage
from virtiofsd_rafs.native.store import Store

FIXTURES = Path(__file__).parents[3] / "shared/fixtures/nydus"
pytestmark = pytest.mark.skipif(not FIXTURES.is_dir(), reason="the folder of public test data is absent")
BLOB_ID = "be7d77eeb719f70884758d1aa800ed0fb09d701aaec469964e9d54325f0d5fef"
_CHUNK_TABLE_SIZE = 1152 + 32
_META = slice(8314, 8346)
_HEADER = slice(8346, 12442)


class BlobFile:
    def __init__(self, data: bytes) -> None:
        self.data = data

    async def read_range(self, blob_id: str, offset: int, length: int) -> bytes:
        assert blob_id == BLOB_ID
        assert offset + length <= len(self.data)
        return self.data[offset : offset + length]

    async def blob_size(self, blob_id: str) -> int:
        assert blob_id == BLOB_ID
        return len(self.data)

    async def close(self) -> None:
        pass


@pytest.fixture
def blob() -> bytes:
    return (FIXTURES / "blobs" / BLOB_ID).read_bytes()


def bootstrap(*, toc: bool = True) -> bytes:
    """The fixture's bootstrap without its chunk table, and perhaps without the digest of the ToC."""
    image = bytearray((FIXTURES / "bootstrap/rafs-v6-2.2.boot").read_bytes())
    struct.pack_into("<Q", image, _CHUNK_TABLE_SIZE, 0)
    (blob_table,) = struct.unpack_from("<Q", image, 1152 + 8)
    if not toc:
        struct.pack_into("<I", image, blob_table + 104, 0)
        image[blob_table + 136 : blob_table + 168] = bytes(32)
    return bytes(image)


def make_store(image: bytes) -> Store:
    store = Store(image, cache_dir=None, spill_size=1 << 20)
    assert store.blob(0).needs_chunk_info
    return store


async def complete(store: Store, data: bytes, *, meta: bytes | None = None, allow: bool = False) -> None:
    await complete_blob(store, store.blob(0), BlobFile(data), meta=meta, allow_unverified=allow)


async def test_authenticated_sections_give_places_and_digests(blob: bytes) -> None:
    with make_store(bootstrap()) as store:
        await complete(store, blob)
        check_verifiable(store.blobs(), allow_unverified=False)
        store.open_blob(0)
        assert store.ingest(0, 0, blob, [0, 1]) == b"\0\0"


@pytest.mark.parametrize("at", [8314, 12954, 13530, 14041, -100])
async def test_a_flipped_byte_in_the_sections_is_noticed(blob: bytes, at: int) -> None:
    damaged = bytearray(blob)
    damaged[at] ^= 1
    with make_store(bootstrap()) as store:
        with pytest.raises((DigestMismatch, BadImage)):
            await complete(store, bytes(damaged))
        # And the right bytes are taken afterwards: nothing was poisoned.
        await complete(store, blob)
        assert not store.blob(0).needs_chunk_info


async def test_a_blob_shorter_than_its_contents_list(blob: bytes) -> None:
    with make_store(bootstrap()) as store, pytest.raises(BadImage):
        await complete(store, blob[:500])


async def test_without_digests_the_image_is_refused_unless_allowed(blob: bytes) -> None:
    meta = blob[_META].ljust(4096, b"\0") + blob[_HEADER]
    with make_store(bootstrap(toc=False)) as store:
        with pytest.raises(UnverifiedImage, match="--allow-unverified"):
            await complete(store, blob, meta=meta)
        await complete(store, blob, meta=meta, allow=True)
        with pytest.raises(UnverifiedImage, match="2 of 2 chunks"):
            check_verifiable(store.blobs(), allow_unverified=False)
        check_verifiable(store.blobs(), allow_unverified=True)
        store.open_blob(0)
        assert store.ingest(0, 0, blob, [0, 1]) == b"\0\0"


async def test_the_list_in_the_blob_is_the_last_resort(blob: bytes) -> None:
    with make_store(bootstrap(toc=False)) as store:
        await complete(store, blob, allow=True)
        store.open_blob(0)
        assert store.ingest(0, 0, blob, [0, 1]) == b"\0\0"
