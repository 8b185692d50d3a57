"""Builds a RAFS v6 image from a directory: a bootstrap and one data blob.

The same tree gives the same bytes, whatever the number of threads, on any machine with the same version of
the compressor. Rust reads the tree and moves the bytes; here is decided what is built and what the results
are called.
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

import attrs

from virtiofsd_rafs.errors import BuildError, ConfigError, OutputError
from virtiofsd_rafs.image._blob_tail import finish_blob
from virtiofsd_rafs.image._bootstrap_head import build_head, metadata_offset
from virtiofsd_rafs.native.builder import Builder, Progress, printable
from virtiofsd_rafs.rafs import c_rafs_v6 as c

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

BOOTSTRAP_NAME = "image.boot"
DEFAULT_CHUNK_SIZE = 1 << 20
_MAX_JOBS = 1024


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
    n_prefetch: int = 0  # entries of the prefetch table
    prefetch_missing: tuple[str, ...] = ()  # listed, but not in the tree
    jobs: int = 1
    content_s: float = 0.0  # reading the tree and writing the chunks
    bootstrap_s: float = 0.0
    sync_s: float = 0.0  # until the disk had both files
    total_s: float = 0.0


def build_image(
    source_dir: Path | str,
    out_dir: Path | str,
    *,
    compressor: str = "zstd",
    digester: str = "blake3",
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    jobs: int | None = None,
    prefetch: Iterable[tuple[bytes, int, int | None]] = (),
    watch: Callable[[Progress], None] | None = None,
) -> BuildResult:
    """Writes ``image.boot`` and the blob, named by its sha256, into *out_dir*, which is made if missing.

    *compressor* is zstd, lz4_block, gzip or none; *digester* blake3 or sha256; *chunk_size* a power of two
    from 4 KiB to 16 MiB. With none, bootstrap and blob can also be mounted by the kernel's EROFS. Both files
    appear whole or not at all. *jobs* threads compress, by default one per CPU.

    Chunks stand in the blob in the order of the tree, those of *prefetch* before them in the order of that
    list: paths inside the image, offsets and lengths (None: to the end); a directory stands for all files in
    it. The image's prefetch table names what is listed. *watch* is called now and then with the progress.

    Raises ConfigError, BuildError (with the path and the reason), or OutputError for *out_dir*.
    """
    start = time.monotonic()
    source, out = Path(source_dir).resolve(), Path(out_dir).resolve()
    kinds = _algorithms(compressor, digester)
    if not c.CHUNK_SIZE_MIN <= chunk_size <= c.CHUNK_SIZE_MAX or chunk_size.bit_count() != 1:
        raise ConfigError(f"chunk size {chunk_size} is not a power of two from 4 KiB to 16 MiB")
    if out == source or source in out.parents:
        raise ConfigError(f"the output {out} lies inside the source", remedy="choose another folder with -o")
    if not source.is_dir():
        raise BuildError(str(source), "not a directory" if source.exists() else "there is no such directory")
    n_jobs = min(jobs or len(os.sched_getaffinity(0)), _MAX_JOBS)

    with (
        _output(out),
        _new_file(out) as (blob_file, keep_blob),
        closing(
            Builder(source, out, chunk_size=chunk_size, compressor=kinds[0], digester=kinds[1], jobs=n_jobs)
        ) as builder,
    ):
        listed = [(entry[0], builder.prefetch(*entry)) for entry in prefetch]
        totals = builder.run(blob_file.fileno(), watch)
        stored = time.monotonic()
        record = None
        if totals.n_chunks:
            record = finish_blob(builder, chunk_size=chunk_size, compressor=kinds[0], digester=kinds[1])
        n_prefetch = totals.n_prefetch if record else 0
        plan = builder.layout(metadata_offset(has_blob=record is not None, n_prefetch=n_prefetch))
        head = build_head(
            size=plan.size,
            chunk_table_offset=plan.chunk_table_offset,
            n_inodes=totals.n_inodes,
            root_nid=plan.root_nid,
            has_xattr=totals.has_xattr,
            chunk_size=chunk_size,
            compressor=kinds[0],
            digester=kinds[1],
            record=record,
            prefetch_nids=builder.prefetch_nids() if record else (),
        )
        with _new_file(out) as (bootstrap_file, keep_bootstrap):
            builder.write(head, bootstrap_file.fileno())
            written = time.monotonic()
            blob_id = record.blob_id.decode() if record else None
            blob = keep_blob(blob_id) if blob_id else None
            bootstrap_path = keep_bootstrap(BOOTSTRAP_NAME)
    end = time.monotonic()
    return BuildResult(
        bootstrap=bootstrap_path,
        blob=blob,
        blob_id=blob_id,
        bootstrap_size=plan.size,
        blob_size=record.compressed_size if record else 0,
        n_inodes=totals.n_inodes,
        n_chunks=totals.n_chunks,
        n_duplicate_chunks=totals.n_duplicates,
        content_size=totals.content_size,
        n_prefetch=n_prefetch,
        prefetch_missing=tuple(dict.fromkeys(printable(path) for path, found in listed if not found)),
        jobs=n_jobs,
        content_s=stored - start,
        bootstrap_s=written - stored,
        sync_s=end - written,
        total_s=end - start,
    )


def _algorithms(compressor: str, digester: str) -> tuple[c.Compressor, c.Digester]:
    try:
        return c.Compressor[compressor.upper()], c.Digester[digester.upper()]
    except KeyError as e:
        raise ConfigError(f"there is no compressor or digester named {e.args[0].lower()}") from None


@contextmanager
def _output(folder: Path) -> Iterator[None]:
    """Makes *folder*; what the system refuses there becomes an OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OutputError:
        raise
    except OSError as e:
        # mkdir says of a file in its place that it exists.
        code = errno.ENOTDIR if isinstance(e, FileExistsError) else e.errno
        raise OutputError(folder, os.strerror(code) if code else str(e)) from e


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
