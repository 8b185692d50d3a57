"""What a boot's times and the daemon's status say, as data and as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs

if TYPE_CHECKING:
    from guest.boot import Boot
    from guest.registry import Traffic

_STALLS = 8


def amount(size: float) -> str:
    """*size* bytes for people: ``30.7 MB`` (powers of 1000, as network rates are)."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def describe(boot: Boot, image_size: int | None, registry: Traffic | None = None) -> dict[str, Any]:
    """One boot as data; ``text`` has the same as lines to print.

    Args:
        boot: what was seen.
        image_size: bytes of the whole image in the registry; without it, what the daemon says.
        registry: everything that the registry answered during the boot, if it was ours.
    """
    status = boot.status
    if image_size is None:
        stored = [blob["stored_size"] for blob in status["image"]["blobs"]]
        image_size = None if None in stored else sum(stored) + status["image"]["bootstrap_size"]
    times = dict(boot.times)
    # The daemon's clock is ours: CLOCK_MONOTONIC.
    for event, name in (("image mounted", "mounted_ns"), ("FUSE_INIT", "init_ns")):
        if status["session"][name]:
            times[event] = status["session"][name] / 1e9 - boot.started
    times = dict(sorted(times.items(), key=lambda item: item[1]))
    requests = sum(status["agent"]["fetches"].values())
    fetched = status["agent"]["bytes_fetched"]
    stalls = [
        {
            "duration_s": round((stall["done_ns"] - stall["parked_ns"]) / 1e9, 4),
            "at_s": round(stall["parked_ns"] / 1e9 - boot.started, 4),
            "path": stall["path"] or f"node {stall['nodeid']}",
            "offset": stall["offset"],
            "length": stall["length"],
        }
        for stall in status["stalls"]["slowest"][:_STALLS]
    ]
    text = [f"{boot.name} cache", "  time line (s since the daemon was started)"]
    text += [f"    {seconds:8.3f}  {event}" for event, seconds in times.items()]
    share = f" of {amount(image_size)} ({100 * fetched / image_size:.0f} %)" if image_size else ""
    text.append(f"  fetched: {requests} requests, {amount(fetched)}{share}")
    if registry is not None:
        text.append(
            f"  with manifest and bootstrap the registry answered {registry.requests} requests,"
            f" {amount(registry.bytes)}"
        )
    if stalls:
        waits = status["stalls"]
        text.append(
            f"  {waits['count']} reads waited for data, {waits['total_ns'] / 1e9:.1f} s in all; the longest"
            " (s, file, offset, length)"
        )
        text += [
            f"    {stall['duration_s']:8.3f}  {stall['path']} [{stall['offset']}, +{stall['length']}]"
            for stall in stalls
        ]
    return {
        "name": boot.name,
        "times_s": {event: round(seconds, 4) for event, seconds in times.items()},
        "requests": requests,
        "bytes": fetched,
        "registry": attrs.asdict(registry) if registry is not None else None,
        "image_bytes": image_size,
        "stalled_reads": status["stalls"]["count"],
        "stalled_s": round(status["stalls"]["total_ns"] / 1e9, 4),
        "stalls": stalls,
        "text": text,
    }


def compare(boots: list[dict[str, Any]]) -> list[str]:
    """The boots side by side, a line each."""
    return [
        f"{boot['name']:>4}: HTTP 200 after {boot['times_s']['HTTP 200']:6.2f} s,"
        f" {boot['requests']:5d} requests, {amount(boot['bytes']):>9}"
        for boot in boots
    ]
