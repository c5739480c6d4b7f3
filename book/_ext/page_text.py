"""What the generated pages share: the chapters of the book, and MyST text for tables."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

LABEL = re.compile(r"^\(([\w-]+)\)=\n# (.+)$", re.M)
RUNS = re.compile(r"\*\*Runs?\*\* (.*?)(?: · |$)", re.M)
FENCED = re.compile(r"^(`{3,}|:{3,}|~{3,})[^\n]*\n.*?^\1\s*$", re.M | re.S)


class PageError(RuntimeError):
    """Say in one sentence why a page cannot be generated."""


@dataclass(frozen=True)
class Chapter:
    """A page of ``chapters/`` that the table of contents lists."""

    path: Path
    root: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text("utf8")

    @property
    def name(self) -> str:
        """Its path from the root, as in ``chapters/1_taming_flows/1_method.md``."""
        return self.path.relative_to(self.root).as_posix()

    @property
    def part(self) -> str:
        return self.path.parent.name

    @property
    def label(self) -> str:
        """The label above its title, such as ``ch-flows``.

        Raises: PageError if it has none.
        """
        match = LABEL.search(self.text)
        if not match:
            raise PageError(f"{self.name} has no label above its title, such as (ch-name)=.")
        return match[1]

    @property
    def runs(self) -> list[str]:
        """The runs that its first box names; ``_b`` after ``run_a`` is short for ``run_a_b``."""
        match = RUNS.search(self.text)
        names, stem = [], ""
        for name in re.findall(r"`(\w+)`", match[1]) if match else []:
            if not name.startswith("_"):
                stem = name
            names.append(name if name == stem else stem + name)
        return names

    def section(self, title: str) -> str:
        """Return the text under a heading of the second level, empty if there is none."""
        prose = FENCED.sub("", self.text)
        match = re.search(rf"^## {re.escape(title)}\s*\n(.*?)(?=^## |\Z)", prose, re.M | re.S)
        return match[1] if match else ""


def chapters(root: Path) -> list[Chapter]:
    """List the chapters in the order of the table of contents."""
    contents = yaml.safe_load((root / "book/_toc.yml").read_text("utf8"))
    return [
        Chapter(root / f"{name}.md", root)
        for name in _files(contents)
        if name.startswith("chapters/") and (root / f"{name}.md").is_file()
    ]


def _files(entry) -> Iterable[str]:
    if isinstance(entry, dict):
        if "file" in entry:
            yield entry["file"]
        entry = list(entry.values())
    if isinstance(entry, list):
        for part in entry:
            yield from _files(part)


def count(number: int, noun: str) -> str:
    """Write a number with its noun: ``1 run``, ``2 runs``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def table(
    header: Sequence[str], rows: Iterable[Sequence[str]], widths: Sequence[int], kind: str = ""
) -> str:
    """Write a table; its cells are MyST text. ``kind`` is a class for the style sheet.

    The class ``generated`` lets a phone show each row as a small card; see ``generated.css``.
    """
    lines = [
        "````{list-table}",
        ":header-rows: 1",
        f":widths: {' '.join(map(str, widths))}",
        f":class: generated {kind}".rstrip(),
        "",
    ]
    for row in [header, *rows]:
        for number, cell in enumerate(row):
            start = "* - " if number == 0 else "  - "
            lines.append(start + cell.strip().replace("\n", "\n    "))
    return "\n".join([*lines, "````"])
