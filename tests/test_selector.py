"""Marks made by mouse, keyboard or in Jupyter come back as positives and negatives."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import test_browser
import torch
from PIL import Image

from lib import ROOT, selector
from lib.selector import FORMAT, SelectionError, Selector, read_selection

browser, open_page = test_browser.browser, test_browser.open_page  # fixtures
STATIC = ROOT / "book/_static"


def pixels(n=24, channels=3, size=16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, channels), dtype=np.uint8)


def decoded(source: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).convert("RGB"))


# The object and its file


@pytest.mark.parametrize("channels", [1, 3])
def test_the_page_holds_the_pictures_without_loss_in_their_order(channels):
    images = pixels(channels=channels)
    sources = re.findall(r'<img src="([^"]*)"', Selector(images, "glasses").html)
    assert len(sources) == 24
    for source, image in zip(sources, images, strict=True):
        assert (decoded(source) == image).all()


def test_marks_are_the_numbers_of_the_pictures():
    shown = Selector(pixels(5), "glasses", marked=[3, 1])
    assert shown.marks.positives.tolist() == [1, 3]
    assert shown.marks.negatives.tolist() == [0, 2, 4]
    positive, _negative = shown.marks.split(torch.arange(5.0))
    assert positive.tolist() == [1.0, 3.0]
    assert re.findall(r'aria-pressed="(\w+)"', shown.html) == ["false", "true"] * 2 + ["false"]
    assert "2 of 5 marked" in shown.html


def test_saved_marks_are_read_back(tmp_path):
    shown = Selector(pixels(), "Brille & Bügel", marked=[0, 23])
    shown.save(tmp_path / "marks.json")
    for marks in (
        read_selection(tmp_path / "marks.json"),
        read_selection(str(tmp_path / "marks.json"), shown),
    ):
        assert marks.positives.tolist() == [0, 23]
        assert marks.negatives.tolist() == list(range(1, 23))
    Selector(pixels(), "none").save(tmp_path / "none.json")
    assert read_selection(tmp_path / "none.json").positives.tolist() == []


def test_fingerprint_changes_with_a_pixel_the_order_and_the_feature():
    images = pixels()
    changed = images.copy()
    changed[3, 2, 1, 0] ^= 1
    found = {
        Selector(images, "glasses").fingerprint(),
        Selector(changed, "glasses").fingerprint(),
        Selector(images[::-1], "glasses").fingerprint(),
        Selector(images, "hat").fingerprint(),
    }
    assert len(found) == 4
    assert all(re.fullmatch("[a-p]{8}", one) for one in found)
    marked = Selector(images, "glasses", marked=[1])
    assert marked.fingerprint() == Selector(images, "glasses").fingerprint()
    assert repr(marked).endswith(f"1 marked\n  fingerprint {marked.fingerprint()}")


def test_text_is_escaped():
    label = '</p><b>"x"</b>'
    assert "<b>" not in Selector(pixels(2), label, title=label, caption=label).html


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(images=pixels().astype(float)), "are float64 of shape"),
        (dict(images=pixels()[0]), r"shape \(16, 16, 3\), wanted uint8 of shape"),
        (dict(images=pixels(0)), "wanted uint8 of shape"),
        (dict(images=pixels(channels=2)), "2 channels, wanted 1 or 3"),
        (dict(marked=[24]), "Picture 24 is to be marked, but they are numbered from 0 to 23"),
        (dict(marked=[-1]), "Picture -1 is to be marked"),
        (dict(images=pixels(100, size=96)), r"take \d\.\d\d MB, wanted at most 1\.5 MB"),
    ],
)
def test_bad_pictures_are_named_in_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        Selector(**dict(images=pixels(), feature="glasses") | arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"marked": [24]}, r"marks \[24\], wanted numbers from 0 to 23"),
        ({"marked": [1.5]}, "wanted numbers from"),
        ({"marked": [True]}, "wanted numbers from"),
        ({"marked": "1"}, "wanted numbers from"),
        ({"marked": [2, 2]}, "marks a picture twice"),
        ({"pictures": 0}, "tells of 0 pictures"),
        ({"pictures": "24"}, "tells of '24' pictures"),
        ({"format": "other"}, "holds no marks"),
        ({"extra": 1}, "holds no marks"),
        ({"fingerprint": "aaaaaaaa"}, "about other pictures or another feature"),
    ],
)
def test_a_file_of_other_marks_is_refused(tmp_path, change, message):
    shown = Selector(pixels(), "glasses", marked=[3])
    path = tmp_path / "marks.json"
    shown.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SelectionError, match=message) as error:
        read_selection(path, shown)
    assert "\n" not in str(error.value)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(SelectionError, match="cannot be read"):
        read_selection(tmp_path / "gone.json")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(SelectionError, match="is not JSON"):
        read_selection(tmp_path / "broken.json")
    with pytest.raises(SelectionError, match="holds no marks"):
        read_selection(tmp_path / "list.json")


# Live in Jupyter


def test_the_book_gets_html_and_text_and_only_jupyter_a_widget(monkeypatch):
    shown = Selector(pixels(), "glasses")
    assert set(shown._repr_mimebundle_()) == {"text/plain", "text/html"}
    monkeypatch.setattr(selector, "in_live_frontend", lambda: True)
    view = shown._repr_mimebundle_()["application/vnd.jupyter.widget-view+json"]
    assert set(view) >= {"model_id"}


def live_pictures(grid) -> list[np.ndarray]:
    """Return the pictures that the style sheet puts onto the buttons, in their order."""
    rules = re.findall(
        rf"\.{grid.scope} \.jupyter-button\.sel-(\d+){{background-image:url\(([^)]*)\)",
        grid.sheet.value,
    )
    assert [int(place) for place, _ in rules] == list(range(len(rules)))
    return [decoded(source) for _, source in rules]


def test_live_buttons_mark_their_picture_on_every_page():
    images = pixels()
    shown = Selector(images, "glasses", marked=[2, 22], per_page=10)
    grid = selector.LiveGrid(shown)
    assert [button.value for button in grid.buttons] == [i == 2 for i in range(10)]
    assert "2 of 24 marked, page 1 of 3" in grid.count.value
    grid.buttons[2].value, grid.buttons[5].value = False, True
    assert shown.marked == {5, 22}
    grid.on.click()
    assert (np.stack(live_pictures(grid)) == images[10:20]).all()
    assert grid.buttons[0].description == "picture 10"
    grid.buttons[0].value = True
    assert grid.buttons[0].description == "picture 10, marked"
    grid.on.click()
    assert (np.stack(live_pictures(grid)) == images[20:]).all()
    assert [b.layout.display for b in grid.buttons] == [None] * 4 + ["none"] * 6
    assert [b.value for b in grid.buttons[:4]] == [False, False, True, False]
    assert grid.on.disabled and not grid.back.disabled
    grid.back.click()
    grid.back.click()
    assert shown.marks.positives.tolist() == [5, 10, 22]
    assert [button.value for button in grid.buttons] == [i == 5 for i in range(10)]
    grid.clear.click()
    assert shown.marked == set() and not any(button.value for button in grid.buttons)


def test_a_live_button_shows_its_picture_and_its_mark(open_page, tmp_path):
    """In markup like that of JupyterLab, whose style for buttons must lose against ours."""
    grid = selector.LiveGrid(Selector(pixels(3), "glasses"))
    button = (
        '<button class="jupyter-button widget-toggle-button sel-live-picture sel-{}">p</button>'
    )
    buttons = button.format(0) + button.format(1).replace('class="', 'class="mod-active ')
    path = tmp_path / "live.html"
    path.write_text(
        "<!doctype html><style>.jupyter-button { width: 148px; height: 28px; overflow: hidden }"
        ".widget-box { overflow: auto }</style>"
        f'<link rel="icon" href="data:,">{grid.sheet.value}<div class="ex sel {grid.scope}">'
        f'<div class="widget-box sel-grid">{buttons}</div></div>'
    )
    page = open_page(path)
    found = page.locator("button").evaluate_all(
        "all => all.map((b) => [getComputedStyle(b), getComputedStyle(b, '::after')])"
        ".map(([own, after]) => [own.backgroundImage, own.width === own.height, after.content])"
    )
    for (image, square, _tick), wanted in zip(found, pixels(3), strict=False):
        assert square and (decoded(image[5:-2]) == wanted).all()
    assert "✓" in found[1][2] and "✓" not in found[0][2]
    assert page.locator(".sel-grid").evaluate("g => getComputedStyle(g).overflow") == "visible"
    assert page.complaints == []


def test_two_live_selectors_do_not_share_a_style():
    one, other = (selector.LiveGrid(Selector(pixels(), "glasses")) for _ in range(2))
    assert one.scope != other.scope and one.scope not in other.sheet.value


# In the page


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    shown = Selector(pixels(), "glasses, or a hat", marked=[2], title="Faces", caption="Noise.")
    path = tmp_path_factory.mktemp("selector") / "page.html"
    sheets = "".join(
        f'<link rel="stylesheet" href="{(STATIC / name).as_uri()}">'
        for name in ("explorer.css", "selector.css")
    )
    path.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>t</title>'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f'{sheets}<script defer src="{(STATIC / "selector.js").as_uri()}"></script>'
        f'<style>html[data-theme="dark"] {{ background: #14181e }}</style>'
        f"<article>{shown.html}</article>"
    )
    return path


def marked(page) -> list[int]:
    pressed = page.locator(".sel-picture").evaluate_all(
        "pictures => pictures.map((p) => p.getAttribute('aria-pressed'))"
    )
    assert set(pressed) <= {"true", "false"}
    numbers = [number for number, value in enumerate(pressed) if value == "true"]
    assert page.locator(".sel-count").inner_text() == f"{len(numbers)} of 24 marked"
    assert json.loads(page.locator("pre").text_content())["marked"] == numbers
    return numbers


def focused(page) -> str | None:
    return page.evaluate("document.activeElement.getAttribute('aria-label')")


def test_clicks_mark_and_unmark(open_page, page_file):
    page = open_page(page_file)
    assert marked(page) == [2]
    for number in (0, 23, 2):
        page.locator(".sel-picture").nth(number).click()
    assert marked(page) == [0, 23]
    page.get_by_role("button", name="Clear").click()
    assert marked(page) == []
    assert page.complaints == []


def test_everything_can_be_done_by_keyboard(open_page, page_file):
    page = open_page(page_file)
    tops = page.locator(".sel-picture").evaluate_all("all => all.map((p) => p.offsetTop)")
    columns = tops.count(tops[0])
    assert 3 < columns < 24
    page.keyboard.press("Tab")
    assert focused(page) == "picture 0"
    for key, number in (
        ("ArrowRight", 1),
        ("ArrowDown", 1 + columns),
        ("ArrowLeft", columns),
        ("ArrowUp", 0),
        ("ArrowUp", 0),
        ("End", 23),
        ("ArrowRight", 23),
        ("Home", 0),
        ("ArrowRight", 1),
    ):
        page.keyboard.press(key)
        assert focused(page) == f"picture {number}", key
    outline = page.evaluate("getComputedStyle(document.activeElement).outline")
    assert "solid 3px" in outline and "0px" not in outline
    page.keyboard.press("Space")
    assert marked(page) == [1, 2]
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert marked(page) == [1]
    assert page.evaluate("scrollY") == 0
    page.keyboard.press("Tab")  # one stop for all pictures
    assert page.evaluate("document.activeElement.className") == "sel-save"
    page.keyboard.press("Shift+Tab")
    assert focused(page) == "picture 2"
    assert page.complaints == []


def test_saved_json_is_read_by_python(open_page, page_file, tmp_path):
    page = open_page(page_file)
    page.locator(".sel-picture").nth(7).click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as JSON").click()
    assert download.value.suggested_filename == "marked-glasses-or-a-hat.json"
    path = tmp_path / "marks.json"
    download.value.save_as(path)
    shown = Selector(pixels(), "glasses, or a hat")
    assert read_selection(path, shown).positives.tolist() == [2, 7]
    assert json.loads(path.read_text())["format"] == FORMAT
    Selector(pixels(), "glasses, or a hat", marked=[2, 7]).save(tmp_path / "ours.json")
    assert json.loads((tmp_path / "ours.json").read_text()) == json.loads(path.read_text())
    with pytest.raises(SelectionError, match="other pictures"):
        read_selection(path, Selector(pixels(), "glasses"))
    assert page.complaints == []


def test_the_json_can_be_copied_also_where_the_browser_refuses(open_page, page_file):
    page = open_page(page_file)
    page.evaluate("() => (navigator.clipboard.writeText = async (text) => (window.copied = text))")
    page.get_by_role("button", name="Copy").click()
    page.get_by_text("Copied.").wait_for()
    assert json.loads(page.evaluate("window.copied"))["marked"] == [2]
    page.evaluate("() => (navigator.clipboard.writeText = () => Promise.reject(new Error()))")
    page.get_by_role("button", name="Copy").click()
    page.get_by_text("Press Ctrl+C").wait_for()
    assert json.loads(page.evaluate("getSelection().toString()"))["marked"] == [2]
    assert page.locator("pre").is_visible()
    assert page.complaints == []


def test_it_is_legible_in_light_and_dark_and_fits_a_phone(open_page, page_file):
    page = open_page(page_file)
    page.locator("summary").click()
    marks = set()
    for theme in ("light", "dark"):
        page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
        assert page.evaluate(test_browser.CONTRASTS) == []
        marks.add(
            page.locator(".sel-picture").nth(2).evaluate("p => getComputedStyle(p).boxShadow")
        )
    assert len(marks) == 2
    tick = (
        page.locator(".sel-picture").nth(2).evaluate("p => getComputedStyle(p, '::after').content")
    )
    assert "✓" in tick  # a mark is more than a colour
    page.set_viewport_size({"width": 375, "height": 740})
    assert page.evaluate(test_browser.TOO_WIDE) == []
    box = page.locator(".sel-picture").nth(0).bounding_box()
    assert min(box["width"], box["height"]) >= 44  # room for a finger


def test_without_javascript_the_pictures_are_there(open_page, page_file):
    page = open_page(page_file, java_script_enabled=False)
    assert page.locator("img").count() == 24
    assert page.get_by_text("Marking needs JavaScript.").is_visible()
    assert not page.locator(".sel-actions").is_visible()


def test_the_script_is_small_and_works_from_a_file():
    script = (STATIC / "selector.js").read_text()
    assert len(script) < 10_000
    assert not re.search(r"\bfetch\s*\(|^\s*(import|export)\b", script, re.MULTILINE)
