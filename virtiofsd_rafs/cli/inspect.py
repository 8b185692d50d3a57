"""``virtiofsd-rafs inspect``: shows what an image contains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import click

from virtiofsd_rafs.cli._image_options import ONE_SHOT_DEADLINE_S, image_options

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from virtiofsd_rafs.backends.config import BackendConfig, RegistryAccess


_SHOWN_PREFETCH = 5


@click.command()
@click.argument("image")
@click.argument("path", required=False)
@image_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--dump", "as_dump", is_flag=True, help="Print offset, field and value of the whole bootstrap.")
def inspect(
    image: str,
    path: str | None,
    blob_dir: Path | None,
    cache_dir: Path | None,
    pull: Literal["missing", "always", "never"],
    access: RegistryAccess | None,
    backend: BackendConfig | None,  # no blob is read; as to `serve` and `check` all the same
    as_json: bool,
    as_dump: bool,
) -> None:
    """Show superblock, blobs, counts and compression of IMAGE, or the directory or file at PATH in it.

    IMAGE is a bootstrap file or host/repository:tag. A directory is listed, of a file its chunks are shown.
    Only the bootstrap is read.

    \b
    Example: virtiofsd-rafs inspect image/image.boot /etc
    """
    import asyncio
    import os

    from virtiofsd_rafs.errors import ConfigError
    from virtiofsd_rafs.image import _summary
    from virtiofsd_rafs.image.resolve import resolve_image
    from virtiofsd_rafs.rafs.v6 import Tree
    from virtiofsd_rafs.rafs.walk import resolve

    resolved = asyncio.run(
        resolve_image(
            image,
            cache_dir=cache_dir,
            blob_dir=blob_dir,
            pull=pull,
            access=access,
            deadline=ONE_SHOT_DEADLINE_S,
        )
    )
    tree = Tree.parse(resolved.bootstrap)
    if as_dump:
        from virtiofsd_rafs.rafs.dump import dump

        for line in dump(tree):
            click.echo(line)
        return
    if path is None:
        summary: Any = _summary.summarize(tree)
        summary["manifest_digest"] = resolved.manifest_digest
        _echo(summary, _summary_lines(summary), as_json=as_json)
        return
    raw = os.fsencode(path)
    inode = resolve(tree, raw)
    if inode is None:
        raise ConfigError(f"the image has no {path}")
    if inode.is_dir:
        listing = _summary.list_directory(tree, inode)
        _echo(listing, map(_list_line, listing), as_json=as_json)
    else:
        found = _summary.describe(tree, raw, inode)
        _echo(found, _file_lines(found), as_json=as_json)


def _echo(data: Any, lines: Iterable[str], *, as_json: bool) -> None:
    if as_json:
        import json

        click.echo(json.dumps(data, indent=2))
        return
    for line in lines:
        # Names need not be UTF-8: their odd bytes leave as they came.
        click.echo(line.encode("utf-8", "surrogateescape"))


def _summary_lines(s: dict[str, Any]) -> Iterator[str]:
    yield f"RAFS v6, {s['compressor']}, {s['digester']}, chunks of {s['chunk_size']} bytes"
    yield f"flags      {' '.join(s['flags'])}"
    yield f"bootstrap  {s['bootstrap_size']} bytes"
    kinds = ("files", "directories", "symlinks", "devices", "fifos", "sockets")
    yield f"inodes     {s['inodes']} ({', '.join(f'{s[kind]} {kind}' for kind in kinds if s[kind])})"
    yield f"names      {s['names']}"
    ratio = f", ratio {s['compression_ratio']}" if s["compression_ratio"] else ""
    stored = f"{s['chunks']} chunks, stored in {s['stored_bytes']}{ratio}"
    yield f"content    {s['content_size']} bytes in {stored}"
    if s["prefetch"]:
        shown = [each["path"] or f"nid {each['nid']}" for each in s["prefetch"][:_SHOWN_PREFETCH]]
        more = len(s["prefetch"]) - len(shown)
        yield f"prefetch   {', '.join(shown)}{f' and {more} more' if more else ''}"
    for blob in s["blobs"]:
        yield f"blob {blob['index']}     {blob['id']}"
        yield f"           {blob['compressed_size']} bytes, {blob['chunks']} chunks"
        yield f"           {' '.join(blob['features'])}"


def _list_line(entry: dict[str, Any]) -> str:
    """One line as of ls -l."""
    size = ", ".join(map(str, entry["device"])) if "device" in entry else entry["size"]
    target = f" -> {entry['target']}" if "target" in entry else ""
    return (
        f"{entry['mode_text']} {entry['nlink']:>3} {entry['uid']:>5} {entry['gid']:>5} {size:>12}"
        f" {_time(entry)} {entry['name']}{target}"
    )


def _file_lines(s: dict[str, Any]) -> Iterator[str]:
    yield f"{s['path']}{' -> ' + s['target'] if 'target' in s else ''}"
    owner = f"{s['uid']}:{s['gid']}"
    yield f"{s['mode_text']} nid {s['nid']}, {s['nlink']} links, owner {owner}, {s['size']} bytes"
    yield f"modified {_time(s)}"
    if "device" in s:
        yield f"device {s['device'][0]}, {s['device'][1]}"
    for name, value in s["xattrs"].items():
        yield f"{name} = {bytes.fromhex(value)!r}"
    for chunk in s.get("chunks", ()):
        yield (
            f"blob {chunk['blob']} chunk {chunk['chunk']}: {chunk['length']} bytes, stored"
            f" {chunk['compressed_size']} at {chunk['compressed_offset']}, {chunk['digest']}"
        )


def _time(entry: dict[str, Any]) -> str:
    """ISO 8601 in UTC, or seconds where the calendar ends."""
    import datetime

    try:
        moment = datetime.datetime.fromtimestamp(entry["mtime"], datetime.UTC)
    except (OverflowError, ValueError, OSError):
        return f"{entry['mtime']}.{entry['mtime_nsec']:09}"
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{entry['mtime_nsec']:09}Z"
