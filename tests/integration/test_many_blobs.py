"""The most blobs that an image can have, served: every one needs descriptors in three processes."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from guest.daemon import Daemon
from tests.integration.conftest import kill
from tests.property.test_parity_made_images import Maker
from virtiofsd_rafs.native.frontend import Frontend
from virtiofsd_rafs.native.session import Session
from virtiofsd_rafs.rafs import c_rafs_v6 as c

if TYPE_CHECKING:
    from pathlib import Path

N_BLOBS = 255


def make_image(folder: Path) -> list[bytes]:
    """A bootstrap of 255 files, each with one chunk in its own blob and one in the next; their contents."""
    maker = Maker(n_blobs=N_BLOBS)
    blobs = [bytearray(8192 + 100) for _ in range(N_BLOBS)]
    entries, files = [], []
    for number in range(N_BLOBS):
        following = (number + 1) % N_BLOBS
        indexes = maker.chunk(number, 4096, 0) + maker.chunk(following, 100, 8192)
        node = maker.inode(0o100644, indexes, layout=c.LAYOUT_CHUNK_BASED, size=4196)
        entries.append((b"%d" % number, node, 1))
        head, tail = bytes([number]) * 4096, bytes([number ^ 0xFF]) * 100
        blobs[number][:4096] = head
        blobs[following][8192:] = tail
        files.append(head + tail)
    maker.chunks = [
        record._replace(digest=hashlib.sha256(stored(blobs[record.blob_index], record)).digest())
        for record in maker.chunks
    ]
    (folder / "image.boot").write_bytes(maker.finish(entries))
    for number, blob in enumerate(blobs):
        (folder / f"{number:064x}").write_bytes(blob)
    return files


def stored(blob: bytearray, record: c.ChunkRecord) -> bytes:
    """The bytes of a chunk in its blob, which are stored as they are."""
    at = record.compressed_offset
    return bytes(blob[at : at + record.uncompressed_size])


def test_255_blobs_are_served(short_dir: Path) -> None:
    files = make_image(short_dir)
    options = ["--blob-dir", str(short_dir), "--cache-dir", str(short_dir / "cache")]
    with Daemon(str(short_dir / "image.boot"), short_dir, short_dir / "log", options) as daemon:
        daemon.wait_ready()
        with Frontend.connect(daemon.socket) as fe:
            fe.start()
            fe.init()
            session = Session.attach(daemon.process.pid)
            for round_ in range(2):
                for number, content in enumerate(files):
                    assert fe.read(fe.resolve(str(number)).nodeid, 0, 8192) == content
                if round_ == 0:
                    # Its successor inherits and opens all of it again.
                    kill(session.status()["processes"]["worker"]["pid"])
            assert session.status()["processes"]["worker"]["generation"] == 2
            assert fe.check() == {}
