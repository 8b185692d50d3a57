"""The table of contents at the end of a blob, and the tar headers that follow each of its sections.

Such a blob is a tar file back to front: a section, then its header. It is read from its end; the last header
names the table and gives its length.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from virtiofsd_rafs.blob import c_blob as c
from virtiofsd_rafs.blob import codecs
from virtiofsd_rafs.errors import BadImage, DigestMismatch
from virtiofsd_rafs.rafs.c_rafs_v6 import Compressor
from virtiofsd_rafs.rafs.records import Buffer, in_range

_COMPRESSORS = {
    c.TOC_FLAG_NONE: Compressor.NONE,
    c.TOC_FLAG_ZSTD: Compressor.ZSTD,
    c.TOC_FLAG_LZ4_BLOCK: Compressor.LZ4_BLOCK,
}
_FLAGS = {compressor: flag for flag, compressor in _COMPRESSORS.items()}
_TAIL = 4096  # the table with its header lies within so many bytes of the end


class Section(NamedTuple):
    """One section of a blob. ``digest`` is the sha256 of its uncompressed bytes.

    Except for image.blob: there it is the sha256 of the stored chunks and the tar header behind them.
    """

    name: bytes
    compressor: Compressor
    digest: bytes
    offset: int
    compressed_size: int
    uncompressed_size: int


def parse_toc(
    tail: Buffer, blob_size: int, *, size: int = 0, digest: bytes = bytes(32)
) -> dict[bytes, Section]:
    """The sections by name, from the last bytes of a blob of *blob_size* bytes.

    *tail* are the last min(4096, blob_size) bytes or more. *size* and *digest* are what the bootstrap
    promises about table and header (0 and zeros: nothing). Raises BadImage or DigestMismatch; the latter for
    whatever bytes are not the promised ones, since only they may be right when they are fetched again.
    """
    if size and any(digest):
        in_range(tail, "toc", len(tail) - size, size)
        if hashlib.sha256(tail[len(tail) - size :]).digest() != digest:
            raise _other_digest()
    in_range(tail, "toc", len(tail) - c.TAR_HEADER_SIZE, c.TAR_HEADER_SIZE)
    name, length = parse_tar_header(tail, len(tail) - c.TAR_HEADER_SIZE)
    if name != c.NAME_TOC:
        raise BadImage("toc", f"the blob ends with a header for {name!r}, not with a table of contents")
    total = length + c.TAR_HEADER_SIZE
    if length % c.TOC_ENTRY_SIZE or total > min(len(tail), _TAIL):
        raise BadImage("toc", f"{length} bytes are not a possible length")
    if size and size != total:
        raise BadImage("toc", f"{total} bytes instead of the {size} that the bootstrap promises")
    start = len(tail) - total
    if any(digest) and hashlib.sha256(tail[start:]).digest() != digest:
        raise _other_digest()
    sections: dict[bytes, Section] = {}
    for at in range(start, start + length, c.TOC_ENTRY_SIZE):
        section = _parse_entry(tail, at)
        # Builders are not of one mind where the data section starts: nothing but its name and digest counts.
        if section.name != c.NAME_BLOB and section.offset + section.compressed_size > blob_size:
            raise BadImage("toc entry", f"{section.name!r} ends beyond the blob", offset=at)
        if section.name in sections:
            raise BadImage("toc entry", f"{section.name!r} is there twice", offset=at)
        sections[section.name] = section
    return sections


def _other_digest() -> DigestMismatch:
    return DigestMismatch("the blob's table of contents does not have the digest that the bootstrap promises")


def _parse_entry(buf: Buffer, at: int) -> Section:
    raw = c.TOC_ENTRY.parse(buf, at)
    compressor = _COMPRESSORS.get(raw.flags)
    if compressor is None:
        raise c.TOC_ENTRY.bad("flags", f"{raw.flags:#x} does not name one compressor", at)
    name = raw.name.rstrip(b"\0")
    if not name or b"\0" in name:
        raise c.TOC_ENTRY.bad("name", f"{raw.name!r} is impossible", at)
    return Section(
        name, compressor, raw.digest, raw.compressed_offset, raw.compressed_size, raw.uncompressed_size
    )


def build_toc(sections: list[Section]) -> bytes:
    """The table and the header behind it."""
    table = b"".join(
        c.TOC_ENTRY.build(
            c.TocEntry(
                _FLAGS[s.compressor], 0, s.name, s.digest, s.offset, s.compressed_size, s.uncompressed_size
            )
        ).ljust(c.TOC_ENTRY_SIZE, b"\0")
        for s in sections
    )
    return table + build_tar_header(c.NAME_TOC, len(table))


def extract(section: Section, stored: Buffer, max_size: int) -> bytes:
    """The uncompressed content of *section* from the *stored* bytes of the blob; its digest is verified.

    Raises BadImage when it would be larger than *max_size*, DigestMismatch when the bytes are not the
    promised ones.
    """
    if section.uncompressed_size > max_size:
        raise BadImage(
            "toc entry", f"{section.name!r} has {section.uncompressed_size} bytes, above {max_size}"
        )
    if len(stored) != section.compressed_size:
        raise BadImage(
            "toc entry", f"{section.name!r}: {len(stored)} bytes instead of {section.compressed_size}"
        )
    try:
        content = codecs.decompress(bytes(stored), section.compressor, section.uncompressed_size)
    except BadImage as e:
        raise DigestMismatch(f"section {_printable(section)} is damaged: {e.message}") from e
    if hashlib.sha256(content).digest() != section.digest:
        raise DigestMismatch(f"section {_printable(section)} does not have the digest of the toc")
    return content


def _printable(section: Section) -> str:
    return section.name.decode("ascii", "replace")


def build_tar_header(name: bytes, size: int) -> bytes:
    """The 512-byte GNU header of a regular file: a name, a size, and the time 0."""
    header = bytearray(c.TAR_HEADER_SIZE)
    header[: len(name)] = name
    if size < 8**11:
        header[124:136] = b"%011o\0" % size
    else:
        # Base 256, as GNU tar writes sizes from 8 GiB on.
        header[124:136] = b"\x80" + size.to_bytes(11, "big")
    header[136:148] = b"00000000000\0"
    header[156] = ord("0")
    header[257:265] = b"ustar  \0"
    header[148:156] = b" " * 8
    header[148:156] = b"%07o\0" % sum(header)
    return bytes(header)


def parse_tar_header(buf: Buffer, offset: int) -> tuple[bytes, int]:
    """Name and size of the header at *offset*. Raises BadImage, also when its checksum is wrong."""
    in_range(buf, "tar header", offset, c.TAR_HEADER_SIZE)
    header = bytearray(buf[offset : offset + c.TAR_HEADER_SIZE])
    stored = bytes(header[148:156])
    header[148:156] = b" " * 8
    try:
        checksum = int(stored.strip(b" \0"), 8)
        digits = bytes(header[124:136])
        size = int.from_bytes(digits[1:], "big") if digits[0] == 0x80 else int(digits.strip(b" \0"), 8)
    except ValueError:
        raise BadImage("tar header", "a number is not octal", offset=offset) from None
    if checksum != sum(header) or size < 0:
        raise BadImage("tar header", "the checksum is wrong", offset=offset)
    return bytes(header[:100]).partition(b"\0")[0], size
