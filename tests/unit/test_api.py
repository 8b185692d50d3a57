"""The API on its socket, the metrics, and the status command that reads them."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import socket
import subprocess
import sys
import threading
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from prometheus_client.parser import text_string_to_metric_families

from tests.sim.images import MadeImage, make_image
from virtiofsd_rafs.cli._api import UnixConnection, _unreachable, fetch_json
from virtiofsd_rafs.cli.status import status as status_command
from virtiofsd_rafs.config import ServeConfig
from virtiofsd_rafs.errors import BackendTimeout, BadReply, Unreachable
from virtiofsd_rafs.image.resolve import ResolvedImage
from virtiofsd_rafs.native.session import Trace
from virtiofsd_rafs.native.store import Store
from virtiofsd_rafs.rafs.v6 import Tree
from virtiofsd_rafs.report.now import screen
from virtiofsd_rafs.runtime import api
from virtiofsd_rafs.runtime.agent import Agent
from virtiofsd_rafs.runtime.metrics import (
    FAMILIES,
    FETCH_BUCKETS_S,
    LOG_LEN,
    SLOWEST_LEN,
    FetchRecord,
    Metrics,
    Sample,
    Stalls,
    render,
    runs_of,
)
from virtiofsd_rafs.runtime.mount import Mounted, seal_bootstrap
from virtiofsd_rafs.runtime.view import View

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

SESSION_STATUS = {
    "processes": {
        "keeper": {"pid": os.getpid()},
        "worker": {"pid": 1, "generation": 2, "crashes": 1},
        "control": {"pid": os.getpid(), "generation": 1},
    },
    "session": {"frontend_connected": True},
    "queues": [
        {"index": 0, "size": 128, "enabled": True, "parked": 0, "in_flight": 0, "completed": 1},
        {"index": 1, "size": 1024, "enabled": True, "parked": 3, "in_flight": 4, "completed": 500},
    ],
    "counters": {"requests": {"15": 7, "3": 2}},
}


class FakeSession:
    def __init__(self) -> None:
        self.post_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.traces: list[Trace] = []
        self.worker_pid = 1
        self.connected = True

    def posts(self) -> list[Any]:
        return []

    def wake(self) -> None:
        pass

    @property
    def wake_fds(self) -> list[int]:
        return []

    def trace(self) -> list[Trace]:
        traces, self.traces = self.traces, []
        return traces

    def status(self) -> dict[str, Any]:
        copied: dict[str, Any] = json.loads(json.dumps(SESSION_STATUS))
        copied["processes"]["worker"]["pid"] = self.worker_pid
        copied["session"]["frontend_connected"] = self.connected
        return copied


@pytest.fixture
def image(tmp_path: Path) -> MadeImage:
    return make_image(tmp_path / "made")


class Rig:
    def __init__(self, image: MadeImage, folder: Path) -> None:
        self.session = FakeSession()
        self.config = ServeConfig(
            image="registry/app:1", socket_path=folder / "rafs.sock", api_socket=folder / "api"
        )
        self.view = View(self.session, self.config)  # type: ignore[arg-type]  # the part that is used
        self.image = image
        self.socket = folder / "api"
        self.store = Store(image.bootstrap, cache_dir=folder, spill_size=1 << 20)

    def mount(self) -> None:
        self.store.open_blob(0)
        self.store.ingest(0, 0, self.image.blob, [0, 1])
        ids = {0: self.image.blob_id}
        mounted = Mounted(
            image=ResolvedImage("registry/app:1", b"", blob_sizes={self.image.blob_id: len(self.image.blob)}),
            store=self.store,
            bootstrap_fd=seal_bootstrap(self.image.bootstrap),
            blob_ids=ids,
            mounted_at=0.0,
        )

        async def no_source() -> Any:
            raise AssertionError

        agent = Agent(self.session, self.store, ids, no_source, self.config, self.view.metrics)
        self.view.serving(mounted, agent)

    async def get(self, path: str, method: str = "GET") -> tuple[int, str, str]:
        """Status, content type and body."""

        def ask() -> tuple[int, str, str]:
            connection = UnixConnection(self.socket)
            connection.request(method, path)
            response = connection.getresponse()
            body = response.read().decode()
            connection.close()
            return response.status, response.headers["Content-Type"], body

        return await asyncio.to_thread(ask)

    async def get_json(self, path: str) -> Any:
        status, kind, body = await self.get(path)
        assert (status, kind) == (200, "application/json; charset=utf-8")
        return json.loads(body)


@asynccontextmanager
async def rig(image: MadeImage, folder: Path) -> AsyncIterator[Rig]:
    made = Rig(image, folder)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(made.socket))
    listener.listen()
    stop = await api.start(listener, made.view)
    try:
        yield made
    finally:
        await stop()
        made.store.close()


def record(**fields: Any) -> FetchRecord:
    values: dict[str, Any] = {
        "started_ns": 1_000_000_000,
        "ended_ns": 1_050_000_000,
        "blob_index": 0,
        "offset": 0,
        "length": 4096,
        "n_chunks": 3,
        "n_wanted": 1,
        "attempt": 1,
        "nodeid": 0,
        "file_offset": 8192,
        "result": "ok",
    }
    return FetchRecord(**(values | fields))


def nodeid_of(image: MadeImage, name: bytes) -> int:
    tree = Tree.parse(image.bootstrap)
    found = tree.lookup(tree.inode(tree.root), name)
    assert found is not None
    return found[0] + 2


async def test_before_the_image_is_mounted(image: MadeImage, tmp_path: Path) -> None:
    async with rig(image, tmp_path) as r:
        daemon = await r.get_json("/api/v1/daemon")
        assert (daemon["state"], daemon["backend_collection"]) == ("INIT", {})
        health = await r.get_json("/healthz")
        assert health["status"] == "ok"
        assert health["loop_lag_s"] >= 0
        code, _, body = await r.get("/readyz")
        assert (code, json.loads(body)) == (
            503,
            {"ready": False, "reason": "the image registry/app:1 is not mounted yet"},
        )
        status = await r.get_json("/api/v1/status")
        assert status["image"] == {"name": "registry/app:1"}
        assert status["stalls"]["count"] == 0
        assert (await r.get("/metrics"))[0] == 200
        assert "0 B in 0 requests" in "\n".join(screen(status))


async def test_what_clients_of_nydusd_ask_for(image: MadeImage, tmp_path: Path) -> None:
    async with rig(image, tmp_path) as r:
        r.mount()
        daemon = await r.get_json("/api/v1/daemon")
        assert daemon["state"] == "RUNNING"
        assert set(daemon["version"]) == {"package_ver", "git_commit", "build_time", "profile", "rustc"}
        assert all(isinstance(value, str) for value in daemon["version"].values())
        assert daemon["backend_collection"]["/"]["mounted_time"] == "1970-01-01T00:00:00Z"
        assert await r.get_json("/readyz") == {"ready": True, "reason": ""}
        assert "ready 1" in (await r.get("/metrics"))[2]
        r.session.worker_pid = 0
        code, _, body = await r.get("/readyz")
        assert code == 503
        assert "no worker" in json.loads(body)["reason"]
        r.session.connected = False  # whoever starts the VM waits for this answer
        assert (await r.get_json("/readyz"))["ready"]


async def test_status_names_the_files_behind_fetches_and_stalls(image: MadeImage, tmp_path: Path) -> None:
    async with rig(image, tmp_path) as r:
        r.mount()
        fourth, second = nodeid_of(image, b"file003"), nodeid_of(image, b"file001")
        r.view.metrics.fetched(record(nodeid=fourth), 4096)
        r.view.metrics.fetched(record(nodeid=second, reason="prefetch", result="backend.unreachable"), 0)
        r.session.traces = [Trace(second, 0, 4096, 100, 500), Trace(1 << 40, 4096, 4096, 100, 900)]
        hurried = await r.get_json("/api/v1/status")
        assert [f["path"] for f in hurried["fetch_log"]] == ["", ""]
        assert "pss_kib" not in hurried["processes"]["keeper"]
        status = await r.get_json("/api/v1/status?full=1")
        hurried = await r.get_json("/api/v1/status")
        assert [f["path"] for f in hurried["fetch_log"]] == ["/file003", "/file001"], "known by now"
        assert [(f["path"], f["reason"]) for f in status["fetch_log"]] == [
            ("/file003", "demand"),
            ("/file001", "prefetch"),
        ]
        assert status["fetch_log"][0]["blob_id"] == image.blob_id
        assert [(s["path"], s["offset"]) for s in status["stalls"]["slowest"]] == [
            ("", 4096),
            ("/file001", 0),
        ]
        assert (status["stalls"]["count"], status["stalls"]["total_ns"]) == (2, 1200)
        assert status["processes"]["keeper"]["pss_kib"] > 1000
        assert status["queues"][1]["parked"] == 3
        (blob,) = status["image"]["blobs"]
        assert (blob["n_chunks"], blob["states"]["verified"]) == (len(image.chunks), 2)
        assert blob["stored_size"] == len(image.blob)
        assert status["agent"]["bytes_fetched"] == 4096
        text = "\n".join(screen(status))
    for expected in (
        f"2 of {len(image.chunks)} chunks",
        "2 on disk",
        "the worker crashed 1 time",
        "4.1 kB in 2 requests",
        "1 of them failed: backend.unreachable (1)",
        "3 requests for 0 chunks",
        "waited    2 requests",
        "/file001",
        f"node {1 << 40}",
    ):
        assert expected in text


async def test_trace(image: MadeImage, tmp_path: Path) -> None:
    async with rig(image, tmp_path) as r:
        assert (await r.get_json("/api/v1/trace"))["fetches"] == []
        r.mount()
        second = nodeid_of(image, b"file001")
        runs = runs_of(
            [(4, "demand"), (5, "read-ahead"), (6, "read-ahead"), (9, "read-ahead"), (2, "demand")]
        )
        r.view.metrics.fetched(record(nodeid=second, runs=runs, source="registry"), 4096)
        r.view.metrics.fetched(record(nodeid=0, reason="fill"), 4096)
        lengths = list(r.store.chunks(0).lengths)
        r.session.traces = [Trace(second, 0, 4096, 100, 500), Trace(second, 4096, 4096, 100, 200)]
        trace = await r.get_json("/api/v1/trace")
    assert trace["blobs"] == [{"id": image.blob_id, "size": len(image.blob)}]
    assert 0 == trace["mounted_at_ns"] == trace["first_init_ns"] < trace["now_ns"]
    first, other = trace["fetches"]
    assert (first["path"], first["source"], first["reason"]) == ("/file001", "registry", "demand")
    assert first["chunks"] == [[4, "demand"], *([n, "read-ahead"] for n in (5, 6, 9)), [2, "demand"]]
    assert (other["path"], other["reason"], other["chunks"]) == ("", "fill", [])
    by_reason = {"demand": lengths[4] + lengths[2], "read-ahead": sum(lengths[n] for n in (5, 6, 9))}
    assert first["bytes_by_reason"] == by_reason
    assert first["unread_bytes"] == sum(by_reason.values()), "nothing was read"
    assert [(stall["path"], stall["offset"]) for stall in trace["stalls"]] == [
        ("/file001", 0),
        ("/file001", 4096),
    ]


async def test_errors_are_json(image: MadeImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig(image, tmp_path) as r:
        status, _, body = await r.get("/api/v1/nothing")
        assert (status, json.loads(body)["code"]) == (404, "UNDEFINED")
        assert (await r.get("/api/v1/daemon", method="DELETE"))[0] == 405

        def broken() -> Any:
            raise RuntimeError("a bug")

        monkeypatch.setattr(r.view, "daemon", broken)
        status, _, body = await r.get("/api/v1/daemon")
        assert (status, json.loads(body)) == (500, {"code": "INTERNAL", "message": "RuntimeError"})


async def test_prometheus_can_read_the_metrics(image: MadeImage, tmp_path: Path) -> None:
    async with rig(image, tmp_path) as r:
        r.mount()
        r.view.metrics.fetched(record(source="registry"), 4096)
        r.view.metrics.fetched(record(reason="prefetch", result="backend.timeout"), 0)
        r.view.metrics.chunks["digest-mismatch"] += 1
        r.session.traces = [Trace(5, 0, 4096, 0, 20_000_000), Trace(5, 0, 4096, 0, 2_000_000_000)]
        status, kind, body = await r.get("/metrics")
        assert status == 200
        assert kind.startswith("text/plain; version=0.0.4")
    families = {family.name: family for family in text_string_to_metric_families(body)}
    assert all(family.type != "unknown" and family.documentation for family in families.values())
    samples = {
        (sample.name.removeprefix("virtiofsd_rafs_"), *sorted(sample.labels.items())): sample.value
        for family in families.values()
        for sample in family.samples
    }
    of_registry = (("reason", "demand"), ("source", "registry"))
    for expected, value in {
        ("fetches_total", of_registry[0], ("result", "ok"), of_registry[1]): 1,
        ("fetches_total", ("reason", "prefetch"), ("result", "backend.timeout"), ("source", "none")): 1,
        ("fetch_bytes_total", *of_registry): 4096,
        ("chunks_fetched_total", ("outcome", "digest-mismatch")): 1,
        ("cache_chunks", ("state", "verified")): 2,
        ("cache_chunks_touched",): 0,
        ("requests_total", ("operation", "read")): 7,
        ("requests_parked",): 3,
        ("fetch_duration_seconds_bucket", ("le", "0.03")): 0,
        ("fetch_duration_seconds_bucket", ("le", "0.1")): 2,
        ("fetch_duration_seconds_bucket", ("le", "+Inf")): 2,
        ("fetch_duration_seconds_sum",): 0.1,
        ("request_wait_seconds_bucket", ("le", "0.01")): 0,
        ("request_wait_seconds_bucket", ("le", "0.03")): 1,
        ("request_wait_seconds_count",): 2,
        ("request_wait_seconds_sum",): 2.02,
        ("ready",): 1,
    }.items():
        assert samples[expected] == pytest.approx(value), expected
    assert 0 <= samples[("loop_lag_seconds",)] < 60


def test_metrics_are_named_alike_and_documented() -> None:
    for name, (kind, text) in FAMILIES.items():
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", name)
        assert name.endswith("_total") == (kind == "counter"), name
        assert text.endswith(".")
    documented = (Path(__file__).parents[2] / "docs" / "scripting.md").read_text()
    section = documented.partition("### `GET /metrics`")[2].partition("\n###")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| .* \| (.*) \|$", section, re.MULTILINE)
    assert rows == [(name, kind, text) for name, (kind, text) in FAMILIES.items()]


def test_labels_are_quoted() -> None:
    text = render(Metrics(), [Sample("chunks_fetched_total", 1, (("outcome", 'a"b\\c\nd'),))])
    assert 'outcome="a\\"b\\\\c\\nd"' in text


def test_the_histogram_and_the_log_are_bounded() -> None:
    metrics = Metrics()
    for i in range(LOG_LEN + 10):
        metrics.fetched(record(started_ns=0, ended_ns=10**12, offset=i), 1)
    assert len(metrics.log) == LOG_LEN
    assert metrics.durations.buckets == [0] * len(FETCH_BUCKETS_S) + [LOG_LEN + 10]
    stalls = Stalls()
    stalls.add(Trace(i, 0, 0, 0, i) for i in range(1000))
    stalls.add([Trace(5, 0, 0, 100, 50)])  # clocks of two processes may disagree
    assert stalls.count == 1001
    assert [trace.nodeid for trace in stalls.slowest()] == list(range(999, 999 - SLOWEST_LEN, -1))


# -- the command --------------------------------------------------------------------------------------------


async def test_the_status_command(image: MadeImage, tmp_path: Path) -> None:
    async with rig(image, tmp_path) as r:
        r.mount()

        def run(*args: str) -> str:
            result = CliRunner().invoke(status_command, list(args), catch_exceptions=False)
            assert result.exit_code == 0
            return result.output

        text = await asyncio.to_thread(run, "--api-socket", str(r.socket))
        assert "registry/app:1" in text
        printed = json.loads(await asyncio.to_thread(run, "--api-socket", str(r.socket), "--json"))
        assert printed["processes"]["control"]["pid"] == os.getpid()
        # The API socket lies beside the other one when nobody says.
        r.socket.rename(tmp_path / "rafs.sock.api")
        assert text.splitlines()[0] in await asyncio.to_thread(
            run, "--socket-path", str(tmp_path / "rafs.sock")
        )


@pytest.mark.parametrize("args", [[], ["--api-socket", "a", "--socket-path", "b"]])
def test_the_status_command_wants_one_daemon(args: list[str]) -> None:
    result = CliRunner().invoke(status_command, args)
    assert "which daemon?" in str(result.exception)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "there is no such socket"),
        ("gone", "has gone"),
        ("plain/socket", "no such folder"),
        ("n" * 200, "too long"),
    ],
)
def test_nobody_answers(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "plain").touch()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "gone"))
    listener.close()
    with pytest.raises(Unreachable, match="no daemon ") as caught:
        fetch_json(tmp_path / name)
    assert words in str(caught.value)
    assert "Errno" not in str(caught.value)
    assert caught.value.remedy


def test_who_may_not_ask_and_who_gets_no_answer(tmp_path: Path) -> None:
    refused = _unreachable(tmp_path / "api", PermissionError(errno.EACCES, "x"))
    assert "belongs to another user (run this as" in str(refused)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "busy"))
    with listener:
        listener.listen()
        with pytest.raises(BackendTimeout, match=r"did not answer within 0\.05 s"):
            fetch_json(tmp_path / "busy", timeout_s=0.05)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n", BadReply),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", BadReply),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{x", BadReply),
        (b"SSH-2.0\r\n", BadReply),
        (b"", Unreachable),
    ],
)
def test_strange_answers(
    tmp_path: Path, answer: bytes, error: type[Exception], serve_once: Callable[[Path, bytes], None]
) -> None:
    serve_once(tmp_path / "api", answer)
    with pytest.raises(error):
        fetch_json(tmp_path / "api")


@pytest.fixture
def serve_once() -> Callable[[Path, bytes], None]:
    def start(path: Path, answer: bytes) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with listener, listener.accept()[0] as peer:
                peer.recv(65536)
                peer.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()

    return start


def test_the_command_needs_no_http_library() -> None:
    code = "import sys, virtiofsd_rafs.cli.status; print('aiohttp' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert out == "False\n"
