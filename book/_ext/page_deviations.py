"""The deviations page: all rows of the chapters' *Deviations* tables, gathered."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from page_text import Chapter, PageError, chapters, count, table

COLUMNS = ("id", "paper", "authors' code", "ours", "measured effect")
CELLS = re.compile(r"(?<!\\)\|")
UNMEASURED = ("not measured", "unknown")


@dataclass(frozen=True)
class Deviation:
    """One row of a chapter's table, its cells as MyST text."""

    id: str
    paper: str
    code: str
    ours: str
    effect: str
    chapter: Chapter

    @property
    def is_measured(self) -> bool:
        return not self.effect.lower().startswith(UNMEASURED)


def chapter_deviations(chapter: Chapter) -> list[Deviation]:
    """Read the rows of a chapter's table.

    Raises: PageError if the section has no table with the five columns, or a row has other cells.
    """
    text = chapter.section("Deviations")
    if not text:
        return []
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("|")]
    rows = [[cell.strip() for cell in CELLS.split(line.strip("|"))] for line in lines]
    if not rows or tuple(cell.lower() for cell in rows[0]) != COLUMNS:
        raise PageError(f"Deviations in {chapter.name} need a table: {' | '.join(COLUMNS)}.")
    for row in rows[2:]:
        if len(row) != len(COLUMNS):
            raise PageError(f"The row {row[0]!r} in {chapter.name} has {len(row)} cells, not 5.")
    return [Deviation(*row, chapter) for row in rows[2:]]


def all_deviations(root: Path) -> list[Deviation]:
    """Gather the rows of all chapters.

    Raises: PageError if an id is used twice.
    """
    found = [deviation for chapter in chapters(root) for deviation in chapter_deviations(chapter)]
    ids = Counter(deviation.id for deviation in found)
    for deviation in found:
        if ids[deviation.id] > 1:
            raise PageError(f"Two deviations have the id {deviation.id!r}; rename one.")
    return found


def counts(root: Path) -> str:
    """Count the deviations and those whose effect was measured."""
    found = all_deviations(root)
    measured = sum(deviation.is_measured for deviation in found)
    number = len({deviation.chapter.name for deviation in found})
    return (
        f"The book lists **{count(len(found), 'deviation')}** in {count(number, 'chapter')}; "
        f"the effect of **{measured}** is measured or derived, that of "
        f"**{len(found) - measured}** is not yet."
    )


def part_deviations(root: Path, part: str) -> str:
    """Write the deviations of the chapters in one folder, one table a chapter."""
    found = [deviation for deviation in all_deviations(root) if deviation.chapter.part == part]
    parts = []
    for chapter in dict.fromkeys(deviation.chapter for deviation in found):
        rows = [
            [
                f"[{d.id}]{{#dev-{d.id.lower()}}}",
                f"*Paper:* {d.paper}",
                f"*Code:* {d.code}",
                f"*Ours:* {d.ours}",
                d.effect,
            ]
            for d in found
            if d.chapter == chapter
        ]
        parts.append(f"From {{ref}}`{chapter.label}`:\n\n{_compact(rows)}")
    return "\n\n".join(parts) or "No chapter of this part lists a deviation yet."


def _compact(rows: list[list[str]]) -> str:
    """Put paper, code and ours below one another, since five columns do not fit a phone."""
    joined = [[name, "\n\n".join(sources), effect] for name, *sources, effect in rows]
    header = ["Id", "What differs", "Measured effect"]
    return table(header, joined, [18, 50, 32], "deviations")
