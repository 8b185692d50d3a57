"""parse(build(x)) == x for any small tree; any flipped bytes give a named error and nothing else.

Damage to a chunk is found by its digest, damage to table of contents or chunk information by the digests that
lead to them, damage to the bootstrap by its structure where that is broken; the rest of a bootstrap is
covered by the digest of its layer (docs/adr/0005-trust-chain.md), here only the kind of error counts.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.reference import reference_image
from tests.reference.bootstrap_writer import directory_blocks
from tests.source_trees import read_directory, read_image
from virtiofsd_rafs.blob import chunk_info, toc
from virtiofsd_rafs.blob.chunk_info import CiEntry
from virtiofsd_rafs.blob.chunk_map import ChunkMap
from virtiofsd_rafs.errors import BadImage, DigestMismatch, UnsupportedFeature
from virtiofsd_rafs.image.build import build_image
from virtiofsd_rafs.image.check import Report, check_bootstrap, check_image
from virtiofsd_rafs.rafs import c_rafs_v6 as c
from virtiofsd_rafs.rafs.dump import dump
from virtiofsd_rafs.rafs.v6 import Tree

SLOW = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
NAMES = st.binary(min_size=1, max_size=255).filter(
    lambda name: name not in (b".", b"..") and not {0, 0x2F} & set(name)
)
CONTENT = st.one_of(
    st.binary(max_size=100),
    st.builds(lambda byte, n: bytes([byte]) * n, st.integers(0, 255), st.integers(0, 20_000)),
)
META = st.fixed_dictionaries(
    {
        "mode": st.integers(0, 0o7777),
        "mtime": st.one_of(st.just(0), st.integers(-(1 << 33), 1 << 33), st.integers(-(1 << 62), 1 << 62)),
        "xattrs": st.dictionaries(
            st.sampled_from(["user.a", "user.bb", "trusted.t", "security.s"]),
            st.binary(max_size=300),
            max_size=3,
        ),
    }
)
TREES = st.recursive(
    st.one_of(
        st.tuples(st.just("file"), META, CONTENT),
        st.tuples(st.just("link"), META, NAMES),
        st.tuples(st.just("fifo"), META, st.none()),
    ),
    lambda children: st.tuples(st.just("dir"), META, st.dictionaries(NAMES, children, max_size=8)),
    max_leaves=20,
)


def plant(path: bytes, node: tuple[str, dict[str, Any], Any]) -> None:
    """Makes *node* on disk. Owner bits stay, so that ordinary users can read it back."""
    kind, meta, content = node
    if kind == "file":
        Path(os.fsdecode(path)).write_bytes(content)
    elif kind == "link":
        os.symlink(content, path)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        os.mkdir(path)
        for name, child in content.items():
            plant(path + b"/" + name, child)
    if kind in ("file", "dir"):
        for name, value in meta["xattrs"].items():
            if os.geteuid() == 0 or name.startswith("user."):
                os.setxattr(path, name, value)
        os.chmod(path, meta["mode"] | 0o700)
    os.utime(path, ns=(0, meta["mtime"]), follow_symlinks=False)


@SLOW
@given(
    st.dictionaries(NAMES, TREES, max_size=10),
    st.sampled_from(["zstd", "lz4_block", "gzip", "none"]),
    st.sampled_from(["blake3", "sha256"]),
    st.sampled_from([4096, 8192, 1 << 20]),
)
def test_what_is_built_is_what_was_there(
    tree: dict[bytes, Any], compressor: str, digester: str, chunk_size: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        plant(os.fsencode(source), ("dir", {"mode": 0o755, "mtime": 1, "xattrs": {}}, tree))
        result = build_image(
            source, f"{folder}/out", compressor=compressor, digester=digester, chunk_size=chunk_size
        )
        blob = result.blob.read_bytes() if result.blob else b""
        assert read_image(result.bootstrap.read_bytes(), blob) == read_directory(source)
        report = Report()
        asyncio.run(check_image(str(result.bootstrap), report))
        assert report.findings == []
        assert report.n_chunks_verified == result.n_chunks
        if compressor == "none":
            # The compressors of both builders may be of different versions.
            expected = reference_image(source, compressor="none", digester=digester, chunk_size=chunk_size)
            assert (result.bootstrap.read_bytes(), blob) == expected


def small_image() -> tuple[bytes, bytes]:
    """An image with every kind of structure in it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        (source / "dir").mkdir(parents=True)
        for i in range(200):
            (source / f"dir/some-longer-name-{i}").write_bytes(b"%d" % i * 50)
        (source / "link").symlink_to("dir")
        (source / "big").write_bytes(bytes(range(256)) * 100)
        os.setxattr(source / "big", "user.x", b"value")
        result = build_image(source, f"{folder}/out", chunk_size=4096)
        assert result.blob
        return result.bootstrap.read_bytes(), result.blob.read_bytes()


BOOTSTRAP, BLOB = small_image()
TREE = Tree.parse(BOOTSTRAP)
RECORD = TREE.blobs[0].record
FLIPS = st.lists(st.tuples(st.integers(0, 1 << 30), st.integers(1, 255)), min_size=1, max_size=4)


def flipped(data: bytes, flips: list[tuple[int, int]], start: int = 0) -> bytes:
    """*data* with bytes from *start* on changed, at least one of them."""
    changed = bytearray(data)
    # A place once only: two flips of it could cancel each other.
    for place, mask in {start + position % (len(data) - start): mask for position, mask in flips}.items():
        changed[place] ^= mask
    return bytes(changed)


@settings(deadline=None, max_examples=400)
@given(FLIPS, st.integers(0, 2))
def test_flipped_bootstrap_is_a_named_error_or_readable(flips: list[tuple[int, int]], region: int) -> None:
    # Most of the file is names and chunk indexes: two thirds of the examples hit the heads and the tables.
    size = len(BOOTSTRAP)
    places = [
        1024 + p % 700 if region == 0 else 12_288 + p % 4096 if region == 1 else p % size for p, _ in flips
    ]
    image = flipped(BOOTSTRAP, list(zip(places, (mask for _, mask in flips), strict=True)))
    try:
        tree = Tree.parse(image)
        list(dump(tree))
        ChunkMap.from_chunk_table(tree)
    except (BadImage, UnsupportedFeature):
        pass
    check_bootstrap(image, Report())


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200), st.integers(0, len(BOOTSTRAP)))
def test_cut_and_overwritten_bootstrap(data: bytes, at: int) -> None:
    for image in (
        BOOTSTRAP[:at],
        BOOTSTRAP[:at] + data,
        BOOTSTRAP[:at] + data + BOOTSTRAP[at + len(data) :],
        data,
    ):
        check_bootstrap(image, Report())


def read_blob_metadata(blob: bytes) -> ChunkMap:
    """Table of contents, chunk information and digests, verified from the bootstrap on."""
    sections = toc.parse_toc(
        blob[-4096:], len(blob), size=RECORD.blob_toc_size, digest=RECORD.blob_toc_digest
    )
    found = {
        name: toc.extract(section, blob[section.offset : section.offset + section.compressed_size], 1 << 20)
        for name, section in sections.items()
        if name != b"image.blob"
    }
    at = RECORD.ci_offset
    array = chunk_info.unpack_section(TREE.blobs[0], blob[at : at + RECORD.ci_compressed_size + 4096])
    assert array == found[b"blob.meta"]
    return ChunkMap.from_chunk_info(TREE.blobs[0], array, found[b"blob.digest"])


def test_untouched_blob_metadata_is_the_chunk_table() -> None:
    assert read_blob_metadata(BLOB) == ChunkMap.from_chunk_table(TREE)[0]


@settings(deadline=None, max_examples=300)
@given(FLIPS)
def test_flipped_blob_metadata_is_never_believed(flips: list[tuple[int, int]]) -> None:
    """Bytes flipped behind the data: a named error, or the same chunk map (headers of tar are not read)."""
    blob = flipped(BLOB, flips, RECORD.ci_offset)
    try:
        chunk_map = read_blob_metadata(blob)
    except (BadImage, DigestMismatch):
        return
    assert chunk_map == ChunkMap.from_chunk_table(TREE)[0]


@settings(deadline=None, max_examples=100)
@given(FLIPS)
def test_flipped_data_is_never_returned(flips: list[tuple[int, int]]) -> None:
    blob = flipped(BLOB[: TREE.blobs[0].data_size], flips) + BLOB[TREE.blobs[0].data_size :]
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "image.boot").write_bytes(BOOTSTRAP)
        Path(folder, TREE.blobs[0].blob_id).write_bytes(blob)
        asyncio.run(check_image(f"{folder}/image.boot", report))
    # Chunks lie without gaps in a compressed blob: each flip hits one.
    assert report.findings
    assert {finding.msgid for finding in report.findings} == {"digest.mismatch"}


ENTRIES = st.builds(
    CiEntry,
    st.integers(0, (1 << 40) - 1),
    st.integers(1, (1 << 24) - 1),
    st.integers(0, (1 << 32) - 1).map(lambda page: page << 12),
    st.integers(1, 1 << 24),
    compressed=st.booleans(),
    flags=st.just(0),
    data=st.just(0),
)


@given(ENTRIES)
def test_chunk_info_round_trips(entry: CiEntry) -> None:
    v1 = entry._replace(compressed=entry.compressed_size != entry.uncompressed_size)
    assert chunk_info.parse_v1(chunk_info.build_v1(entry)) == v1
    v2 = entry._replace(flags=int(entry.compressed))
    assert chunk_info.parse_v2(chunk_info.build_v2(entry)) == v2


@given(st.binary(min_size=24, max_size=24))
def test_chunk_info_keeps_every_bit(raw: bytes) -> None:
    entry = chunk_info.parse_v2(raw)
    assert chunk_info.build_v2(entry) == raw


@given(st.lists(NAMES, unique=True).map(sorted))
def test_directory_blocks_keep_order_and_fit(names: list[bytes]) -> None:
    entries: Any = [(name, None) for name in names]
    blocks = list(directory_blocks(entries))
    assert [name for block in blocks for name, _ in block] == names
    sizes = [sum(c.DIRENT.size + len(name) for name, _ in block) for block in blocks]
    assert all(size <= c.BLOCK_SIZE for size in sizes)
    for size, block in zip(sizes, blocks[1:], strict=False):
        assert size + c.DIRENT.size + len(block[0][0]) > c.BLOCK_SIZE
