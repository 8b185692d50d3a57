"""The page of a report in a headless browser: it can be read, and nothing runs that should not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.sim.browser import Browser, find_browser
from tests.sim.traces import HOSTILE, fetch, lively, ns, stall, trace
from virtiofsd_rafs.report.html import page
from virtiofsd_rafs.report.model import analyse
from virtiofsd_rafs.report.trace import parse, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

# Of everything that has text of its own and is seen: the lowest contrast, and where. The background is that
# of the nearest element which has one.
CONTRAST = """
(() => {
  const pen = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgb = (color) => {
    pen.clearRect(0, 0, 1, 1); pen.fillStyle = color; pen.fillRect(0, 0, 1, 1);
    return pen.getImageData(0, 0, 1, 1).data;
  };
  const light = (c) => [0, 1, 2].map((i) => c[i] / 255).map((v) => v <= 0.04045 ? v / 12.92
    : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  let worst = [99, ""];
  for (const element of document.querySelectorAll("body *")) {
    if (element.closest(".v, script, style, #tip")) continue;
    if (![...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    let below = element;
    while (below && rgb(getComputedStyle(below).backgroundColor)[3] < 255) below = below.parentElement;
    const a = light(rgb(getComputedStyle(element).color));
    const b = light(rgb(getComputedStyle(below || document.body).backgroundColor));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst = [ratio, element.className + ": " + element.textContent.slice(0, 40)];
  }
  return worst;
})()
"""


@pytest.fixture(scope="module")
def browser(missing: Callable[[str], None]) -> Iterator[Browser]:
    program = find_browser()
    if program is None:
        missing("chromium")
    assert program is not None
    with Browser(program) as running:
        yield running


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three boots side by side, with hostile names in every place that has names."""
    pull = trace(
        [fetch(i / 9, 8 + i, reason="pull", path=f"layer {i}", length=20_000_000) for i in range(4)],
        [],
        name="pull first",
        events={"downloaded": ns(11), "unpacked": ns(13), "first exec": ns(18), "HTTP 200": ns(21)},
    )
    evil = trace(
        [fetch(2.1, 2.5, path=HOSTILE[0], source=HOSTILE[1], result=HOSTILE[2], reason=HOSTILE[0])],
        [stall(2, 2.5, HOSTILE[4])],
        image=HOSTILE[0],
        name=HOSTILE[1],
        events={HOSTILE[2]: ns(2.3)},
    )
    traces = [lively(120), trace([], [], name="warm"), pull, evil]
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(page([analyse(parse(one, name="cold")) for one in traces], note=HOSTILE[0]))
    return file


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (400, False), (400, True)])
def test_the_page_reads_well(browser: Browser, shown: Path, width: int, dark: bool) -> None:
    browser.look(width=width, dark=dark)
    browser.open(shown)
    assert browser.complaints == []
    assert [request for request in browser.requests if not request.startswith("data:")] == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    ratio, where = browser.evaluate(CONTRAST)
    assert ratio >= 4.5, where
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in paper[4:-1].split(",")) < 384) is dark


def test_the_waterfall_has_a_bar_for_each_fetch(browser: Browser, shown: Path) -> None:
    browser.look(width=1280)
    browser.open(shown)
    n_fetches = len(lively(120)["fetches"])
    counted = browser.evaluate(
        "[...document.querySelectorAll('.rows')].map(rows => [rows.children.length,"
        " [...rows.querySelectorAll('.b')].filter(bar => bar.getBoundingClientRect().width >= 2).length])"
    )
    assert counted == [[n_fetches] * 2, [4, 4], [1, 1]]
    # Reasons differ in more than colour.
    looks = browser.evaluate(
        "[...document.querySelectorAll('.legend i')].map(i => getComputedStyle(i).backgroundImage)"
    )
    assert len(set(looks)) >= 4
    waits = browser.evaluate("document.querySelector('.marks path').getAttribute('d').split('M').length - 1")
    assert waits == len(lively(120)["stalls"])


def test_names_are_text_and_never_markup(browser: Browser, shown: Path) -> None:
    browser.open(shown)
    assert (
        browser.evaluate("document.querySelectorAll('img, iframe, object, [onerror], [onmouseover]').length")
        == 0
    )
    assert browser.evaluate("document.title").startswith("Boot report: ")
    text = browser.evaluate("document.body.textContent")
    for name in HOSTILE:
        assert printable(name).rpartition("/")[2] in text
    # And if one got through, the policy would stop it.
    browser.evaluate(
        "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')"
    )
    browser.evaluate("new Promise(done => setTimeout(done, 50))")
    assert browser.evaluate("document.title") != "1"
    assert any("Content Security Policy" in complaint for complaint in browser.complaints)


def test_details_of_a_fetch(browser: Browser, shown: Path) -> None:
    browser.look(width=1280)
    browser.open(shown)
    assert browser.evaluate("document.getElementById('tip').hidden")
    x, y = browser.evaluate(
        "(() => { const row = document.querySelectorAll('.rows li')[5];"
        " row.scrollIntoView({block: 'center'}); const box = row.getBoundingClientRect();"
        " return [box.left + 300, box.top + 8]; })()"
    )
    browser.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    browser("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    wanted = sorted(lively(120)["fetches"], key=lambda one: one["started_ns"])[5]
    tip = browser.evaluate("document.getElementById('tip').textContent")
    assert printable(wanted["path"] or wanted["reason"]) in tip
    assert wanted["source"] in tip
    # The keyboard goes on from there.
    browser.evaluate("document.querySelector('.wf-scroll').focus()")
    for _ in range(2):
        browser("Input.dispatchKeyEvent", type="keyDown", key="ArrowDown")
    place = "[...document.querySelector('.rows').children].findIndex(row => row.classList.contains('on'))"
    assert browser.evaluate(place) == 7
    browser("Input.dispatchKeyEvent", type="keyDown", key="Escape")
    assert browser.evaluate("document.getElementById('tip').hidden")
    assert browser.complaints == []


def test_full_logs_give_a_page_of_bounded_size(browser: Browser, tmp_path: Path) -> None:
    found = lively(3756)
    assert len(found["fetches"]) >= 4096
    text = page([analyse(parse(json.loads(json.dumps(found))))])
    assert len(text) < 4_000_000
    (tmp_path / "full.html").write_text(text)
    browser.look(width=400)
    browser.open(tmp_path / "full.html")
    assert browser.evaluate("document.querySelectorAll('.rows .b').length") == len(found["fetches"])
    assert browser.evaluate("document.documentElement.scrollWidth") <= 400
    assert browser.complaints == []
