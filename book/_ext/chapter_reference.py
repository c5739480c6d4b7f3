"""Compare what a chapter prints with the text kept in ``book/reference/<profile>/``.

A reference is a text file with one section a cell that prints, named by the digest of the cell's
source, so that a moved cell keeps its section and an edited cell loses it::

    --- 1a2b3c4d | print(f"held-out {nll:.3f} nats")
    held-out 1.234 nats

Compared are standard output and plain-text results, never figures and HTML: print the number beside
each. Numbers that stand alone are compared at a relative tolerance of 1e-4, all other text exactly,
except that a run of spaces counts as one (a column's width follows its numbers). A cell tag such as
``rtol-1e-2`` or ``atol-0.5`` loosens the numbers of one cell. Of a line that begins with ``time:``
only its presence is compared. There is no way to leave a cell out.
"""

import hashlib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from nbformat import NotebookNode

RTOL = 1e-4
NUMBER = re.compile(r"(?<![A-Za-z0-9_.])[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![A-Za-z0-9_])")
ADDRESS_OR_FIGURE = re.compile(r"^\[?<(Figure size|Axes)| at 0x[0-9a-f]+>")
HEADER = re.compile(r"--- ([0-9a-f]{8}) \| ")
TOLERANCE_TAG = re.compile(r"(rtol|atol)-(.+)")


@dataclass(frozen=True)
class Tolerance:
    """How far a number may be from its reference: ``rtol`` relative, ``atol`` absolute."""

    rtol: float = RTOL
    atol: float = 0.0


def tolerance(cell: NotebookNode) -> Tolerance:
    """Read the tolerance of a cell from its tags.

    Raises: ValueError if a tag does not end with a number.
    """
    found = {}
    for tag in cell.metadata.get("tags", []):
        if match := TOLERANCE_TAG.fullmatch(tag):
            found[match[1]] = float(match[2])
    return Tolerance(**found)


def source_digest(cell: NotebookNode) -> str:
    """Name a cell by its source."""
    return hashlib.sha256(cell.source.encode()).hexdigest()[:8]


def printed_text(cell: NotebookNode) -> str:
    """Join the text outputs of an executed cell, without reprs of figures and of addresses."""
    parts = []
    for output in cell.outputs:
        if output.output_type == "stream" and output.name == "stdout":
            parts.append(output.text)
        elif output.output_type == "error":
            parts.append(f"{output.ename}: {output.evalue}\n")
        elif text := output.get("data", {}).get("text/plain"):
            if not ADDRESS_OR_FIGURE.search(text):
                parts.append(text + "\n")
    lines = "".join(parts).splitlines()
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def error_text(cell: NotebookNode) -> str:
    """Join what an executed cell wrote to standard error."""
    return "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stderr")


def shows_silent_figure(cell: NotebookNode) -> bool:
    """Tell whether an executed cell shows a figure without ``mystnb: {image: {alt: ...}}``."""
    shows = any(kind.startswith("image/") for o in cell.outputs for kind in o.get("data", {}))
    alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
    return shows and not alt.strip()


def compare(printed: str, reference: str, within: Tolerance) -> str | None:
    """Compare a cell's text with its reference; return the first difference as a sentence."""
    new, old = printed.splitlines(), reference.splitlines()
    for number, (got, wanted) in enumerate(zip(new, old, strict=False), start=1):
        if got.startswith("time:") and wanted.startswith("time:"):
            continue
        if words(got) != words(wanted):
            return f"line {number} is {got!r} and its reference {wanted!r}."
        pairs = zip(NUMBER.findall(got), NUMBER.findall(wanted), strict=True)
        for value, expected in pairs:
            close = math.isclose(
                float(value), float(expected), rel_tol=within.rtol, abs_tol=within.atol
            )
            if not close:
                return (
                    f"{value} in line {number} is farther than rtol {within.rtol:g}, "
                    f"atol {within.atol:g} from its reference {expected}: {got!r}."
                )
    if len(new) != len(old):
        return f"it prints {len(new)} line(s) and its reference has {len(old)}."
    return None


def words(line: str) -> str:
    """Reduce a line to its text: numbers become one sign, runs of spaces one space."""
    return re.sub(r"\s+", " ", NUMBER.sub("#", line)).strip()


def reference_path(path: Path, root: Path, profile: str) -> Path:
    """Locate the reference of a chapter."""
    return (root / "book/reference" / profile / path.relative_to(root)).with_suffix(".txt")


def read_reference(path: Path) -> list[tuple[str, str]]:
    """Read a reference as (digest of the cell's source, text) in the order of the cells."""
    sections: list[tuple[str, list[str]]] = []
    for line in path.read_text("utf8").splitlines():
        if match := HEADER.match(line):
            sections.append((match[1], []))
        elif sections:
            sections[-1][1].append(line)
    return [(digest, "\n".join(lines).strip("\n")) for digest, lines in sections]


def match_sections(
    cells: list[NotebookNode], sections: list[tuple[str, str]]
) -> tuple[list[str | None], int]:
    """Give each cell the text of its section, or None; count the sections that no cell has."""
    left = list(sections)
    texts: list[str | None] = []
    for cell in cells:
        digest = source_digest(cell)
        section = next((section for section in left if section[0] == digest), None)
        if section:
            left.remove(section)
        texts.append(section[1] if section else None)
    return texts, len(left)


def write_reference(path: Path, cells: list[NotebookNode]) -> None:
    """Write the reference of an executed chapter."""
    sections = []
    for cell in cells:
        if text := printed_text(cell):
            lines = [
                line.strip() for line in cell.source.splitlines() if re.search("[A-Za-z]", line)
            ]
            sections.append(f"--- {source_digest(cell)} | {lines[-1]}\n{text}\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".partial")
    temporary.write_text("\n".join(sections), "utf8")
    os.replace(temporary, path)
