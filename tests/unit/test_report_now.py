"""The status on one screen: everything that an operator looks for, and nothing that a name could break."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from click.testing import CliRunner

from tests.sim.traces import HOSTILE
from virtiofsd_rafs.cli import cli
from virtiofsd_rafs.cli import status as status_module
from virtiofsd_rafs.errors import Unreachable
from virtiofsd_rafs.report.now import screen

if TYPE_CHECKING:
    import pytest

NOW = 500 * 10**9


def second(t: float) -> int:
    return NOW + round(t * 10**9)


def fetched(start: float, end: float, **fields: Any) -> dict[str, Any]:
    values = {"started_ns": second(start), "ended_ns": second(end), "length": 10**6, "result": "ok"}
    return values | {"source": "mirror:5000"} | fields


def status(**fields: Any) -> dict[str, Any]:
    states = {"absent": 60, "fetching": 0, "present": 5, "verified": 30, "spilled": 5}
    values: dict[str, Any] = {
        "id": "/run/rafs.sock",
        "version": "1.0",
        "state": "RUNNING",
        "now_ns": NOW,
        "image": {
            "name": "registry/app:1",
            "complete": False,
            "blobs": [{"n_chunks": 100, "on_disk": True, "states": states}],
        },
        "session": {
            "frontend_connected": True,
            "start_ns": second(-400),
            "connected_ns": second(-60),
            "init_ns": second(-50),
        },
        "queues": [
            {"index": 0, "parked": 0, "in_flight": 0, "completed": 1},
            {"index": 1, "parked": 2, "in_flight": 3, "completed": 99},
        ],
        "agent": {
            "fetches": {"ok": 7, "backend.timeout": 2},
            "bytes_fetched": 5_000_000,
            "chunks_waiting": 2,
            "fetches_in_flight": 1,
            "outage_s": 61.0,
            "first_start": {"listed_chunks": 40, "prefetching": True, "fill": "waiting"},
            "sources": [
                {
                    "source": "mirror:5000",
                    "requests": 9,
                    "errors": 2,
                    "state": "resting",
                    "rests_for_s": 4.5,
                }
            ],
            "cache": {"dir": "/var/cache/rafs", "disk_errors": 1},
        },
        "fetch_log": [fetched(-15, -5), fetched(-2, -1), fetched(-1, -0.5, source="registry")],
        "stalls": {
            "count": 3,
            "total_ns": 2_500_000_000,
            "slowest": [{"path": "/bin/sh", "nodeid": 3, "offset": 0, "parked_ns": 0, "done_ns": 2 * 10**9}],
        },
        "waiting": [
            {
                "path": HOSTILE[3],
                "nodeid": 3,
                "offset": 4096,
                "since_ns": second(-3.25),
                "attempts": 2,
                "doing": "backing off",
            }
        ],
        "processes": {
            "keeper": {"pid": 11, "pss_kib": 3000},
            "worker": {"pid": 0, "crashes": 1},
            "control": {"pid": 13, "pss_kib": None},
        },
    }
    return values | fields


def test_one_screen() -> None:
    lines = screen(status())
    assert len(lines) <= 24
    text = "\n".join(lines)
    for expected in (
        "registry/app:1",
        "RUNNING, version 1.0, running for 7 min",
        "connected for 60.0 s, its kernel has mounted; 100 requests answered, 3 under way in 2 queues",
        "35 %: 35 of 100 chunks",
        "30 on disk (/var/cache/rafs), 5 in memory, 5 stored and to be verified again",
        "the disk refused 1 time",
        "250.0 kB/s over the last 10 s, 1 fetch under way; 5.0 MB in 9 requests so far",
        "2 of them failed: backend.timeout (2)",
        "nothing has come for 61.0 s: asked again until it does",
        "prefetching 40 listed chunks",
        "background fill: waiting",
        "mirror:5000  resting for 4.50 s  9 requests  2 failed",
        "registry     well                1 request   0 failed  median 500 ms",
        "2 requests for 2 chunks",
        r"3.2 s  /srv/\xff\xfe\x1b[31m\u202egnp.exe\x0a at 4096  backing off, 2 tries failed",
        "3 requests, 2.50 s altogether",
        "2.00 s  /bin/sh at 0",
        "keeper 11 (3.1 MB), worker is being started, control 13",
        "the worker crashed 1 time",
    ):
        assert expected in text
    assert "\x1b" not in text


def test_a_daemon_that_does_nothing() -> None:
    session = {"frontend_connected": False}
    quiet = {"fetches": {}, "bytes_fetched": 0}
    stalls = {"count": 0, "total_ns": 0, "slowest": []}
    found = status(
        state="INIT",
        image={"name": "app"},
        session=session,
        queues=[],
        agent=quiet,
        fetch_log=[],
        stalls=stalls,
        waiting=[],
    )
    text = "\n".join(screen(found))
    for expected in (
        "not mounted yet",
        "none is connected",
        "idle",
        "nobody",
        "no request",
        "none until a VM",
    ):
        assert expected in text


def test_watching_ends_when_the_daemon_does(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [status(), status(state="INIT")]

    def look(*_: object) -> dict[str, Any]:
        if not looks:
            raise Unreachable("gone")
        return looks.pop(0)

    monkeypatch.setattr(status_module, "fetch_json", look)
    done = CliRunner().invoke(cli, ["status", "--api-socket", "x", "--watch", "--interval", "0.1"])
    assert isinstance(done.exception, Unreachable)
    assert done.output.count("registry/app:1") == 2
