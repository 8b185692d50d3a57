"""What a boot's times and the daemon's status say, as data and as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guest.boot import Boot

_STALLS = 8


def amount(size: float) -> str:
    """*size* bytes for people: ``30.7 MB`` (powers of 1000, as network rates are)."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def describe(boot: Boot, image_size: int | None) -> dict[str, Any]:
    """One boot as data; ``text`` has the same as lines to print.

    Args:
        boot: what was seen.
        image_size: bytes of the whole image in the registry, if known.
    """
    status = boot.status
    session, agent = status["session"], status["agent"]
    times = dict(boot.times)
    for event, clock in (("image mounted", "mounted_ns"), ("FUSE_INIT", "init_ns")):
        if session[clock]:
            times[event] = (session[clock] - session["start_ns"]) / 1e9
    times = dict(sorted(times.items(), key=lambda item: item[1]))
    requests, size = sum(agent["fetches"].values()), agent["bytes_fetched"]
    stalls = [
        {
            "duration_s": (stall["done_ns"] - stall["parked_ns"]) / 1e9,
            "path": stall["path"] or f"node {stall['nodeid']}",
            "offset": stall["offset"],
            "length": stall["length"],
        }
        for stall in status["stalls"]["slowest"][:_STALLS]
    ]
    text = [f"{boot.name} cache", "  time line (s since the daemon was started)"]
    text += [f"    {seconds:8.3f}  {event}" for event, seconds in times.items()]
    share = f" of {amount(image_size)} ({100 * size / image_size:.0f} %)" if image_size else ""
    text.append(f"  fetched: {requests} requests, {amount(size)}{share}")
    if stalls:
        text.append("  longest stalls (s, what was read)")
        text += [
            f"    {stall['duration_s']:8.3f}  {stall['path']} [{stall['offset']}, +{stall['length']}]"
            for stall in stalls
        ]
    return {
        "name": boot.name,
        "times_s": {event: round(seconds, 4) for event, seconds in times.items()},
        "requests": requests,
        "bytes": size,
        "image_bytes": image_size,
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
