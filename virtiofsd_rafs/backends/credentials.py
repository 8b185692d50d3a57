"""Where registry credentials come from: files that every tool of the field reads, and credential helpers.

The files, in order; the first one that has something for a registry decides:

1. ``--auth-file``, and then nothing else;
2. ``$DOCKER_CONFIG/config.json``, without that variable ``~/.docker/config.json``;
3. ``$REGISTRY_AUTH_FILE``, without that variable ``$XDG_RUNTIME_DIR/containers/auth.json`` (or
   ``/run/containers/<uid>/auth.json``), then ``$XDG_CONFIG_HOME/containers/auth.json``.

A file is read again when it has changed, which a ``stat`` tells, whenever credentials are looked up: that is
when a registry asks for them the first time, when it has refused some, and when a token is renewed. In a file
``credHelpers`` come before ``credsStore``, and both before ``auths``, as for docker.

Helpers run in a session of their own, never for longer than a time-out, one at a time for each
registry; what they answer is kept until a registry refuses it, or until it is old.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import attrs

from virtiofsd_rafs.errors import AuthError, BackendError, BackendTimeout
from virtiofsd_rafs.registry.docker_config import DockerConfig, config_host, parse_docker_config
from virtiofsd_rafs.registry.helper import (
    MAX_REPLY,
    helper_failed,
    helper_program,
    helper_question,
    parse_helper_reply,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from virtiofsd_rafs.registry.auth import Credentials

_log = logging.getLogger(__name__)
_MAX_CONFIG_LEN = 1 << 20

# Cloud helpers ask a service first, which takes them seconds.
HELPER_TIMEOUT_S = 15.0
# What a helper answered is asked for again after this long, when a token is renewed and nobody waits.
HELPER_MAX_AGE_S = 3600.0
# A helper whose answer was refused is not asked more often than this: it would only say the same.
HELPER_PAUSE_S = 5.0
# Killed processes end within milliseconds.
_REAP_S = 2.0


def config_paths(environ: Mapping[str, str] | None = None) -> list[Path]:
    """The files that are looked into without ``--auth-file``, whether or not they exist."""
    env = os.environ if environ is None else environ
    home = _home(env)
    paths: list[Path] = []
    if folder := env.get("DOCKER_CONFIG"):
        paths.append(Path(folder) / "config.json")
    elif home is not None:
        paths.append(home / ".docker" / "config.json")
    if file := env.get("REGISTRY_AUTH_FILE"):
        paths.append(Path(file))
        return paths
    runtime = env.get("XDG_RUNTIME_DIR")
    paths.append(
        Path(runtime) / "containers" / "auth.json"
        if runtime
        else Path("/run/containers") / str(os.getuid()) / "auth.json"
    )
    if base := env.get("XDG_CONFIG_HOME"):
        paths.append(Path(base) / "containers" / "auth.json")
    elif home is not None:
        paths.append(home / ".config" / "containers" / "auth.json")
    return paths


def _home(env: Mapping[str, str]) -> Path | None:
    if home := env.get("HOME"):
        return Path(home)
    try:
        return Path.home()
    except RuntimeError:
        return None


class Found(NamedTuple):
    """What a look-up found, and where, for messages. ``trouble``: what kept it from finding more."""

    credentials: Credentials | None = None
    origin: str = ""
    trouble: BackendError | None = None


_Stamp = tuple[int, int, int, int]


@attrs.define
class _File:
    path: Path
    required: bool
    stamp: _Stamp | None = None
    config: DockerConfig = attrs.field(factory=DockerConfig)

    def read(self) -> None:
        """Reads the file if it has changed. Raises AuthError when it cannot be used."""
        try:
            with self.path.open("rb") as f:
                now = _stamp(os.fstat(f.fileno()))
                if now == self.stamp:
                    return
                data = f.read(_MAX_CONFIG_LEN + 1)
        except (FileNotFoundError, NotADirectoryError) as e:
            if self.required:
                raise AuthError(
                    f"{self.path} is not there", remedy="mend --auth-file, or log in with it"
                ) from e
            self.stamp, self.config = None, DockerConfig()
            return
        except OSError as e:
            raise AuthError(f"{self.path} cannot be read: {e.strerror}", remedy="mend its permissions") from e
        if len(data) > _MAX_CONFIG_LEN:
            raise AuthError(
                f"{self.path} is longer than {_MAX_CONFIG_LEN} bytes", remedy="point DOCKER_CONFIG elsewhere"
            )
        config = parse_docker_config(data, str(self.path))
        _log.debug("registry credentials come from %s", self.path)
        self.stamp, self.config = now, config

    def changed(self) -> bool:
        """Whether the file differs from what was read."""
        try:
            return _stamp(self.path.stat()) != self.stamp
        except OSError:
            return self.stamp is not None


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


class _Answer(NamedTuple):
    credentials: Credentials | None
    at: float


class CredentialStore:
    """The credentials of the user who runs this.

    Reads the files at once: going on anonymously with a file that cannot be used would only hide the reason.
    Raises AuthError then. Later a file that has become unusable is told, and what it held is kept.

    Args:
        auth_file: the only file to look into; None: the usual ones.
        helper_timeout_s: how long a helper may take.
        helper_pause_s: how soon a helper is asked again after its answer was refused.
    """

    def __init__(
        self,
        auth_file: Path | None = None,
        *,
        helper_timeout_s: float = HELPER_TIMEOUT_S,
        helper_pause_s: float = HELPER_PAUSE_S,
    ) -> None:
        paths = config_paths() if auth_file is None else [auth_file]
        self._files = [_File(path, required=auth_file is not None) for path in dict.fromkeys(paths)]
        self._helper_timeout_s = helper_timeout_s
        self._helper_pause_s = helper_pause_s
        self._answers: dict[tuple[str, str], _Answer] = {}
        self._asking: dict[tuple[str, str], asyncio.Task[Credentials | None]] = {}
        for file in self._files:
            file.read()

    async def find(self, host: str, repository: str = "", *, refused: Credentials | None = None) -> Found:
        """The credentials for *repository* at *host*; *refused* are known to be of no use any more.

        Raises AuthError or BackendTimeout when the helper that is meant for this registry fails. One for all
        registries (credsStore) is passed over then, and told as ``trouble``: many registries let anybody in.
        """
        await asyncio.to_thread(self._read_again)  # a home directory may be on a server that hangs
        trouble: BackendError | None = None
        for file in self._files:
            config = file.config
            own = config.helper(host)
            if own is not None:
                answer = await self._ask(own, host, refused)
                if answer is not None:
                    return Found(answer, f"the credential helper {own}")
            elif config.default_helper is not None:
                try:
                    answer = await self._ask(config.default_helper, host, refused)
                except BackendError as e:
                    trouble = e
                    _log.warning("%s", e)
                else:
                    if answer is not None:
                        return Found(answer, f"the credential helper {config.default_helper}")
            entry = config.lookup(host, repository)
            if entry is not None:
                return Found(entry, config.path)
        return Found(trouble=trouble)

    def _read_again(self) -> None:
        for file in self._files:
            if file.changed():
                try:
                    file.read()
                except AuthError as e:
                    _log.warning("%s: going on with what it held before", e)

    async def _ask(self, name: str, host: str, refused: Credentials | None) -> Credentials | None:
        """What the helper *name* says about *host*, now or lately."""
        key = (name, config_host(host))
        known = self._answers.get(key)
        if known is not None:
            age = time.monotonic() - known.at
            stale = known.credentials is None or known.credentials == refused
            if age < (self._helper_pause_s if stale else HELPER_MAX_AGE_S):
                return known.credentials
        task = self._asking.get(key)
        if task is None:
            task = asyncio.ensure_future(self._ask_now(name, host, key))
            self._asking[key] = task
            task.add_done_callback(lambda t: self._asked(key, t))
        # Whoever is cancelled leaves the helper to those who still wait.
        return await asyncio.shield(task)

    async def _ask_now(self, name: str, host: str, key: tuple[str, str]) -> Credentials | None:
        credentials = await run_helper(name, host, timeout_s=self._helper_timeout_s)
        self._answers[key] = _Answer(credentials, time.monotonic())
        return credentials

    def _asked(self, key: tuple[str, str], task: asyncio.Task[Credentials | None]) -> None:
        self._asking.pop(key, None)
        if not task.cancelled():
            task.exception()  # those who wait get it; nobody may be left

    async def close(self) -> None:
        """Ends helpers that still run."""
        tasks = list(self._asking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def run_helper(name: str, host: str, *, timeout_s: float) -> Credentials | None:
    """What the credential helper *name* has for *host*.

    The program is found by PATH, gets the question on its standard input, and is killed with all that it
    started when it takes longer than *timeout_s*. Raises AuthError, or BackendTimeout, which may be cured by
    waiting.
    """
    program = shutil.which(helper_program(name))
    if program is None:
        raise AuthError(
            f"the credential helper docker-credential-{name} is not installed",
            remedy="put it on the PATH, or put the registry under `auths`",
        )
    try:
        process = await asyncio.create_subprocess_exec(
            program,
            "get",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as e:
        raise helper_failed(name, f"cannot be run: {e.strerror}") from e
    try:
        async with asyncio.timeout(timeout_s):
            output = await _talk(process, helper_question(host))
            if len(output) > MAX_REPLY:
                raise helper_failed(name, f"sent more than {MAX_REPLY} bytes")
            status = await process.wait()
    except TimeoutError:
        raise BackendTimeout(
            f"the credential helper docker-credential-{name} did not answer within {timeout_s:g} s",
            remedy=f"try `docker-credential-{name} get` by hand; it may need the network or a terminal",
        ) from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await _reap(process)
    return parse_helper_reply(name, status, output)


async def _reap(process: asyncio.subprocess.Process) -> None:
    """Waits for a process that was killed.

    asyncio calls a process ended when its pipes are at their end as well, and stops reading a pipe whose
    bytes nobody takes. Somebody who left the process group may hold the pipe for ever: he is not waited for.
    """
    assert process.stdout is not None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_REAP_S):
            while await process.stdout.read(64 << 10):
                pass
            await process.wait()


async def _talk(process: asyncio.subprocess.Process, question: bytes) -> bytes:
    """Up to one byte more than a helper may send."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(ConnectionError):  # it may answer without reading
        process.stdin.write(question)
        await process.stdin.drain()
    process.stdin.close()
    output = bytearray()
    while len(output) <= MAX_REPLY:
        piece = await process.stdout.read(64 << 10)
        if not piece:
            break
        output += piece
    return bytes(output)
