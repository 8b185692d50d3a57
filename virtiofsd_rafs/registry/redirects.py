"""Redirect targets of blobs, kept until they expire or are refused.

A registry with an object store behind it answers each blob request with a signed URL. Asking for a new one
before each range would double the requests of a cold boot.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from datetime import UTC, datetime
from urllib.parse import parse_qs, urlsplit

# Without a date in the URL: long enough to save requests; a refusal drops the entry anyway.
DEFAULT_TTL_S = 300.0
# Dates in the URL were written by another clock.
CLOCK_MARGIN_S = 10.0
_MAX_ENTRIES = 1024


class RedirectCache:
    """At most 1024 targets by blob. Time is an argument, in seconds since the epoch."""

    def __init__(self) -> None:
        self._targets: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def get(self, blob: str, *, now: float) -> str | None:
        """The target of *blob* that is still good at *now*."""
        entry = self._targets.get(blob)
        if entry is None:
            return None
        if now >= entry[1]:
            del self._targets[blob]
            return None
        return entry[0]

    def put(self, blob: str, url: str, *, now: float) -> None:
        """Keeps *url* for *blob*. A target that is known keeps its age."""
        known = self._targets.get(blob)
        if known is not None and known[0] == url:
            return
        self._targets[blob] = (url, expiry(url, now=now))
        self._targets.move_to_end(blob)
        while len(self._targets) > _MAX_ENTRIES:
            self._targets.popitem(last=False)

    def drop(self, blob: str) -> None:
        """Forgets the target of *blob*."""
        self._targets.pop(blob, None)


def expiry(url: str, *, now: float) -> float:
    """When *url* stops being good, seconds since the epoch, as its own signature parameters tell.

    Known: ``X-Amz-Date`` + ``X-Amz-Expires`` (S3, GCS as ``X-Goog-*``), ``Expires`` (OSS, CloudFront, old
    S3), ``se`` (Azure).
    """
    try:
        query = {k.lower(): v[0] for k, v in parse_qs(urlsplit(url).query, max_num_fields=64).items()}
    except ValueError:
        return now + DEFAULT_TTL_S
    for vendor in ("x-amz", "x-goog", "x-oss"):
        start = _timestamp(query.get(f"{vendor}-date", ""))
        ttl = query.get(f"{vendor}-expires", "")
        if start is not None and re.fullmatch(r"\d{1,9}", ttl):
            return start + int(ttl) - CLOCK_MARGIN_S
    if re.fullmatch(r"\d{9,11}", query.get("expires", "")):
        return int(query["expires"]) - CLOCK_MARGIN_S
    end = _timestamp(query.get("se", ""))
    return end - CLOCK_MARGIN_S if end is not None else now + DEFAULT_TTL_S


def _timestamp(text: str) -> float | None:
    for form in ("%Y%m%dT%H%M%SZ", "%Y-%m-%dT%H:%M:%SZ"):
        try:
            return datetime.strptime(text, form).replace(tzinfo=UTC).timestamp()
        except (ValueError, OverflowError):
            continue
    return None
