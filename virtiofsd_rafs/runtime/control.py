"""The life of the control process: mount the image, then serve posts and the API until the keeper goes.

What the control process needs to know it gets from the keeper's socket pair, the session's shared memory, and
its configuration; it may be killed at any time, and is started again while the workers go on with what is
cached.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import sys
from typing import TYPE_CHECKING, TypeVar

from virtiofsd_rafs.config import IN_CONFIG_FILE
from virtiofsd_rafs.errors import ConfigError, VirtiofsdRafsError
from virtiofsd_rafs.runtime import scheduling
from virtiofsd_rafs.runtime.mount import (
    FATAL,
    FRONTEND,
    MESSAGE,
    MOUNT_INDEX,
    SHUTDOWN,
    KeeperGone,
    Mounter,
    send,
)

if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Awaitable, Callable, Coroutine

    from virtiofsd_rafs.backends.base import BlobSource, Renewable
    from virtiofsd_rafs.backends.config import BackendConfig
    from virtiofsd_rafs.config import ServeConfig
    from virtiofsd_rafs.image.resolve import ResolvedImage
    from virtiofsd_rafs.native.session import Session
    from virtiofsd_rafs.runtime.agent import Agent
    from virtiofsd_rafs.runtime.mount import Mounted
    from virtiofsd_rafs.runtime.renewal import Renewal
    from virtiofsd_rafs.runtime.sandbox import Confined
    from virtiofsd_rafs.runtime.view import View

T = TypeVar("T")
_log = logging.getLogger(__name__)

# With a warm cache, a source that nobody has needed is opened then. What it imports takes a tenth of a second
# of processor time, which the VM is to have while it starts.
PREPARE_AFTER_S = 5.0

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def main(
    session: Session,
    keeper: socket.socket,
    api: socket.socket,
    config: ServeConfig,
    *,
    memory: int | None = None,
    confined: Confined | None = None,
) -> int:
    """Run control until the keeper goes; the exit code.

    *keeper* is this end of the SOCK_SEQPACKET pair, *api* a listening unix socket, *memory* a memfd that a
    successor gets, too, *confined* the sandbox that this process is in already. When the image cannot be
    served, the reason is printed, the keeper is told to end, and the error's exit code is returned. When a
    predecessor had mounted it, workers serve what is cached, and the keeper is left to try again.
    """
    logging.basicConfig(stream=sys.stderr, level=config.log_level.upper(), format=_FORMAT)
    _raise_nofile()
    had_mount = session.mount_fds(MOUNT_INDEX) is not None
    try:
        return _Control(session, keeper, api, config, memory, confined).run()
    except VirtiofsdRafsError as e:
        print(f"virtiofsd-rafs: {e.msgid}: {e}", file=sys.stderr, flush=True)
        if not had_mount:
            with contextlib.suppress(KeeperGone):
                send(keeper, FATAL, e.exit_code)
        return e.exit_code
    except KeeperGone:
        return 0


def _raise_nofile() -> None:
    """Four descriptors for each of up to 255 blobs, and as many again while they are handed over."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _unless(event: asyncio.Event, work: Coroutine[None, None, T]) -> T | None:
    """The result of *work*; None when *event* comes first, and *work* is cancelled then."""
    import asyncio

    task = asyncio.ensure_future(work)
    waiter = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        waiter.cancel()
        await asyncio.gather(task, waiter, return_exceptions=True)


class _Control:
    def __init__(
        self,
        session: Session,
        keeper: socket.socket,
        api: socket.socket,
        config: ServeConfig,
        memory: int | None,
        confined: Confined | None,
    ) -> None:
        self._session = session
        self._keeper = keeper
        self._api = api
        self._config = config
        self._memory = memory
        self._confined = confined
        self._source: BlobSource | None = None
        self._resolver: Renewable | None = None  # asks for the image
        self._agent: Agent | None = None
        self._renewal: Renewal | None = None
        self._preparing: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()

    def run(self) -> int:
        foreign = None if self._confined is None else self._confined.foreign
        mounter = Mounter(self._keeper, self._config, foreign)
        fds = self._session.mount_fds(MOUNT_INDEX)
        mounted = mounter.adopt(fds) if fds is not None else None
        if mounted is None:
            mounted = mounter.warm()
        import asyncio

        scheduling.loop_first()
        return asyncio.run(self._serve(mounter, mounted))

    async def _serve(self, mounter: Mounter, mounted: Mounted | None) -> int:
        import asyncio
        import signal

        from virtiofsd_rafs.runtime.renewal import Renewal
        from virtiofsd_rafs.runtime.view import View

        loop = asyncio.get_running_loop()
        gone = asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, gone.set)
        loop.add_reader(self._keeper.fileno(), self._keeper_readable, gone)
        view = View(self._session, self._config)
        view.confined = self._confined
        renewal = Renewal(lambda: self._source or self._resolver, self._renewed, self._memory)
        view.renewal = self._renewal = renewal
        stop_api = self._start_api(view)
        agent = None
        try:
            if mounted is None:
                mounted = await _unless(gone, mounter.cold(self._open_source, self._resolving))
                self._resolver = None
            if mounted is not None:
                agent = self._start_agent(mounted, view)
                await gone.wait()
        finally:
            loop.remove_reader(self._keeper.fileno())
            if self._preparing is not None:
                self._preparing.cancel()
            if agent is not None:
                await agent.close()
            await stop_api()
            if self._source is not None:
                await self._source.close()
            await asyncio.gather(*self._closing, return_exceptions=True)
        return 0

    def _keeper_readable(self, gone: asyncio.Event) -> None:
        try:
            data = self._keeper.recv(MESSAGE.size)
        except ConnectionError:
            data = b""
        if len(data) != MESSAGE.size:
            gone.set()
            return
        kind, value, _, _ = MESSAGE.unpack(data)
        if kind == SHUTDOWN:
            gone.set()
        elif kind == FRONTEND:
            _log.info("the VMM has %s", "connected" if value else "gone")

    async def _open_source(self, image: ResolvedImage) -> BlobSource:
        """The source of the image's blobs, opened when it is first needed."""
        if self._source is None:
            import asyncio
            from importlib import import_module

            from virtiofsd_rafs.backends import module_of, open_source

            backend = self._backend()
            # A quarter of a second of imports, during which the loop goes on.
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, import_module, module_of(image, backend))
            if self._source is None:
                self._source = open_source(image, self._config, backend, self._reload())
                if self._renewal is not None:
                    self._renewal.opened(self._source)
        return self._source

    def _resolving(self, registry: Renewable) -> None:
        """The image is asked for: with what came by the API before, and meanwhile."""
        self._resolver = registry
        if self._renewal is not None:
            self._renewal.opened(registry)

    def _renewed(self) -> None:
        if self._agent is not None:
            self._agent.renewed()

    def _close_source(self) -> None:
        """All of the image is here. Should a chunk be lost, the source is opened again."""
        import asyncio

        source, self._source = self._source, None
        if source is not None:
            task = asyncio.ensure_future(source.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _backend(self) -> BackendConfig | None:
        """Where blobs are, if not where the image comes from. Raises ConfigError."""
        source, path = self._config.blob_source, self._config.config_file
        if source != IN_CONFIG_FILE:
            return source
        from virtiofsd_rafs.backends.reload import load_config_file

        assert path is not None
        backend = load_config_file(path).backend
        if backend is None:
            raise ConfigError(f"--config {path}: it has no back-end any more", remedy="mend it")
        return backend

    def _reload(self) -> Callable[[], BackendConfig | None] | None:
        """What asks the configuration file again where blobs are."""
        path = self._config.config_file
        if path is None:
            return None

        def reload() -> BackendConfig | None:
            from virtiofsd_rafs.backends.reload import backend_in

            return backend_in(path)

        return reload

    def _start_agent(self, mounted: Mounted, view: View) -> Agent:
        import asyncio

        from virtiofsd_rafs.runtime.agent import Agent

        async def source() -> BlobSource:
            return await self._open_source(mounted.image)

        store = mounted.store
        agent = Agent(
            self._session,
            store,
            mounted.blob_ids,
            source,
            self._config,
            view.metrics,
            bootstrap_fd=mounted.bootstrap_fd,
            started_ns=lambda: int(self._session.status()["session"]["init_ns"]),
            completed=self._close_source,
        )
        self._agent = agent
        view.serving(mounted, agent)
        agent.start()
        states = [store.states(index) for index in mounted.blob_ids]
        if any(each.verified or each.present for each in states):
            loop = asyncio.get_running_loop()
            self._preparing = loop.call_later(PREPARE_AFTER_S, self._prepare, mounted)
        else:
            self._prepare(mounted)
        return agent

    def _prepare(self, mounted: Mounted) -> None:
        """Something will be missed sooner or later: be ready for it."""
        import asyncio

        store = mounted.store
        if self._source is None and any(store.states(index).absent for index in mounted.blob_ids):
            task = asyncio.ensure_future(self._open_source(mounted.image))
            task.add_done_callback(_note_failure)

    def _start_api(self, view: View) -> Callable[[], Awaitable[None]]:
        """Serves the API from the first connection on: most daemons are never asked, and aiohttp is heavy."""
        import asyncio
        from importlib import import_module

        loop = asyncio.get_running_loop()
        starting: list[asyncio.Task[Callable[[], Awaitable[None]]]] = []
        self._api.setblocking(False)

        async def start() -> Callable[[], Awaitable[None]]:
            module = await loop.run_in_executor(None, import_module, "virtiofsd_rafs.runtime.api")
            stop: Callable[[], Awaitable[None]] = await module.start(self._api, view)
            return stop

        def first_connection() -> None:
            loop.remove_reader(self._api.fileno())
            starting.append(asyncio.ensure_future(start()))
            starting[0].add_done_callback(_note_failure)

        async def stop() -> None:
            if not starting:
                loop.remove_reader(self._api.fileno())
            for task in starting:
                try:
                    await (await task)()
                except Exception:  # told by _note_failure
                    _log.debug("the API did not start")

        loop.add_reader(self._api.fileno(), first_connection)
        return stop


def _note_failure(task: asyncio.Task[object]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        if isinstance(error, VirtiofsdRafsError):
            _log.warning("%s: %s", error.msgid, error)
        else:
            _log.error("internal error", exc_info=error)
