"""From the configured image to a mount that the keeper holds.

Until the image is handed over, FUSE_INIT waits, so this path is short: with a warm cache it touches neither
the network nor asyncio. A restarted control takes its predecessor's tables over, so that the workers'
mappings stay valid.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from virtiofsd_rafs.cache.names import RECORD_SUFFIX
from virtiofsd_rafs.cache.promise import check_verifiable, complete_blob
from virtiofsd_rafs.errors import CacheError, ConfigError, NotFound, VirtiofsdRafsError
from virtiofsd_rafs.image.content import ContentStore
from virtiofsd_rafs.image.resolve import ResolvedImage, resolve_image
from virtiofsd_rafs.native.store import Store

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable
    from mmap import mmap

    from virtiofsd_rafs.backends.base import BlobSource, Renewable
    from virtiofsd_rafs.cache.nydusd import Used
    from virtiofsd_rafs.config import Pull, ServeConfig
    from virtiofsd_rafs.native.session import MountFds
    from virtiofsd_rafs.native.store import BlobInfo

_log = logging.getLogger(__name__)

# Messages to the keeper and from it: four little-endian u32, the first one says which.
MESSAGE = struct.Struct("<4I")
MOUNT_BEGIN = 1
MOUNT_BLOB = 2
MOUNT_COMMIT = 3
FATAL = 4
FRONTEND = 17
SHUTDOWN = 18

# One image per daemon.
MOUNT_INDEX = 0


@attrs.frozen(kw_only=True)
class Mounted:
    """The image that is being served."""

    image: ResolvedImage
    """Without its bootstrap, which lives in the sealed memfd behind ``bootstrap_fd``."""
    store: Store
    bootstrap_fd: int
    blob_ids: dict[int, str]
    mounted_at: float
    """Seconds since the epoch."""


class KeeperGone(Exception):
    """The keeper has ended, and with it the reason to be here."""


def send(keeper: socket.socket, *words: int, fds: list[int] | None = None) -> None:
    """Sends one message. Raises KeeperGone."""
    message = MESSAGE.pack(*words, *[0] * (4 - len(words)))
    try:
        if fds:
            socket.send_fds(keeper, [message], fds)
        else:
            keeper.send(message)
    except (BrokenPipeError, ConnectionResetError):
        raise KeeperGone from None


def seal_bootstrap(bootstrap: bytes) -> int:
    """A read-only descriptor of a memfd with *bootstrap*, which nobody can change any more."""
    import fcntl

    fd = os.memfd_create("rafs-bootstrap", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(bootstrap)
        while view:
            view = view[os.write(fd, view) :]
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(fd)


_CACHE_REMEDIES = {
    errno.EACCES: "let this user write there",
    errno.EPERM: "let this user write there",
    errno.EROFS: "it is mounted read-only",
    errno.EEXIST: "it is a file, name a directory",
    errno.ENOTDIR: "a part of the path is a file, name a directory",
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there",
    errno.EIO: "the disk is broken",
}


def _tell_unusable(cache_dir: Path, cause: int) -> None:
    """Says why the cache directory cannot be used, and what can be done."""
    remedy = _CACHE_REMEDIES.get(cause, "choose another place")
    _log.warning(
        "cache directory %s cannot be used (%s): memory stands in; %s, or give another --cache-dir, or "
        "--no-cache",
        cache_dir,
        os.strerror(cause),
        remedy,
    )


def usable_cache(cache_dir: Path | None) -> Path | None:
    """*cache_dir*, made if need be; None when it cannot be had: memory stands in then."""
    if cache_dir is None:
        return None
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        _tell_unusable(cache_dir, e.errno or 0)
        return None
    if not os.access(cache_dir, os.R_OK | os.W_OK | os.X_OK):
        read_only = os.statvfs(cache_dir).f_flag & os.ST_RDONLY
        _tell_unusable(cache_dir, errno.EROFS if read_only else errno.EACCES)
        return None
    return cache_dir


def _tell_missing(folder: Path, blob_ids: list[str]) -> None:
    """Warns of blobs that are not in *folder*: the cache may have them all, or they are on their way here."""
    for blob_id in blob_ids:
        if not (folder / blob_id).exists():
            _log.warning("blob %s is not in %s (check --blob-dir)", blob_id, folder)


def _finish_now(work: Coroutine[None, None, ResolvedImage]) -> ResolvedImage:
    """The result of a coroutine that never waits."""
    try:
        work.send(None)
    except StopIteration as e:
        result: ResolvedImage = e.value
        return result
    work.close()
    raise AssertionError("a cached image needs no event loop")


class Mounter:
    """Finds *config*'s image and hands it to *keeper*.

    *foreign* is what nydusds had open before this process was confined; None: it is not, and looks itself.
    """

    def __init__(
        self, keeper: socket.socket, config: ServeConfig, foreign: Iterable[Used] | None = None
    ) -> None:
        self._keeper = keeper
        self._config = config
        self._foreign = foreign
        self._cache_dir = usable_cache(config.cache_dir)

    def warm(self) -> Mounted | None:
        """Mounts the image when all of its metadata is here; None: the network is needed.

        Raises ImageError, CacheError, and NotFound with ``pull="never"``.
        """
        if self._config.pull == "always" and not Path(self._config.image).is_file():
            return None
        try:
            image = _finish_now(self._resolve("never"))
        except NotFound:
            if self._config.pull == "never":
                raise
            return None
        store = self._store(image.bootstrap)
        if any(blob.needs_chunk_info for blob in store.blobs()):
            store.close()
            return None
        return self._hand_over(image, store)

    async def cold(
        self,
        open_source: Callable[[ResolvedImage], Awaitable[BlobSource]],
        asking: Callable[[Renewable], None] = lambda _: None,
    ) -> Mounted:
        """Mounts the image, whatever it takes. Raises ImageError, BackendError, CacheError, ConfigError.

        *asking* is told what takes new credentials while the image is looked for.
        """
        image = await self._resolve(self._config.pull, asking)
        store = self._store(image.bootstrap)
        missing = [blob for blob in store.blobs() if blob.needs_chunk_info]
        if missing:
            from virtiofsd_rafs.backends.retry import with_retries
            from virtiofsd_rafs.cache.nydusd import read_meta

            source = await open_source(image)
            for blob in missing:

                def complete(blob: BlobInfo = blob) -> Awaitable[None]:
                    return complete_blob(
                        store,
                        blob,
                        source,
                        meta=image.blob_metas.get(blob.blob_id) or read_meta(self._cache_dir, blob.blob_id),
                        allow_unverified=self._config.allow_unverified,
                    )

                what = f"chunk information of blob {blob.blob_id}"
                await with_retries(complete, deadline_s=self._config.io_deadline_s, what=what)
        return self._hand_over(image, store)

    def adopt(self, fds: MountFds) -> Mounted | None:
        """Takes over what a predecessor mounted; None when that cannot be done."""
        import mmap

        with mmap.mmap(fds.bootstrap, 0, prot=mmap.PROT_READ) as bootstrap:
            store = self._store(bootstrap)
        try:
            if any(blob.needs_chunk_info for blob in store.blobs()):
                raise CacheError("the list of chunks must be fetched again")
            if len(fds.blobs) != store.n_blobs:
                raise CacheError(f"{len(fds.blobs)} blobs are mounted, the image has {store.n_blobs}")
            for index, blob in enumerate(fds.blobs):
                store.adopt_blob(index, blob.state, blob.extents, blob.touched, blob.data)
            store.adopt_spill(fds.spill)
        except CacheError as e:
            _log.warning("the predecessor's tables cannot be taken over (%s): mounting anew", e)
            store.close()
            return None
        _log.info("took over %s: %d blobs", self._config.image, store.n_blobs)
        return self._mounted(self._origin(), store, os.dup(fds.bootstrap))

    def _resolve(
        self, pull: Pull, asking: Callable[[Renewable], None] = lambda _: None
    ) -> Coroutine[None, None, ResolvedImage]:
        config = self._config
        return resolve_image(
            config.image,
            cache_dir=self._cache_dir,
            blob_dir=config.blob_dir,
            pull=pull,
            plain_http=config.plain_http,
            access=config.registry,
            deadline=config.io_deadline_s,
            asking=asking,
        )

    def _store(self, bootstrap: bytes | mmap) -> Store:
        return Store(
            bootstrap,
            cache_dir=self._cache_dir,
            spill_size=self._config.spill_size,
            for_nydusd=self._config.cache_nydusd,
        )

    def _hand_over(self, image: ResolvedImage, store: Store) -> Mounted:
        """Opens the cache files and gives everything that a worker needs to the keeper."""
        blobs = store.blobs()
        check_verifiable(blobs, allow_unverified=self._config.allow_unverified)
        self._check_nydusd([blob.blob_id for blob in blobs])
        on_disk = [store.open_blob(blob.blob_index) for blob in blobs]
        if self._cache_dir is not None and not all(on_disk):
            _tell_unusable(self._cache_dir, store.stats().last_disk_errno)
        if image.blob_dir is not None and self._config.blob_source is None:
            folder, names = image.blob_dir, [blob.blob_id for blob in blobs]
            # Nobody waits for it: the directory may be on a NAS that hangs.
            threading.Thread(target=_tell_missing, args=(folder, names), daemon=True).start()
        if self._config.cache_nydusd and self._cache_dir is not None:
            self._write_metas(image, blobs, self._cache_dir)
        bootstrap_fd = seal_bootstrap(image.bootstrap)
        spill_fd = store.share_spill()
        send(self._keeper, MOUNT_BEGIN, MOUNT_INDEX, len(blobs), fds=[bootstrap_fd, spill_fd])
        os.close(spill_fd)
        for blob in blobs:
            fds = [fd for fd in store.share(blob.blob_index) if fd is not None]
            send(self._keeper, MOUNT_BLOB, MOUNT_INDEX, blob.blob_index, fds=fds)
            for fd in fds:
                os.close(fd)
        send(self._keeper, MOUNT_COMMIT, MOUNT_INDEX)
        if image.reference is None:
            # `cache gc` asks which blobs somebody may come back for.
            remember = ContentStore(self._cache_dir).remember_file
            record = os.path.abspath(image.name), [blob.blob_id for blob in blobs]
            threading.Thread(target=remember, args=record, daemon=True).start()
        _log.info("serving %s: %d blobs", image.name, len(blobs))
        return self._mounted(image, store, bootstrap_fd)

    def _check_nydusd(self, blob_ids: list[str]) -> None:
        """Raises CacheError when nydusd writes where we would."""
        folder = self._cache_dir
        if folder is None or not any(
            os.path.exists(folder / (blob_id + RECORD_SUFFIX)) for blob_id in blob_ids
        ):
            return  # nearly always, and then nothing is imported
        from virtiofsd_rafs.cache.nydusd import check_unused

        check_unused(folder, blob_ids, self._foreign)

    def _write_metas(self, image: ResolvedImage, blobs: list[BlobInfo], cache_dir: Path) -> None:
        from virtiofsd_rafs.cache.nydusd import write_meta

        for blob in blobs:
            try:
                write_meta(cache_dir, blob.blob_id, image.blob_metas.get(blob.blob_id))
            except OSError as e:
                _log.warning("the chunk map of blob %s cannot be kept: %s", blob.blob_id, e.strerror)

    def _mounted(self, image: ResolvedImage, store: Store, bootstrap_fd: int) -> Mounted:
        return Mounted(
            image=attrs.evolve(image, bootstrap=b"", blob_metas={}),
            store=store,
            bootstrap_fd=bootstrap_fd,
            blob_ids={blob.blob_index: blob.blob_id for blob in store.blobs()},
            mounted_at=time.time(),
        )

    def _origin(self) -> ResolvedImage:
        """Where the blobs of the mounted image come from.

        The tag may name another image by now, and the registry may be away: only its place counts.
        """
        from virtiofsd_rafs.registry.reference import parse_reference

        name = self._config.image
        try:
            return _finish_now(self._resolve("never"))
        except VirtiofsdRafsError:
            try:
                return ResolvedImage(name=name, bootstrap=b"", reference=parse_reference(name))
            except ConfigError:
                blob_dir = self._config.blob_dir or Path(name).parent
                return ResolvedImage(name=name, bootstrap=b"", blob_dir=blob_dir)
