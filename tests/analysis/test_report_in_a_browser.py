"""The report in Chromium: no error, every figure with its points, filters that filter, at three widths."""

import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from run_with_samples import add_samples, decode

from rloop_mcore.analysis.browser import Words, browser
from rloop_mcore.analysis.maths import Formulas
from rloop_mcore.analysis.read_run import read_run
from rloop_mcore.analysis.report import write_report
from rloop_mcore.main.live import LiveReport, LiveServer

CHROME = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(
    CHROME is None or find_spec("playwright") is None, reason="no Chromium (apt-get install chromium) or no Playwright"
)
RLOOP = ["base", "i0_explore_000002", "i0_explore_000004", "i0_exploit_000000", "i1_explore_000004"]
DAPO = ["base", "i0_explore_000004", "i0_explore_000008"]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        started = playwright.chromium.launch(executable_path=CHROME, args=sandbox, timeout=60_000)
        yield started
        started.close()


@pytest.fixture
def runs(rloop_run: Path, dapo_run: Path) -> list[Path]:
    add_samples(rloop_run, 2, RLOOP, seed=11)
    add_samples(dapo_run, 1, DAPO, seed=12)
    return [rloop_run, dapo_run]


@pytest.fixture
def report(runs: list[Path], tmp_path: Path) -> Path:
    write_report(runs, tmp_path / "report.html", words=[Words(decode), Words(decode)])
    return tmp_path / "report.html"


class Watched:
    """A page whose complaints and requests are noted."""

    def __init__(self, chromium: Any, url: str, width: int = 1400, theme: str = "light") -> None:
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
        self.page, self.complaints, self.asked = context.new_page(), list[str](), list[str]()
        self.page.set_default_timeout(60_000)
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)
        self.page.wait_for_selector("#problem h3")

    def _console(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def count(self) -> tuple[int, int]:
        """(problems, responses) that the filters leave, as the page says."""
        problems, responses = re.findall(r"\d+", self.page.inner_text("#f-count"))[:2]
        return int(problems), int(responses)


@pytest.mark.parametrize(("width", "theme"), [(1400, "light"), (800, "dark"), (390, "light")])
def test_it_loads_and_draws_every_figure(report: Path, chromium: Any, width: int, theme: str) -> None:
    watched = Watched(chromium, report.as_uri(), width, theme)
    page = watched.page
    assert watched.complaints == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in watched.asked)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out
    assert page.locator("#f-run").is_visible()
    specs = json.loads(page.text_content("#figures"))
    drawn = page.evaluate(
        "[...document.querySelectorAll('.plot')].map(plot => plot._fullData?.map(trace => trace.type))"
    )
    assert drawn == [[trace["type"] for trace in spec["data"]] for spec in specs]
    sizes = page.evaluate("[...document.querySelectorAll('.plot svg.main-svg')].map(svg => svg.clientWidth)")
    assert len(sizes) >= len(specs)
    assert all(100 < size <= width for size in sizes if size)


@pytest.mark.parametrize("chosen", ["by the system", "by the button"])
def test_a_dark_page_prints_in_light_colours(report: Path, chromium: Any, chosen: str) -> None:
    page = Watched(chromium, report.as_uri(), theme="dark" if chosen == "by the system" else "light").page
    if chosen == "by the button":
        for _ in range(2):  # auto, light, dark
            page.click("#theme")
    inks = "[...document.querySelectorAll('h1, .plot .xtick text')].map(text => getComputedStyle(text))"
    inks = f"[...new Set({inks}.map(style => style.fill == 'rgb(0, 0, 0)' ? style.color : style.fill))]"
    assert page.evaluate(inks) == ["rgb(231, 235, 240)"]
    page.emulate_media(media="print")
    wait_until("figures in ink", page, lambda: page.evaluate(inks) == ["rgb(28, 36, 48)"])


def test_printed_figures_have_the_width_of_their_columns_and_are_as_before_afterwards(
    report: Path, chromium: Any
) -> None:
    page = Watched(chromium, report.as_uri(), width=900).page
    widths = (
        "[...document.querySelectorAll('.plot')].map(plot => [plot.querySelector('svg').clientWidth, plot.clientWidth])"
    )

    def fits() -> bool:
        return all(svg == box for svg, box in page.evaluate(widths))

    before = page.evaluate(widths)
    assert fits()
    assert before[0][0] > 700
    page.emulate_media(media="print")
    wait_until("figures of the columns' width", page, lambda: fits() and page.evaluate(widths)[0][0] < 330)
    page.emulate_media(media="screen")
    wait_until("figures as before", page, lambda: page.evaluate(widths) == before)
    page.set_viewport_size({"width": 700, "height": 900})
    wait_until("figures of a smaller window", page, lambda: fits() and page.evaluate(widths)[0][0] < before[0][0])


def test_figures_of_many_runs_have_room_and_colours_of_their_own(
    rloop_run: Path, chromium: Any, tmp_path: Path
) -> None:
    add_samples(rloop_run, 2, RLOOP, seed=11)
    runs = [tmp_path / f"rloop_without_something_or_other_{number}" for number in range(7)]
    for run in runs:
        shutil.copytree(rloop_run, run)
    write_report(runs, tmp_path / "report.html")
    page = chromium.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(120_000)
    page.goto((tmp_path / "report.html").as_uri())
    looks = (
        "plot => plot._fullData.map(({line, marker}) => "
        "[line?.color, line?.dash, line?.width, marker?.color, marker?.pattern?.shape].join())"
    )
    for title, traces in (
        ("Validation avg@32", 7),
        ("Coverage", 21),
        ("Response length, right and wrong", 14),
        ("Expert trajectories", 7),
        ("Turnover of the hard problems", 7),
    ):
        plot = figure(page, title).locator(".plot")
        assert plot.evaluate("plot => plot._fullLayout._size.h") > 150, title
        assert plot.evaluate("({_fullLayout: {legend}}) => legend._height <= legend._effHeight"), title  # all of it
        assert len(set(plot.evaluate(looks))) == traces, title
    drawn = "lines => lines.map(getComputedStyle).map(style => [style.stroke, style.strokeDasharray].join())"
    curves = figure(page, "Training success").locator(".scatterlayer .js-line").evaluate_all(drawn)
    assert page.locator(".swatch line").evaluate_all(drawn) == curves  # the overview's are those of the figures


def figure(page: Any, title: str) -> Any:
    return page.locator("figure", has=page.get_by_role("heading", name=title, exact=True))


def points(page: Any, title: str) -> list[dict[str, Any]]:
    """The points that Plotly has drawn in a figure, trace by trace."""
    drawn = "plot => plot.calcdata.map(points => ({x: points.map(p => p.x), y: points.map(p => p.y), z: points[0].z}))"
    return list(figure(page, title).locator(".plot").evaluate(drawn))


def wait_until(what: str, page: Any, condition: Callable[[], bool]) -> None:
    """Playwright's own waiting is by eval, which the page forbids."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited 60 s for {what}"
        page.wait_for_timeout(100)


def test_figures_show_the_runs_numbers(report: Path, chromium: Any) -> None:
    page = Watched(chromium, report.as_uri()).page
    rloop, dapo = points(page, "Training success")
    assert rloop["x"] == dapo["x"] == list(range(1, 9))
    assert rloop["y"] == pytest.approx([0.325, 0.55, 0.775, 1.0] * 2)
    assert figure(page, "Training success").locator(".scatterlayer path.js-line").count() == 2
    forgetting = points(page, "Forgetting: rloop")[0]["z"]
    assert len(forgetting) == 4
    assert page.locator("figure", has_text="Differential forgetting").count() == 1


def test_hover_and_zoom(report: Path, chromium: Any) -> None:
    page = Watched(chromium, report.as_uri()).page
    plot = figure(page, "Training success").locator(".plot")
    plot.scroll_into_view_if_needed()
    area = plot.locator(".nsewdrag").bounding_box()
    assert area is not None
    third = "plot => [plot._fullLayout.xaxis.d2p(3), plot._fullLayout.yaxis.d2p(0.775)]"
    across, down = plot.evaluate(third)
    page.mouse.move(area["x"] + across, area["y"] + down)
    wait_until("the hover's label", page, lambda: plot.locator(".hoverlayer text").count() > 0)
    before = plot.evaluate("plot => plot.layout.xaxis.range.slice()")
    page.mouse.move(area["x"] + area["width"] / 4, area["y"] + area["height"] / 3)
    page.mouse.down()
    page.mouse.move(area["x"] + area["width"] / 2, area["y"] + 2 * area["height"] / 3, steps=4)
    page.mouse.up()
    end = "plot => plot.layout.xaxis.range[1]"
    wait_until("the zoom", page, lambda: plot.evaluate(end) < before[1])
    zoomed = plot.evaluate("plot => plot.layout.xaxis.range.slice()")
    page.click("#theme")  # draws anew, as rloop report --live does when there is news
    assert plot.evaluate("plot => plot.layout.xaxis.range.slice()") == zoomed
    page.set_viewport_size({"width": 800, "height": 900})
    wait_until("a wider figure", page, lambda: plot.evaluate("plot => plot._fullLayout.width") > 700)
    assert plot.evaluate("plot => plot.layout.xaxis.range.slice()") == zoomed


def held(runs: list[Path]) -> dict[str, Any]:
    """What the browser of the first run holds; tests/analysis/test_browser.py has it against the trajectories."""
    return browser(read_run(runs[0]), Words(decode), Formulas(100), 5_000_000)


def test_filters_leave_what_fits(report: Path, runs: list[Path], chromium: Any) -> None:
    watched, content = Watched(chromium, report.as_uri()), held(runs)
    page, problems, responses = watched.page, content["problems"], content["responses"]

    def expected(problem: Any = lambda each: True, response: Any = None) -> tuple[int, int]:
        fitting = [each for each in responses if response is None or response(each)]
        with_any = {each["problem"] for each in fitting}
        left = {i for i, each in enumerate(problems) if problem(each) and (response is None or i in with_any)}
        return len(left), sum(each["problem"] in left for each in fitting)

    assert watched.count() == expected() == (9 + 6, len(responses))
    for state, fits in {
        "hard": lambda each: each["hard"],
        "rft": lambda each: each["rft"],
        "never": lambda each: not each["right"],
        "lost": lambda each: each["lost"],
    }.items():
        page.select_option("#f-state", state)
        assert watched.count() == expected(fits), state
    page.click("#f-clear")
    page.select_option("#f-kind", "validation")
    assert watched.count() == expected(lambda each: each["kind"] == "validation")
    page.click("#f-clear")
    page.select_option("#f-verdict", "right")
    page.fill("#f-low", "8")
    assert watched.count() == expected(response=lambda each: each["correct"] and each["tokens"] >= 8)
    page.select_option("#f-step", "3")
    assert watched.count() == expected(response=lambda e: e["correct"] and e["tokens"] >= 8 and e["visit"] == 3)
    page.click("#f-clear")
    page.fill("#f-reward", "1")
    assert watched.count() == expected(response=lambda each: each["reward"] >= 1)
    page.click("#f-clear")
    page.fill("#f-text", "train/4")
    assert watched.count()[0] == 1
    page.fill("#f-text", "no such thing")
    assert watched.count()[0] == 0
    assert "No problem fits" in page.inner_text("#problem")
    page.click("#f-clear")
    page.select_option("#f-run", "1")
    assert watched.count()[0] == 9 + 6
    assert watched.complaints == []


def test_reading_side_by_side(report: Path, chromium: Any) -> None:
    watched = Watched(chromium, report.as_uri())
    page = watched.page
    page.select_option("#f-state", "rft")
    page.select_option("#f-kind", "train")
    left, right = page.locator(".pane select").all()
    assert left.input_value() != right.input_value()
    assert page.locator(".pane .response").count() == 2
    first = page.locator(".pane").nth(0)
    assert "1 of 4" in first.locator("button").inner_text()
    first.locator("button").click()
    assert "2 of 4" in page.locator(".pane").nth(0).locator("button").inner_text()
    page.locator(".history button").nth(3).click()
    assert page.locator(".pane select").nth(1).input_value() == "3"
    page.click("#f-clear")
    page.fill("#f-text", "<b>bold</b>")
    assert page.locator(".response mark").first.inner_text() == "<b>bold</b>"
    assert page.locator(".response b").count() == 0  # what a model wrote is text
    assert page.evaluate("document.querySelector('.prose math msup') !== null")  # and its formulas are drawn
    assert watched.complaints == []


def test_by_keyboard(report: Path, chromium: Any) -> None:
    page = Watched(chromium, report.as_uri()).page
    page.focus("#problems")
    first = page.inner_text("#problem h3")
    page.keyboard.press("ArrowDown")
    second = page.inner_text("#problem h3")
    assert first != second
    assert page.locator("#problems li[aria-selected=true] .name span").first.inner_text() == second
    page.keyboard.press("ArrowUp")
    assert page.inner_text("#problem h3") == first
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('#problem') !== null")
    page.locator(".pane button").first.focus()
    for number in (2, 3):
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.textContent") == f"{number} of 4 ›"
    page.get_by_role("region", name="Response on the left").focus()


def test_colours_and_events(report: Path, chromium: Any) -> None:
    page = Watched(chromium, report.as_uri()).page
    font = "document.querySelector('.plot').layout.font.color"
    light = page.evaluate(font)
    page.click("#theme")
    page.click("#theme")
    assert page.inner_text("#theme") == "Colours: dark"
    assert page.evaluate(font) != light
    rows = page.locator("tr[data-kind=phase]")
    assert rows.first.is_visible()
    page.click("#event-kinds button:has-text('phase')")
    assert not rows.first.is_visible()


def test_a_live_page_follows_the_run(runs: list[Path], chromium: Any) -> None:
    server = LiveServer(LiveReport(runs[:1]))
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        watched = Watched(chromium, server.url)
        page = watched.page
        page.wait_for_selector("#live:has-text('not running')")
        assert not page.locator("#f-run").is_visible()  # there is one run
        page.fill("#f-text", "train/4")
        with (runs[0] / "metrics.jsonl").open("a") as file:
            line = {"iteration": 1, "phase": "explore", "step": 5, "total": 5, "global_step": 9, "success_rate": 0.5}
            file.write(json.dumps(line) + "\n")
        wait_until("the new step", page, lambda: len(points(page, "Training success")[0]["x"]) == 9)
        assert points(page, "Training success")[0]["y"][-1] == 0.5
        assert page.input_value("#f-text") == "train/4"  # the reader's place is kept
        assert watched.count()[0] == 1
        assert watched.complaints == []
        assert all(url.startswith(server.url) for url in watched.asked)
    finally:
        server.close()
        thread.join(10)
