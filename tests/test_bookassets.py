"""The guards of the build can fail: a tiny book breaks each of them, another breaks none."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import bookassets
import pytest
import yaml

from lib import ROOT

HEADER = """---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
---
"""
CLEAN = {
    "book/_toc.yml": "format: jb-book\nroot: book/intro\nchapters:\n- file: chapters/one\n",
    "book/intro.md": "# A book\n\nSee {cite}`malnick2024taming` and {ref}`ch-one`.\n\n"
    "$$ a = b $$ (eq-one)\n\n```{bibliography}\n```\n",
    "chapters/one.md": HEADER + "(ch-one)=\n# One\n\nBy {eq}`eq-one`, https://example.org.\n",
    ".venv/lib/package/README.md": "# Not ours\n",
    "notes.md": "# Not listed\n",
}
WIDGET_CELL = "\n```{code-cell}\nimport ipywidgets\nipywidgets.IntSlider()\n```\n"


def build(root: Path, files: dict, settings: dict) -> tuple[int, str]:
    """Build a book as `make book` does; return the exit status and what it said."""
    for name in ("book/_ext", "book/_static"):
        shutil.copytree(
            ROOT / name,
            root / name,
            ignore=shutil.ignore_patterns("__pycache__"),
            dirs_exist_ok=True,
        )
    shutil.copy(ROOT / "book/references.bib", root / "book")
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    config = yaml.safe_load((ROOT / "_config.yml").read_text()) | settings
    (root / "_config.yml").write_text(yaml.safe_dump(config))
    command = "build . --config _config.yml --toc book/_toc.yml --all -W -n --keep-going".split()
    done = subprocess.run(
        [Path(sys.executable).with_name("jupyter-book"), *command],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, re.sub(r"\x1b\[\d+m", "", done.stdout + done.stderr)


def test_a_clean_book_is_built_offline_and_without_launch_links(tmp_path):
    status, said = build(tmp_path, CLEAN, {})
    assert status == 0, said
    html = tmp_path / "_build/html"
    pages = {path.relative_to(html).as_posix() for path in html.rglob("*.html")}
    pages = {name for name in pages if not name.startswith("_static")}
    assert pages - bookassets.GENERATED == {"book/intro.html", "chapters/one.html"}
    chapter = (html / "chapters/one.html").read_text()
    assert "mybinder" not in chapter
    assert "colab" not in chapter
    assert 'src="../_static/mathjax/tex-mml-chtml.js' in (html / "book/intro.html").read_text()
    mathjax = [path for path in (html / "_static/mathjax").rglob("*") if path.is_file()]
    assert 10 < len(mathjax)
    assert sum(path.stat().st_size for path in mathjax) < 3_000_000


def test_each_guard_fails_the_build(tmp_path):
    intro = (
        CLEAN["book/intro.md"]
        + '```{raw} html\n<script src="https://cdn.example.org/x.js"></script>'
        + '<iframe src="//video.example.org"></iframe>\n```\n'
        + "\n![picture](https://images.example.org/x.png)\n"
    )
    files = CLEAN | {
        "book/intro.md": intro,
        "book/_static/custom.css": "@import url('https://fonts.example.org/f.css');",
        "chapters/one.md": CLEAN["chapters/one.md"] + WIDGET_CELL,
        "_build/html/chapters/gone.html": "<p>from an earlier build</p>",
    }
    repository = {"url": "https://github.com/someone/forgetting", "branch": "main"}
    settings = {"only_build_toc_files": False, "repository": repository}
    status, said = build(tmp_path, files, settings)
    assert status != 0
    for message in (
        "book/intro.html loads https://cdn.example.org/x.js from the network",
        "book/intro.html loads //video.example.org from the network",
        "book/intro.html loads https://images.example.org/x.png from the network",
        "_static/custom.css loads https://fonts.example.org/f.css from the network",
        "notes.md: WARNING: would be published but is not in the table of contents",
        "chapters/one.html shows a live ipywidget",
        "chapters/gone.html is left over from a page that is gone",
    ):
        assert message in said, said
    assert ".venv" not in said
    assert not (tmp_path / "_build/html/.venv").exists()
    # The same book names a repository: now there are plain links.
    chapter = (tmp_path / "_build/html/chapters/one.html").read_text()
    links = set(re.findall(r'<a href="(https://(?:mybinder|colab)[^"]*)"', chapter))
    assert links == {
        "https://mybinder.org/v2/gh/someone/forgetting/main?urlpath=lab/tree/chapters/one.md",
        "https://colab.research.google.com/github/someone/forgetting/blob/gh-pages/"
        "_sources/chapters/one.ipynb",
    }
    assert (tmp_path / "_build/html/_sources/chapters/one.ipynb").exists()


@pytest.mark.parametrize(
    ("html", "found"),
    [
        ('<link rel="stylesheet" href="https://a.org/x.css">', ["https://a.org/x.css"]),
        ('<img srcset="x.png 1x, https://a.org/y.png 2x">', ["https://a.org/y.png 2x"]),
        ('<p style="background: url(//a.org/x.png)">', ["//a.org/x.png"]),
        ("<style>@font-face{src:url('https://a.org/f.woff')}</style>", ["https://a.org/f.woff"]),
        ('<script>load("https://a.org/x.mjs")</script>', ["https://a.org/x.mjs"]),
        ('<video poster="HTTPS://a.org/x.jpg"></video>', ["HTTPS://a.org/x.jpg"]),
        ('<a href="https://a.org/x.js">a link is not loaded</a>', []),
        ('<link rel="canonical" href="https://a.org">', []),
        ("<code>&lt;script src='https://a.org/x.js'&gt;</code>", []),
        ('<img src="data:image/png;base64,aGk="><img src="_images/x.png">', []),
    ],
)
def test_the_audit_sees_what_a_browser_would_load(tmp_path, html, found):
    page = tmp_path / "page.html"
    page.write_text(html)
    assert [
        p.split(" loads ")[1].split(" from the")[0] for p in bookassets.problems(page, "p")
    ] == (found)
