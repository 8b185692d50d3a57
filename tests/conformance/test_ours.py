"""Every check against the daemon."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conformance.catalogue import all_checks
from tests.conformance.ours import SILENT
from tests.conformance.verdict import judge

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conformance.check import Check
    from tests.conformance.ours import Ours


@pytest.mark.parametrize("check", [pytest.param(check, id=check.id) for check in all_checks()])
def test_conforms(check: Check, request: pytest.FixtureRequest, start_ours: Callable[[], Ours]) -> None:
    for _ in range(3):
        if check.fresh:
            with start_ours() as ours:
                verdict = judge(check, ours)
        else:
            verdict = judge(check, request.getfixturevalue("shared"))
        if verdict.how != SILENT:
            break
    says = f"{check.title}.\n{check.source}: {check.says}"
    assert verdict.passed, f"{verdict.word}: {verdict.how} ({verdict.where})\n{says}"
