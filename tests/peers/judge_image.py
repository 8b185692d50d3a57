"""Has images of our builder judged by Nydus' own programs; see scripts/judge-image.

A tree with every kind of file is built with each compressor, digester and some chunk sizes. ``nydus-image
check`` must accept bootstrap and blob, and what ``nydusd`` serves over FUSE must equal the source. One thing
it cannot do: it shows an mtime of 0 as the time of the mount.

An image with a prefetch table is judged as well: ``nydus-image inspect`` must show the listed paths, and
``nydusd`` fetch what they mean before anybody reads (and not everything: it reads ahead a little).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.source_trees import make_varied_tree, read_directory
from virtiofsd_rafs.image.build import build_image
from virtiofsd_rafs.rafs.v6 import Tree
from virtiofsd_rafs.rafs.walk import walk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtiofsd_rafs.image.build import BuildResult
    from virtiofsd_rafs.rafs.v6 import ChunkRef

_MOUNT_TIMEOUT_S = 20
_PREFETCH_TIMEOUT_S = 10
_LISTED = [b"/a/random", b"/own", b"/a/text"]


def main() -> int:
    """The exit code: 0 when every judge agrees."""
    parser = argparse.ArgumentParser(prog="scripts/judge-image", description=__doc__)
    parser.add_argument("--nydus-image", required=True, help="the program nydus-image")
    parser.add_argument("--nydusd", help="the program nydusd; without it nothing is mounted")
    args = parser.parse_args()
    faults = 0
    with tempfile.TemporaryDirectory() as tmp:
        work = Path(tmp)
        (work / "source").mkdir()
        make_varied_tree(work / "source")
        source = read_directory(work / "source")
        kinds = product(("zstd", "lz4_block", "gzip", "none"), ("blake3", "sha256"), (4096, 1 << 20))
        for number, (compressor, digester, chunk_size) in enumerate(kinds):
            result = build_image(
                work / "source",
                work / str(number),
                compressor=compressor,
                digester=digester,
                chunk_size=chunk_size,
            )
            verdicts = [_check(args.nydus_image, result)]
            if args.nydusd:
                with _served(args.nydusd, result, work / f"served{number}") as mount:
                    verdicts.append(_compare(source, read_directory(mount)))
            said = [verdict for verdict in verdicts if verdict]
            faults += len(said)
            print(f"{compressor:9} {digester:6} chunks of {chunk_size:7}: {'; '.join(said) or 'accepted'}")
        said = _judge_prefetch(args.nydus_image, args.nydusd, work)
        faults += len(said)
        print(f"{'prefetch table':39} {'; '.join(said) or 'accepted'}")
    return 1 if faults else 0


def _judge_prefetch(nydus_image: str, nydusd: str | None, work: Path) -> list[str]:
    """What the judges have against an image with a prefetch table."""
    entries = [(path, 0, None) for path in _LISTED]
    result = build_image(work / "source", work / "listed", prefetch=entries)
    said = [verdict] if (verdict := _check(nydus_image, result)) else []
    shown = subprocess.run(
        [nydus_image, "inspect", "-B", result.bootstrap, "-R", "prefetch"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    found = [path.rstrip("/") for entry in json.loads(shown) for path in entry["path"]]
    if found != [path.decode() for path in _LISTED]:
        said.append(f"nydus-image shows {found}")
    if nydusd:
        tree = Tree.parse(result.bootstrap.read_bytes())
        listed = [
            ref
            for path, inode in walk(tree)
            if inode.is_reg and path.startswith(tuple(_LISTED))
            for ref in tree.chunks(inode)
        ]
        with _served(nydusd, result, work / "prefetched", prefetch=True) as mount:
            (cache,) = mount.with_suffix(".cache").glob("*.blob.data")
            end = time.monotonic() + _PREFETCH_TIMEOUT_S
            while (missing := _not_stored(cache, listed)) and time.monotonic() < end:
                time.sleep(0.05)
            time.sleep(1)  # what is too much would come now
            if missing:
                said.append(f"nydusd: {missing} of {len(listed)} chunks were not prefetched")
            if cache.stat().st_blocks * 512 >= tree.blobs[0].uncompressed_size:
                said.append("nydusd: prefetched everything")
    return said


def _not_stored(cache: Path, refs: list[ChunkRef]) -> int:
    """How many of the chunks are holes of the cache file."""
    with cache.open("rb") as file:
        found = [_data_at(file.fileno(), ref.data_offset) for ref in refs]
    return found.count(False)


def _data_at(fd: int, offset: int) -> bool:
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) == offset
    except OSError:  # no data behind it
        return False


def _check(nydus_image: str, result: BuildResult) -> str:
    """Empty, or what nydus-image has against the image."""
    done = subprocess.run(
        [nydus_image, "check", "-B", result.bootstrap, "-D", result.bootstrap.parent, "-v"],
        capture_output=True,
        text=True,
        check=False,
    )
    accepted = done.returncode == 0 and f"{result.n_chunks}, features" in done.stdout
    return "" if accepted else f"nydus-image: {done.stderr[-1000:] or done.stdout[-1000:]}"


@contextmanager
def _served(nydusd: str, result: BuildResult, mount: Path, *, prefetch: bool = False) -> Iterator[Path]:
    """The image mounted by nydusd at *mount*; its cache lies beside that."""
    folder = str(result.bootstrap.parent)
    cache = mount.with_suffix(".cache")
    for path in (mount, cache):
        path.mkdir()
    config = {
        "device": {
            "backend": {"type": "localfs", "config": {"dir": folder}},
            "cache": {"type": "blobcache", "config": {"work_dir": str(cache)}},
        },
        "mode": "direct",
        "digest_validate": False,
        "enable_xattr": True,
        "fs_prefetch": {"enable": prefetch, "threads_count": 2, "prefetch_all": False},
    }
    mount.with_suffix(".json").write_text(json.dumps(config))
    daemon = subprocess.Popen(
        [
            *(nydusd, "fuse", "--config", mount.with_suffix(".json"), "--bootstrap", result.bootstrap),
            *("--mountpoint", mount, "--log-level", "error", "--rlimit-nofile", "0"),
        ]
    )
    try:
        end = time.monotonic() + _MOUNT_TIMEOUT_S
        while not os.path.ismount(mount):
            if daemon.poll() is not None or time.monotonic() > end:
                sys.exit(f"{nydusd} does not mount {result.bootstrap}")
            time.sleep(0.05)
        yield mount
    finally:
        daemon.terminate()
        daemon.wait()
        if os.path.ismount(mount):
            subprocess.run(["umount", mount], check=True)


def _compare(source: dict[bytes, Any], served: dict[bytes, Any]) -> str:
    """Empty, or the first path where the trees differ."""
    if source.keys() != served.keys():
        return f"nydusd: other names: {sorted(source.keys() ^ served.keys())[:3]}"
    for path, entry in source.items():
        found = dict(served[path])
        if entry["mtime"] == (0, 0):
            found["mtime"] = entry["mtime"]
        if found != entry:
            fields = [field for field in entry if found.get(field) != entry[field]]
            return f"nydusd: {path!r} differs in {fields}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
