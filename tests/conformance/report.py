"""What came of runs: JSON, a table for the terminal, and the tables of docs/conformance.md."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import attrs

from tests.conformance.catalogue import AREAS, all_checks
from tests.conformance.verdict import DIES, DIFFERS, HANGS, NOT_OFFERED, OK, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from tests.conformance.check import Check

BEGIN, END = "<!-- conformance -->", "<!-- /conformance -->"
_HOW_MAX = 110


@attrs.frozen
class Result:
    """A back-end and its verdicts by check."""

    name: str
    version: str
    verdicts: dict[str, Verdict]

    @property
    def title(self) -> str:
        return f"{self.name} {self.version}".strip()

    def counts(self) -> str:
        words = [verdict.word for verdict in self.verdicts.values()]
        return ", ".join(
            f"{words.count(word)} {word}" for word in (OK, DIFFERS, DIES, HANGS, NOT_OFFERED) if word in words
        )


def load(path: Path) -> list[Result]:
    """Results of earlier runs.

    Raises:
        ValueError: the file is something else.
    """
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or "back_ends" not in data:
        raise ValueError(f"{path} holds no results of conformance runs")
    return [
        Result(one["name"], one["version"], {id_: Verdict(**v) for id_, v in one["verdicts"].items()})
        for one in data["back_ends"]
    ]


def merge(old: Iterable[Result], new: Iterable[Result]) -> list[Result]:
    """Results by title; verdicts of *new* replace those of *old*."""
    merged = {result.title: result for result in old}
    for result in new:
        before = merged[result.title].verdicts if result.title in merged else {}
        merged[result.title] = attrs.evolve(result, verdicts=before | result.verdicts)
    return list(merged.values())


def to_json(results: Iterable[Result]) -> str:
    """Results, and what the checks are about."""
    data: dict[str, Any] = {
        "checks": [{"id": c.id, "title": c.title, "source": c.source, "says": c.says} for c in all_checks()],
        "back_ends": [
            {
                "name": result.name,
                "version": result.version,
                "verdicts": {id_: attrs.asdict(verdict) for id_, verdict in result.verdicts.items()},
            }
            for result in results
        ],
    }
    return json.dumps(data, indent=1) + "\n"


def terminal(results: list[Result]) -> str:
    """Counts of each, and every verdict that is not plainly ok."""
    lines = []
    for result in results:
        lines += [f"{result.title}: {result.counts()}"]
        for check in all_checks():
            verdict = result.verdicts.get(check.id)
            if verdict is not None and verdict.word != OK:
                where = f" ({verdict.where})" if verdict.where else ""
                lines += [f"  {check.id:34} {verdict.word:12} {verdict.how}{where}"]
    return "\n".join(lines)


def markdown(results: list[Result]) -> str:
    """A table of counts, then one per area. Neighbours of a family with the same verdicts share a row."""
    head = "| back-end | " + " | ".join((OK, DIFFERS, DIES, HANGS, NOT_OFFERED)) + " |"
    lines = [head, "|---" * 6 + "|"]
    for result in results:
        words = [verdict.word for verdict in result.verdicts.values()]
        counts = [str(words.count(word)) for word in (OK, DIFFERS, DIES, HANGS, NOT_OFFERED)]
        lines.append(f"| {result.title} | " + " | ".join(counts) + " |")
    for area, title in AREAS.items():
        lines += ["", f"### {title}", "", "| check | what is asked, and where it is said | "]
        lines[-1] += " | ".join(result.title for result in results) + " |"
        lines.append("|---" * (2 + len(results)) + "|")
        for group in _groups([c for c in all_checks() if c.area == area], results):
            lines.append(_row(group, results))
    return "\n".join(lines)


def _groups(checks: list[Check], results: list[Result]) -> list[list[Check]]:
    groups: list[list[Check]] = []
    for check in checks:
        last = groups[-1][-1] if groups else None
        if (
            last
            and check.family
            and last.family == check.family
            and _words(last, results) == _words(check, results)
        ):
            groups[-1].append(check)
        else:
            groups.append([check])
    return groups


def _words(check: Check, results: list[Result]) -> list[str]:
    missing = Verdict("")
    return [_cell(result.verdicts.get(check.id, missing)) for result in results]


def _row(group: list[Check], results: list[Result]) -> str:
    first, last = group[0], group[-1]
    name = f"`{first.id}`" if first is last else f"`{first.id}` … `{last.id}` ({len(group)})"
    what = first.title if first is last else first.family
    cells = _words(first, results)
    return f"| {name} | {_escape(what)}. {_escape(first.source)}: *{_escape(first.says)}* | " + (
        " | ".join(cells) + " |"
    )


def _cell(verdict: Verdict) -> str:
    if verdict.word in (OK, ""):
        return verdict.word
    if verdict.word == NOT_OFFERED:
        return NOT_OFFERED
    how = re.sub(r"\s+", " ", verdict.how).replace("nothing arrived in time", "no answer")
    if len(how) > _HOW_MAX:
        how = how[:_HOW_MAX].rpartition(" ")[0] + " …"
    return f"**{verdict.word}**: {_escape(how)}"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def write_docs(path: Path, results: list[Result]) -> None:
    """Puts the tables between the markers of a document.

    Raises:
        ValueError: it has no markers.
    """
    text = path.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no lines {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n{markdown(results)}\n{END}{after}")
