"""The papers' numbers from ``book/papers/*.yaml``, each named ``file/table/row/column``.

A cell is a number, ``null``, or a mapping with ``value`` and a ``note``, ``text`` or ``reason``.
A number that no source gives is ``null`` with a ``reason``, its own or the table's ``missing``.
Sentences that the paper claims stand under ``claims`` and are named ``file/claims/place/id``.
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from lib import ROOT

PAPERS = ROOT / "book" / "papers"


class PaperError(LookupError):
    """Say in one sentence which path into the papers' tables is wrong."""


@dataclass(frozen=True)
class PaperEntry:
    """One cell of a paper's table, or one sentence that it claims.

    ``value`` is None where there is no number; then ``reason`` says why. ``text`` is what is
    printed instead of a number, or the claim; ``label`` is the table's name, ``source`` where it
    was read.
    """

    path: str
    value: float | None
    reason: str | None
    text: str | None
    note: str | None
    label: str
    title: str
    source: str


@cache
def _load(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def _step(mapping: dict[str, Any], key: str, path: str) -> Any:
    if key not in mapping:
        known = ", ".join(map(str, mapping))
        raise PaperError(f"The path {path!r} fails at {key!r}; known there are: {known}.")
    return mapping[key]


def paper_entry(path: str) -> PaperEntry:
    """Look up one cell by its path, such as ``taming/table_1/4/DF_tamed``.

    Raises: PaperError if the path does not lead to a cell.
    """
    parts = path.split("/")
    if len(parts) != 4:
        raise PaperError(f"The path {path!r} must have the form file/table/row/column.")
    name, table_name, row, column = parts
    files = {file.stem: file for file in sorted(PAPERS.glob("*.yaml"))}
    paper = _load(_step(files, name, path))
    if table_name == "claims":
        place = _step(paper["claims"], row, path)
        table = {"label": place["label"], "title": "", "source": place["source"]}
        cell = _step(place["items"], column, path)
        cell = {"text": cell} if isinstance(cell, str) else cell
        cell = {"value": None, "reason": "the source gives a sentence, no number"} | cell
    else:
        table = _step(paper["tables"], table_name, path)
        cell = _step(_step(table["rows"], row, path), column, path)
        cell = cell if isinstance(cell, dict) else {"value": cell}
    value = cell["value"]
    return PaperEntry(
        path=path,
        value=None if value is None else float(value),
        reason=None if value is not None else cell.get("reason", table.get("missing")),
        text=cell.get("text"),
        note=cell.get("note"),
        label=table["label"],
        title=table["title"],
        source=paper["sources"][table["source"]],
    )


def paper_value(path: str) -> float | None:
    """Return the number at a path, or None where the sources do not give it.

    Raises: PaperError if the path does not lead to a cell.
    """
    return paper_entry(path).value


def paper_cell(path: str | None) -> str:
    """Write what the paper says for a table: the number, its text, or why there is none."""
    if path is None:
        return "no number to compare with"
    entry = paper_entry(path)
    if entry.value is not None:
        return f"{format_number(entry.value, digits=5)} ({entry.label})"
    if entry.text is not None:
        return f"{entry.text} ({entry.label})"
    return f"not given ({entry.label}): {entry.reason}"


def format_number(x: float, digits: int = 3) -> str:
    """Write a number with ``digits`` significant digits, small and huge ones as ``2.15e-7``."""
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    if 1e-3 <= abs(x) < 1e5:
        rounded = float(f"{x:.{digits - 1}e}") if abs(x) < 10**digits else round(x)
        return f"{rounded:.10g}"
    mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa}e{int(exponent)}"
