"""The scoreboard: each table row, figure and claim of the papers with our verdict.

``book/scoreboard.yaml`` lists what the papers show; the verdicts come from the rules of the configs
and the files in ``results/``, when the page is built.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from string import Formatter

import yaml
from page_text import PageError, chapters, count, table

from lib import results
from lib.papers import PAPERS, format_number, paper_cell, paper_entry
from lib.results import Judged, format_ours, judge
from lib.verdicts import NOT_ATTEMPTED, VERDICTS, worst

NEAREST_FIRST = ("paper", "gpu", "cpu")  # smoke shows that a run works, and measures nothing
ITEM_KEYS = {"label", "says", "paths", "judged_by", "variants", "chapter", "unknown", "count"}


@dataclass
class Item:
    """One line of the scoreboard."""

    paper: str
    group: str
    label: str
    says: str
    paths: list[str] = field(default_factory=list)
    judged_by: list[str] = field(default_factory=list)
    variants: list[str] = field(default_factory=list)
    chapter: str | None = None
    unknown: bool = False
    count: int = 1
    judged: list[Judged] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """The worst of the verdicts on its numbers that were measured."""
        return worst(judged.verdict for judged in self.judged)

    def covers(self, path: str) -> bool:
        """Tell whether a path of a paper's table belongs to this line."""
        starts = [f"{self.paper}/{start}" for start in self.paths]
        return any(path == start or path.startswith(start + "/") for start in starts)


@dataclass
class Board:
    """All items, the entries that judge none of them, and why some are no attempt."""

    items: list[Item]
    own: dict[str, list[Judged]]
    names: dict[str, str]
    elsewhere: dict[str, str]


def judged_runs(root: Path) -> dict[str, list[Judged]]:
    """Judge every run that has a config or a result, in the profile nearest to the paper's.

    Raises: ResultsError or VerdictError for damaged results and malformed rules.
    """
    names = {path.stem for path in (root / "configs").glob("*.yaml")}
    names |= {path.parent.parent.name for path in results.RESULTS.glob("[!.]*/*/metrics.json")}
    found = {}
    for name in sorted(names):
        profiles = [p for p in NEAREST_FIRST if (results.RESULTS / name / p).is_dir()]
        found[name] = judge(name, profiles[0] if profiles else "cpu")
    return found


def read_board(root: Path) -> Board:
    """Read the list of items and give each the entries that judge it.

    Raises: PageError if the list names a key, run or quantity that does not exist.
    """
    listed = yaml.safe_load((root / "book/scoreboard.yaml").read_text("utf8"))
    elsewhere = listed.pop("elsewhere")
    items, names = [], {}
    for paper, block in listed.items():
        names[paper] = block["short"]
        for group in block["groups"]:
            for entry in group["items"]:
                if wrong := set(entry) - ITEM_KEYS:
                    raise PageError(f"book/scoreboard.yaml has the unknown key {min(wrong)!r}.")
                item = Item(paper, group["title"], **entry)
                item.says = _with_numbers(item)
                items.append(item)
    runs = judged_runs(root)
    own = _share_out(items, runs, elsewhere)
    _check_names(items, runs, elsewhere, {chapter.label for chapter in chapters(root)})
    return Board(items, own, names, elsewhere)


def _with_numbers(item: Item) -> str:
    """Put the paper's numbers into the braces of a description."""
    numbers = {}
    for name in {name for _, name, *_ in Formatter().parse(item.says) if name}:
        cell = paper_entry(f"{item.paper}/{item.paths[0]}/{name}")
        given = None if cell.value is None else format_number(cell.value, digits=5)
        numbers[name] = given or cell.text or "(not given)"
    return item.says.format(**numbers)


def _share_out(items: list[Item], runs: dict[str, list[Judged]], elsewhere: dict[str, str]) -> dict:
    """Give each entry to the items it judges; return by run those that judge none."""
    own: dict[str, list[Judged]] = {}
    for run, entries in runs.items():
        for judged in entries:
            path = judged.entry["paper"]
            named = f"{run}/{judged.entry['quantity']}"
            path = None if run in elsewhere else path
            mine = [i for i in items if named in i.judged_by or (path and i.covers(path))]
            if not mine and path:
                mine = [_unlisted(path)]
                items += mine
            for item in mine:
                item.judged.append(judged)
            if not mine:
                own.setdefault(run, []).append(judged)
    return own


def _unlisted(path: str) -> Item:
    """Make a line for a number of a paper that a config judges and the list leaves out."""
    entry = paper_entry(path)
    says = entry.text or f"{entry.title}: {path.split('/', 2)[2]}, {paper_cell(path)}"
    return Item(path.split("/")[0], "Further numbers", entry.label, says, [path.split("/", 1)[1]])


def _check_names(
    items: list[Item],
    runs: dict[str, list[Judged]],
    elsewhere: dict[str, str],
    labels: set[str],
) -> None:
    known = {f"{run}/{j.entry['quantity']}" for run, entries in runs.items() for j in entries}
    for item in items:
        for name in item.judged_by:
            if name not in known:
                raise PageError(
                    f"book/scoreboard.yaml judges {item.label!r} by {name!r}, which no config has."
                )
        if item.chapter and item.chapter not in labels:
            raise PageError(
                f"book/scoreboard.yaml links {item.label!r} to {item.chapter!r}, which is no "
                "chapter's label."
            )
    for name in [*elsewhere, *(name for item in items for name in item.variants)]:
        if name not in runs:
            raise PageError(f"book/scoreboard.yaml names the run {name!r}, which has no config.")


def availability(item: Item) -> str:
    """Say which of the paper's numbers the sources at hand give; empty where they give all."""
    if item.unknown:
        return "The content is not known to us."
    cells = [path for path in _cells(item.paper) if item.covers(path)]
    given = [
        paper_entry(path).value is not None or paper_entry(path).text is not None for path in cells
    ]
    if all(given):
        return ""
    if not any(given):
        return "The paper's numbers are not available to us."
    return f"Of the paper's {len(given)} numbers, {sum(given)} are available to us."


@cache
def _cells(paper: str) -> list[str]:
    tables = yaml.safe_load((PAPERS / f"{paper}.yaml").read_text("utf8"))["tables"]
    return [
        f"{paper}/{name}/{row}/{column}"
        for name, block in tables.items()
        if block["kind"] == "printed"
        for row, cells in block["rows"].items()
        for column in cells
    ]


def badge(verdict: str) -> str:
    """Write a verdict so that the style sheet can colour it."""
    return f"[{verdict}]{{.verdict .{verdict.replace(' ', '-')}}}"


def tally(judged: list[Judged]) -> str:
    """Count verdicts in words: ``3 reproduced, 1 not reproduced``."""
    counts = Counter(j.verdict for j in judged)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])


def measured(judged: Judged) -> str:
    """Write what was measured: ``share centre tamed 0.0026 ± 0.0011 (5 seeds)``."""
    quantity = judged.entry["quantity"].replace("_", " ")
    if not judged.row:
        return f"*{quantity}:* not measured"
    return f"{quantity} {format_ours(judged.row)}{_before(judged)}"


def _before(judged: Judged) -> str:
    """Write the base's value of a Fréchet distance, which says nothing by itself."""
    if judged.row.unit != "Fréchet distance":
        return ""
    known = {row.quantity: row for row in results.read_results(*judged.run.split("/")).rows}
    parts = judged.row.quantity.split("_")
    for n in range(len(parts) - 1, 0, -1):
        for end in ("base", "original"):
            name = "_".join([*parts[:n], end])
            if name in known and name != judged.row.quantity:
                return f", before {format_number(known[name].value)}"
    return ""


def run_name(judged: Judged) -> str:
    """Name a run with its profile; one without a result has none yet."""
    name = judged.run.split("/")[0]
    return f"`{judged.run}`" if judged.row else f"`{name}` (not run yet)"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _item_row(item: Item, board: Board, labels: dict[str, list[str]]) -> list[str]:
    says = [_sentence(item.says)] + [text for text in [availability(item)] if text]
    if found := [measured(j) for j in item.judged if j.row]:
        says.append(f"*Ours:* {'; '.join(found)}.")
    quantities = {name.split("/")[1] for name in item.judged_by}
    for run in item.variants:
        entries = [j for j in board.own.get(run, []) if j.entry["quantity"] in quantities]
        says.append(f"*With other settings,* `{run}`: {tally(entries) or NOT_ATTEMPTED}.")
    verdict = badge(item.verdict)
    if len(item.judged) > 1:
        verdict += f"\n{tally(item.judged)}"
    elif item.chapter and not item.judged:
        verdict += "\nshown, but no rule judges it"
    names = dict.fromkeys(run_name(j) for j in item.judged)
    shown = [label for j in item.judged for label in labels.get(j.run.split("/")[0], [])]
    places = dict.fromkeys([*([item.chapter] if item.chapter else []), *shown])
    where = [f"{{ref}}`{place}`" for place in places] + list(names)
    return [item.label, "\n".join(says), verdict, ", ".join(where)]


def run_labels(root: Path) -> dict[str, list[str]]:
    """Map each run to the labels of the chapters whose first box names it."""
    labels: dict[str, list[str]] = {}
    for chapter in chapters(root):
        for run in chapter.runs:
            labels.setdefault(run, []).append(chapter.label)
    return labels


def counts_table(root: Path) -> str:
    """Count the verdicts on each paper and on all."""
    board = read_board(root)
    tallies = {paper: Counter() for paper in board.names}
    for item in board.items:
        tallies[item.paper][item.verdict] += item.count
    rows = [
        [badge(verdict), *(str(t[verdict]) for t in tallies.values()),
         f"**{sum(t[verdict] for t in tallies.values())}**"]
        for verdict in VERDICTS
    ]  # fmt: skip
    totals = [sum(tally.values()) for tally in tallies.values()]
    rows.append(["**listed**", *(f"**{n}**" for n in [*totals, sum(totals)])])
    return table(["Verdict", *board.names.values(), "All"], rows, [40, 15, 15, 15, 15], "counts")


def paper_tables(root: Path, paper: str) -> str:
    """Write one table for each group of a paper's items."""
    board, labels = read_board(root), run_labels(root)
    items = [item for item in board.items if item.paper == paper]
    if not items:
        raise PageError(f"The scoreboard lists nothing of {paper!r}.")
    parts = []
    for group in dict.fromkeys(item.group for item in items):
        rows = [_item_row(item, board, labels) for item in items if item.group == group]
        header = ["In the paper", "What it says", "Verdict", "Where"]
        parts += [f"### {group}", table(header, rows, [18, 48, 16, 18], "scoreboard")]
    return "\n\n".join(parts)


def own_claims(root: Path) -> str:
    """List by run the claims that judge no table or figure of a paper."""
    board, labels = read_board(root), run_labels(root)
    parts = []
    for run, entries in board.own.items():
        where = " and ".join(f"{{ref}}`{label}`" for label in labels.get(run, []))
        about = [f"{count(len(entries), 'claim')}: {tally(entries)}.",
                 f"Shown in {where}." if where else "No chapter shows it yet."]  # fmt: skip
        if run in board.elsewhere:
            about.append(f"A paper's number beside it is for orientation: {board.elsewhere[run]}.")
        rows = []
        for judged in entries:
            path = judged.entry["paper"]
            beside = f"\nBeside the paper's {paper_cell(path)}." if path else ""
            rows.append([judged.entry["claim"] + beside, measured(judged), badge(judged.verdict)])
        header = ["Claim", "Ours", "Verdict"]
        parts += [f"### {run_name(entries[0])}", "\n".join(about),
                  table(header, rows, [50, 32, 18], "claims")]  # fmt: skip
    return "\n\n".join(parts) or "No config makes a claim of its own."
