"""Traces as a daemon writes them, of boots that never were. The same every time."""

from __future__ import annotations

import random
from typing import Any

START = 5_000_000_000_000
HOSTILE = (
    "/srv/</script><img src=x onerror=document.title=1>",
    '/srv/" onmouseover="alert(1)" \'',
    "/srv/<!--<script>",
    "/srv/\udcff\udcfe\x1b[31m\u202egnp.exe\n",
    "/srv/&amp;&#60;]]>",
    "/srv/" + "n" * 255,
)


def ns(seconds: float) -> int:
    """*seconds* after the start of the boot, on the daemon's clock."""
    return START + round(seconds * 1e9)


def fetch(start: float, end: float, **fields: Any) -> dict[str, Any]:
    """One try of a fetch: of 100 000 bytes on demand that went well, unless *fields* say otherwise."""
    values: dict[str, Any] = {
        "started_ns": ns(start),
        "ended_ns": ns(end),
        "blob_index": 0,
        "offset": 0,
        "length": 100_000,
        "n_chunks": 2,
        "n_wanted": 1,
        "attempt": 1,
        "nodeid": 7,
        "file_offset": 0,
        "result": "ok",
        "reason": "demand",
        "source": "registry",
        "path": "/bin/sh",
    }
    return values | fields


def stall(start: float, end: float, path: str = "/bin/sh", **fields: Any) -> dict[str, Any]:
    """A request that waited."""
    values = {"path": path, "nodeid": 7, "offset": 0, "length": 4096}
    return values | {"parked_ns": ns(start), "done_ns": ns(end)} | fields


def trace(fetches: list[dict[str, Any]], stalls: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """What ``GET /api/v1/trace`` answers."""
    values: dict[str, Any] = {
        "image": "registry.example/app:1",
        "started_at_ns": ns(0),
        "connected_at_ns": ns(0.2),
        "mounted_at_ns": ns(0.5),
        "first_init_ns": ns(2),
        "first_exec_ns": ns(2.2),
        "now_ns": ns(60),
        "bootstrap_size": 100_000,
        "blobs": [{"id": "a" * 64, "size": 50_000_000}],
        "fetches": fetches,
        "stalls": stalls,
    }
    return values | fields


def lively(n: int, seed: int = 1) -> dict[str, Any]:
    """A boot with *n* fetches of every reason, some of them failed and repeated, and hostile names."""
    rng = random.Random(seed)
    fetches, stalls = [], []
    at = 2.2
    for i in range(n):
        path = HOSTILE[i % len(HOSTILE)] if i % 5 == 0 else f"/usr/lib/folder{i % 17}/library-{i % 90}.so"
        length = rng.randrange(4_000, 600_000)
        took = 0.02 + length / 3.5e6 * rng.uniform(0.8, 1.3)
        reason = rng.choice(["demand"] * 6 + ["prefetch", "fill"])
        ahead = length // rng.choice([2, 3, 10]) if reason == "demand" and i % 3 == 0 else 0
        shares = {reason: length - ahead} | ({"read-ahead": ahead} if ahead else {})
        common = {"offset": i * 700_000, "length": length, "path": path if reason == "demand" else ""}
        common |= {
            "reason": reason,
            "bytes_by_reason": shares,
            "source": rng.choice(["registry", "mirror:5000"]),
        }
        begin = at
        if i % 11 == 3:
            fetches.append(fetch(at, at + took / 2, **common, result="backend.timeout"))
            at += took / 2 + 0.05
            common["attempt"] = 2
        fetches.append(fetch(at, at + took, **common, unread_bytes=ahead // 2))
        if reason == "demand":
            stalls.append(stall(begin, at + took + 0.001, path))
        at += took * rng.uniform(0.2, 1.2)
    return trace(fetches, stalls, events={"HTTP 200": ns(at + 0.5)}, blobs=[{"id": "b", "size": n * 700_000}])
