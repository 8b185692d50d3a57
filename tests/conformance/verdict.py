"""How a check ends, in a few words that can be compared."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

import attrs

from tests.conformance.check import NotOffered, Violation
from tests.conformance.subject import hangs

if TYPE_CHECKING:
    from tests.conformance.check import Check
    from tests.conformance.subject import Subject

OK, DIFFERS, DIES, HANGS, NOT_OFFERED = "ok", "differs", "dies", "hangs", "not offered"


@attrs.frozen
class Verdict:
    """One of the words above, how it came, and at which line of the check."""

    word: str
    how: str = ""
    where: str = ""

    @property
    def passed(self) -> bool:
        return self.word in (OK, NOT_OFFERED)


def judge(check: Check, subject: Subject) -> Verdict:
    """Runs a check here and now; whatever goes wrong is the back-end's doing."""
    try:
        check.body(subject, **check.arguments)
    except Violation as e:
        return Verdict(DIFFERS, str(e))
    except NotOffered as e:
        return Verdict(NOT_OFFERED, str(e))
    except Exception as e:
        where = traceback.extract_tb(e.__traceback__)
        ours = [frame for frame in where if "/conformance/" in frame.filename]
        line = f"{ours[-1].name}: {ours[-1].line}" if ours else ""
        return Verdict(HANGS if hangs(e) else DIFFERS, str(e), line)
    return Verdict(OK)
