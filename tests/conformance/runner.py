"""Runs checks one by one, each in a process of its own, against a back-end that may die or hang."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from guest.daemon import DaemonError
from tests.conformance.verdict import DIES, DIFFERS, HANGS, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tests.conformance.check import Check
    from tests.conformance.judged import Judged
    from tests.conformance.tree import Tree

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 5.0
"""For any one thing that a check waits for."""
LIMIT_S = 40.0
"""For a whole check."""


def run(
    checks: Iterable[Check],
    judged: Judged,
    tree: Tree,
    work: Path,
    *,
    timeout_s: float = TIMEOUT_S,
    limit_s: float = LIMIT_S,
    tell: Callable[[Check, Verdict], None] = lambda _check, _verdict: None,
) -> dict[str, Verdict]:
    """Verdicts by the checks' ids; *tell* is called after each."""
    verdicts = {}
    with judged:
        for check in checks:
            # What fails is asked again, and once more if the answer is another one then: races are like that.
            seen: list[Verdict] = []
            while len(seen) < _attempts(seen):
                seen.append(_attempt(check, judged, tree, work, timeout_s, limit_s))
            verdicts[check.id] = verdict = _summary(seen)
            tell(check, verdict)
    return verdicts


def _attempts(seen: list[Verdict]) -> int:
    """How often a check is to be run that came to these verdicts so far."""
    if not seen or seen[0].passed:
        return 1
    return 2 if len({verdict.word for verdict in seen}) == 1 else 3


def _summary(seen: list[Verdict]) -> Verdict:
    """The first verdict, and how often it came if not each time."""
    first = seen[0]
    same = sum(verdict.word == first.word for verdict in seen)
    if same == len(seen):
        return first
    return attrs.evolve(first, how=f"in {same} of {len(seen)} runs: {first.how}")


def _attempt(
    check: Check, judged: Judged, tree: Tree, work: Path, timeout_s: float, limit_s: float
) -> Verdict:
    try:
        socket = judged.socket(work, fresh=check.fresh)
        verdict = _with_death(_run_one(check, judged, socket, tree, timeout_s, limit_s), judged)
    except (DaemonError, OSError) as e:
        verdict = Verdict(DIES, f"it does not start: {str(e).splitlines()[0]}")
    if verdict.word in (HANGS, DIES):
        judged.stop()
    return verdict


def _with_death(verdict: Verdict, judged: Judged) -> Verdict:
    death = judged.death()
    if not death:
        return verdict
    return Verdict(DIES, death, verdict.where)


def _run_one(
    check: Check, judged: Judged, socket: Path, tree: Tree, timeout_s: float, limit_s: float
) -> Verdict:
    arguments = [check.id, str(socket), str(tree.root), str(timeout_s), "1" if judged.can_stall else "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.conformance.one", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(limit_s, kill)
    timer.start()
    verdict = None
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            message = json.loads(line)
            if "word" in message:
                verdict = Verdict(**message)
                continue
            judged.stall(message["stall"])
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write("\n")
                process.stdin.flush()
        _, errors = process.communicate()
    finally:
        timer.cancel()
        judged.stall(False)
    if verdict is not None:
        return verdict
    if late.is_set():
        return Verdict(HANGS, f"no end within {limit_s:g} s")
    last = errors.strip().splitlines()[-1:] or [f"exit code {process.returncode}"]
    return Verdict(DIFFERS, f"the check broke: {last[0]}")
