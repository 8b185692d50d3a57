"""One exchange with a registry as plan -> reply -> next step, without any I/O.

The caller sends ``Exchange.request()``, hands the head of the reply to ``on_reply()`` *before it reads a
body*, and does what the step says. Status decides first, always: a registry may announce a Content-Length for
an error body that it does not send (docker-registry 2.8.2 with 416), so the body of an error is never waited
for.

Rules that hold here and nowhere else:

* Redirects are followed by hand. Authorization goes to the origin (scheme, host, port) of the registry alone.
* A redirect target is used again for the same blob until it expires or is refused; then the registry is asked
  anew.
* A range request may be answered 200 with the whole blob (ranges are only a SHOULD, and pull-through caches
  do that while the blob is cold): the wanted slice is cut out of the stream, or the stream is given up, but
  it is never collected.

Source: OCI distribution-spec 1.1 (pull, push), RFC 9110 (ranges 14, status 15).
"""

from __future__ import annotations

import enum
import re
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import attrs

from virtiofsd_rafs.errors import (
    AuthError,
    BackendError,
    BadReply,
    NotFound,
    RangeIgnored,
    Throttled,
    Unreachable,
)
from virtiofsd_rafs.registry.challenge import Challenge, parse_challenges

if TYPE_CHECKING:
    from collections.abc import Iterable

    from virtiofsd_rafs.registry.reference import Reference

MAX_REDIRECTS = 5
# A pause that a server may ask for; more than this is cut, because a guest waits behind it.
MAX_RETRY_AFTER_S = 60.0
# How much of a 200 reply may be skipped to reach the wanted slice before the stream is given up.
DEFAULT_MAX_SKIP = 8 << 20

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_PRINTABLE = "".join(chr(c) for c in range(0x21, 0x7F))
_UNSATISFIED = re.compile(r"bytes \*/(\d{1,19})")


@attrs.frozen
class ReplyHead:
    """Status and header fields of a reply. Names are compared without case."""

    status: int
    fields: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, status: int, fields: Iterable[tuple[str, str]]) -> ReplyHead:
        """A head from any iterable of (name, value)."""
        return cls(status, tuple((name.lower(), value) for name, value in fields))

    def get(self, name: str) -> str | None:
        """The first field called *name* (lower-case)."""
        return next((v for n, v in self.fields if n == name), None)

    def all(self, name: str) -> list[str]:
        """Every field called *name* (lower-case)."""
        return [v for n, v in self.fields if n == name]

    def content_length(self) -> int | None:
        """The announced length of the body; None when there is none or it is no number."""
        value = self.get("content-length")
        return int(value) if value is not None and re.fullmatch(r"\d{1,19}", value) else None


@attrs.frozen
class Endpoint:
    """Where a repository's API is, and whether unencrypted hops were allowed by the user.

    ``prefix`` (``/a/b``) stands in front of ``/v2``; ``namespace`` is the registry that a mirror stands for,
    which it is told with each request.
    """

    host: str
    repository: str
    plain_http: bool = False
    prefix: str = ""
    namespace: str = ""

    @classmethod
    def of(cls, reference: Reference, *, plain_http: bool) -> Endpoint:
        """The endpoint of *reference*'s repository."""
        return cls(reference.api_host, reference.repository, plain_http)

    @property
    def base(self) -> str:
        """``scheme://host/v2/repo``."""
        scheme = "http" if self.plain_http else "https"
        return f"{scheme}://{self.host}{self.prefix}/v2/{self.repository}"

    def manifest_url(self, target: str) -> str:
        """The manifest called *target*, a tag or a digest."""
        return f"{self.base}/manifests/{quote(target, safe=':')}{self._query}"

    def blob_url(self, digest: str) -> str:
        """The blob *digest* (``sha256:hex``)."""
        return f"{self.base}/blobs/{digest}{self._query}"

    def uploads_url(self) -> str:
        """Where an upload begins."""
        return f"{self.base}/blobs/uploads/"

    @property
    def _query(self) -> str:
        # As containerd does it: a mirror of many registries (Spegel, Harbor, a P2P agent) has to know which.
        return f"?ns={quote(self.namespace, safe='')}" if self.namespace else ""


@attrs.frozen
class Request:
    """What to send next. ``authorize`` says whether the registry's Authorization may go along."""

    method: str
    url: str
    headers: tuple[tuple[str, str], ...]
    authorize: bool


class Step(enum.Enum):
    """What to do after a reply's head."""

    FINAL = "final"  # the reply is the answer: interpret status and headers, then read or drop the body
    AGAIN = "again"  # send request() again: it has another URL now
    REFUSED = "refused"  # authenticate with challenges(), then send request() again


def origin(url: str) -> tuple[str, str, int]:
    """(scheme, host, port) of *url*, default port filled in. Raises BadReply for what is not http(s)."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as e:
        raise BadReply("the server sent a malformed URL") from e
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadReply(f"the server sent a URL of scheme {parts.scheme[:16]!r}")
    return parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80)


def join_url(base: str, location: str) -> str:
    """The absolute URL that *location*, a header of a reply to a request to *base*, means.

    It is left as it was written, except that spaces and what is not ASCII are quoted. Raises BadReply.
    """
    try:
        joined = urljoin(base, location.strip())
    except ValueError as e:
        raise BadReply(f"{without_query(base)} sent a malformed Location") from e
    return quote(joined, safe=_PRINTABLE, errors="surrogateescape")


def without_query(url: str) -> str:
    """*url* for a message: a signed URL's query is a credential, and so is userinfo."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return "(malformed URL)"
    return SplitResult(parts.scheme, host, parts.path, "", "").geturl()


class Exchange:
    """A request to the registry and everything that redirects and refusals make of it.

    Args:
        endpoint: the registry; its origin alone gets the Authorization.
        method: GET, HEAD or an upload's verb (uploads are never redirected with a cached location).
        url: absolute, of the registry.
        headers: sent with every hop.
        location: a redirect target that an earlier exchange for the same object found, or None.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        method: str,
        url: str,
        *,
        headers: Iterable[tuple[str, str]] = (),
        location: str | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._home = origin(endpoint.base)
        self._method = method
        self._start_url = url
        self._headers = (("Accept-Encoding", "identity"), *headers)
        self._url = location or url
        self._from_cache = location is not None
        self._hops = 0
        self._challenges: list[Challenge] = []
        self.cache_refused = False  # the cached location was refused: forget it

    @property
    def location(self) -> str | None:
        """The URL outside the registry that is asked now; None while the registry itself is."""
        return None if self._at_home() else self._url

    @property
    def where(self) -> str:
        """The current URL as a message may show it."""
        return without_query(self._url)

    def request(self) -> Request:
        """The request to send now."""
        return Request(self._method, self._url, self._headers, self._at_home())

    def challenges(self) -> list[Challenge]:
        """The challenges of the reply that gave ``Step.REFUSED``."""
        return self._challenges

    def on_reply(self, head: ReplyHead) -> Step:
        """The step after *head*. Raises BadReply for redirects that lead nowhere good."""
        if head.status in (301, 302, 303, 307, 308) and head.get("location") is not None:
            self._follow(head.get("location") or "")
            return Step.AGAIN
        if self._at_home():
            if head.status == 401:
                self._challenges = parse_challenges(head.all("www-authenticate"))
                return Step.REFUSED
            return Step.FINAL
        if 400 <= head.status < 500 and head.status not in (408, 416, 429):
            if self._from_cache:
                # Signed URLs end without notice, as 403 (S3, OSS), 400 or 410: the registry gives a new one.
                self._url = self._start_url
                self._from_cache = False
                self.cache_refused = True
                return Step.AGAIN
            if head.status in (401, 403):
                raise Unreachable(
                    f"{self.where} refused the URL that the registry gave for it: {head.status}"
                )
        return Step.FINAL

    def _at_home(self) -> bool:
        return origin(self._url) == self._home

    def _follow(self, location: str) -> None:
        self._hops += 1
        if self._hops > MAX_REDIRECTS:
            raise BadReply(f"more than {MAX_REDIRECTS} redirects for {without_query(self._start_url)}")
        target = join_url(self._url, location)
        scheme, _, _ = origin(target)
        if scheme == "http" and not self._endpoint.plain_http:
            raise BadReply(
                f"{self.where} redirects to unencrypted {without_query(target)}",
                remedy="--plain-http allows that",
            )
        if "@" in urlsplit(target).netloc:
            raise BadReply(f"{self.where} redirects to a URL with a user name in it")
        self._url = target
        self._from_cache = False


@attrs.frozen
class BodyPlan:
    """Which part of a body is wanted: drop ``skip`` bytes, take ``count``. ``ends`` = the body must end
    there.

    ``total`` is the blob's size as far as the reply tells it.
    """

    skip: int
    count: int
    ends: bool
    total: int | None


def range_headers(offset: int, length: int) -> tuple[tuple[str, str], ...]:
    """The header of a request for *length* >= 1 bytes at *offset*."""
    return (("Range", f"bytes={offset}-{offset + length - 1}"),)


def plan_range_body(
    head: ReplyHead, offset: int, length: int, *, what: str, now: float, max_skip: int = DEFAULT_MAX_SKIP
) -> BodyPlan:
    """How to read exactly *length* bytes at *offset* out of the reply to a range request.

    Raises:
        BadReply: the range is not the one that was asked for, or the blob ends before it.
        RangeIgnored: 200, and more than *max_skip* bytes lie before the slice.
        BackendError: any status of refusal (see ``status_error``).
    """
    if head.get("content-encoding") not in (None, "identity", ""):
        raise BadReply(f"{what}: the server encoded the body although it was asked not to")
    announced = head.content_length()
    if head.status == 206:
        return _plan_partial(head, offset, length, announced, what)
    if head.status == 200:
        if announced is not None and announced < offset + length:
            raise BadReply(f"{what} has {announced} bytes, {offset + length} are needed")
        if offset > max_skip:
            raise RangeIgnored(f"{what}: the server ignores ranges and would send {offset} bytes first")
        return BodyPlan(offset, length, ends=announced == offset + length, total=announced)
    if head.status == 416:
        size = _UNSATISFIED.fullmatch(head.get("content-range") or "")
        told = f" (it has {size[1]})" if size else ""
        raise BadReply(f"{what} has no bytes {offset} to {offset + length - 1}{told}")
    raise status_error(head, what, now=now)


def _plan_partial(head: ReplyHead, offset: int, length: int, announced: int | None, what: str) -> BodyPlan:
    content_range = _CONTENT_RANGE.fullmatch((head.get("content-range") or "").strip())
    if content_range is None:
        raise BadReply(f"{what}: 206 without a usable Content-Range")
    first, last = int(content_range[1]), int(content_range[2])
    total = None if content_range[3] == "*" else int(content_range[3])
    if first != offset or last != offset + length - 1 or (total is not None and last >= total):
        raise BadReply(f"{what}: asked for bytes {offset}-{offset + length - 1}, got {first}-{last}")
    if announced is not None and announced != length:
        raise BadReply(f"{what}: {length} bytes were asked for, the body has {announced}")
    return BodyPlan(0, length, ends=True, total=total)


def check_ok(head: ReplyHead, expected: tuple[int, ...], what: str, *, now: float) -> None:
    """Returns when the status is one of *expected*, else raises what ``status_error`` makes of it."""
    if head.status not in expected:
        raise status_error(head, what, now=now)


def status_error(head: ReplyHead, what: str, *, now: float) -> BackendError:
    """The error that an unwanted status stands for; ``retryable`` tells whether another try can help.

    Args:
        head: the reply.
        what: the object that was asked for, as the message names it.
        now: seconds since the epoch, for a Retry-After that is a date.
    """
    status = head.status
    if status in (401, 403):
        return AuthError(
            f"{what}: access refused ({status})",
            remedy="log in with `docker login`, or check that the account may read the repository",
        )
    if status in (404, 410):
        return NotFound(f"{what} is not there ({status})", remedy="check the name, or push it again")
    pause = retry_after(head, now=now)
    if status == 429 or (status == 503 and pause is not None):
        wait = 1.0 if pause is None else pause
        return Throttled(f"{what}: the server asks to wait {wait:.0f} s ({status})", retry_after_s=wait)
    if status == 408 or status >= 500:
        return Unreachable(f"{what}: the server failed with {status}")
    return BadReply(f"{what}: unexpected status {status}")


def retry_after(head: ReplyHead, *, now: float) -> float | None:
    """The pause in seconds that Retry-After asks for, 0 to MAX_RETRY_AFTER_S; None without a usable one."""
    value = (head.get("retry-after") or "").strip()
    if re.fullmatch(r"\d{1,9}", value):
        return min(float(value), MAX_RETRY_AFTER_S)
    try:
        when = parsedate_to_datetime(value).timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None
    return min(max(when - now, 0.0), MAX_RETRY_AFTER_S)
