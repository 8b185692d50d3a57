"""Runs the cases on all sides in turn."""

from __future__ import annotations

import re
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import attrs
import click

from guest.daemon import DaemonError
from tests.bench import processes, sides
from tests.bench.kit import contenders as who
from tests.bench.kit import runs, tables
from tests.bench.kit.cases import find_targets
from tests.bench.kit.results import CaseResult, Record
from tests.bench.material import REPOSITORY
from tests.sim.registry import RegistrySimulator
from virtiofsd_rafs.errors import PeerError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from tests.bench.kit.cases import Case, Targets
    from tests.bench.kit.contenders import Attached, Contender
    from tests.bench.kit.runs import Run, Setting
    from tests.bench.material import Material
    from virtiofsd_rafs.native.frontend import TreeEntry

Tree = dict[bytes, "TreeEntry"]
# Of a back-end that fails, is gone or does not answer: the others go on.
FAILURES = (OSError, PeerError, RuntimeError, DaemonError)
# A slow link: 100 Mbit/s, 20 ms.
BANDWIDTH, LATENCY_S = 12.5e6, 0.02
IDLE_AFTER_S, IDLE_S = 0.05, 1.0


@attrs.define
class Entrant:
    """A side while it runs, with what is known of it."""

    side: sides.Side
    targets: Targets
    data: Sequence[Path] | None = None
    """Files whose pages can be dropped."""


@attrs.define
class Comparison:
    """What all cases share. Results are printed as they come."""

    material: Material
    contenders: list[Contender]
    attached: list[Attached]
    rounds: int
    setting: Setting
    work: Path
    pin: bool = True
    seen: dict[str, dict[str, Any]] = attrs.field(factory=dict)
    """Per side: its version, files, PSS in KiB and processes when it had read everything once; what it did
    while nobody asked (:meth:`_rest`)."""

    @property
    def names(self) -> list[str]:
        """All sides, the floor last."""
        names = [each.name for each in self.contenders]
        names += [each.name for each in self.attached]
        return sorted(names, key=lambda name: name.startswith("floor"))

    def measure(self, cases: Sequence[Case]) -> list[CaseResult]:
        """All cases, in order within the ways in which back-ends have to be started."""
        results: list[CaseResult] = []
        local = [case for case in cases if case.what in ("load", "walk", "forget", "disk")]
        for queues in sorted({case.queues for case in local}):
            results += self._together([case for case in local if case.queues == queues], queues)
        for case in cases:
            if case.what in ("remote", "stalled"):
                results.append(self._remote(case))
        order = {case.name: i for i, case in enumerate(cases)}
        return sorted(results, key=lambda result: order[result.name])

    def _say(self, result: CaseResult) -> CaseResult:
        for line in tables.lines(result):
            click.echo(line)
        return result

    def _pin(self, sides: Sequence[sides.Side]) -> None:
        if self.pin:
            processes.pin([pid for side in sides for pid in side.pids()])

    # --- sides that run beside each other, all warm ---

    def _together(self, cases: Sequence[Case], queues: int) -> list[CaseResult]:
        results = []
        with ExitStack() as stack:
            notes: dict[str, str] = {}
            running = self._start_all(stack, queues, notes)
            for case in cases:
                result = CaseResult.of(case, self.names)
                for name, record in result.records.items():
                    record.note = notes.get(name, "")
                self._measure_case(case, running, result, notes)
                results.append(self._say(result))
            if "idle" not in next(iter(self.seen.values()), {"idle": None}):
                self._rest(running)
        return results

    def _rest(self, running: dict[str, Entrant]) -> None:
        """What all sides use from 50 ms after their last request on, for a second, by process."""
        time.sleep(IDLE_AFTER_S)
        before = {name: entrant.side.usage() for name, entrant in running.items()}
        time.sleep(IDLE_S)
        for name, entrant in running.items():
            used = entrant.side.usage() - before[name]
            names = processes.names(used.cpu)
            by_process = [[names[pid], ns / 1000 / IDLE_S] for pid, ns in used.cpu.items()]
            self.seen[name]["idle"] = {"wakeups": used.wakeups / IDLE_S, "cpu_us": by_process}
        click.echo("\nidle, each second")
        for name in running:
            idle = self.seen[name]["idle"]
            parts = ", ".join(f"{process} {us:.0f} us" for process, us in idle["cpu_us"])
            click.echo(f"  {name:<14}{idle['wakeups']:.0f} sleeps, {parts}")

    def _start_all(self, stack: ExitStack, queues: int, notes: dict[str, str]) -> dict[str, Entrant]:
        """All sides that have so many queues; why the others have not goes to *notes*."""
        first = not self.seen
        opened: dict[str, tuple[sides.Side, Contender | None]] = {}
        for contender in self.contenders:
            folder = self._folder(contender.name, first)
            with _telling(contender.name, notes):
                side = sides.start(contender.name, contender.start(folder), queues=queues)
                opened[contender.name] = (stack.enter_context(side), contender)
        for each in self.attached:
            if queues > 1 or not first:
                notes[each.name] = "attached: it takes one connection only, with one request queue"
                continue
            with _telling(each.name, notes):
                opened[each.name] = (stack.enter_context(each.connect()), None)
        self._pin([side for side, _ in opened.values()])
        trees: dict[str, Tree] = {}
        running = {}
        for name in filter(opened.__contains__, self.names):
            side, its = opened[name]
            with _telling(name, notes):
                tree = side.fe.read_tree(content=first, xattrs=first)
                data = its.data(self.work / name) if its is not None and its.data is not None else None
                running[name] = Entrant(side, find_targets(side.fe, tree), data)
                if its is None or its.same_tree:
                    trees[name] = tree
            if name not in running:
                continue
            if first:
                self.seen[name] = {
                    "version": its.version if its is not None else "",
                    "files": len(tree),
                    "pss_kib": side.pss_kib(),
                    "processes": len(side.pids()),
                }
                seen = self.seen[name]
                pss = f"PSS {tables.mebibytes(seen['pss_kib'])} MiB"
                click.echo(f"{name}: {seen['files']} files, {pss} in {seen['processes']} processes")
        if not running:
            raise click.ClickException("there is nothing to measure")
        if first:
            compare_trees(trees)
        return running

    def _folder(self, name: str, first: bool) -> Path:
        folder = self.work / name
        if first:
            return who.empty(folder)
        # Sockets of the last one: nobody listens there.
        for socket in folder.glob("*.sock"):
            socket.unlink()
        return folder

    def _measure_case(
        self, case: Case, running: dict[str, Entrant], result: CaseResult, notes: dict[str, str]
    ) -> None:
        able = {}
        for name, entrant in running.items():
            record = result.records[name]
            with self._noting(name, running, result, notes):
                record.note = _why_not(case, entrant) or ""
                if not record.note:
                    able[name] = entrant
        for _ in range(self.rounds):
            for name, entrant in able.items():
                if name in running:
                    with self._noting(name, running, result, notes):
                        run = runs.run_case(
                            entrant.side, case, entrant.targets, self.setting, entrant.data or ()
                        )
                        result.records[name].runs.append(run)
        for name, entrant in able.items():
            if name in running:
                with self._noting(name, running, result, notes):
                    record = result.records[name]
                    counted = runs.system_calls(
                        entrant.side, case, entrant.targets, self.setting, entrant.data or ()
                    )
                    record.syscalls_by, record.syscalls = counted
                    record.pss_kib = entrant.side.pss_kib()

    @contextmanager
    def _noting(
        self, name: str, running: dict[str, Entrant], result: CaseResult, notes: dict[str, str]
    ) -> Iterator[None]:
        """A side that fails is out from then on, and its record tells why."""
        try:
            yield
        except FAILURES as error:
            del running[name]
            notes[name] = f"out since {result.name}: {_line(error)}"
            result.records[name].note = f"failed: {_line(error)}"

    # --- sides that are started anew for each run, over a registry ---

    def _remote(self, case: Case) -> CaseResult:
        result = CaseResult.of(case, self.names)
        able = [each for each in self.contenders if each.over is not None]
        for record in (result.records[name] for name in self.names if name not in {c.name for c in able}):
            record.note = "serves no image from a registry"
        slow = case.what == "remote"
        link = {"latency_s": LATENCY_S, "bandwidth": BANDWIDTH} if slow else {}
        with RegistrySimulator(**link) as sim:  # type: ignore[arg-type]
            sim.store.add_build(REPOSITORY, "1", self.material.image)
            for _ in range(self.rounds):
                for contender in able:
                    record = result.records[contender.name]
                    if not record.note:
                        try:
                            record.runs.append(self._cold_run(case, contender, sim, record))
                        except FAILURES as error:
                            record.note = f"failed: {_line(error)}"
                        sim.clear_faults()
        return self._say(result)

    def _cold_run(self, case: Case, contender: Contender, sim: RegistrySimulator, record: Record) -> Run:
        assert contender.over is not None
        folder = who.empty(self.work / f"{contender.name}-cold")
        digest = f"sha256:{self.material.blob_id}"
        with sides.start(contender.name, contender.over(sim, folder)) as side:
            self._pin([side])
            targets = find_targets(side.fe, side.fe.read_tree(content=False, xattrs=False))
            before = len(sim.ranges(digest))
            if case.what == "stalled":
                run = runs.stalled(side, case, targets, self.setting, lambda: _hold(sim, digest))
            else:
                run = runs.run_case(side, case, targets, self.setting)
            spans = sim.ranges(digest)[before:]
            record.pss_kib = side.pss_kib()
        fetched = sum(span[1] - span[0] + 1 for span in spans if span is not None)
        return attrs.evolve(run, remote_requests=len(spans), remote_bytes=fetched)


def _hold(sim: RegistrySimulator, digest: str) -> Callable[[], None]:
    return sim.fault("hold", where="blob", digest=digest).release


def _why_not(case: Case, entrant: Entrant) -> str | None:
    """Why a case says nothing about a side, or ``None``."""
    if case.what == "disk" and not entrant.data:
        return "n/a: its files are not known, or mapped, so that their pages cannot be dropped"
    return runs.not_needed(entrant.side, case, entrant.targets)


@contextmanager
def _telling(name: str, notes: dict[str, str]) -> Iterator[None]:
    """What keeps a side from taking part is said and noted."""
    try:
        yield
    except FAILURES as error:
        text = too_few_queues(str(error))
        notes[name] = _line(text)
        click.echo(f"{name}: {text}")


def _line(text: object) -> str:
    """The first line, which a row of a table has room for."""
    return str(text).partition("\n")[0]


def too_few_queues(text: str) -> str:
    """What the front-end says of a back-end that has fewer queues, for a table; any other text as it is."""
    found = re.search(r"has (\d+) queues", text)
    if not found:
        return text
    n = int(found[1]) - 1  # without hiprio
    return f"offers {n} request queue{'' if n == 1 else 's'}"


def compare_trees(trees: dict[str, Tree]) -> None:
    """All sides must show the same names, modes, contents and links.

    Raises:
        ClickException: they do not.
    """
    views = {
        name: {
            path: (e.attr.mode, e.attr.uid, e.attr.gid, int(e.attr.mtime), e.sha256, e.target)
            for path, e in tree.items()
        }
        for name, tree in trees.items()
    }
    first = next(iter(views), "")
    for name, view in views.items():
        differing = [p for p in view.keys() | views[first].keys() if view.get(p) != views[first].get(p)]
        if differing:
            path = min(differing)
            raise click.ClickException(
                f"{name} and {first} differ in {len(differing)} files, first {path!r}: "
                f"{view.get(path)} and {views[first].get(path)}"
            )
