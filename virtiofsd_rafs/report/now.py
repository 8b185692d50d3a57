"""A daemon's status on one screen, for people. Pure: the JSON of ``GET /api/v1/status`` goes in."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from virtiofsd_rafs.report.trace import OK, printable
from virtiofsd_rafs.report.units import amount, count, duration, percent

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# Traffic of the last seconds is the rate.
RATE_S = 10.0
_WAITS = 6
_SLOWEST = 4
_BAR = 24
_LABEL = 10


def screen(status: dict[str, Any]) -> list[str]:
    """Lines to print; none is longer than a name makes it."""
    parts: list[tuple[str, list[str]]] = [
        ("image", _image(status)),
        ("VM", [_vm(status)]),
        ("cache", list(_cache(status))),
        ("traffic", list(_traffic(status))),
        ("sources", list(_sources(status))),
        ("waiting", list(_waiting(status))),
        ("waited", list(_waited(status))),
        ("processes", list(_processes(status))),
    ]
    lines = []
    for label, rows in parts:
        for i, row in enumerate(rows):
            lines.append(f"{label if i == 0 else '':<{_LABEL}}{row}".rstrip())
    return lines


def _ago(status: dict[str, Any], since_ns: int) -> str:
    seconds = max(0.0, (status["now_ns"] - since_ns) / 1e9)
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} days"


def _image(status: dict[str, Any]) -> list[str]:
    session = status["session"]
    started = session.get("start_ns", 0)
    since = f", running for {_ago(status, started)}" if started else ""
    lines = [
        printable(status["image"]["name"]),
        f"{status['state']}, version {status['version']}{since}, {printable(status['id'])}",
    ]
    if status["state"] == "INIT":
        lines.append("not mounted yet: requests of a VM wait")
    return lines


def _vm(status: dict[str, Any]) -> str:
    session = status["session"]
    if not session["frontend_connected"]:
        return "none is connected"
    text = "connected"
    if session.get("connected_ns"):
        text += f" for {_ago(status, session['connected_ns'])}"
    asked = session.get("init_ns")
    text += "" if asked is None else ", its kernel has mounted" if asked else ", its kernel has not asked yet"
    queues = status["queues"]
    requests = sum(queue["completed"] for queue in queues)
    busy = sum(queue["in_flight"] for queue in queues)
    broken = sum(bool(queue.get("broken")) for queue in queues)
    text += f"; {count(requests, 'request')} answered, {busy} under way in {count(len(queues), 'queue')}"
    return f"{text}, {broken} broken by its driver" if broken else text


def _cache(status: dict[str, Any]) -> Iterator[str]:
    blobs = status["image"].get("blobs", [])
    if not blobs:
        return
    total = sum(blob["n_chunks"] for blob in blobs)
    stored = sum(blob["states"]["verified"] for blob in blobs if blob["on_disk"])
    spilled = sum(blob["states"]["spilled"] for blob in blobs)
    unverified = sum(blob["states"]["present"] for blob in blobs if blob["on_disk"])
    ready = stored + spilled
    filled = round(_BAR * ready / total) if total else 0
    bar = "\u2588" * filled + "\u2591" * (_BAR - filled)
    yield f"{bar}  {percent(ready, total)}: {ready} of {count(total, 'chunk')}"
    cache = status["agent"].get("cache", {})
    where = printable(cache["dir"]) if cache.get("dir") else "no disk"
    notes = [f"{stored} on disk ({where})", f"{spilled} in memory"]
    if unverified:
        notes.append(f"{unverified} stored and to be verified again")
    if status["image"].get("complete"):
        notes.append("complete: no registry is needed any more")
    yield ", ".join(notes)
    if cache.get("disk_errors"):
        yield f"the disk refused {count(cache['disk_errors'], 'time')}: make room there; memory stands in"


def _traffic(status: dict[str, Any]) -> Iterator[str]:
    agent = status["agent"]
    tries = sum(agent["fetches"].values())
    failed = {msgid: n for msgid, n in agent["fetches"].items() if msgid != OK}
    rate = _rate(status)
    now = f"{amount(rate)}/s" if rate else "idle"
    under_way = agent.get("fetches_in_flight", 0)
    yield (
        f"{now} over the last {RATE_S:g} s, {count(under_way, 'fetch', 'fetches')} under way;"
        f" {amount(agent['bytes_fetched'])} in {count(tries, 'request')} so far"
    )
    if failed:
        kinds = ", ".join(f"{printable(msgid)} ({n})" for msgid, n in sorted(failed.items()))
        yield f"{sum(failed.values())} of them failed: {kinds}"
    if agent.get("outage_s"):
        yield f"nothing has come for {duration(agent['outage_s'])}: asked again until it does"
    first = agent.get("first_start", {})
    if first.get("prefetching"):
        yield f"prefetching {count(first.get('listed_chunks', 0), 'listed chunk')}"
    if first.get("fill", "off") != "off":
        yield f"background fill: {first['fill']}"


def _rate(status: dict[str, Any]) -> float:
    """Bytes per second of the last seconds; a fetch that began before counts in part."""
    end = status["now_ns"]
    begin = end - RATE_S * 1e9
    total = 0.0
    for fetch in status["fetch_log"]:
        if fetch["result"] == OK and fetch["ended_ns"] > begin:
            took = max(1, fetch["ended_ns"] - fetch["started_ns"])
            total += fetch["length"] * min(1.0, (fetch["ended_ns"] - begin) / took)
    return total / RATE_S


def _sources(status: dict[str, Any]) -> Iterator[str]:
    """The places with their health; without such an account, who stands in the log."""
    log: dict[str, list[dict[str, Any]]] = {}
    for fetch in status["fetch_log"]:
        log.setdefault(fetch["source"], []).append(fetch)
    rows: list[tuple[str, ...]] = []
    for place in status["agent"].get("sources", []):
        state = place["state"]
        if place.get("rests_for_s"):
            state += f" for {duration(place['rests_for_s'])}"
        tries = count(place["requests"], "request")
        rows.append(
            (place["source"], state, tries, f"{place['errors']} failed", _median(log.get(place["source"])))
        )
    known = {row[0] for row in rows}
    for name, fetches in log.items():
        if name and name not in known:
            failed = sum(fetch["result"] != OK for fetch in fetches)
            state = "well" if fetches[-1]["result"] == OK else "failing"
            rows.append((name, state, count(len(fetches), "request"), f"{failed} failed", _median(fetches)))
    rows = [tuple(printable(cell) for cell in row) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))


def _median(fetches: Sequence[dict[str, Any]] | None) -> str:
    times = [(f["ended_ns"] - f["started_ns"]) / 1e9 for f in fetches or () if f["result"] == OK]
    return f"median {duration(statistics.median(times))}" if times else ""


def _waiting(status: dict[str, Any]) -> Iterator[str]:
    parked = sum(queue["parked"] for queue in status["queues"])
    chunks = status["agent"].get("chunks_waiting", 0)
    waits = status.get("waiting", [])
    if not parked and not chunks:
        yield "nobody"
        return
    yield f"{count(parked, 'request')} for {count(chunks, 'chunk')}"
    for wait in waits[:_WAITS]:
        tries = f", {count(wait['attempts'], 'try', 'tries')} failed" if wait["attempts"] else ""
        since = _ago(status, wait["since_ns"])
        yield f"{since:>9}  {_file(wait)} at {wait['offset']}  {wait['doing']}{tries}"


def _waited(status: dict[str, Any]) -> Iterator[str]:
    stalls = status["stalls"]
    if not stalls["count"]:
        yield "no request"
        return
    yield f"{count(stalls['count'], 'request')}, {duration(stalls['total_ns'] / 1e9)} altogether; the longest"
    for stall in stalls["slowest"][:_SLOWEST]:
        waited = duration((stall["done_ns"] - stall["parked_ns"]) / 1e9)
        yield f"{waited:>9}  {_file(stall)} at {stall['offset']}"


def _file(item: dict[str, Any]) -> str:
    return printable(item["path"]) or f"node {item['nodeid']}"


def _processes(status: dict[str, Any]) -> Iterator[str]:
    shown = []
    for role, process in status["processes"].items():
        if not process["pid"]:
            idle = role == "worker" and not status["session"]["frontend_connected"]
            shown.append(f"{role} none until a VM comes" if idle else f"{role} is being started")
            continue
        pss = process.get("pss_kib")
        shown.append(f"{role} {process['pid']}" + (f" ({amount(pss * 1024)})" if pss else ""))
    yield ", ".join(shown)
    crashes = status["processes"]["worker"].get("crashes", 0)
    if crashes:
        yield f"the worker crashed {count(crashes, 'time')} and was replaced (please report its log)"
