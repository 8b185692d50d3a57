"""A trace as values: what the daemon (or a recorder) wrote is checked here, once.

Times become seconds since the start of the boot. Names become printable: they are bytes that somebody else
chose, and go to terminals and pages.
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Any

import attrs

from virtiofsd_rafs.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

DEMAND, READ_AHEAD, PREFETCH, FILL, PULL = "demand", "read-ahead", "prefetch", "fill", "pull"
REASONS = (DEMAND, READ_AHEAD, PREFETCH, FILL, PULL)
"""Why bytes were fetched: a request waits for them, they follow such bytes, a list names them, everything is
to be there in the end, or the whole image is downloaded first (the classic way)."""

OK = "ok"

# What the daemon's logs hold; a trace with as many may lack earlier ones.
LOG_LEN = 4096
# More than the logs hold is no trace of ours.
_MAX_RECORDS = 1 << 16
_MAX_EVENTS = 64
# A VM that comes so long after its daemon starts its own time line.
_LATE_VM_S = 30.0
# Where time has no bound, a broken trace would give a page as long.
_MAX_NS = 1 << 62


@attrs.frozen
class Event:
    """Something that happened once. ``at_s`` may be negative: before the VM came."""

    name: str
    at_s: float


@attrs.frozen
class Fetch:
    """One try of a fetch."""

    start_s: float
    end_s: float
    path: str
    """File whose read asked first; empty when nobody's did."""
    blob: int
    offset: int
    length: int
    n_chunks: int
    attempt: int
    reason: str
    """Why it was started."""
    by_reason: tuple[tuple[str, int], ...]
    """Its bytes by reason, in the order of REASONS; what lies between its chunks counts as the reason of the
    fetch."""
    unread: int | None
    """Bytes that no read was answered from; None when nobody counted."""
    source: str
    result: str

    @property
    def ok(self) -> bool:
        """Whether its bytes came and were right."""
        return self.result == OK

    @property
    def arrived(self) -> int:
        """Bytes that came over the link, right or wrong."""
        return 0 if self.result.startswith(("backend.", "internal.")) else self.length

    @property
    def wanted(self) -> bool:
        """Whether a request waited for some of it."""
        return any(reason == DEMAND for reason, _ in self.by_reason)


@attrs.frozen
class Stall:
    """A request that had to wait for its data."""

    start_s: float
    end_s: float
    path: str
    offset: int
    length: int

    @property
    def seconds(self) -> float:
        """How long."""
        return self.end_s - self.start_s


@attrs.frozen
class Trace:
    """Everything that is known of a boot. Fetches and stalls are in the order of their starts."""

    name: str
    image: str
    events: tuple[Event, ...]
    fetches: tuple[Fetch, ...]
    stalls: tuple[Stall, ...]
    image_bytes: int | None
    """Stored size of all blobs."""
    link_bytes: int | None
    """All that the registry answered, metadata included, where that was measured."""
    truncated: bool
    """The logs were full: earlier fetches or stalls may be missing."""


def printable(name: str) -> str:
    """*name* with everything escaped that is no visible character: control and format characters (which turn
    text around), line ends, lone surrogates. A backslash stays: it is what an escape begins with."""
    return "".join(char if _visible(char) else _escape(char) for char in name)


def _visible(char: str) -> bool:
    return char == " " or unicodedata.category(char)[0] not in "CZ"


def _escape(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8, as Python's surrogateescape has it
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class _Fields:
    """The fields of one JSON object, each checked when it is taken."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise _bad(where, "is no object")
        self._data: dict[str, Any] = data
        self._where = where

    def number(self, name: str, default: int | None = None) -> int:
        """A whole number from 0 on."""
        value = self._data.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_NS:
            raise _bad(f"{self._where}.{name}", "is no number that it may be")
        return value

    def maybe(self, name: str) -> int | None:
        """A number, or nothing."""
        return None if self._data.get(name) is None else self.number(name)

    def text(self, name: str, default: str = "") -> str:
        """A text, made printable."""
        value = self._data.get(name, default)
        if not isinstance(value, str):
            raise _bad(f"{self._where}.{name}", "is no text")
        return printable(value)

    def array(self, name: str) -> list[Any]:
        """An array of a length that is sane."""
        value = self._data.get(name, [])
        if not isinstance(value, list) or len(value) > _MAX_RECORDS:
            raise _bad(f"{self._where}.{name}", "is no array of a sane length")
        return value

    def numbers(self, name: str, limit: int) -> dict[str, int]:
        """An object of at most *limit* numbers."""
        value = self._data.get(name, {})
        if not isinstance(value, dict) or len(value) > limit:
            raise _bad(f"{self._where}.{name}", "is no object of a sane size")
        fields = _Fields(value, f"{self._where}.{name}")
        return {printable(key): fields.number(key) for key in value}


def _bad(where: str, what: str) -> ConfigError:
    return ConfigError(f"{where} {what}", remedy="a report is made of what GET /api/v1/trace answers")


def parse(data: Any, *, name: str = "boot") -> Trace:
    """The trace in the JSON value *data*. ``name`` in it comes before *name*.

    Recorders may add to what the daemon tells: ``name``, ``events`` (names to CLOCK_MONOTONIC ns) and
    ``link_bytes``. Raises ConfigError for what is no trace.
    """
    top = _Fields(data, "trace")
    if "fetches" not in data and "events" not in data:
        raise _bad("trace", "has neither fetches nor events")
    known = (
        ("daemon started", "started_at_ns"),
        ("image mounted", "mounted_at_ns"),
        ("VM connected", "connected_at_ns"),
        ("FUSE_INIT", "first_init_ns"),
        ("first read of a program", "first_exec_ns"),
    )
    times = {event: top.number(field, 0) for event, field in known}
    times |= top.numbers("events", _MAX_EVENTS)
    times = {event: t for event, t in times.items() if t}
    fetches = [_Fields(item, "fetch") for item in top.array("fetches")]
    stalls = [_Fields(item, "stall") for item in top.array("stalls")]
    origin = _origin(times, fetches, stalls)
    first_fetch = min((item.number("started_ns") for item in fetches), default=0)
    if first_fetch:
        times.setdefault("first fetch", first_fetch)
    sizes = [_Fields(blob, "blob").maybe("size") for blob in top.array("blobs")]
    known_sizes = [size for size in sizes if size is not None]
    events = (Event(event, (t - origin) / 1e9) for event, t in times.items())
    return Trace(
        name=top.text("name", name),
        image=top.text("image"),
        events=tuple(sorted(events, key=lambda event: event.at_s)),
        fetches=tuple(sorted((_fetch(item, origin) for item in fetches), key=lambda f: f.start_s)),
        stalls=tuple(sorted((_stall(item, origin) for item in stalls), key=lambda s: s.start_s)),
        image_bytes=sum(known_sizes) if sizes and len(known_sizes) == len(sizes) else None,
        link_bytes=top.maybe("link_bytes"),
        truncated=max(len(fetches), len(stalls)) >= LOG_LEN,
    )


def _origin(times: Mapping[str, int], fetches: Iterable[_Fields], stalls: Iterable[_Fields]) -> int:
    """When the boot began: with the daemon, or with its first VM when that came much later."""
    activity = [item.number("started_ns") for item in fetches] + [item.number("parked_ns") for item in stalls]
    first = min([*times.values(), *activity], default=0)
    vm = times.get("VM connected", 0)
    return vm if vm - first > _LATE_VM_S * 1e9 else first


def _fetch(item: _Fields, origin: int) -> Fetch:
    start, length = item.number("started_ns"), item.number("length")
    reason = item.text("reason", DEMAND)
    shares = item.numbers("bytes_by_reason", len(REASONS))
    # Between the chunks lie bytes that nobody needs.
    shares[reason] = shares.get(reason, 0) + max(0, length - sum(shares.values()))
    order = {known: i for i, known in enumerate(REASONS)}
    return Fetch(
        start_s=(start - origin) / 1e9,
        end_s=(max(start, item.number("ended_ns")) - origin) / 1e9,
        path=item.text("path"),
        blob=item.number("blob_index", 0),
        offset=item.number("offset", 0),
        length=length,
        n_chunks=item.number("n_chunks", 0),
        attempt=item.number("attempt", 1),
        reason=reason,
        by_reason=tuple(sorted(shares.items(), key=lambda share: order.get(share[0], len(order)))),
        unread=item.maybe("unread_bytes"),
        source=item.text("source"),
        result=item.text("result", OK),
    )


def _stall(item: _Fields, origin: int) -> Stall:
    start = item.number("parked_ns")
    path = item.text("path") or f"node {item.number('nodeid', 0)}"
    return Stall(
        start_s=(start - origin) / 1e9,
        end_s=(max(start, item.number("done_ns")) - origin) / 1e9,
        path=path,
        offset=item.number("offset", 0),
        length=item.number("length", 0),
    )
