"""A page in a real browser: `make browser` runs these, and says what is missing; elsewhere they are left out."""

import importlib.util
import os
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from prunekit.report.page import write_page

ASKED = "BROWSER_TESTS" in os.environ  # of `make browser`: nothing is left out in silence
MISSING = [name for name in ("playwright", "axe_playwright_python") if importlib.util.find_spec(name) is None]
CHROMIUM = next((found for name in ("chromium", "google-chrome", "chrome") if (found := shutil.which(name))), None)
if MISSING and not ASKED:
    pytest.skip(f"{' and '.join(MISSING)} not installed: pip install 'prunekit[browser]'", allow_module_level=True)

sync_api: Any = importlib.import_module("playwright.sync_api")  # of an extra: unknown to a checker without it

HERE = importlib.util.spec_from_file_location("pages", Path(__file__).parent / "test_page.py")
assert HERE is not None
assert HERE.loader is not None
pages: Any = importlib.util.module_from_spec(HERE)
HERE.loader.exec_module(pages)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None and not ASKED, reason="there is no Chromium")]


@pytest.fixture(scope="module")
def browser() -> Any:
    with sync_api.sync_playwright() as playing:
        opened = playing.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


CHARTS = {"results": 15, "study": 4, "grid": 3, "family": 2}  # at least; of a study trials, front and two choices


@pytest.fixture(params=CHARTS)
def kind(request: pytest.FixtureRequest) -> str:
    """Results and a comparison, a study, a comparison that is a grid, or a family."""
    return request.param


@pytest.fixture
def shown(browser: Any, tmp_path: Path, kind: str) -> Any:
    """A page, its requests and its complaints."""
    if kind == "study":
        folders = [pages.study(tmp_path / "s", metrics=("perplexity", "seconds"))]
    elif kind == "grid":
        folders = [pages.grid(tmp_path / "g")]
    elif kind == "family":
        folders = [pages.family(tmp_path / "f", metric="latency")]
    else:
        folders = [pages.comparison(tmp_path / "c", speed=True), pages.result(tmp_path / "a")]
    file = write_page(folders, tmp_path / "page.html")
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.complaints, page.requests = [], []
    page.on("console", lambda message: page.complaints.append(message.text) if message.type != "info" else None)
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(file.as_uri())
    page.evaluate("window.drawn.then(() => null)")
    yield page
    assert page.complaints == []
    assert page.requests == [file.as_uri()]
    page.close()


def test_all_charts_are_drawn(shown: Any, kind: str) -> None:
    charts = shown.locator(".chart")
    assert charts.count() >= CHARTS[kind]
    for i in range(charts.count()):
        assert charts.nth(i).locator("svg").count() == 1
        assert charts.nth(i).locator("svg path, svg text").count() > 3


@pytest.mark.parametrize("kind", ["results"], indirect=True)
def test_the_leaderboard_sorts_and_filters(shown: Any) -> None:
    table = shown.locator("table.filtered").first

    def cells() -> list[str]:
        return table.locator("tbody tr:visible td:nth-child(2)").all_inner_texts()

    before = cells()
    heading = table.locator("th").nth(2)  # perplexity
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert cells() == before
    heading.locator("button").press("Enter")  # by keyboard
    assert heading.get_attribute("aria-sort") == "descending"
    assert cells() == before[::-1]
    shown.locator("input[type=search]").first.fill("twin")
    assert cells() == ["twin"]


@pytest.mark.parametrize("kind", ["grid"], indirect=True)
def test_a_long_leaderboard_shows_its_first_rows_until_all_are_asked_for(shown: Any) -> None:
    table, status = shown.locator("table.filtered"), shown.get_by_role("status")

    def cells() -> list[str]:
        return table.locator("tbody tr:visible td:nth-child(2)").all_inner_texts()

    assert len(cells()) == 20
    assert status.inner_text() == "The first 20 of 23; 3 more are in the page."
    first = cells()[0]
    shown.locator("input[type=search]").fill("p0 a5")  # the last of all: a search is over all rows
    assert cells() == ["p0 + a5"]
    shown.locator("input[type=search]").fill("")
    table.locator("th").nth(2).locator("button").click()
    table.locator("th").nth(2).locator("button").click()
    assert len(cells()) == 20
    assert first not in cells()  # the first in the new order, of all rows
    shown.emulate_media(media="print")
    assert len(cells()) == 20
    assert status.is_visible()  # paper says that there are more
    assert not shown.get_by_role("button", name="Show all 23").is_visible()
    shown.emulate_media(media="screen")
    shown.get_by_role("button", name="Show all 23").press("Enter")  # by keyboard
    assert len(cells()) == 23
    shown.get_by_role("button", name="Show the first 20").press("Enter")
    assert len(cells()) == 20


@pytest.mark.parametrize("kind", ["grid"], indirect=True)
def test_the_grid_scrolls_by_keyboard_where_the_window_is_narrow(shown: Any) -> None:
    shown.set_viewport_size({"width": 160, "height": 800})
    wide = shown.locator("figure .wide").first
    assert wide.evaluate("e => e.scrollWidth > e.clientWidth")
    assert wide.get_attribute("tabindex") == "0"
    marks = [text for text in shown.locator(".chart").first.locator("svg text").all_text_contents() if text in "1=×"]
    assert sorted(marks) == ["1", "=", "×"]


@pytest.mark.parametrize("kind", ["study"], indirect=True)
def test_the_recipes_of_a_study_sort_and_filter(shown: Any) -> None:
    table = shown.locator("table.filtered").first

    def names() -> list[str]:
        return table.locator("tbody tr:visible td:nth-child(1)").all_inner_texts()

    assert names() == ["2", "0", "base", "1"]  # the best first, what has no value last
    heading = table.locator("th").nth(3)  # seconds
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert names() == ["2", "0", "base", "1"]
    heading.locator("button").press("Enter")  # by keyboard
    assert heading.get_attribute("aria-sort") == "descending"
    assert names() == ["1", "base", "0", "2"]
    table.locator("th").nth(0).locator("button").click()  # numbers before words
    assert heading.get_attribute("aria-sort") is None
    assert names() == ["0", "1", "2", "base"]
    shown.locator("input[type=search]").first.fill("obs stream")
    assert names() == ["2"]


def test_the_theme_switches_and_ink_follows(shown: Any) -> None:
    def ink() -> str:
        return shown.locator(".chart svg .role-axis-label text").first.evaluate("e => getComputedStyle(e).fill")

    light = ink()
    shown.locator("#theme").click()
    assert shown.locator("html").get_attribute("data-theme") == "dark"
    assert shown.locator("#theme").get_attribute("aria-pressed") == "true"
    assert ink() != light


OVERLAPPING = """() => {
  let found = [];
  for (const chart of document.querySelectorAll(".chart")) {
    const shown = [...chart.querySelectorAll("svg g.names text")].filter((e) => getComputedStyle(e).opacity !== "0");
    const boxes = shown.map((e) => [e.textContent, e.getBoundingClientRect()]);
    boxes.forEach(([a, x], i) => boxes.slice(0, i).forEach(([b, y]) => {
      const across = Math.min(x.right, y.right) - Math.max(x.left, y.left);
      const down = Math.min(x.bottom, y.bottom) - Math.max(x.top, y.top);
      if (across > 1 && down > 3) found.push([a, b]);  // boxes of lines are higher than their letters
    }));
  }
  return found;
}"""


@pytest.mark.parametrize("kind", ["results", "family"], indirect=True)
@pytest.mark.parametrize("width", [390, 1200])
def test_names_beside_points_do_not_overlap(shown: Any, kind: str, width: int) -> None:
    shown.set_viewport_size({"width": width, "height": 800})
    shown.wait_for_timeout(300)
    named = shown.locator(".chart svg g.names text")
    assert named.count() >= (4 if kind == "family" else 3)
    assert shown.evaluate(OVERLAPPING) == []


@pytest.mark.parametrize("kind", ["results"], indirect=True)
def test_the_leaderboard_begins_on_the_first_screen_of_a_phone(shown: Any) -> None:
    shown.set_viewport_size({"width": 390, "height": 800})
    assert shown.locator("table.filtered tbody tr").first.bounding_box()["y"] < 400


def test_paper_is_light_and_unfolds_what_is_folded(shown: Any) -> None:
    shown.locator("#theme").click()
    shown.emulate_media(media="print")
    paper = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == "rgb(255, 255, 255)"
    assert not shown.locator("#theme").is_visible()
    shown.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert shown.locator("details:not([open])").count() == 0
    assert shown.pdf(format="A4").startswith(b"%PDF")
    shown.evaluate("dispatchEvent(new Event('afterprint'))")
    assert shown.locator("details[open]").count() == 0


@pytest.mark.parametrize("width", [360, 768, 1400])
def test_nothing_is_wider_than_the_window(shown: Any, width: int) -> None:
    shown.set_viewport_size({"width": width, "height": 800})
    shown.wait_for_timeout(300)
    assert shown.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing_serious(shown: Any, dark: bool) -> None:
    if dark:
        shown.locator("#theme").click()
    shown.evaluate(resources.files("axe_playwright_python").joinpath("axe.min.js").read_text("utf-8"))
    found = shown.evaluate("axe.run()")["violations"]
    assert [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")] == []
