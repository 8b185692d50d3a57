"""When counted instructions are a fault, and when they are only shown."""

from __future__ import annotations

import json

from tests.bench.callgrind import FIGURES, faults

KNOWN = {"getattr": 1000.0, "getattr-4-queues": 1000.0, "lookup": 2000.0}


def test_counts_within_the_tolerance_are_no_fault() -> None:
    assert faults({"getattr": 1029.0, "getattr-4-queues": 971.0, "lookup": 2059.0}, KNOWN) == []


def test_more_and_fewer_instructions_have_to_be_explained() -> None:
    assert faults({**KNOWN, "lookup": 2061.0}, KNOWN) == ["lookup: 2061, not 2000 (+3.0%)"]
    assert faults({**KNOWN, "lookup": 1900.0}, KNOWN) == ["lookup: 1900, not 2000 (-5.0%)"]
    assert faults({**KNOWN, "new": 1.0}, KNOWN) == ["new has no figure"]


def test_another_toolchain_is_held_to_ratios_only() -> None:
    assert faults({"getattr": 5.0, "getattr-4-queues": 5.2, "lookup": 1.0}, None) == []
    assert faults({"getattr": 5.0, "getattr-4-queues": 5.3}, None) == [
        "four queues take 1.06 x the instructions of one per request"
    ]


def test_figures_are_kept_for_each_case_that_a_bar_names() -> None:
    assert {"getattr", "lookup", "read-4k"} <= json.loads(FIGURES.read_text())["instructions"].keys()
