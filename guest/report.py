"""What was seen of a boot, as a recording that ``virtiofsd-rafs boot report`` reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from guest.boot import Boot
    from guest.pull_first import Pull
    from guest.registry import Traffic
    from virtiofsd_rafs.report.model import Report


def recording(boot: Boot, name: str, traffic: Traffic | None = None) -> dict[str, Any]:
    """The daemon's trace of *boot*, with what was seen from outside.

    Args:
        boot: what was seen.
        name: how the report calls it.
        traffic: everything that the registry answered during the boot, if it was ours.
    """
    return {
        **boot.trace,
        "name": name,
        "events": {event: _ns(boot.started + seconds) for event, seconds in boot.times.items()},
        "link_bytes": traffic.bytes if traffic is not None else None,
    }


def recording_of_pull(pull: Pull, boot: Boot, name: str, image: str, traffic: Traffic) -> dict[str, Any]:
    """A recording of the classic way: *boot* came after *pull*. What lay between them does not count."""
    begin = pull.unpacked_ns
    events = {
        "pull begins": pull.started_ns,
        "downloaded": pull.downloaded_ns,
        "unpacked": pull.unpacked_ns,
        **{event: begin + _ns(seconds) for event, seconds in boot.times.items()},
    }
    fetches = [
        {
            "started_ns": layer.started_ns,
            "ended_ns": layer.ended_ns,
            "length": layer.size,
            "reason": "pull",
            "path": f"layer {layer.number + 1} of {len(pull.layers)}",
            "source": "registry",
        }
        for layer in pull.layers
    ]
    return {
        "name": name,
        "image": image,
        "events": events,
        "blobs": [{"size": layer.size} for layer in pull.layers],
        "fetches": fetches,
        "stalls": [],
        "link_bytes": traffic.bytes,
    }


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def comparison(reports: Sequence[Report]) -> str:
    """The first boot against the last, in one sentence; empty without a last one that pulled."""
    cold, pulled = reports[0], reports[-1]
    if not pulled.pulled or not pulled.end_s or not pulled.traffic:
        return ""
    return (
        f"{cold.name}: {cold.end_s / pulled.end_s:.2f} of the time of {pulled.name.lower()},"
        f" {cold.traffic / pulled.traffic:.2f} of its bytes"
    )
