"""The bootstrap layer: a tar, mostly gzip-compressed, with ``image/image.boot`` and the blobs' chunk maps in
it.

Pure: bytes in, bytes out. Nothing is written anywhere, so no name in the archive can lead out of a directory;
only three kinds of names are looked at, and everything else is skipped by its size.

Source: POSIX.1-2017 pax (ustar header, extended headers), GNU tar's ``L`` entries; RAFS: OCI packaging of a
bootstrap.
"""

from __future__ import annotations

import io
import re
import zlib
from typing import TYPE_CHECKING, BinaryIO

import attrs

from virtiofsd_rafs.errors import BadImage
from virtiofsd_rafs.registry.manifest import MAX_BOOTSTRAP_LEN

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

BOOTSTRAP_NAME = b"image/image.boot"
LEGACY_BOOTSTRAP_NAME = b"image.boot"
_META_NAME = re.compile(rb"image/([0-9a-f]{64})\.blob\.meta")

_BLOCK = 512
_PIECE = 1 << 20
# zlib copies what follows a gzip member: with many members in large pieces that would be all there is to do.
_GZIP_PIECE = 16 << 10
_MAX_HEADER_ENTRY = 1 << 20
_MAX_ENTRIES = 4096
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"


@attrs.frozen
class LayerFiles:
    """What a bootstrap layer holds. ``blob_metas``: blob id -> chunk map as nydusd's cache file has it."""

    bootstrap: bytes
    blob_metas: Mapping[str, bytes]


def decompress(source: BinaryIO, *, limit: int = MAX_BOOTSTRAP_LEN) -> bytes:
    """The tar in *source*, which is gzip (one or more members), zstd or plain by its first bytes.

    Raises BadImage when it is damaged or longer than *limit* bytes; memory grows with what really comes out.
    """
    magic = source.read(4)
    source.seek(-len(magic), io.SEEK_CUR)
    if magic[:2] == _GZIP_MAGIC:
        pieces = _gunzip(source)
    elif magic == _ZSTD_MAGIC:
        pieces = _unzstd(source)
    else:
        pieces = iter(lambda: source.read(_PIECE), b"")
    out = bytearray()
    for piece in pieces:
        if len(out) + len(piece) > limit:
            raise BadImage("bootstrap layer", f"longer than {limit} bytes when it is decompressed")
        out += piece
    return bytes(out)


def extract_layer(tar: bytes) -> LayerFiles:
    """The bootstrap and the chunk maps in *tar*. A later entry of the same name replaces an earlier one, as
    in tar.

    Raises BadImage when the archive is malformed or there is no bootstrap in it.
    """
    found: dict[bytes, memoryview] = {}
    for name, content in _files(memoryview(tar)):
        found[name] = content
    bootstrap = found.get(BOOTSTRAP_NAME, found.get(LEGACY_BOOTSTRAP_NAME))
    if bootstrap is None:
        raise BadImage("bootstrap layer", f"no {BOOTSTRAP_NAME.decode()} in it")
    metas = {
        match[1].decode(): bytes(content)
        for name, content in found.items()
        if (match := _META_NAME.fullmatch(name)) is not None
    }
    return LayerFiles(bytes(bootstrap), metas)


def _gunzip(source: BinaryIO) -> Iterator[bytes]:
    inflater = zlib.decompressobj(wbits=31)
    pending = b""
    while True:
        data = pending or source.read(_GZIP_PIECE)
        if not data:
            if not inflater.eof:
                raise BadImage("bootstrap layer", "the gzip stream ends early")
            return
        if inflater.eof:
            if not data.strip(b"\0"):
                pending = b""
                continue  # padding after the last member
            inflater = zlib.decompressobj(wbits=31)
        try:
            piece = inflater.decompress(data, _PIECE)
        except zlib.error as e:
            raise BadImage("bootstrap layer", "the gzip stream is damaged") from e
        pending = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
        if piece:
            yield piece


def _unzstd(source: BinaryIO) -> Iterator[bytes]:
    import zstandard  # few images need it

    try:
        with zstandard.ZstdDecompressor().stream_reader(source, read_across_frames=True) as reader:
            while piece := reader.read(_PIECE):
                yield piece
    except zstandard.ZstdError as e:
        raise BadImage("bootstrap layer", "the zstd stream is damaged") from e


def _files(tar: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Name (without a leading ``./``) and content of each regular file that may interest us."""
    at = 0
    long_name: bytes | None = None
    pax_size: int | None = None
    for _ in range(_MAX_ENTRIES):
        header = bytes(tar[at : at + _BLOCK])
        if not header.strip(b"\0"):
            return  # the end: zero blocks, or nothing at all
        if len(header) < _BLOCK:
            raise BadImage("bootstrap layer", "the tar ends inside a header", offset=at)
        _check_sum(header, at)
        kind = header[156:157]
        size = _number(header[124:136], at)
        if kind not in (b"x", b"g", b"L", b"K") and pax_size is not None:
            size = pax_size
        start, at = at + _BLOCK, at + _BLOCK + -(-size // _BLOCK) * _BLOCK
        if start + size > len(tar):
            raise BadImage("bootstrap layer", "the tar ends inside a file", offset=start)
        if kind in (b"x", b"g", b"L", b"K"):
            if size > _MAX_HEADER_ENTRY:
                raise BadImage("bootstrap layer", "an extended header is too long", offset=start)
            content = bytes(tar[start : start + size])
            if kind == b"L":
                long_name = content.rstrip(b"\0")
            elif kind == b"x":
                records = _pax(content, start)
                long_name = records.get(b"path", long_name)
                if b"size" in records:
                    pax_size = _decimal(records[b"size"], start)
            continue
        name = long_name if long_name is not None else _name(header)
        long_name, pax_size = None, None
        if kind in (b"0", b"\0", b"7"):
            yield name.removeprefix(b"./"), tar[start : start + size]
    raise BadImage("bootstrap layer", f"more than {_MAX_ENTRIES} entries")


def _name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _check_sum(header: bytes, at: int) -> None:
    stored = _number(header[148:156], at)
    if sum(header) - sum(header[148:156]) + 8 * 0x20 != stored:
        raise BadImage("bootstrap layer", "a tar header's checksum is wrong", offset=at)


def _number(field: bytes, at: int) -> int:
    if field[0] & 0x80:  # GNU's base-256 form; its sign bit makes sizes that are no sizes
        value = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        if field[0] != 0x80 or value >= 1 << 63:
            raise BadImage("bootstrap layer", "a number in a tar header is out of range", offset=at)
        return value
    text = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]*", text):
        raise BadImage("bootstrap layer", "a number in a tar header is not octal", offset=at)
    return int(text or b"0", 8)


def _decimal(text: bytes, at: int) -> int:
    if not re.fullmatch(rb"[0-9]{1,18}", text):
        raise BadImage("bootstrap layer", "a size in a pax header is no number", offset=at)
    return int(text)


def _pax(content: bytes, offset: int) -> dict[bytes, bytes]:
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(content):
        match = re.compile(rb"([0-9]{1,7}) ").match(content, at)
        end = at + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            raise BadImage("bootstrap layer", "a pax header is malformed", offset=offset + at)
        key, _, value = content[match.end() : end - 1].partition(b"=")
        records[key] = value
        at = end
    return records


def pack_layer(bootstrap: bytes, blob_metas: Mapping[str, bytes]) -> bytes:
    """The tar of a bootstrap layer: ``image/``, ``image/image.boot``, then the chunk maps by blob id.

    Times and owners are zero, so that the same bootstrap gives the same layer.
    """
    out = bytearray(_header(b"image/", 0, 0o755, b"5"))
    files = [(BOOTSTRAP_NAME, bootstrap)]
    files += [(f"image/{blob_id}.blob.meta".encode(), blob_metas[blob_id]) for blob_id in sorted(blob_metas)]
    for name, content in files:
        out += _header(name, len(content), 0o444, b"0")
        out += content
        out += bytes(-len(content) % _BLOCK)
    return bytes(out + bytes(2 * _BLOCK))


def _header(name: bytes, size: int, mode: int, kind: bytes) -> bytes:
    """A ustar header; *name* fits in its first field, and a bootstrap's size in eleven octal digits."""
    header = bytearray(_BLOCK)
    header[0 : len(name)] = name
    header[100:124] = b"%07o\0%07o\0%07o\0" % (mode, 0, 0)
    header[124:148] = b"%011o\0%011o\0" % (size, 0)
    header[148:156] = b" " * 8
    header[156:157] = kind
    header[257:265] = b"ustar\x0000"
    header[329:345] = b"%07o\0%07o\0" % (0, 0)
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)
