"""Images that nydus-image made: they load, list and read bit for bit."""

from __future__ import annotations

import hashlib
import itertools

import pytest

from tests.source_trees import FIXTURES, chunk_reader
from virtiofsd_rafs.blob import chunk_info, toc
from virtiofsd_rafs.blob.chunk_map import ChunkMap
from virtiofsd_rafs.blob.digest import digest_of
from virtiofsd_rafs.errors import UnsupportedFeature
from virtiofsd_rafs.rafs import c_rafs_v6 as c
from virtiofsd_rafs.rafs.v6 import ChunkRef, Tree
from virtiofsd_rafs.rafs.walk import walk

pytestmark = pytest.mark.skipif(not FIXTURES.is_dir(), reason="the folder of public test data is absent")

BLOB_ID = "be7d77eeb719f70884758d1aa800ed0fb09d701aaec469964e9d54325f0d5fef"
INLINE_ID = "2fa78cad554b75ac91a4a125ed148d0ddeb25efa4aaa8bd80e5dc292690a4dca"


@pytest.fixture(scope="module")
def tree() -> Tree:
    return Tree.parse((FIXTURES / "bootstrap/rafs-v6-2.2.boot").read_bytes())


@pytest.fixture(scope="module")
def blob() -> bytes:
    return (FIXTURES / "blobs" / BLOB_ID).read_bytes()


def test_bootstrap_describes_itself(tree: Tree) -> None:
    sb = tree.superblock
    assert sb.flags == 0x194
    assert (sb.compressor, sb.digester) == (c.Compressor.ZSTD, c.Digester.BLAKE3)
    assert (sb.root_nid, sb.inos, sb.chunk_size, sb.ext.chunk_table_size) == (128, 3, 1 << 20, 160)
    (entry,) = tree.blobs
    assert (entry.blob_id, entry.features) == (BLOB_ID, 0x7000_0021)
    assert (entry.device.blocks, entry.device.mapped_blkaddr) == (9, 512)
    assert (entry.data_size, entry.record.compressed_size) == (7802, 14554)


def test_tree(tree: Tree) -> None:
    listed = [
        (path, inode.mode, inode.nlink, inode.size, inode.mtime, inode.mtime_nsec)
        for path, inode in walk(tree)
    ]
    assert listed == [
        (b"/", 0o40755, 2, 67, 0, 0),
        (b"/lib.rs", 0o100644, 1, 16931, 1676819553, 628661334),
        (b"/sync_io.rs", 0o100644, 1, 13400, 1676819553, 628993084),
    ]
    assert [e.name for e in tree.entries(tree.inode(128))] == [b".", b"..", b"lib.rs", b"sync_io.rs"]
    # The header's chunk bits are those of the image here; the reader goes by the superblock all the same.
    assert tree.inode(133).union == 0x28
    assert list(tree.chunks(tree.inode(133))) == [ChunkRef(0, 0, 0, 16931, 0)]
    assert list(tree.chunks(tree.inode(136), 13_000, 1000)) == [ChunkRef(0, 1, 13_000, 400, 20480)]


def test_content(tree: Tree, blob: bytes) -> None:
    read = chunk_reader(tree, blob)  # verifies blake3 against the chunk table
    content = {path: read(next(tree.chunks(inode)).chunk_index) for path, inode in walk(tree) if inode.is_reg}
    assert {path: hashlib.sha256(data).hexdigest() for path, data in content.items()} == {
        b"/lib.rs": "1810eba864521293bb0d6b55a3c82318d4d89f294ed761c456d9088a17de0c69",
        b"/sync_io.rs": "e629ab260ff0dc02a24648a3e0dd8c13a5daf233d535c330e3201925f5eeff96",
    }


def test_blob_agrees_with_the_bootstrap(tree: Tree, blob: bytes) -> None:
    entry = tree.blobs[0]
    record = entry.record
    assert entry.toc_digest == hashlib.sha256(blob[-1024:]).digest()
    sections = toc.parse_toc(blob[-4096:], len(blob), size=1024, digest=entry.toc_digest)
    assert [*sections] == [b"image.blob", b"blob.meta", b"blob.meta.header", b"blob.digest"]
    digests = sections[b"blob.digest"]
    stored = blob[digests.offset : digests.offset + digests.compressed_size]
    array = chunk_info.unpack_section(entry, blob[record.ci_offset : record.ci_offset + 32 + 4096])
    by_info = ChunkMap.from_chunk_info(entry, array, toc.extract(digests, stored, 64))
    assert by_info == ChunkMap.from_chunk_table(tree)[0]
    assert b"".join(map(chunk_info.build_v1, chunk_info.parse_array(array, 2, v2=False))) == array
    # The data section's digest is over the stored chunks and their tar header.
    assert sections[b"image.blob"].digest == hashlib.sha256(blob[: 7802 + 512]).digest()
    assert toc.build_tar_header(b"image.blob", 7802) == blob[7802 : 7802 + 512]
    assert toc.build_tar_header(b"rafs.blob.toc", 512) == blob[-512:]


def test_blob_with_its_bootstrap_inside() -> None:
    blob = (FIXTURES / "toc" / INLINE_ID).read_bytes()
    sections = toc.parse_toc(blob[-4096:], len(blob))
    boot = sections[b"image.boot"]
    tree = Tree.parse(toc.extract(boot, blob[boot.offset : boot.offset + boot.compressed_size], 1 << 20))
    assert {path: inode.size for path, inode in walk(tree) if inode.is_reg} == {
        b"/error.rs": 2816,
        b"/lib.rs": 678,
        b"/logger.rs": 3115,
    }
    # Such a blob is known by its file name; inside it has the digest of what comes before the bootstrap.
    assert tree.blobs[0].blob_id == hashlib.sha256(blob[: boot.offset]).hexdigest()
    read = chunk_reader(tree, blob)
    for _, inode in walk(tree):
        if inode.is_reg:
            assert len(b"".join(read(ref.chunk_index) for ref in tree.chunks(inode))) == inode.size


def test_zran_chunk_information() -> None:
    (path,) = (FIXTURES / "zran").glob("*.blob.meta")
    meta = path.read_bytes()
    header = chunk_info.parse_header(meta, len(meta) - 4096)
    assert (header.features, header.ci_entries, header.ci_zran_count, header.ci_zran_offset) == (
        15,
        163,
        21,
        3912,
    )
    entries = chunk_info.parse_array(meta, 163, v2=True)
    assert b"".join(map(chunk_info.build_v2, entries)) == meta[: 163 * 24]
    assert entries[0].uncompressed_size == 1404
    for one, following in itertools.pairwise(entries):
        assert following.uncompressed_offset >= one.uncompressed_offset + one.uncompressed_size


def test_other_versions_are_refused() -> None:
    for name in ("sha256-nocompress-repeatable", "blake3-lz4_block-non_repeatable"):
        with pytest.raises(Exception, match="not a RAFS v6 bootstrap"):
            Tree.parse((FIXTURES / "repeatable" / name).read_bytes())


def test_digests_of_the_content_are_blake3(tree: Tree, blob: bytes) -> None:
    read = chunk_reader(tree, blob)
    for record in tree.chunk_table():
        assert digest_of(read(record.chunk_index), c.Digester.BLAKE3) == record.digest
        assert digest_of(read(record.chunk_index), c.Digester.SHA256) != record.digest


def test_zran_blobs_are_refused(tree: Tree) -> None:
    image = bytearray(tree.image)
    image[4096 + 84] |= c.BlobFeatures.ZRAN
    with pytest.raises(UnsupportedFeature, match="ZRAN"):
        Tree.parse(bytes(image))
