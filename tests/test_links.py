"""Every link of the built book leads somewhere, and every link out of it is one that we know."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from test_browser import BOOK, need

from lib import ROOT

# A new host is added here after somebody has opened the link. The last three are those of the
# launch links, which appear as soon as _config.yml names a repository.
HOSTS = {"arxiv.org", "doi.org", "github.com", "mybinder.org", "colab.research.google.com"}
SOURCES = [
    *ROOT.glob("*.md"),
    *(ROOT / "book").glob("*.md"),
    *(ROOT / "chapters").glob("*/*.md"),
    ROOT / "book/references.bib",
    ROOT / "CITATION.cff",
]
ADDRESS = re.compile(r"\bhttps?://[^\s)\]>}\"'`|]+")


def pages_of(folder: Path) -> list[Path]:
    """List the pages of a built book, without the templates that the theme leaves in _static."""
    paths = sorted(folder.resolve().rglob("*.html"))
    return [path for path in paths if path.relative_to(folder.resolve()).parts[0] != "_static"]


class Page(HTMLParser):
    """The places of a page that links may lead to, and its links."""

    def __init__(self, path: Path):
        super().__init__()
        self.anchors, self.links = set(), []
        self.feed(path.read_text("utf8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        names = ("href", "src", "data-src", "poster") if tag != "base" else ()
        self.links += [attrs[name] for name in names if attrs.get(name)]


def broken_links(folder: Path) -> list[str]:
    """List the links within the pages of a folder whose file or anchor is not there."""
    pages = {path: Page(path) for path in pages_of(folder)}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.exists():
                broken.append(f"{path.relative_to(folder.resolve())}: {link} is not there")
            elif anchor and target in pages and anchor not in pages[target].anchors:
                broken.append(f"{path.relative_to(folder.resolve())}: {link} has no such anchor")
    return broken


def strange_addresses(addresses: list[str]) -> list[str]:
    """List the addresses that are not https, cannot be read, or have a host nobody has allowed."""
    strange = []
    for address in addresses:
        try:
            parts = urlsplit(address)
            host = parts.hostname or ""
        except ValueError:
            strange.append(address)
            continue
        if parts.scheme != "https" or host not in HOSTS or parts.username or " " in address:
            strange.append(address)
    return sorted(set(strange))


def external(links: list[str]) -> list[str]:
    """Pick the links that leave the book."""
    return [link for link in links if re.match(r"(?!data:|mailto:|javascript:)[\w+.-]+:|//", link)]


def test_links_of_the_built_book_lead_somewhere():
    need(BOOK.is_dir(), "no built book in _build/html; run `make book` first")
    assert broken_links(BOOK) == []


def test_links_out_of_the_built_book_are_known():
    need(BOOK.is_dir(), "no built book in _build/html; run `make book` first")
    found = [link for path in pages_of(BOOK) for link in external(Page(path).links)]
    assert strange_addresses(found) == []


def test_addresses_in_the_sources_are_known():
    found = [link for path in SOURCES for link in ADDRESS.findall(path.read_text("utf8"))]
    assert strange_addresses([link.rstrip(".,;:") for link in found]) == []


PAGES = {
    "index.html": '<a href="sub/two.html#there">x</a><a href="#top" id="top">y</a><img src="a.png">'
    '<a href="https://arxiv.org/abs/1">z</a><a href="mailto:a@b.org">m</a>',
    "sub/two.html": '<a name="there" href="../index.html?q=1#top">x</a><a href="a%20b.txt">y</a>',
}


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("two.html#there", "three.html", "index.html: sub/three.html is not there"),
        ("#there", "#here", "index.html: sub/two.html#here has no such anchor"),
        ('href="#top"', 'href="#tip"', "index.html: #tip has no such anchor"),
        ("a.png", "b.png", "index.html: b.png is not there"),
        ("q=1#top", "q=1#tap", "sub/two.html: ../index.html?q=1#tap has no such anchor"),
    ],
)
def test_planted_broken_links_are_found(tmp_path, old, new, complaint):
    for name in ("sub/a b.txt", "a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name, text in PAGES.items():
        (tmp_path / name).write_text(text, "utf8")
    assert broken_links(tmp_path) == []
    for name, text in PAGES.items():
        (tmp_path / name).write_text(text.replace(old, new), "utf8")
    assert broken_links(tmp_path) == [complaint]


def test_planted_strange_addresses_are_found():
    assert strange_addresses(["https://arxiv.org/abs/2211.16488"]) == []
    strange = [
        "http://arxiv.org/abs/1",
        "https://arxiv.org.example/abs/1",
        "https://user@arxiv.org/abs/1",
        "https://[arxiv.org/abs/1",
        "//arxiv.org/abs/1",
        "ftp://arxiv.org",
        "https://arxiv.org/a b",
    ]
    assert strange_addresses(strange) == sorted(strange)
    assert external(["#a", "b.html", "data:,", "//x.org", "https://x.org"]) == [
        "//x.org",
        "https://x.org",
    ]
