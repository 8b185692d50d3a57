"""Proof that checks can fail: each against a back-end with the defect that it is there for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conformance.catalogue import all_checks
from tests.conformance.check import CHECKS
from tests.conformance.faulty import DEFECTS, Faulty
from tests.conformance.verdict import DIFFERS, HANGS, judge

if TYPE_CHECKING:
    from tests.conformance.tree import Tree

NOTICED_BY = {
    "double-answer": {"reply.exactly-once", "vmm.start-qemu-10", "frame.indirect-7", "wrap.batch-7"},
    "used-length-zero": {"reply.used-length", "reply.used-length-error"},
    "used-length-long": {"reply.used-length", "reply.used-length-error", "reply.used-length-forget"},
    "serves-disabled": {"ring.disabled"},
    "serves-stopped": {"ring.stopped"},
    "writes-behind-reply": {"reply.long-buffer", "reply.exactly-once"},
    "writes-behind-buffer": {"reply.short-buffer", "frame.chained-compact", "frame.in-header-split"},
    "writes-late": {"frame.indirect-compact", "vmm.start-crosvm"},
    "writes-stopped": {"pause.base-idle"},
    "wrong-unique": {"reply.out-of-order-unique"},
    "wrong-data": {"reply.exactly-once", "vmm.pause-qemu-11", "frame.parts-apart"},
    "positive-error": {"reply.used-length-error"},
    "loses-requests": {"ring.size-8", "wrap.index-size-64"},
    "loses-interrupts": {"event.used-event", "vmm.start-cloud-hypervisor"},
    "interrupts-always": {"event.used-event-passed", "event.used-event"},
    "wants-no-kick": {"event.avail-event-idle"},
    "wrong-base": {"pause.base-idle", "wrap.pause"},
    "forgets-acks": {"msg.need-reply-everything"},
    "accepts-all": {"msg.refused"},
}
"""Checks that must notice a defect, by the defect."""

CASES = [(defect, name) for defect, names in NOTICED_BY.items() for name in sorted(names)]


def test_every_defect_is_noticed_by_a_check() -> None:
    assert set(NOTICED_BY) == set(DEFECTS) - {""}
    assert set().union(*NOTICED_BY.values()) <= {check.id for check in all_checks()}


@pytest.mark.parametrize(("defect", "name"), CASES)
def test_a_defect_is_noticed(tree: Tree, defect: str, name: str) -> None:
    with Faulty(tree, defect) as subject:
        assert judge(CHECKS[name], subject).word in (DIFFERS, HANGS)


@pytest.mark.parametrize("name", sorted(set().union(*NOTICED_BY.values())))
def test_without_the_defect_the_same_check_passes(tree: Tree, name: str) -> None:
    with Faulty(tree, "") as subject:
        subject.timeout_s = 30
        verdict = judge(CHECKS[name], subject)
        assert verdict.word == "ok", verdict.how
