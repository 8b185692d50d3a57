"""Image references as docker writes them: ``[host[:port]/]path[:tag][@sha256:hex]``.

The rules are those of the distribution project's reference grammar: the first component is a host when it
holds a dot or a colon, is ``localhost``, or has an upper-case letter; without a host the image is on Docker
Hub; without tag and digest the tag is ``latest``.
"""

from __future__ import annotations

import re

import attrs

from virtiofsd_rafs.errors import ConfigError

DEFAULT_HOST = "docker.io"
DEFAULT_TAG = "latest"
# Docker Hub's name is not the host that speaks the registry API.
_API_HOSTS = {"docker.io": "registry-1.docker.io", "index.docker.io": "registry-1.docker.io"}

_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:.]+\])(?::[0-9]{{1,5}})?")
_PATH_COMPONENT = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")
# The distribution project's limit for host and path together.
_MAX_NAME_LEN = 255


def api_host(host: str) -> str:
    """The ``host[:port]`` that serves ``/v2/`` for the registry *host*."""
    return _API_HOSTS.get(host, host)


def is_sha256(digest: str) -> bool:
    """Whether *digest* is ``sha256:`` and 64 lower-case hex digits, the only form that is verified here."""
    return _SHA256.fullmatch(digest) is not None


@attrs.frozen
class Reference:
    """A parsed reference. At least one of ``tag`` and ``digest`` is set; the digest decides when both are."""

    host: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @property
    def api_host(self) -> str:
        """The ``host[:port]`` that serves ``/v2/``."""
        return api_host(self.host)

    @property
    def target(self) -> str:
        """What stands in ``/v2/<repository>/manifests/<target>``."""
        target = self.digest or self.tag
        assert target is not None
        return target

    @property
    def key(self) -> str:
        """``host/repo:tag`` (without tag: ``host/repo@digest``): the name of its record in the cache."""
        if self.tag is not None:
            return f"{self.host}/{self.repository}:{self.tag}"
        return f"{self.host}/{self.repository}@{self.digest}"

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag is not None else ""
        digest = f"@{self.digest}" if self.digest is not None else ""
        return f"{self.host}/{self.repository}{tag}{digest}"


def parse_reference(text: str) -> Reference:
    """The reference that *text* writes, with docker's defaults filled in.

    Raises ConfigError that names the part that is wrong.
    Source: github.com/distribution/reference, grammar in reference.go and normalize.go.
    """
    if "://" in text:
        raise _bad(text, "it has a scheme", "write host/repository:tag; --plain-http selects http")
    rest, at, digest = text.partition("@")
    if at and not is_sha256(digest):
        raise _bad(text, "the digest is not sha256: and 64 lower-case hex digits")
    head, slash, path = rest.partition("/")
    if slash and ("." in head or ":" in head or head == "localhost" or head != head.lower()):
        host = head
    else:
        host, path = DEFAULT_HOST, rest
    last = path.rfind("/")
    path, colon, tag = _split_tag(path, last)
    if colon and not _TAG.fullmatch(tag):
        raise _bad(text, f"the tag {tag!r} is not 1 to 128 of letters, digits, '_', '.', '-'")
    if not _HOST.fullmatch(host) or not _port_fits(host):
        raise _bad(text, f"the host {host!r} is not host[:port]")
    if host == DEFAULT_HOST and "/" not in path:
        path = f"library/{path}"
    if not all(_PATH_COMPONENT.fullmatch(c) for c in path.split("/")):
        hint = "repositories are lower-case" if path != path.lower() else ""
        raise _bad(text, f"the repository {path!r} is malformed", hint)
    if len(host) + 1 + len(path) > _MAX_NAME_LEN:
        raise _bad(text, f"the name is longer than {_MAX_NAME_LEN} characters")
    chosen = tag if colon else (None if at else DEFAULT_TAG)
    return Reference(host=host, repository=path, tag=chosen, digest=digest if at else None)


def _split_tag(path: str, last_slash: int) -> tuple[str, str, str]:
    colon = path.find(":", last_slash + 1)
    return (path, "", "") if colon < 0 else (path[:colon], ":", path[colon + 1 :])


def _port_fits(host: str) -> bool:
    port = re.search(r":([0-9]+)$", host)
    return port is None or 0 < int(port[1]) < 65536


def _bad(text: str, why: str, remedy: str = "") -> ConfigError:
    # A password pasted into the reference (user:secret@host) must not come back in a message.
    shown = re.sub(r"^([^@/:]*):.*@(?!sha256:)", r"\1:***@", text.partition("://")[2] or text)
    return ConfigError(
        f"{shown!r} is no image reference: {why}", remedy=remedy or "write host/repository:tag"
    )
