"""The classic way, for comparison: download the whole image, unpack it, serve the directory with virtiofsd.

The image is the same root directory as an OCI image of gzipped tar layers, in the same registry behind the
same link. It is pulled as container engines do it: up to three downloads at once, each verified while it
comes, and each layer unpacked as soon as it and all before it are there.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import subprocess
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import attrs

from guest.daemon import BackEnd
from guest.kit import VAR

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

VIRTIOFSD = VAR / "virtiofsd" / "virtiofsd"
# As container engines have it by default.
CONNECTIONS = 3
# Layers that the image is divided into: enough to keep the connections busy and to unpack meanwhile.
LAYERS = 4
# Of gzip, as image builders use it.
_LEVEL = 6
_LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
_PIECE = 256 * 1024


class PullError(Exception):
    """The image cannot be made, pushed, pulled or unpacked; the text says why."""


class Virtiofsd(BackEnd):
    """virtiofsd on a directory, without sandbox and with all caching that it offers."""

    def __init__(self, program: str | Path, tree: Path, work: Path, log: Path | None = None) -> None:
        work.mkdir(parents=True, exist_ok=True)
        socket = work / "vhost.sock"
        socket.unlink(missing_ok=True)  # of an earlier one: it would be taken for this one's
        argv = [str(program), f"--socket-path={socket}", f"--shared-dir={tree}", "--sandbox", "none"]
        argv += ["--seccomp", "none", "--cache", "always", "--xattr", "--log-level", "error"]
        # File handles, the default for root since 1.14, need the mount point of the tree's file system, which
        # cannot be seen from within a chroot.
        argv += ["--inode-file-handles=never"]
        super().__init__(argv, socket, log or work / "log")


# -- making and pushing -------------------------------------------------------------------------------------


def divide(root: Path, n: int = LAYERS) -> list[list[str]]:
    """The content of *root* in up to *n* parts of similar size; paths relative to it.

    What lies in :file:`usr` is divided as well. An empty tree is one empty part.
    """
    paths = [p for p in sorted(root.iterdir()) if p.name != "usr" or p.is_symlink() or not p.is_dir()]
    if len(paths) < sum(1 for _ in root.iterdir()):
        paths += sorted((root / "usr").iterdir())
    sizes = {str(path.relative_to(root)): _size(path) for path in paths}
    parts: list[tuple[int, list[str]]] = [(0, []) for _ in range(n)]
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        smallest = min(range(n), key=lambda i: parts[i][0])
        parts[smallest] = (parts[smallest][0] + size, [*parts[smallest][1], name])
    filled = [sorted(names) for _, names in parts if names]
    return filled or [[]]


def _size(path: Path) -> int:
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(inner.lstat().st_size for inner in path.rglob("*"))


def pack(root: Path, out: Path) -> list[Path]:
    """Writes the layers of *root* into the folder *out*.

    Raises:
        PullError: tar failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    parts = divide(root)
    layers = [out / f"layer-{i}.tar.gz" for i in range(len(parts))]

    def write(layer: Path, names: Sequence[str]) -> None:
        # The folder above a part belongs to it: its owner and mode are part of the image.
        above = ["usr"] if any(name.startswith("usr/") for name in names) else []
        _run(
            *("tar", "--create", "--file", layer, "--directory", root, "--numeric-owner", "--sort=name"),
            *("--xattrs", "--xattrs-include=*", "--use-compress-program", f"gzip -n -{_LEVEL}"),
            *("--no-recursion", ".", *above, "--recursion", *names),
        )

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, layers, parts))
    return layers


def _run(*argv: str | Path) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise PullError(f"{argv[0]} failed: {done.stderr.strip()[-500:]}")


def push(layers: Sequence[Path], host: str, repository: str, tag: str = "latest") -> None:
    """Pushes an OCI image of *layers* to a registry on plain http.

    Raises:
        PullError: the registry does not take it.
    """
    described = []
    for layer in layers:
        content = layer.read_bytes()
        described.append(_describe(_LAYER_TYPE, content))
        _push_blob(host, repository, content)
    config = json.dumps({"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers"}}).encode()
    _push_blob(host, repository, config)
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": _MANIFEST_TYPE,
            "config": _describe(_CONFIG_TYPE, config),
            "layers": described,
        }
    ).encode()
    path = f"/v2/{repository}/manifests/{tag}"
    _ask(host, "PUT", path, manifest, {"Content-Type": _MANIFEST_TYPE}, expect=201)


def _describe(kind: str, content: bytes) -> dict[str, Any]:
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    return {"mediaType": kind, "digest": digest, "size": len(content)}


def _push_blob(host: str, repository: str, content: bytes) -> None:
    location = _ask(host, "POST", f"/v2/{repository}/blobs/uploads/", b"", {}, expect=202)["Location"]
    target = urlsplit(location)
    digest = hashlib.sha256(content).hexdigest()
    query = f"{target.query}&digest=sha256:{digest}"
    headers = {"Content-Type": "application/octet-stream"}
    _ask(host, "PUT", f"{target.path}?{query}", content, headers, expect=201)


def _ask(
    host: str, method: str, path: str, body: bytes, headers: dict[str, str], *, expect: int
) -> http.client.HTTPMessage:
    connection = http.client.HTTPConnection(host, timeout=60)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        answer.read()
        if answer.status != expect:
            raise PullError(f"{host}{urlsplit(path).path}: HTTP {answer.status} instead of {expect}")
        return answer.headers
    except (OSError, http.client.HTTPException) as error:
        raise PullError(f"{host}: {error}") from error
    finally:
        connection.close()


# -- pulling ------------------------------------------------------------------------------------------------


@attrs.frozen
class Layer:
    """A layer that was downloaded. Times are CLOCK_MONOTONIC in ns."""

    number: int
    size: int
    started_ns: int
    ended_ns: int


@attrs.frozen
class Pull:
    """An image that was pulled and unpacked. Times are CLOCK_MONOTONIC in ns."""

    started_ns: int
    downloaded_ns: int
    unpacked_ns: int
    layers: list[Layer]

    @property
    def seconds(self) -> float:
        """How long all of it took."""
        return (self.unpacked_ns - self.started_ns) / 1e9


def pull(
    host: str,
    repository: str,
    into: Path,
    *,
    tag: str = "latest",
    note: Callable[[str], None] = lambda _: None,
) -> Pull:
    """Downloads and unpacks an image from a registry on plain http.

    Args:
        host: the registry (or the link before it).
        repository: as in a reference.
        into: folder for the layers and, in :file:`root`, the unpacked tree.
        tag: as in a reference.
        note: gets a text about what is going on.

    Raises:
        PullError: something did not come, is not what its digest promises, or cannot be unpacked.
    """
    root = into / "root"
    root.mkdir(parents=True)
    started = time.monotonic_ns()
    described = json.loads(_get(host, f"/v2/{repository}/manifests/{tag}", {"Accept": _MANIFEST_TYPE}))
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        coming: list[Future[Layer]] = [
            pool.submit(_download, host, repository, i, layer, into / str(i))
            for i, layer in enumerate(described["layers"])
        ]
        layers = []
        for i, future in enumerate(coming):
            note(f"pull first: layer {i + 1} of {len(coming)}")
            layers.append(future.result())
            _run(
                *("tar", "--extract", "--gzip", "--file", into / str(i), "--directory", root),
                *("--numeric-owner", "--same-owner", "--same-permissions", "--xattrs", "--xattrs-include=*"),
            )
    downloaded = max(layer.ended_ns for layer in layers)
    return Pull(started, downloaded, time.monotonic_ns(), layers)


def _get(host: str, path: str, headers: dict[str, str]) -> bytes:
    connection = http.client.HTTPConnection(host, timeout=60)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != http.HTTPStatus.OK:
            raise PullError(f"{host}{path}: HTTP {answer.status}")
        return content
    except (OSError, http.client.HTTPException) as error:
        raise PullError(f"{host}: {error}") from error
    finally:
        connection.close()


def _download(host: str, repository: str, number: int, layer: dict[str, Any], file: Path) -> Layer:
    started = time.monotonic_ns()
    digest = hashlib.sha256()
    connection = http.client.HTTPConnection(host, timeout=300)
    try:
        connection.request("GET", f"/v2/{repository}/blobs/{layer['digest']}")
        answer = connection.getresponse()
        if answer.status != http.HTTPStatus.OK:
            raise PullError(f"{host}: layer {layer['digest']}: HTTP {answer.status}")
        with file.open("wb") as out:
            while piece := answer.read(_PIECE):
                digest.update(piece)
                out.write(piece)
    except (OSError, http.client.HTTPException) as error:
        raise PullError(f"{host}: {error}") from error
    finally:
        connection.close()
    if f"sha256:{digest.hexdigest()}" != layer["digest"]:
        raise PullError(f"layer {layer['digest']} has another digest")
    return Layer(number, layer["size"], started, time.monotonic_ns())
