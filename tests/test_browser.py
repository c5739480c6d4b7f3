"""What a reader sees, in headless Chromium over file:// with the network cut off.

The first half drives an Explorer on a page of its own, the second half opens every page of the
built book. Both are skipped by name without Chromium or a built book, but fail in CI.
"""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps

from lib import ROOT
from lib.explorer import Explorer

CHROMIUM = shutil.which("chromium")
BOOK = ROOT / "_build/html"
PAGES = [str(p.relative_to(BOOK)) for p in sorted(BOOK.glob("[!_]*/**/*.html"))]
PAGES += ["search.html"] if PAGES else []
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
    "--disable-background-networking --disable-component-update --disable-sync"
).split()
RNG = np.random.default_rng(0)
FIELD = RNG.random((8, 6, 64, 64))
SAMPLES = RNG.integers(0, 256, (8, 1, 20, 30, 3), dtype=np.uint8)
LINES = RNG.random((1, 6, 100))
LINES[0, 2, 40:50] = np.nan  # a gap
MARKERS = RNG.random((8, 6))
DOTS = RNG.random((8, 1, 4))
SHARES = RNG.random((8, 6))


def need(condition, what: str) -> None:
    """Skip by name where something is missing, but never in CI."""
    if condition:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what}, and CI=true asks for it.")
    pytest.skip(what)


@pytest.fixture(scope="module")
def browser():
    need(CHROMIUM, "no chromium on the path")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def open_page(browser):
    """Return a function that opens a page offline; complaints are collected in page.complaints."""
    contexts = []

    def block(route, page):
        page.complaints.append(f"external request: {route.request.url}")
        route.abort()

    def open_one(path: Path, query: str = "", **options):
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
        contexts.append(context)
        context.set_offline(True)
        page = context.new_page()
        page.complaints, page.files = [], set()
        page.route(re.compile(r"^(?!file:|data:|blob:)"), lambda route: block(route, page))
        page.on("request", lambda request: page.files.add(request.url.split("?")[0]))
        page.on("pageerror", lambda error: page.complaints.append(f"error: {error}"))
        page.on(
            "console",
            lambda said: (
                said.type in ("error", "warning")
                and page.complaints.append(f"console {said.type}: {said.text}")
            ),
        )
        page.goto(path.as_uri() + query)
        return page

    yield open_one
    for context in contexts:
        context.close()


def test_what_is_missing_fails_in_ci_and_is_skipped_elsewhere(monkeypatch):
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no such thing, and CI=true"):
        need(None, "no such thing")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="no such thing"):
        need(None, "no such thing")


# An Explorer on its own page


@pytest.fixture(scope="module")
def explorer_page(tmp_path_factory) -> Path:
    shown = Explorer(
        {"δ (delta)": range(1, 9), "α (alpha)": np.linspace(0, 1, 6)},
        density={"X": dict(array=FIELD, extent=(-1, 1, -1, 1), vmin=0, vmax=1)},
        images={"samples": SAMPLES},
        curves={
            "lines": dict(x=np.linspace(0, 1, 100), lines={"nll": LINES}, dots={"points": DOTS}),
            "bars": dict(x=np.arange(100), lines={"nll": LINES}, step=True, fill=True),
            "marked": dict(x=[0, 1], lines={"one": [0, 1]}, markers={"mean": MARKERS}),
        },
        values={"share": dict(array=SHARES, format=".4f")},
        start={"δ (delta)": 3, "α (alpha)": 0.4},
        title="Test",
    )
    folder = ROOT / "book/_static"
    path = tmp_path_factory.mktemp("explorer") / "page.html"
    path.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>t</title>'
        '<link rel="icon" href="data:,">'
        f'<link rel="stylesheet" href="{(folder / "explorer.css").as_uri()}">'
        f'<script defer src="{(folder / "explorer.js").as_uri()}"></script>{shown.html}'
    )
    return path


READ = """() => ({
  canvases: [...document.querySelectorAll("canvas")].map(c => {
    const copy = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    [copy.canvas.width, copy.canvas.height] = [c.width, c.height];
    copy.drawImage(c, 0, 0);
    return { width: c.width, pixels: [...copy.getImageData(0, 0, c.width, c.height).data] };
  }),
  paths: [...document.querySelectorAll(".ex-plot .ex-series")].map(p => p.getAttribute("d")),
  values: [...document.querySelectorAll("dd")].map(v => v.textContent),
  outputs: [...document.querySelectorAll("output")].map(v => v.textContent),
  spoken: [...document.querySelectorAll("input")].map(i => i.getAttribute("aria-valuetext")),
})"""


def read(page) -> dict:
    page.wait_for_function("document.querySelectorAll('canvas').length === 2")
    state = page.evaluate(READ)
    for canvas in state["canvases"]:
        rgba = np.array(canvas["pixels"], dtype=np.uint8).reshape(-1, canvas["width"], 4)
        assert (rgba[..., 3] == 255).all()
        canvas["pixels"] = rgba[..., :3]
    return state


def assert_shows(state: dict, delta: int, alpha: int) -> None:
    """Check that every panel shows the arrays at a position."""
    viridis = colormaps["viridis"](np.arange(256), bytes=True)[:, :3]
    levels = np.round(255 * FIELD[delta, alpha]).astype(int)[::-1]
    assert (state["canvases"][0]["pixels"] == viridis[levels]).all()
    assert (state["canvases"][1]["pixels"] == SAMPLES[delta, 0]).all()
    assert state["values"] == [f"{SHARES[delta, alpha]:.4f}"]
    assert state["outputs"] == [str(delta + 1), f"{alpha / 5:g}"]
    assert state["spoken"] == [f"δ (delta) = {delta + 1}", f"α (alpha) = {alpha / 5:g}"]


def test_the_script_draws_what_python_drew(open_page, explorer_page):
    """The first view, drawn by Python, stays as it is when the script takes over."""
    page = open_page(explorer_page)
    drawn = re.findall(r'<path class="ex-series[^>]* d="([^"]*)"', explorer_page.read_text())
    state = read(page)
    assert_shows(state, 2, 2)
    assert state["paths"] == drawn
    assert page.complaints == []


def test_keys_move_the_panels_of_their_axis_and_no_other(open_page, explorer_page):
    page = open_page(explorer_page)
    before = read(page)
    page.locator("input").nth(0).focus()
    page.keyboard.press("ArrowRight")
    after = read(page)
    assert_shows(after, 3, 2)
    nll, dots, bars, one, mean = range(5)
    changed = [a != b for a, b in zip(before["paths"], after["paths"], strict=True)]
    assert [changed[i] for i in (nll, dots, bars, one, mean)] == [False, True, False, False, True]
    page.keyboard.press("Tab")
    page.keyboard.press("End")
    last = read(page)
    assert_shows(last, 3, 5)
    changed = [a != b for a, b in zip(after["paths"], last["paths"], strict=True)]
    assert [changed[i] for i in (nll, dots, bars, one, mean)] == [True, False, True, False, True]
    said = f"share: {SHARES[3, 5]:.4f}"  # once the slider rests
    page.wait_for_function(
        "s => document.querySelector('[role=status]').textContent === s", arg=said
    )


def test_the_mouse_reaches_every_position(open_page, explorer_page):
    page = open_page(explorer_page)
    thumb = 18
    boxes = [page.locator("input").nth(axis).bounding_box() for axis in (0, 1)]
    for delta, alpha in [(0, 0), (7, 5), (4, 1), (1, 4)]:
        for box, at, n in zip(boxes, (delta, alpha), (8, 6), strict=True):
            x = box["x"] + thumb / 2 + (box["width"] - thumb) * at / (n - 1)
            page.mouse.click(x, box["y"] + box["height"] / 2)
        assert_shows(read(page), delta, alpha)
    assert page.complaints == []


def test_a_key_is_answered_within_50_ms(open_page, explorer_page):
    page = open_page(explorer_page)
    read(page)
    page.evaluate("""() => {
      window.delays = [];
      addEventListener("keydown", (event) => requestAnimationFrame(() => setTimeout(() =>
        window.delays.push(performance.now() - event.timeStamp))), true);
    }""")
    page.locator("input").nth(0).focus()
    for key in 6 * ["ArrowRight", "ArrowLeft"]:
        page.keyboard.press(key)
        page.wait_for_timeout(30)
    delays = page.evaluate("window.delays")
    assert len(delays) == 12
    # The median: other work on the machine may hold up a single frame.
    assert np.median(delays) < 50, delays


def test_without_javascript_the_first_view_is_there(open_page, explorer_page):
    page = open_page(explorer_page, java_script_enabled=False)
    assert page.locator("img").count() == 2
    assert page.get_by_text("Shown: δ (delta) = 3, α (alpha) = 0.4.").is_visible()
    assert page.get_by_text(f"{SHARES[2, 2]:.4f}").is_visible()
    assert not page.locator("input").first.is_visible()


# The built book

CONTRASTS = """() => {
  const parse = (c) => {
    const n = c.match(/[\\d.]+/g).map(Number);
    return c.startsWith("color(srgb") ? [255 * n[0], 255 * n[1], 255 * n[2], n[3] ?? 1]
                                      : [n[0], n[1], n[2], n[3] ?? 1];
  };
  const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] + below[i] * (1 - top[3]));
  const ground = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) {
      layers.push(parse(getComputedStyle(e).backgroundColor));
      if (layers.at(-1)[3] === 1) break;
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const light = (c) => c.map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const faint = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim());
    const shown = element.checkVisibility({opacityProperty: true, visibilityProperty: true});
    if (!text.join("") || !shown) continue;
    const style = getComputedStyle(element), size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);  // 18 and 14 pt
    const below = ground(element);
    const ink = over(parse(element.closest("svg") ? style.fill : style.color), below);
    const [a, b] = [light(ink), light(below)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < (large ? 3 : 4.5)) faint.push(`${ratio.toFixed(2)} ${text.join(" ").slice(0, 40)}`);
  }
  return faint;
}"""

TOO_WIDE = """() => document.documentElement.scrollWidth <= innerWidth ? [] :
  [...document.querySelectorAll("body *")]
    .filter((e) => e.getBoundingClientRect().right > innerWidth + 1)
    .map((e) => `${e.tagName} ${e.className}`).slice(0, 8)"""

LOOK = """(explorer) => JSON.stringify([
  [...explorer.querySelectorAll("canvas")].map((c) => {
    const copy = document.createElement("canvas").getContext("2d");
    [copy.canvas.width, copy.canvas.height] = [c.width, c.height];
    copy.drawImage(c, 0, 0);
    return copy.canvas.toDataURL();
  }),
  [...explorer.querySelectorAll(".ex-plot path")].map((path) => path.getAttribute("d")),
  [...explorer.querySelectorAll("dd")].map((value) => value.textContent),
])"""


def assert_sliders_move(page) -> None:
    """Check that two steps of each slider of the page change what its explorer shows."""
    for explorer in page.locator("book-explorer").all():
        for slider in explorer.locator("input").all():
            before = explorer.evaluate(LOOK)
            slider.press("ArrowRight")
            slider.press("ArrowRight")
            changed = f"([explorer, before]) => ({LOOK})(explorer) !== before"
            page.wait_for_function(changed, arg=[explorer.element_handle(), before])


def serious(page) -> list[str]:
    """Return what axe-core calls a serious or critical fault of accessibility."""
    from axe_playwright_python.sync_playwright import Axe

    # Without preload it does not fetch the style sheets again, which a page from a disk may not.
    # Its rule for contrast takes four fifths of its time; CONTRASTS sees all text in a fortieth.
    options = {"resultTypes": ["violations"], "preload": False}
    options["rules"] = {"color-contrast": {"enabled": False}}
    found = Axe().run(page, options=options).response["violations"]
    return [
        f"{fault['id']}: {node['html'][:80]}"
        for fault in found
        if fault["impact"] in ("serious", "critical")
        for node in fault["nodes"]
    ]


def test_a_serious_fault_is_found(open_page, tmp_path):
    path = tmp_path / "page.html"
    path.write_text('<!doctype html><html lang="en"><title>t</title><main><img src="data:,">')
    assert [fault.split(":")[0] for fault in serious(open_page(path))] == ["image-alt"]


def test_faint_text_is_found(open_page, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(
        '<!doctype html><html lang="en"><title>t</title><body style="background: white">'
        '<p style="color: #888">faint</p><p style="color: #888; font-size: 24px">large</p>'
        '<p style="color: #666">fine <i style="color: #fff8">inner</i></p>'
        '<p style="color: #888" hidden>hidden</p>'
    )
    assert open_page(path).evaluate(CONTRASTS) == ["3.54 faint", "1.00 inner"]


@pytest.mark.parametrize("name", PAGES or [None])
def test_page_of_the_book(open_page, name):
    """Each page: no complaint or request, small, fits a phone, legible, accessible, and moves."""
    need(name, "no built book in _build/html; run `make book` first")
    page = open_page(BOOK / name, color_scheme="light")
    page.wait_for_load_state("load")
    page.evaluate("window.MathJax?.startup?.promise")
    page.wait_for_function("!document.querySelector('book-explorer img')")
    assert page.locator("mjx-merror, .problematic").count() == 0
    assert page.evaluate(CONTRASTS) == []

    assert serious(page) == []

    page.emulate_media(color_scheme="dark")
    page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
    page.wait_for_function("document.getAnimations().length === 0")  # colours fade over
    assert page.evaluate(CONTRASTS) == []

    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate(TOO_WIDE) == []

    assert_sliders_move(page)
    assert page.complaints == []
    own = [Path(url.removeprefix("file://")) for url in page.files if "/_static/" not in url]
    assert sum(path.stat().st_size for path in own if path.is_file()) < 2_000_000


def test_the_index_leads_into_the_book(open_page):
    need(PAGES, "no built book in _build/html; run `make book` first")
    page = open_page(BOOK / "index.html")
    page.wait_for_url("**/book/*.html")
    assert page.locator("article h1").is_visible()


@pytest.mark.parametrize(
    "words", ["Jacobian", "likelihood quantile", "elastic weight consolidation"]
)
def test_search_finds(open_page, words):
    need(PAGES, "no built book in _build/html; run `make book` first")
    page = open_page(BOOK / "search.html", "?q=" + words.replace(" ", "+"))
    page.wait_for_selector("#search-results li a")
    hit = page.locator("#search-results li a").first
    hit.click()
    page.wait_for_load_state("load")
    text = page.locator("article").inner_text().lower()
    assert all(word.lower() in text for word in words.split())
    assert page.complaints == []
