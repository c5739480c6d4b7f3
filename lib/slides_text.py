"""Turn pieces of the chapters' MyST text into HTML for slides.

Equations stay TeX, which MathJax sets in the browser; a reference becomes a link with the name of
what it refers to.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.colon_fence import colon_fence_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin
from mdit_py_plugins.front_matter import front_matter_plugin
from mdit_py_plugins.myst_blocks import myst_block_plugin
from mdit_py_plugins.myst_role import myst_role_plugin
from pybtex.database import parse_file

TITLED = re.compile(r"^\(([\w-]+)\)=\n#+ (.+)$", re.M)
DIRECTIVE = re.compile(
    r"^`{3,}\{(?:exercise|prf:algorithm)\}[ \t]*(?P<title>[^\n]*)\n:label: (?P<label>\S+)$", re.M
)
EQUATION = re.compile(r"^\$\$\n(?P<tex>.*?)^\$\$ \((?P<label>[\w-]+)\)$", re.M | re.S)
PAPERS_NUMBER = re.compile(r"\\text\{\[(?P<tag>\w+ \(.+?\))\]\}", re.S)
FIGURE = re.compile(r"\bname: (?P<label>fig-[\w-]+)")
ABBREVIATED = "".join(rf"(?<!{word}\.)" for word in ("Fig", "Figs", "Eq", "Eqs", "Sec", "vs", "al"))
SENTENCE_END = re.compile(rf"(?<=[.?!]){ABBREVIATED}\s+(?=[A-Z\d$*δα\"{{])")
TITLE_END = re.compile(r"(?<=\S)[.:]\s+")


class SlidesError(ValueError):
    """Say in one sentence what of which chapter cannot be put on a slide."""


@dataclass
class Names:
    """What references may refer to: titles, equations and works by their label or key."""

    titles: dict[str, str]
    equations: dict[str, str]
    figures: set[str]
    works: dict[str, str]


def collect_names(root: Path, pages: Iterable[Path]) -> Names:
    """Read the labels of pages, and the works that the book cites.

    An equation has the paper's number where it shows one, else a number within its page.
    """
    names = Names({}, {}, set(), {})
    for page in pages:
        text = page.read_text("utf8")
        names.titles |= dict(TITLED.findall(text))
        names.titles |= {found["label"]: found["title"] for found in DIRECTIVE.finditer(text)}
        names.figures |= set(FIGURE.findall(text))
        own = 0
        for found in EQUATION.finditer(text):
            if tag := PAPERS_NUMBER.search(found["tex"]):
                names.equations[found["label"]] = re.sub(r"\}\\_\\text\{", "_", tag["tag"])
            else:
                own += 1
                names.equations[found["label"]] = f"({own})"
    for page in (root / "book").glob("*.md"):
        title = re.search(r"^# (.+)$", page.read_text("utf8"), re.M)
        names.titles[page.stem] = title[1] if title else page.stem
    works = parse_file(str(root / "book/references.bib"), "bibtex").entries
    names.works = {key: _cited(work) for key, work in works.items()}
    return names


def _cited(work) -> str:
    last = [
        " ".join(str(name) for name in person.rich_last_names)  # without TeX's accents
        for person in work.persons.get("author", [])
    ]
    authors = f"{last[0]} et al." if len(last) > 2 else " and ".join(last)
    return f"{authors} {work.fields.get('year', '')}".strip()


def _role(self, tokens: list[Token], number: int, options, env: dict) -> str:
    """Write a role as the name of its target.

    Raises: SlidesError if the role or its target is unknown.
    """
    names, kind, content = env["names"], tokens[number].meta["name"], tokens[number].content
    explicit = re.fullmatch(r"(.+?)\s*<(.+)>", content, re.S)
    text, target = explicit.groups() if explicit else (None, content)
    try:
        match kind:
            case "ref" | "prf:ref":
                found = text or names.titles[target]
            case "numref":
                if target not in names.figures:
                    raise KeyError(target)
                found = text or "this figure"
            case "eq":
                found = names.equations[target]
            case "doc":
                found = text or names.titles[Path(target).name]
            case "cite" | "cite:p" | "cite:t":
                return escape("; ".join(names.works[key.strip()] for key in target.split(",")))
            case "term":
                return escape(text or target)
            case _:
                raise SlidesError(f"The role {kind!r} has no form on a slide; add one.")
    except KeyError as error:
        raise SlidesError(f"A {kind} refers to {error.args[0]!r}, which no page has.") from None
    return f'<a href="#{escape(target)}">{MARKDOWN.renderInline(found, env)}</a>'


def _math_inline(self, tokens, number, options, env) -> str:
    return rf'<span class="math">\({escape(tokens[number].content)}\)</span>'


def _math_block(self, tokens, number, options, env) -> str:
    token = tokens[number]
    tex, label, tag = token.content.strip(), "", ""
    if token.type == "math_block_label":
        label = f' id="{escape(token.info)}"'
        name = env["names"].equations[token.info]
        tag = rf"\tag{{{name.strip('()')}}}" if name.startswith("(") else ""
    return f'<div class="math"{label}>\\[{escape(tex)}{tag}\\]</div>\n'


def _make_parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark").enable("table")
    parser.use(front_matter_plugin).use(myst_block_plugin).use(colon_fence_plugin)
    parser.use(dollarmath_plugin, allow_digits=True, double_inline=True).use(myst_role_plugin)
    for kind in ("math_inline", "math_inline_double"):
        parser.add_render_rule(kind, _math_inline)
    for kind in ("math_block", "math_block_label"):
        parser.add_render_rule(kind, _math_block)
    for kind in ("myst_target", "myst_line_comment", "front_matter"):
        parser.add_render_rule(kind, lambda *_: "")
    parser.add_render_rule("myst_role", _role)
    return parser


MARKDOWN = _make_parser()


def blocks(text: str) -> Iterable[list[Token]]:
    """Split MyST text into its blocks: each paragraph, heading, list, equation or directive."""
    block = []
    for token in MARKDOWN.parse(text):
        block.append(token)
        if token.level == 0 and token.nesting <= 0:
            yield block
            block = []


def block_html(block: list[Token], names: Names) -> str:
    """Render one block."""
    return MARKDOWN.renderer.render(block, MARKDOWN.options, {"names": names})


def text_html(text: str, names: Names) -> str:
    """Render MyST text with paragraphs."""
    return MARKDOWN.render(text, {"names": names})


def line_html(text: str, names: Names) -> str:
    """Render one line of MyST text."""
    return MARKDOWN.renderInline(" ".join(text.split()), {"names": names})


def sentences(text: str) -> list[str]:
    """Split prose into sentences."""
    return [part.strip() for part in SENTENCE_END.split(text.strip()) if part.strip()]


def title_and_rest(caption: str) -> tuple[str, str]:
    """Split a caption at the end of its first sentence or at its first colon.

    A caption that begins with its left panel names no whole, and has no title.
    """
    if caption.startswith(("Left:", "Left,", "Top:")):
        return "", caption
    for found in TITLE_END.finditer(caption):
        title, rest = caption[: found.start()], caption[found.end() :]
        closed = title.count("$") % 2 == 0 and title.count("(") == title.count(")")
        if closed and len(title) > 11 and not re.search(r"\b(Figs?|Eqs?|Sec|vs)$", title):
            is_word = re.match("[a-z]{2}", rest)  # and not a variable
            return title, rest[:1].upper() + rest[1:] if is_word else rest
    return caption.rstrip("."), ""
