"""What the API and its users see of a daemon: one place that gathers it from session, store and agent."""

from __future__ import annotations

import functools
import mmap
import os
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from virtiofsd_rafs import __version__
from virtiofsd_rafs.backends.base import CONNECTIONS
from virtiofsd_rafs.native.store import paths
from virtiofsd_rafs.runtime.first_start import is_complete, is_stored
from virtiofsd_rafs.runtime.metrics import Metrics, Sample, Stalls, render
from virtiofsd_rafs.runtime.renewal import Renewal

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtiofsd_rafs.config import ServeConfig
    from virtiofsd_rafs.native.session import Session, Trace
    from virtiofsd_rafs.runtime.agent import Agent
    from virtiofsd_rafs.runtime.metrics import FetchRecord
    from virtiofsd_rafs.runtime.mount import Mounted
    from virtiofsd_rafs.runtime.sandbox import Confined
    from virtiofsd_rafs.runtime.wants import Wait

# States as nydusd names them.
INIT = "INIT"
READY = "READY"
RUNNING = "RUNNING"

# The status shows so many of the latest fetches, and in full so many; the trace has them all.
_STATUS_FETCHES = 64
_FULL_FETCHES = 1024
# So many of the longest stalls; in full all that are kept.
_STATUS_STALLS = 16
# The status shows so many of the chunks that are waited for, longest first.
_STATUS_WAITS = 16


class View:
    """A daemon as seen from outside. All methods are for the event loop, but :meth:`name_nodes` blocks."""

    def __init__(self, session: Session, config: ServeConfig) -> None:
        self._session = session
        self._config = config
        self._mounted: Mounted | None = None
        self._agent: Agent | None = None
        self._names: dict[int, str] = {}
        self._nameless: set[int] = set()
        self.metrics = Metrics()
        self.confined: Confined | None = None
        """The sandbox that is in force; control says."""
        self.renewal = Renewal(lambda: None, lambda: None)
        """Takes new credentials; control puts its own here."""

    def serving(self, mounted: Mounted, agent: Agent) -> None:
        """The image is mounted and its posts are served from now on."""
        self._mounted = mounted
        self._agent = agent

    @property
    def state(self) -> str:
        """INIT until the image is mounted, then RUNNING, whether or not a VMM has come (as nydusd)."""
        return INIT if self._mounted is None else RUNNING

    def unready(self) -> str:
        """Why a front-end that connects now would have to wait; empty when it would not."""
        if self._mounted is None:
            return f"the image {self._config.image} is not mounted yet"
        status = self._session.status()
        # Without a VM that has set its rings up there is nothing to serve, and no worker.
        asked = status["session"]["frontend_connected"] and any(q["enabled"] for q in status["queues"])
        if asked and not status["processes"]["worker"]["pid"]:
            return "no worker serves the VM: one is being started"
        return ""

    def daemon(self) -> dict[str, Any]:
        """What nydusd's clients ask for: id, version, state, back-end."""
        info: dict[str, Any] = {
            "id": str(self._config.socket_path or self._config.api_socket),
            "version": {
                "package_ver": __version__,
                "git_commit": "",
                "build_time": "",
                "profile": "release",
                "rustc": "",
            },
            "supervisor": None,
            "state": self.state,
            "backend_collection": {},
        }
        if self._mounted is not None:
            mounted_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._mounted.mounted_at))
            info["backend_collection"]["/"] = {
                "backend_type": "rafs",
                "mountpoint": "/",
                "mounted_time": mounted_at,
                "config": None,
            }
        return info

    def take_nameless(self) -> list[int]:
        """Nodes that were mentioned since the last call and whose names are not known yet."""
        nameless, self._nameless = self._nameless, set()
        return [nodeid for nodeid in nameless if nodeid not in self._names]

    def trace_nodes(self) -> list[int]:
        """Nodes that :meth:`trace` mentions and whose names are not known yet."""
        seen = {record.nodeid for record in self.metrics.log}
        seen.update(trace.nodeid for trace in self._collect_stalls().log)
        return [nodeid for nodeid in seen if nodeid and nodeid not in self._names]

    def name_nodes(self, nodeids: list[int]) -> None:
        """Looks names up in the bootstrap. Blocking: for an executor."""
        if self._mounted is None or not nodeids:
            return
        with mmap.mmap(self._mounted.bootstrap_fd, 0, prot=mmap.PROT_READ) as bootstrap:
            found = paths(bootstrap, nodeids)
        self._names.update({nodeid: found.get(nodeid, "") for nodeid in nodeids})

    def accessed(self) -> Callable[[], bytes]:
        """What was read so far, as a prefetch list: the result makes it, in a thread, out of copies."""
        mounted = self._mounted
        if mounted is None:
            return bytes
        log = list(self.metrics.log)
        touched = {index: bytes(mounted.store.touched(index)) for index in mounted.blob_ids}

        def gather() -> bytes:
            from virtiofsd_rafs.runtime.accessed import accessed, order_of_use
            from virtiofsd_rafs.runtime.prefetch import format_list

            with mmap.mmap(mounted.bootstrap_fd, 0, prot=mmap.PROT_READ) as bootstrap:
                return format_list(accessed(bootstrap, order_of_use(log, touched)))

        return gather

    def _collect_stalls(self) -> Stalls:
        """Takes over what the workers have written since."""
        if self._agent is None:
            return Stalls()
        self._agent.stalls.add(self._session.trace())
        return self._agent.stalls

    def _waits(self) -> list[Wait]:
        return self._agent.planner.waits(_STATUS_WAITS) if self._agent is not None else []

    def status(self, *, full: bool = False) -> dict[str, Any]:
        """Everything: session, processes, queues, image, cache, traffic, log of fetches, longest stalls.

        Times in ns are CLOCK_MONOTONIC, as is ``now_ns``. *full* adds what takes long: the memory of the
        processes, which the kernel counts page by page, and many more fetches.
        """
        status = self._session.status()
        if full:
            for process in status.get("processes", {}).values():
                process["pss_kib"] = _pss_kib(process.get("pid", 0))
        status |= {
            "id": str(self._config.socket_path or self._config.api_socket),
            "version": __version__,
            "state": self.state,
            "now_ns": time.monotonic_ns(),
            "sandbox": self._sandbox(),
            "image": self._image(),
            "agent": self._agent_status(),
            "fetch_log": [self._fetch(record) for record in self._latest(full=full)],
            "stalls": self._stall_report(full=full),
            "waiting": [self._wait(wait) for wait in self._waits()],
        }
        return status

    def _sandbox(self) -> dict[str, Any]:
        return {"mode": "none"} if self.confined is None else self.confined.status()

    def _image(self) -> dict[str, Any]:
        mounted = self._mounted
        if mounted is None:
            return {"name": self._config.image}
        blobs = []
        complete = True
        # A call into the store gives the interpreter's lock away, and a busy host gives it back late
        for info in mounted.store.blobs():
            states = mounted.store.states(info.blob_index)
            on_disk = mounted.store.chunks(info.blob_index).has_data
            if info.blob_index in mounted.blob_ids:
                complete = complete and is_stored(info, states, on_disk=on_disk)
            blobs.append(
                {
                    "id": info.blob_id,
                    "n_chunks": info.n_known,
                    "uncompressed_size": info.uncompressed_size,
                    "stored_size": mounted.image.blob_sizes.get(info.blob_id),
                    "on_disk": on_disk,
                    "states": states._asdict(),
                }
            )
        return {
            "name": mounted.image.name,
            "manifest_digest": mounted.image.manifest_digest,
            "complete": complete,
            "bootstrap_size": os.fstat(mounted.bootstrap_fd).st_size,
            "blobs": blobs,
        }

    def _agent_status(self) -> dict[str, Any]:
        status = self.metrics.as_dict()
        # Also while the image is asked for.
        status["sources"] = [attrs.asdict(place, recurse=False) for place in self.renewal.report()]
        if self._agent is not None and self._mounted is not None:
            planner = self._agent.planner
            status |= {
                "planner": attrs.asdict(planner.counters, recurse=False),
                "first_start": self._agent.first_start.status(),
                "chunks_waiting": planner.waiting,
                "fetches_in_flight": planner.in_flight,
                "outage_s": self._agent.outage_s,
                "connections": attrs.asdict(CONNECTIONS, recurse=False),
                "cache": {
                    "dir": str(self._config.cache_dir) if self._config.cache_dir else None,
                    **self._mounted.store.stats()._asdict(),
                    "limit": self._agent.eviction.limit,
                    **attrs.asdict(self._agent.eviction.counters, recurse=False),
                },
            }
        return status

    def trace(self) -> Callable[[], dict[str, Any]]:
        """What was fetched, why, and who waited, in order: the material of reports.

        The result puts it together in a thread, out of copies: it may be hundreds of thousands of chunks.
        Times are CLOCK_MONOTONIC in ns, 0 for what has not happened.
        """
        session = self._session.status().get("session", {})
        mounted = self._mounted
        ids = mounted.blob_ids if mounted is not None else {}
        sizes = mounted.image.blob_sizes if mounted is not None else {}
        head = {
            "image": mounted.image.name if mounted is not None else self._config.image,
            "mounted_at_ns": session.get("mounted_ns", 0),
            "first_init_ns": session.get("init_ns", 0),
            "started_at_ns": session.get("start_ns", 0),
            "connected_at_ns": session.get("connected_ns", 0),
            "first_exec_ns": session.get("first_exec_ns", 0),
            "now_ns": time.monotonic_ns(),
            "bootstrap_size": os.fstat(mounted.bootstrap_fd).st_size if mounted is not None else None,
            "blobs": [{"id": blob_id, "size": sizes.get(blob_id)} for blob_id in ids.values()],
        }
        records, stalls = list(self.metrics.log), list(self._collect_stalls().log)

        def gather() -> dict[str, Any]:
            fetches = [
                self._fetch(record) | {"chunks": record.chunks} | self._use(record) for record in records
            ]
            return head | {"fetches": fetches, "stalls": [self._stall(trace) for trace in stalls]}

        return gather

    def _name(self, nodeid: int) -> str:
        """Its path; empty while that is not known."""
        name = self._names.get(nodeid)
        if name is None and nodeid:
            self._nameless.add(nodeid)
        return name or ""

    def _fetch(self, record: FetchRecord) -> dict[str, Any]:
        ids = self._mounted.blob_ids if self._mounted is not None else {}
        shown = record._asdict()
        del shown["runs"]
        return shown | {
            "blob_id": ids.get(record.blob_index, ""),
            "path": self._name(record.nodeid),
        }

    def _use(self, record: FetchRecord) -> dict[str, Any]:
        """Stored bytes of its chunks by reason, and of those that no read was answered from."""
        if self._mounted is None or record.blob_index not in self._mounted.blob_ids:
            return {}
        lengths = self._mounted.store.chunks(record.blob_index).lengths
        touched = self._mounted.store.touched(record.blob_index)
        by_reason: dict[str, int] = {}
        unread = 0
        for chunk, reason in record.chunks:
            if chunk < len(lengths):
                by_reason[reason] = by_reason.get(reason, 0) + lengths[chunk]
                unread += 0 if touched[chunk] else lengths[chunk]
        return {"bytes_by_reason": by_reason, "unread_bytes": unread}

    def _stall(self, trace: Trace) -> dict[str, Any]:
        return {"path": self._name(trace.nodeid), **trace._asdict()}

    def _wait(self, wait: Wait) -> dict[str, Any]:
        return {
            "path": self._name(wait.origin.nodeid),
            "nodeid": wait.origin.nodeid,
            "offset": wait.origin.file_offset,
            "since_ns": int(wait.since * 1e9),
            "attempts": wait.attempts,
            "doing": wait.doing,
        }

    def _latest(self, *, full: bool) -> list[FetchRecord]:
        n = _FULL_FETCHES if full else _STATUS_FETCHES
        # From the end: a deque is slow in its middle.
        return list(islice(reversed(self.metrics.log), n))[::-1]

    def _stall_report(self, *, full: bool) -> dict[str, Any]:
        if self._agent is None:
            return {"count": 0, "total_ns": 0, "slowest": []}
        stalls = self._collect_stalls()
        return {
            "count": stalls.count,
            "total_ns": stalls.total_ns,
            "slowest": [self._stall(trace) for trace in stalls.slowest()[: None if full else _STATUS_STALLS]],
        }

    def prometheus(self, loop_lag_s: float = 0.0) -> str:
        """The metrics as text for Prometheus."""
        samples = [
            Sample("build_info", 1, (("version", __version__),)),
            Sample("loop_lag_seconds", loop_lag_s),
            Sample("ready", int(not self.unready())),
        ]
        return render(self.metrics, samples + self._samples(), self._collect_stalls())

    def _samples(self) -> list[Sample]:
        status = self._session.status()
        queues = status.get("queues", [])
        samples = [
            Sample("worker_crashes_total", status["processes"]["worker"]["crashes"]),
            Sample("frontend_connected", int(status["session"]["frontend_connected"])),
            Sample("requests_parked", sum(queue["parked"] for queue in queues)),
            Sample("requests_in_flight", sum(queue["in_flight"] for queue in queues)),
            *(
                Sample("requests_total", n, (("operation", _operation(opcode)),))
                for opcode, n in status["counters"]["requests"].items()
            ),
        ]
        if self._agent is None or self._mounted is None:
            return samples
        planner, store = self._agent.planner, self._mounted.store
        counters, stats, eviction = planner.counters, store.stats(), self._agent.eviction
        samples += [
            Sample("chunks_posted_total", counters.posts),
            Sample("chunks_retried_total", counters.retries),
            Sample("chunks_expired_total", counters.expired),
            Sample("chunks_planned_total", counters.chunks_wanted, (("reason", "demand"),)),
            Sample("chunks_planned_total", counters.chunks_read_ahead, (("reason", "read-ahead"),)),
            Sample("chunks_planned_total", counters.chunks_prefetched, (("reason", "prefetch"),)),
            Sample("chunks_planned_total", counters.chunks_filled, (("reason", "fill"),)),
            Sample("chunks_joined_total", counters.read_ahead_used, (("reason", "read-ahead"),)),
            Sample("chunks_joined_total", counters.prefetch_used, (("reason", "prefetch"),)),
            Sample("chunks_left_total", counters.left_to_others),
            Sample("http_requests_total", CONNECTIONS.opened, (("connection", "opened"),)),
            Sample("http_requests_total", CONNECTIONS.reused, (("connection", "reused"),)),
            Sample("image_complete", int(is_complete(store, self._mounted.blob_ids))),
            Sample("chunks_waiting", planner.waiting),
            Sample("fetches_in_flight", planner.in_flight),
            Sample("outage_seconds", self._agent.outage_s),
            Sample("cache_disk_errors_total", stats.disk_errors),
            Sample("cache_bytes", eviction.counters.cache_bytes),
            Sample("cache_limit_bytes", eviction.limit),
            Sample("cache_sweeps_total", eviction.counters.sweeps),
            Sample("cache_evicted_chunks_total", eviction.counters.evicted_chunks),
            Sample("cache_evicted_bytes_total", eviction.counters.evicted_bytes),
            Sample("cache_spill_bytes", stats.spill_used),
        ]
        totals: dict[str, int] = {}
        for index in self._mounted.blob_ids:
            for state, n in store.states(index)._asdict().items():
                totals[state] = totals.get(state, 0) + n
        touched = sum(store.n_touched(index) for index in self._mounted.blob_ids)
        samples.append(Sample("cache_chunks_touched", touched))
        samples += [Sample("cache_chunks", n, (("state", state),)) for state, n in totals.items()]
        for place in self.renewal.report():
            label = (("source", place.source),)
            samples += [
                Sample("source_requests_total", place.requests, label),
                Sample("source_errors_total", place.errors, label),
                Sample("source_received_bytes_total", place.bytes, label),
                Sample("source_resting", int(place.state == "resting"), label),
            ]
        return samples


@functools.cache
def _operation(opcode: str) -> str:
    """The name of a FUSE operation, as metrics spell it."""
    from virtiofsd_rafs.fuse.consts import Opcode  # only /metrics needs it

    try:
        return Opcode(int(opcode)).name.lower()
    except ValueError:
        return opcode


def _pss_kib(pid: int) -> int | None:
    """Proportional set size of a process in KiB; None when the kernel does not tell us."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        pass
    return None
