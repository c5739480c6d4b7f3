"""The slides: what of a chapter is on them, what is not, and that a deck works in a browser."""

import base64
import re
from html import unescape

import chapter_cache
import pytest
from nbformat.v4 import new_output
from test_browser import CHROMIUM, browser, need, open_page, serious  # noqa: F401  fixtures

from lib import ROOT
from lib.slides import Chapter, Slide, copy_mathjax, deck, parts_of_book
from lib.slides_text import SlidesError, collect_names, line_html, sentences, title_and_rest

PIXEL = base64.b64encode(b"no picture, but nobody looks").decode()
TABLE = """<div><table border="1" class="dataframe"><thead><tr style="text-align: right;">
<th>quantity</th><th>verdict</th><th>run</th></tr></thead><tbody>{}</tbody></table></div>"""
ROW = "<tr><th>share {}</th><td>not reproduced</td><td>toy_run/cpu</td></tr>"
PAGE = r"""---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
---
(ch-toy)=
# A toy

:::{admonition} Before you run this page
:class: tip
**Paper** {cite}`heng2023` · **Data** none · **You will be able to** count to $3$.
:::

An introduction.

## The claim

> It holds, by {eq}`sa-9` of {ref}`ch-toy` and {ref}`ch-far`.

```{code-cell} python3
---
mystnb:
  image: {alt: "Two dots & a line."}
  figure: {name: fig-dots, caption: "Figure 2 of the paper, re-made: dots at $x = 0$. A line."}
---
draw()
```

## Objective and code

Words that are not beside an equation.

```{literalinclude} x.py
```

**The loss** is

$$
x < 1 \qquad \text{[SA (9)]}
$$ (sa-9)

and then

$$
y = 2
$$ (toy-own)

## Results

```{code-cell} python3
comparison("toy_run")
```

## Deviations

| id | paper | authors' code | ours | measured effect |
|---|---|---|---|---|
| SA-one | $\lambda$ | none | $2\lambda$ | twice as slow |

## Exercises and summary

```{exercise} Predict first: how many?
:label: ex-many

Look at {numref}`fig-dots` and {term}`verdicts <verdict>`.
```

````{solution-start} ex-many
:class: dropdown
````

```{code-cell} python3
---
mystnb: {image: {alt: secret}, figure: {name: fig-secret, caption: secret}}
---
secret()
```

The secret is
$$
s = 1
$$ (toy-secret)

````{solution-end}
````

**Summary.** One thing. See Fig. 2 of it.
"""


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """The names of a book of one chapter that refers to another part."""
    far = tmp_path_factory.mktemp("far") / "far.md"
    far.write_text("(ch-far)=\n# Far away\n", "utf8")
    page = tmp_path_factory.mktemp("toy") / "toy.md"
    page.write_text(PAGE, "utf8")
    return collect_names(ROOT, [page, far])


def make_slides(root, names, text=PAGE) -> list[Slide]:
    """Read a page into slides; each code cell has the output that its code would make."""
    (root / "_config.yml").write_text("{}", "utf8")
    path = root / "chapters/part/toy.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf8")
    cells = chapter_cache.read_chapter(path, root).cells
    rows = "".join(ROW.format(number) for number in range(11))
    for cell in cells:
        if cell.cell_type == "code":
            is_table = "comparison" in cell.source
            data = {"text/html": TABLE.format(rows)} if is_table else {"image/png": PIXEL}
            cell.outputs = [new_output("display_data", data)]
    return list(Chapter(path, cells, names, root).slides())


@pytest.fixture(scope="module")
def slides(tmp_path_factory, names):
    return make_slides(tmp_path_factory.mktemp("slides"), names)


def test_a_chapter_gives_its_slides_in_order(slides):
    kinds = [slide.kind for slide in slides]
    assert kinds == "chapter claim figure equation table table deviations exercise summary".split()
    by_kind = {slide.kind: slide for slide in slides}
    assert by_kind["chapter"].title == "A toy" and by_kind["chapter"].label == "ch-toy"
    assert "You will be able to count" in by_kind["chapter"].body
    assert "Heng and Soh 2023" in by_kind["chapter"].body
    assert by_kind["claim"].title == "The claim" and "introduction" not in str(slides)
    assert by_kind["figure"].title == "Figure 2 of the paper, re-made"
    assert 'alt="Two dots &amp; a line."' in by_kind["figure"].body
    assert r'Dots at <span class="math">\(x = 0\)</span>. A line.' in by_kind["figure"].body
    assert by_kind["summary"].body.count("<li>") == 2
    assert "paper → ours" in by_kind["deviations"].title
    assert (
        "code: none. Effect: twice as slow" in by_kind["deviations"].body
        and "SA-one" in by_kind["deviations"].body
    )


def test_equations_come_with_the_sentence_before_them(slides):
    (body,) = (slide.body for slide in slides if slide.kind == "equation")
    assert "<strong>The loss</strong> is" in body and "not beside" not in body
    assert r"x &lt; 1 \qquad \text{[SA (9)]}\]" in body  # the paper's number is enough
    assert r"y = 2\tag{1}" in body


def test_long_tables_are_split_and_keep_their_verdicts(slides):
    tables = [slide for slide in slides if slide.kind == "table"]
    assert [slide.title for slide in tables] == [f"Results: toy run ({n} of 2)" for n in (1, 2)]
    shown = re.findall(r"share \d+", "".join(slide.body for slide in tables))
    assert shown == [f"share {number}" for number in range(11)]
    assert "toy_run/cpu" not in tables[0].body and "<th>run</th>" not in tables[0].body
    assert '<span class="not-reproduced">not reproduced</span>' in tables[0].body


def test_no_solution_is_on_a_slide(slides):
    assert "secret" not in str(slides) and "Think" not in str(slides)
    exercise = next(slide for slide in slides if slide.kind == "exercise")
    assert exercise.title == "Exercise: Predict first: how many?" and exercise.label == "ex-many"
    assert '<a href="#fig-dots">this figure</a>' in exercise.body
    assert "verdicts" in exercise.body and "&lt;verdict" not in exercise.body


def test_sliders_stay_live(tmp_path, names):
    cell = "\n```{code-cell} python3\n:tags: [hide-input]\nslider\n```\n"
    text = PAGE.replace("## Results\n", "## Results\n" + cell)
    path = tmp_path / "chapters/part/toy.md"
    made = '<book-explorer class="ex"><p class="ex-title">Move δ</p></book-explorer>'
    make_slides(tmp_path, names, text)
    cells = chapter_cache.read_chapter(path, tmp_path).cells
    for other in cells:
        if other.cell_type == "code":
            other.outputs = []
        if other.source == "slider":
            other.outputs = [new_output("display_data", {"text/html": made})]
    slides = list(Chapter(path, cells, names, tmp_path).slides())
    assert [slide.title for slide in slides if slide.kind == "sliders"] == ["Move δ"]
    page = deck("Part", slides)
    assert 'customElements.define("book-explorer"' in page and ".ex-slider" in page
    assert "book-selector" not in page  # what no slide shows is not in the file


def test_links_lead_to_slides_of_the_deck_or_nowhere(slides):
    page = deck("Part", slides)
    ids = re.findall(r' id="([^"]+)"', page)
    links = re.findall(r'href="#([^"]+)"', page)
    assert len(ids) == len(set(ids)) and set(links) <= set(ids)
    assert {"ch-toy", "sa-9", "fig-dots"} <= set(links)
    assert "Far away" in page  # another part's: its name, without a link
    assert not re.findall(r'(?:src|href)="(?!#|data:|mathjax/)', page)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{ref}`ch-far`", "{ref}`ch-gone`", "toy.md: A ref refers to 'ch-gone'"),
        ("{ref}`ch-far`", "{abbr}`MLE`", "toy.md: The role 'abbr' has no form"),
    ],
)
def test_what_has_no_form_is_refused(tmp_path, names, old, new, message):
    with pytest.raises(SlidesError, match=message):
        make_slides(tmp_path, names, PAGE.replace(old, new))


def test_prose_is_split_where_a_sentence_ends():
    assert sentences("See Fig. 2. It is 0.5 wide! $x$ falls.") == [
        "See Fig. 2.",
        "It is 0.5 wide!",
        "$x$ falls.",
    ]
    assert title_and_rest("The base flow. Left: points.") == ("The base flow", "Left: points.")
    assert title_and_rest("Left: dots. Right: a line.") == ("", "Left: dots. Right: a line.")
    assert title_and_rest("A figure of Fig. 2 and more.") == ("A figure of Fig. 2 and more", "")
    assert title_and_rest("Samples at $a: b$ of it: all.") == ("Samples at $a: b$ of it", "All.")


def test_every_part_of_the_book_has_a_deck_and_every_chapter_its_names():
    parts = parts_of_book()
    paths = [path for _, chapters in parts.values() for path in chapters]
    assert parts["0_background"][0] == "Background" and len(parts) > 3
    names = collect_names(ROOT, paths)
    for path in paths:  # every reference of every chapter is known
        for role in re.findall(r"\{(?:ref|numref|eq|cite|term|prf:ref)\}`[^`]+`", path.read_text()):
            assert unescape(line_html(role, names))


def test_a_deck_turns_by_keys_and_fits(open_page, slides, tmp_path):  # noqa: F811
    need(CHROMIUM, "no chromium on the path")
    copy_mathjax(tmp_path / "mathjax")
    path = tmp_path / "deck.html"
    path.write_text(deck("Part", slides), "utf8")
    page = open_page(path, viewport={"width": 1280, "height": 720}, color_scheme="dark")
    page.evaluate("MathJax.startup.promise")
    assert page.locator("mjx-container").count() > 5 and page.locator("mjx-merror").count() == 0
    too_large = """() => [...document.querySelectorAll("section")].filter((s) =>
      s.scrollHeight > s.clientHeight + 1 || s.scrollWidth > s.clientWidth + 1).length"""
    assert page.evaluate(too_large) == 0
    for key, top in (("ArrowRight", 720), (" ", 1440), ("ArrowLeft", 720), ("Home", 0)):
        page.keyboard.press(key)
        page.wait_for_function("y => Math.abs(scrollY - y) < 2", arg=top)
    assert serious(page) == []
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.complaints == []
