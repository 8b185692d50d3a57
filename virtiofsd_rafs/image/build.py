"""Builds a RAFS v6 image from a directory: a bootstrap and one data blob.

Plain and deterministic: the same tree gives the same bytes, on any machine with the same compressor version.
Memory grows with the number of files and chunks, never with their size.
"""

from __future__ import annotations

import errno
import os
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

import attrs

from virtiofsd_rafs.errors import ConfigError
from virtiofsd_rafs.image._blob_writer import BlobFull, BlobWriter
from virtiofsd_rafs.image._bootstrap_writer import BootstrapWriter
from virtiofsd_rafs.image._scan import SourceInode, in_order, scan
from virtiofsd_rafs.rafs import c_rafs_v6 as c

if TYPE_CHECKING:
    import io
    from collections.abc import Callable, Iterator

BOOTSTRAP_NAME = "image.boot"
DEFAULT_CHUNK_SIZE = 1 << 20


@attrs.frozen
class BuildResult:
    """What a build wrote. ``blob`` and ``blob_id`` are None when no file has any content. Sizes in bytes."""

    bootstrap: Path
    blob: Path | None
    blob_id: str | None
    bootstrap_size: int
    blob_size: int
    n_inodes: int
    n_chunks: int
    n_duplicate_chunks: int
    content_size: int  # of all files, each hard link counted once


def build_image(
    source_dir: Path | str,
    out_dir: Path | str,
    *,
    compressor: str = "zstd",
    digester: str = "blake3",
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> BuildResult:
    """Writes ``image.boot`` and the blob, named by its sha256, into *out_dir*, which is made if missing.

    *compressor* is zstd, lz4_block, gzip or none; *digester* blake3 or sha256; *chunk_size* a power of two
    from 4 KiB to 16 MiB. With none, bootstrap and blob can also be mounted by the kernel's EROFS. Both files
    appear whole or not at all.

    Raises ConfigError, BuildError (with the path and the reason), or OSError for *out_dir*.
    """
    source, out = Path(source_dir).resolve(), Path(out_dir).resolve()
    kinds = _algorithms(compressor, digester)
    if not c.CHUNK_SIZE_MIN <= chunk_size <= c.CHUNK_SIZE_MAX or chunk_size.bit_count() != 1:
        raise ConfigError(f"chunk size {chunk_size} is not a power of two from 4 KiB to 16 MiB")
    if out == source or source in out.parents:
        raise ConfigError(f"the output {out} lies inside the source", remedy="choose another folder with -o")

    root = scan(source)
    out.mkdir(parents=True, exist_ok=True)
    with _new_file(out) as (blob_file, keep_blob):
        writer = BlobWriter(blob_file, chunk_size=chunk_size, compressor=kinds[0], digester=kinds[1])
        content_size = sum(
            _store(source, inode, writer, chunk_size) for inode in in_order(root) if inode.is_reg
        )
        record = writer.finish() if writer.chunks else None
        bootstrap = BootstrapWriter(
            root, chunk_size=chunk_size, compressor=kinds[0], digester=kinds[1], blob=writer, record=record
        )
        with _new_file(out) as (bootstrap_file, keep_bootstrap):
            bootstrap.write(bootstrap_file)
            blob_id = record.blob_id.decode() if record else None
            blob = keep_blob(blob_id) if blob_id else None
            bootstrap_path = keep_bootstrap(BOOTSTRAP_NAME)
    return BuildResult(
        bootstrap=bootstrap_path,
        blob=blob,
        blob_id=blob_id,
        bootstrap_size=bootstrap.size,
        blob_size=record.compressed_size if record else 0,
        n_inodes=bootstrap.n_inodes,
        n_chunks=len(writer.chunks),
        n_duplicate_chunks=writer.n_duplicates,
        content_size=content_size,
    )


def _algorithms(compressor: str, digester: str) -> tuple[c.Compressor, c.Digester]:
    try:
        return c.Compressor[compressor.upper()], c.Digester[digester.upper()]
    except KeyError as e:
        raise ConfigError(f"there is no compressor or digester named {e.args[0].lower()}") from None


def _store(source: Path, inode: SourceInode, writer: BlobWriter, chunk_size: int) -> int:
    """Adds the content of a file to the blob, chunk by chunk, and returns its size."""
    size = 0
    path = os.path.join(os.fsencode(source), inode.path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        # Unbuffered: the chunk is the buffer.
        with open(fd, "rb", buffering=0) as file:
            for data in _chunks(file, inode.st.st_size, chunk_size):
                inode.chunks.append(writer.add(data, size))
                size += len(data)
            after = os.fstat(fd)
    except BlobFull as e:
        raise inode.fail(str(e), remedy="use a larger --chunk-size or split the tree") from e
    except OSError as e:
        raise inode.fail(os.strerror(e.errno or 0)) from e
    if size != inode.st.st_size or (after.st_size, after.st_mtime_ns) != (size, inode.st.st_mtime_ns):
        raise inode.fail("the file changed while the image was built")
    return size


def _chunks(file: io.FileIO, size: int, chunk_size: int) -> Iterator[bytes]:
    """The content of *file* in pieces of *chunk_size* bytes; ends early where the file does."""
    zeros = b""
    data_start = 0  # no data in the file lies between the position and here
    for position in range(0, size, chunk_size):
        length = min(chunk_size, size - position)
        if data_start < position + length:
            data_start = _next_data(file.fileno(), position, size)
        if data_start >= position + length:
            # A hole is stored like the zeros that it reads as, but need not be read.
            if len(zeros) != length:
                zeros = bytes(length)
            yield zeros
            continue
        file.seek(position)
        yield _read(file, length)


def _next_data(fd: int, position: int, size: int) -> int:
    """Where the next data at or behind *position* starts; *size* when there is none."""
    try:
        return os.lseek(fd, position, os.SEEK_DATA)
    except OSError as e:
        if e.errno == errno.ENXIO:
            return size
        return position  # the file system cannot tell


def _read(file: io.FileIO, length: int) -> bytes:
    """The next *length* bytes, fewer only at the end of the file."""
    data = file.read(length)
    while 0 < len(data) < length and (more := file.read(length - len(data))):
        data += more
    return data


@contextmanager
def _new_file(folder: Path) -> Iterator[tuple[IO[bytes], Callable[[str], Path]]]:
    """A new file in *folder*, and the function that names it; without a name it is removed."""
    fd, temporary = tempfile.mkstemp(prefix=".build-", dir=folder)
    with open(fd, "wb") as file:

        def keep(name: str) -> Path:
            file.flush()
            os.fsync(file.fileno())
            os.fchmod(file.fileno(), 0o644)
            return Path(temporary).rename(folder / name)

        try:
            yield file, keep
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
