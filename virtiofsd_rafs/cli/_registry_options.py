"""Options that say how registries are reached, the same for every command that speaks to one."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtiofsd_rafs.backends.config import RegistryAccess

    Command = Callable[..., object]

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

_OPTIONS = (
    click.option("--plain-http", is_flag=True, help="Speak http to the registry instead of https."),
    click.option(
        "--mirror",
        multiple=True,
        metavar="URL",
        help="Ask http(s)://HOST[:PORT][/PREFIX] before the registry; may be repeated, first one first.",
    ),
    click.option("--auth-file", type=_FILE, help="Take credentials from this file and no other."),
    click.option(
        "--ca-file",
        type=_FILE,
        multiple=True,
        help="Trust the PEM certificates in this file beside the system's; may be repeated.",
    ),
    click.option("--skip-verify", is_flag=True, help="Trust any certificate. Dangerous."),
    click.option("--proxy", metavar="URL", help="Reach registry and mirrors through this HTTP proxy."),
    click.option("--proxy-fallback", is_flag=True, help="Go straight to the server while the proxy is down."),
)


def registry_options(command: Command) -> Command:
    """Adds the options to *command*, which gets them together as ``access``: None when nothing was given."""

    def joined(*args: Any, plain_http: bool, access: RegistryAccess | None, **kwargs: Any) -> object:
        if plain_http:
            from virtiofsd_rafs.backends.config import RegistryAccess

            access = RegistryAccess.of(access, plain_http=True)
        return command(*args, access=access, **kwargs)

    return lean_registry_options(functools.update_wrapper(joined, command))


def lean_registry_options(command: Command) -> Command:
    """As :func:`registry_options`, but ``plain_http`` comes apart from ``access``.

    An ``access`` costs milliseconds of imports, which tell when a VM waits for the command.
    """

    @functools.wraps(command)
    def collected(
        *args: Any,
        plain_http: bool,
        mirror: tuple[str, ...],
        auth_file: Path | None,
        ca_file: tuple[Path, ...],
        skip_verify: bool,
        proxy: str | None,
        proxy_fallback: bool,
        **kwargs: Any,
    ) -> object:
        access = None
        if mirror or auth_file or ca_file or skip_verify or proxy:
            access = _access(
                mirrors=mirror,
                auth_file=auth_file,
                ca_files=ca_file,
                skip_verify=skip_verify,
                proxy=proxy,
                proxy_fallback=proxy_fallback,
            )
        return command(*args, plain_http=plain_http, access=access, **kwargs)

    for option in reversed(_OPTIONS):
        collected = option(collected)
    return collected


def _access(
    *,
    mirrors: tuple[str, ...],
    auth_file: Path | None,
    ca_files: tuple[Path, ...],
    skip_verify: bool,
    proxy: str | None,
    proxy_fallback: bool,
) -> RegistryAccess:
    """What the options say. Raises ConfigError."""
    import attrs

    from virtiofsd_rafs.backends.config import HttpOptions, Mirror, RegistryAccess
    from virtiofsd_rafs.backends.proxies import proxy_of
    from virtiofsd_rafs.errors import ConfigError

    options = None
    if proxy:
        options = attrs.evolve(proxy_of(proxy), fallback=proxy_fallback)
        if options.auth is not None:
            # Everybody who lists processes sees it.
            raise ConfigError(
                f"--proxy {options.url}: a password has no place on the command line",
                remedy="put the whole URL into HTTPS_PROXY or HTTP_PROXY",
            )
    return RegistryAccess(
        mirrors=tuple(map(Mirror.of, mirrors)),
        http=HttpOptions(ca_files=ca_files, skip_verify=skip_verify, proxy=options),
        auth_file=auth_file,
    )
