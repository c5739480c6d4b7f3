"""Keep the book readable from a USB stick, and refuse to build it when it is not.

Copies MathJax into the book, adds scripts and styles of slider and selector, puts launch links
where a repository is known, and warns (which fails `make book`, as it builds with -W) about what a
stock Jupyter Book lets through without a word: assets from the network, pages nobody listed, pages
left over from an earlier build, and live widgets, which render as nothing.
"""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

from sphinx.util import logging

LOGGER = logging.getLogger(__name__)

MATHJAX_PARTS = ("tex-mml-chtml.js", "input/tex/extensions", "output/chtml/fonts")  # 2 of 24 MB
WIDGET = "application/vnd.jupyter.widget-view+json"
GENERATED = {"index.html", "search.html"}  # without a source of their own
LOADING = {  # tag -> attributes whose address the browser loads by itself
    "script": ("src",),
    "img": ("src", "srcset"),
    "iframe": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
    "audio": ("src",),
    "track": ("src",),
    "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"),
    "input": ("src",),
}
LOADING_LINKS = set(
    "stylesheet icon preload modulepreload prefetch preconnect dns-prefetch manifest".split()
)
EXTERNAL = re.compile(r"\s*(?:https?:)?//", re.IGNORECASE)
CSS_ADDRESS = re.compile(
    r"""(?:url\(\s*|@import\s+)["']?((?:https?:)?//[^"')\s]+)""", re.IGNORECASE
)
SCRIPT_ADDRESS = re.compile(r"""["'`]((?:https?:)?//[^"'`\s]+\.(?:m?js|css|woff2?)\b[^"'`\s]*)""")


class AssetCollector(HTMLParser):
    """Collect the external addresses that a page makes the browser load."""

    def __init__(self):
        super().__init__()
        self.found, self.inside, self.has_widget = [], None, False

    def handle_starttag(self, tag, attrs):
        attrs = {name: value or "" for name, value in attrs}
        self.inside = tag if tag in ("script", "style") else None
        self.has_widget |= tag == "script" and attrs.get("type") == WIDGET
        names = LOADING.get(tag, ())
        if tag == "link" and LOADING_LINKS & set(attrs.get("rel", "").lower().split()):
            names = ("href",)
        for name in names:
            for address in (
                attrs.get(name, "").split(",") if name == "srcset" else [attrs.get(name)]
            ):
                if address and EXTERNAL.match(address):
                    self.found.append(address.strip())
        self.found += CSS_ADDRESS.findall(attrs.get("style", ""))

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "style":
            self.found += CSS_ADDRESS.findall(data)
        elif self.inside == "script":
            self.found += SCRIPT_ADDRESS.findall(data)


def problems(path: Path, name: str) -> list[str]:
    """List what an HTML or CSS file does that needs a network or a kernel."""
    text = path.read_text(encoding="utf-8", errors="replace")
    collector = AssetCollector()
    if path.suffix == ".css":
        collector.found = CSS_ADDRESS.findall(text)
    else:
        collector.feed(text)
    found = [
        f"{name} loads {address} from the network; put a copy into book/_static"
        for address in collector.found
    ]
    if collector.has_widget:
        found.append(f"{name} shows a live ipywidget, empty without a kernel; use lib.explorer")
    return found


def warn(message: str, where=None) -> None:
    LOGGER.warning(message, location=where, type="bookassets")


def check_pages(app, env, docnames):
    """Warn about pages that the table of contents does not list.

    Runs before every build, also one that reads nothing, so that a second try is not green.
    """
    listed = set(app.config.external_site_map)
    for docname in sorted(env.found_docs - listed):
        warn("would be published but is not in the table of contents; list or exclude it", docname)


def copy_mathjax(app):
    """Copy the parts of MathJax that pages with formulas load."""
    import importlib.util

    source = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent
    target = Path(app.outdir) / "_static/mathjax"
    for part in MATHJAX_PARTS:
        if (source / "static/mathjax" / part).is_dir():
            shutil.copytree(source / "static/mathjax" / part, target / part, dirs_exist_ok=True)
        else:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / "static/mathjax" / part, target / part)


def audit(app, exception):
    """Warn about every page that loads something external, and about pages without a source."""
    if exception or app.builder.format != "html":
        return
    copy_mathjax(app)
    out = Path(app.outdir)
    made = {app.builder.get_outfilename(name) for name in app.env.found_docs}
    for path in sorted([*out.rglob("*.html"), *out.rglob("*.css")]):
        name = path.relative_to(out).as_posix()
        for problem in problems(path, name):
            warn(problem)
        is_page = path.suffix == ".html" and not name.startswith(("_static/", "_sources/"))
        if is_page and str(path) not in made and path.name not in GENERATED:
            warn(f"{name} is left over from a page that is gone; remove _build and build again")


def set_up_pages(app, config):
    """Point MathJax to the copy in the book, and drop launch links without a repository."""
    config.html_theme_options["logo"] = {"text": config.html_title}
    config.mathjax_path = "mathjax/tex-mml-chtml.js"
    if not config.html_theme_options.get("repository_url"):
        config.html_theme_options.pop("launch_buttons", None)


def add_colab_link(app, pagename, templatename, context, doctree):
    """Add a Colab link to the theme's launch links.

    Colab opens only .ipynb, and the sources are MyST text, so the link leads to the notebook that
    the theme puts beside the published page, on the branch of GitHub Pages.
    """
    for group in context.get("header_buttons", []):
        if group.get("label") == "launch-buttons" and "github_user" in context:
            repository = f"{context['github_user']}/{context['github_repo']}"
            group["buttons"].append(
                {
                    "type": "link",
                    "text": "Colab",
                    "tooltip": "Launch on Colab",
                    "icon": "_static/images/logo_colab.png",
                    "url": "https://colab.research.google.com/github/"
                    f"{repository}/blob/gh-pages/_sources/{pagename}.ipynb",
                }
            )


def mend_roles(app, pagename, templatename, context, doctree):
    """Make the entries of a bibliography items of their list, which screen readers then announce.

    Sphinx puts entries of the deprecated role doc-biblioentry into an element of the role list.
    """
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def setup(app):
    app.connect("config-inited", set_up_pages, priority=900)
    app.connect("env-before-read-docs", check_pages)
    app.connect("html-page-context", add_colab_link, priority=600)
    app.connect("html-page-context", mend_roles)
    app.connect("build-finished", audit, priority=900)
    for name in ("explorer", "selector"):
        app.add_js_file(f"{name}.js", loading_method="defer")
        app.add_css_file(f"{name}.css")
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
