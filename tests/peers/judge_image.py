"""Has images of our builder judged by Nydus' own programs; see scripts/judge-image.

A tree with every kind of file is built with each compressor, digester and some chunk sizes. ``nydus-image
check`` must accept bootstrap and blob, and what ``nydusd`` serves over FUSE must equal the source. One thing
it cannot do: it shows an mtime of 0 as the time of the mount.
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

if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtiofsd_rafs.image.build import BuildResult

_MOUNT_TIMEOUT_S = 20


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
    return 1 if faults else 0


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
def _served(nydusd: str, result: BuildResult, mount: Path) -> Iterator[Path]:
    """The image mounted by nydusd at *mount*."""
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
