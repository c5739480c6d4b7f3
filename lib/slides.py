"""Make slides of each part of the book from its executed chapters.

``python -m lib.slides`` (``make slides``) writes ``_build/slides/<part>.html``, one deck a part,
which opens from a disk without a network; ``_build/slides/mathjax`` sets its formulas. A chapter
gives a slide with what it teaches, its claim, its labelled equations, its figures and sliders, its
tables of results, its deviations, its exercises without their solutions, and its summary.
Chapters are executed through the book's cache, so that what the book has run is not run again.
"""

import base64
import importlib.util
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path

import yaml
from markdown_it.token import Token

from lib import ROOT
from lib.checkpoints import write_atomically
from lib.slides_text import (
    Names,
    SlidesError,
    block_html,
    blocks,
    collect_names,
    line_html,
    sentences,
    text_html,
    title_and_rest,
)

sys.path.append(str(ROOT / "book/_ext"))  # where the book executes and reads its chapters

import bookassets
import chapter_cache
import page_deviations
import page_text

FOLDER = ROOT / "_build/slides"
SOURCES = ROOT / "book/slides"
ROWS, DEVIATIONS = 9, 4  # of a table, and of the deviations, on one slide
TWO_FIT = 900  # characters of two equations with their text that share a slide
IMAGES = {"image/png": "image/png", "image/svg+xml": "image/svg+xml"}
ELEMENTS = {"<book-explorer": "explorer", "<book-selector": "selector"}
VERDICT = re.compile(r"<td>(reproduced|same ordering|not reproduced|not attempted)</td>")


@dataclass(frozen=True)
class Slide:
    """One slide: HTML of its title and body, what it is of, and the label that links lead to."""

    kind: str
    title: str
    body: str
    section: str = ""
    label: str = ""


class Chapter:
    """An executed chapter, read from its first cell to its last into slides."""

    def __init__(self, path: Path, cells: list, names: Names, root: Path = ROOT):
        self.page, self.cells, self.names = page_text.Chapter(path, root), cells, names
        self.title, self.section, self.subsection, self.solution = "", "", "", ""
        self.lead: list[Token] = []  # the paragraph before an equation
        self.opening: list[list[Token]] | None = None  # the claim, while it is being read
        self.waiting: list[str] = []  # equations that may share a slide

    def slides(self) -> Iterator[Slide]:
        """Yield the slides in the order of the page.

        Raises: SlidesError if something of the page has no form on a slide.
        """
        try:
            for cell in self.cells:
                if cell.cell_type == "code":
                    yield from self.outputs(cell)
                    continue
                for block in blocks(cell.source):
                    yield from self.block(block)
            yield from self.flush()
        except SlidesError as error:
            raise SlidesError(f"{self.page.name}: {error}") from None

    def block(self, block: list[Token]) -> Iterator[Slide]:
        first = block[0]
        found = re.match(r"\{([\w:-]+)\}\s*(.*)", first.info)
        directive, argument = found.groups() if found else ("", "")
        lead, self.lead = self.lead, []
        if directive in ("solution-start", "solution-end") or self.solution:
            if directive:
                self.solution = argument if directive == "solution-start" else ""
        elif first.type == "heading_open":
            yield from self.flush()
            yield from self.heading(first.tag, block[1].content)
        elif argument == "Before you run this page":
            yield self.first(first.content)
        elif directive == "exercise":
            yield self.exercise(argument, first.content)
        elif first.type == "math_block_label":
            self.waiting.append("".join(block_html(part, self.names) for part in (lead, block)))
        elif first.type == "paragraph_open" and block[1].content.startswith("**Summary.**"):
            yield self.summary(block[1].content.removeprefix("**Summary.**"))
        elif first.type in ("paragraph_open", "blockquote_open"):
            self.lead = block
            if self.opening is not None:
                self.opening.append(block)

    def heading(self, tag: str, text: str) -> Iterator[Slide]:
        title = line_html(text, self.names)
        if tag == "h1":
            self.title = title
        elif tag == "h2":
            self.section, self.subsection = title, ""
            self.opening = [] if text == "The claim" else None
            if text == "Deviations":
                yield from self.deviations()
        else:
            self.subsection = title

    def first(self, box: str) -> Slide:
        """Make the title slide from the chapter's first box."""
        parts = re.split(r"\s·\s", " ".join(box.split("\n")[1:]))
        goal = next((part for part in parts if part.startswith("**You will")), "")
        facts = (line_html(part, self.names) for part in parts if part != goal)
        body = f'<p class="goal">{line_html(goal.replace("**", ""), self.names)}</p>'
        body += f'<ul class="facts">{_items(facts)}</ul>'
        self.opening = []
        return Slide("chapter", self.title, body, "", self.page.label)

    def flush(self) -> Iterator[Slide]:
        """Show the claim, or a chapter's introduction, and the equations, two where they fit."""
        if self.opening and (self.section or "## The claim" not in self.page.text):
            body = "".join(block_html(block, self.names) for block in self.opening)
            yield Slide("claim", self.section or "What for", body, self.title)
        self.opening = None
        while self.waiting:
            body = self.waiting.pop(0)
            if self.waiting and len(body + self.waiting[0]) < TWO_FIT:
                body += self.waiting.pop(0)
            yield Slide("equation", self.subsection or self.section, body, self.title)

    def outputs(self, cell) -> Iterator[Slide]:
        """Show the figure, the sliders or the table of a code cell."""
        if self.solution:
            return
        yield from self.flush()
        figures = cell.metadata.get("mystnb", {})
        for output in cell.outputs:
            data = output.get("data", {})
            html = data.get("text/html", "")
            kind = next((kind for kind in IMAGES if kind in data), None)
            if any(element in html for element in ELEMENTS):
                yield self.live(html)
            elif kind and "figure" in figures:
                yield self.figure(kind, data[kind], figures)
            elif "<table" in html and "hide-output" not in cell.metadata.get("tags", []):
                yield from self.table(html)

    def figure(self, kind: str, data: str, about: dict) -> Slide:
        title, rest = title_and_rest(about["figure"].get("caption", ""))
        title = line_html(title, self.names) or self.subsection or self.section
        alt = escape(about.get("image", {}).get("alt", ""))
        if kind == "image/svg+xml":
            data = base64.b64encode(data.encode()).decode()
        source = f"data:{IMAGES[kind]};base64,{data.replace(chr(10), '')}"
        body = f'<figure><img src="{source}" alt="{alt}">'
        body += f"<figcaption>{line_html(rest, self.names)}</figcaption>" if rest else ""
        label = about["figure"].get("name", "")
        return Slide("figure", title, body + "</figure>", self.where(), label)

    def live(self, html: str) -> Slide:
        title = re.search(r'<p class="ex-title">(.*?)</p>', html)  # the style sheet hides it there
        return Slide("sliders", title[1] if title else self.section, html, self.where())

    def table(self, html: str) -> Iterator[Slide]:
        """Show a table of pandas, some rows a slide; the column that names the run is left out."""
        head = re.search(r"<thead>(.*?)</thead>", html, re.S)[1]
        rows = re.findall(r"<tr.*?</tr>", html.split("</thead>")[1], re.S)
        run = ""
        if re.search(r"<th>run</th>\s*</tr>\s*$", head):
            run = re.search(r"<td>([^<]*)</td>\s*</tr>", rows[0])[1].split("/")[0]
            head = re.sub(r"<th>run</th>(\s*</tr>\s*)$", r"\1", head)
            rows = [re.sub(r"<td>[^<]*</td>(\s*</tr>)$", r"\1", row) for row in rows]
        head = re.sub(r' style="[^"]*"| halign="[^"]*"| valign="[^"]*"', "", head)
        head = head.replace("<th></th>", "<td></td>")
        rows = [VERDICT.sub(_badge, row) for row in rows]
        title = f"Results: {run.replace('_', ' ')}" if run else self.subsection or self.section
        for number, part in _parts(rows, ROWS):
            body = f'<div class="wide" tabindex="0" role="group" aria-label="{escape(title)}">'
            body += f"<table><thead>{head}</thead><tbody>{''.join(part)}</tbody></table></div>"
            yield Slide("table", f"{title}{number}", body, self.where())

    def deviations(self) -> Iterator[Slide]:
        """Show the deviations, a line each."""
        lines = []
        for each in page_deviations.chapter_deviations(self.page):
            paper, code, ours, effect = (
                line_html(text.replace(r"\|", "|"), self.names)
                for text in (each.paper, each.code, each.ours, each.effect)
            )
            lines.append(
                f"<b>{escape(each.id)}</b> {paper} → {ours}"
                f"<br><small>Authors' code: {code}. Effect: {effect}</small>"
            )
        for number, part in _parts(lines, DEVIATIONS):
            body = f"<ul>{_items(part)}</ul>"
            yield Slide("deviations", f"Where we deviate: paper → ours{number}", body, self.title)

    def exercise(self, title: str, content: str) -> Slide:
        label, _, text = content.partition("\n")
        label = label.removeprefix(":label:").strip()
        title = "Exercise: " + line_html(title, self.names)
        return Slide("exercise", title, text_html(text, self.names), self.title, label)

    def summary(self, text: str) -> Slide:
        lines = (line_html(sentence, self.names) for sentence in sentences(text))
        return Slide("summary", "Summary", f"<ul>{_items(lines)}</ul>", self.title)

    def where(self) -> str:
        return " · ".join(filter(None, (self.title, self.subsection or self.section)))


def _text(block: list[Token]) -> str:
    return "".join(token.content for token in block)


def _items(lines: Iterable[str]) -> str:
    return "".join(f"<li>{line}</li>" for line in lines)


def _parts(lines: list[str], size: int) -> Iterator[tuple[str, list[str]]]:
    """Split lines into parts of nearly equal length, each with its number where there are more."""
    n = -(-len(lines) // size)
    for part in range(n):
        start, end = (len(lines) * k // n for k in (part, part + 1))
        yield f" ({part + 1} of {n})" if n > 1 else "", lines[start:end]


def _badge(found: re.Match) -> str:
    return f'<td><span class="{found[1].replace(" ", "-")}">{found[1]}</span></td>'


def deck(title: str, slides: list[Slide]) -> str:
    """Write the HTML of a deck, with its style and scripts inside."""
    first = [(slide.label, slide.title) for slide in slides if slide.kind == "chapter"]
    contents = _items(f'<a href="#{escape(label)}">{name}</a>' for label, name in first)
    body = f"<ol>{contents}</ol><p class='keys'>Arrow keys, space or scrolling turn the slides.</p>"
    parts = []
    for number, slide in enumerate([Slide("part", title, body), *slides], start=1):
        level = {"part": "h1", "chapter": "h2"}.get(slide.kind, "h3")
        label = f' id="{escape(slide.label)}"' if slide.label else ""
        parts.append(
            f'<section class="{slide.kind}"{label} aria-labelledby="slide-{number}"><div>'
            f'<p class="where">{slide.section}</p><{level} id="slide-{number}">{slide.title}'
            f"</{level}>{slide.body}</div>"
            f'<p class="number">{number} / {len(slides) + 1}</p></section>'
        )
    page = within("\n".join(parts))
    names = [name for element, name in ELEMENTS.items() if element in page]
    static = ROOT / "book/_static"
    looks = dict.fromkeys(["explorer", *names]) if names else ()  # the selector's builds on it
    styles = [static / f"{name}.css" for name in looks] + [SOURCES / "slides.css"]
    scripts = [static / f"{name}.js" for name in names] + [SOURCES / "slides.js"]
    return (
        (SOURCES / "deck.html")
        .read_text("utf8")
        .replace("{{title}}", escape(title))
        .replace("{{style}}", "\n".join(path.read_text("utf8") for path in styles))
        .replace("{{script}}", "\n".join(path.read_text("utf8") for path in scripts))
        .replace("{{slides}}", page)
    )


def within(page: str) -> str:
    """Take away the links whose target is on no slide of the deck, such as another part's."""
    there = set(re.findall(r' id="([^"]+)"', page))
    link = re.compile(r'<a href="#([^"]+)">(.*?)</a>', re.S)
    return link.sub(lambda found: found[0] if found[1] in there else found[2], page)


def parts_of_book(root: Path = ROOT) -> dict[str, tuple[str, list[Path]]]:
    """Map each folder of chapters to its caption and chapters in the table of contents."""
    contents = yaml.safe_load((root / "book/_toc.yml").read_text("utf8"))
    found = {}
    for part in contents["parts"]:
        paths = [root / f"{entry['file']}.md" for entry in part["chapters"]]
        paths = [path for path in paths if path.relative_to(root).parts[0] == "chapters"]
        if paths:
            found[paths[0].parent.name] = part["caption"], paths
    return found


def copy_mathjax(folder: Path) -> None:
    """Copy the parts of MathJax that the book uses beside the decks."""
    source = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent
    for part in bookassets.MATHJAX_PARTS:
        origin, target = source / "static/mathjax" / part, folder / part
        target.parent.mkdir(parents=True, exist_ok=True)
        if origin.is_dir():
            shutil.copytree(origin, target, dirs_exist_ok=True)
        else:
            shutil.copy2(origin, target)


def main() -> int:
    """Execute what the cache lacks, write the decks and print their paths."""
    parts = parts_of_book()
    paths = [path for _, chapters in parts.values() for path in chapters]
    cache = chapter_cache.cache_folder(ROOT)
    if errors := chapter_cache.execute_all(paths, ROOT, cache):
        print(*(f"{page}:\n{error}" for page, error in errors.items()), sep="\n\n", file=sys.stderr)
        print(f"{len(errors)} of the chapters raised an error.", file=sys.stderr)
        return 1
    names = collect_names(ROOT, paths)
    copy_mathjax(FOLDER / "mathjax")
    for name, (title, chapters) in parts.items():
        slides = []
        for path in chapters:
            notebook = chapter_cache.execute(path, ROOT, cache).notebook
            slides += Chapter(path, notebook.cells, names).slides()
        target = FOLDER / f"{name}.html"
        write_atomically(target, deck(title, slides).encode())
        print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
