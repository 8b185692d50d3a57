"""The command line: also back-ends that die or hang, and what is written of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from tests.conformance.__main__ import main
from tests.conformance.catalogue import all_checks
from tests.conformance.report import BEGIN, END, Result, load, markdown, merge, to_json, write_docs
from tests.conformance.verdict import DIES, DIFFERS, HANGS, OK, Verdict

if TYPE_CHECKING:
    from tests.conformance.ours import Ours
    from tests.conformance.tree import Tree

PEER = """
import os, socket, sys, time
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
connection, _ = listener.accept()
connection.recv(12)
if sys.argv[2] == "dies":
    os._exit(3)
if sys.argv[2] == "panics":
    sys.stderr.write("thread 'main' panicked at somewhere/crate-1.0/src/lib.rs:12:3:\\n")
    os._exit(101)
time.sleep(60)
"""


@pytest.fixture
def peer(tmp_path: Path) -> str:
    """A command of a back-end that does what its last argument says at the first message."""
    program = tmp_path / "peer.py"
    program.write_text(PEER)
    return f"{sys.executable} {program} {{socket}}"


def judge_by_command_line(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(arguments), catch_exceptions=False)
    return result.exit_code, result.output


def test_ours(tmp_path: Path) -> None:
    """With a check that is given a fresh daemon and held-back data, and one that is not offered."""
    where = tmp_path / "results.json"
    names = ["msg.reply-header", "opcode.hiprio-not-blocked", "msg.stray-descriptor"]
    options = [option for name in names for option in ("--only", name)]
    code, output = judge_by_command_line("--ours", *options, "--json", str(where), "--timeout", "30")
    assert code == 0, output
    (result,) = load(where)
    assert result.name == "virtiofsd-rafs"
    assert [result.verdicts[name].word for name in names] == [OK, OK, "not offered"]


def test_attached(shared: Ours, tree: Tree) -> None:
    options = ["--attach", f"it={shared.daemon.socket}", "--tree", str(tree.root), "--only", "ring.size-8"]
    code, output = judge_by_command_line(*options, "--timeout", "30")
    assert code == 0, output
    assert output.strip() == "it: 1 ok"


@pytest.mark.parametrize(
    ("does", "word", "how"),
    [("dies", DIES, "exit code 3"), ("panics", DIES, "crate-1.0/src/lib.rs:12"), ("hangs", HANGS, "")],
)
def test_a_back_end_that_dies_or_hangs(peer: str, tmp_path: Path, does: str, word: str, how: str) -> None:
    where = tmp_path / "results.json"
    options = ["--only", "msg.reply-header", "--only", "msg.back-to-back", "--timeout", "0.3"]
    code, output = judge_by_command_line("--command", f"bad={peer} {does}", *options, "--json", str(where))
    assert code == 1, output
    (result,) = load(where)
    verdicts = list(result.verdicts.values())
    assert [verdict.word for verdict in verdicts] == [word, word]
    assert how in verdicts[0].how
    assert "bad: 2 " + word in output


def test_a_program_that_is_not_there() -> None:
    code, output = judge_by_command_line("--command", "nothing-there {socket}", "--only", "msg.unknown")
    assert code == 1
    assert "it does not start" in output


def test_every_check_says_what_it_rests_on() -> None:
    code, output = judge_by_command_line("--list")
    assert code == 0
    for check in all_checks():
        assert check.id in output
        assert check.source
        assert check.says.endswith((".", ")"))
        assert not check.title.endswith(".")


def test_runs_are_merged_by_back_end() -> None:
    old = [Result("a", "1", {"x": Verdict(OK), "y": Verdict(OK)}), Result("b", "1", {"x": Verdict(OK)})]
    new = [Result("a", "1", {"y": Verdict(DIES, "code")}), Result("b", "2", {})]
    merged = {result.title: result.verdicts for result in merge(old, new)}
    assert merged == {
        "a 1": {"x": Verdict(OK), "y": Verdict(DIES, "code")},
        "b 1": {"x": Verdict(OK)},
        "b 2": {},
    }


def test_tables(tmp_path: Path) -> None:
    """Neighbours with the same verdicts share a row; a pipe in a text does not break it."""
    checks = all_checks()
    good = Result("good", "1", {check.id: Verdict(OK) for check in checks})
    bad = Result("bad", "", good.verdicts | {"init.minor-31": Verdict(DIFFERS, "minor | major")})
    rows = [line for line in markdown([good, bad]).splitlines() if "`init.minor-" in line]
    assert [row.split("|")[1].strip() for row in rows] == [
        "`init.minor-27` … `init.minor-30` (4)",
        "`init.minor-31`",
        "`init.minor-32` … `init.minor-45` (14)",
    ]
    assert rows[1].endswith("| ok | **differs**: minor \\| major |")
    document = tmp_path / "doc.md"
    document.write_text(f"before\n{BEGIN}\nformer tables\n{END}\nafter\n")
    write_docs(document, [good, bad])
    text = document.read_text()
    assert text.startswith(f"before\n{BEGIN}\n| back-end |")
    assert text.endswith(f"{END}\nafter\n")
    assert "former tables" not in text
    with pytest.raises(ValueError, match="has no lines"):
        write_docs(Path(__file__).with_name("conftest.py"), [good])


def test_earlier_results_make_a_document(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(to_json([Result(name, "1", {"msg.unknown": Verdict(OK)})]))
    document, both = tmp_path / "doc.md", tmp_path / "both"
    document.write_text(f"{BEGIN}\n{END}\n")
    options = ["--from", str(tmp_path / "a"), "--from", str(tmp_path / "b"), "--write", str(document)]
    assert judge_by_command_line(*options, "--json", str(both)) == (0, "")
    assert [result.title for result in load(both)] == ["a 1", "b 1"]
    assert "| b 1 | 1 | 0 | 0 | 0 | 0 |" in document.read_text()


def test_results_of_something_else_are_refused(tmp_path: Path) -> None:
    where = tmp_path / "other.json"
    where.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="no results"):
        load(where)
