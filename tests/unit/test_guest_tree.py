"""Reports of guests: passes told apart, differences named."""

from __future__ import annotations

from guest.tree import Pass, difference, passes


def test_passes_with_a_reset_in_the_middle() -> None:
    report = "# pass 1\n.\td\n./a\n# pass 1\n.\td\n# end 0\n# pass 2\n.\td\n# end 1\n# pass 3\n./x\n"
    assert passes(report) == [
        Pass([".\td", "./a"], None),
        Pass([".\td"], 0),
        Pass([".\td"], 1),
        Pass(["./x"], None),
    ]


def test_noise_outside_of_passes_is_no_tree() -> None:
    assert passes("hello\n") == []


def test_difference_names_path_and_both_sides() -> None:
    assert difference(["./a\t1", "./b\t2"], ["./a\t1", "./b\t2"]) == ""
    text = difference(["./a\t1", "./b\t2"], ["./a\t9", "./c\t3"])
    assert "./a\t1" in text
    assert "./a\t9" in text
    assert text.count("(not there)") == 2


def test_order_and_repetition_count() -> None:
    assert "order" in difference(["./a\t1", "./b\t2"], ["./b\t2", "./a\t1"])
    assert "twice" in difference(["./a\t1"], ["./a\t1", "./a\t1"])


def test_many_differences_are_cut() -> None:
    text = difference([f"./{i}\t" for i in range(30)], [], limit=3)
    assert text.endswith("... and 27 more")
