"""The teaching page: all exercises, and what sessions, chapters and runs cost.

Times come from the cache and from ``results/``: one is shown where a chapter was executed or a run
was made, and elsewhere the page says that it is not measured. Nothing here is typed by hand.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import chapter_cache
import yaml
from page_text import Chapter, PageError, chapters, count, table

from lib import results
from lib.config import PROFILES
from lib.results import Results, read_results

UNMEASURED = "not measured"
EXERCISE = re.compile(r"^`{3,}\{exercise\} (.+)\n:label: (ex-[\w-]+)$", re.M)


def duration(seconds: float) -> str:
    """Write seconds in the unit in which they are read most easily."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def seconds_of(result: Results) -> float:
    """Return the time of a run; each row holds the time up to its own."""
    return max(row.wall_s for row in result.rows)


def is_on_gpu(result: Results) -> bool:
    return "CPU" not in result.rows[0].device


def measured_runs() -> dict[str, list[Results]]:
    """Map each run with results to them, one for each profile; smoke runs measure nothing."""
    found: dict[str, list[Results]] = {}
    for path in sorted(results.RESULTS.glob("[!.]*/[!.]*/metrics.json")):
        name, profile = path.parent.parent.name, path.parent.name
        if profile != "smoke":
            found.setdefault(name, []).append(read_results(name, profile))
    return found


def profiles(root: Path, run: str) -> str:
    """List the profiles that a config has; its top level is the profile ``cpu``."""
    raw = yaml.safe_load((root / "configs" / f"{run}.yaml").read_text("utf8"))
    return ", ".join(name for name in PROFILES if name == "cpu" or name in raw)


def together(runs: Iterable[str], measured: dict[str, list[Results]], on_gpu: bool) -> str:
    """Add up the times of runs, and count those that have none."""
    runs = list(runs)
    times = [
        max(seconds_of(result) for result in fitting)
        for run in runs
        if (fitting := [r for r in measured.get(run, []) if is_on_gpu(r) == on_gpu])
    ]
    if not runs:
        return "no run"
    if not times:
        return UNMEASURED
    missing = len(runs) - len(times)
    return duration(sum(times)) + (f" and {count(missing, 'run')} {UNMEASURED}" if missing else "")


def live_seconds(root: Path) -> dict[str, float]:
    """Read how long each chapter took when it was executed last, by its name."""
    return chapter_cache.read_seconds(root / chapter_cache.CACHES / "seconds.json")


def chapter_costs(root: Path) -> str:
    """List each chapter with the time of its page and of the runs that its first box names."""
    live, measured, rows = live_seconds(root), measured_runs(), []
    for chapter in chapters(root):
        took = live.get(chapter.name)
        runs = list(dict.fromkeys(chapter.runs))
        rows.append(
            [
                f"{{ref}}`{chapter.label}`",
                UNMEASURED if took is None else duration(took),
                count(len(runs), "run") if runs else "no run",
                f"*CPU:* {together(runs, measured, False)}",
                f"*GPU:* {together(runs, measured, True)}",
            ]
        )
    header = ["Chapter", "Page, CPU", "Behind it", "Its runs on CPUs", "On a GPU"]
    return table(header, rows, [32, 14, 12, 22, 20], "costs")


def run_costs(root: Path) -> str:
    """List every config with the profiles it has, and the time of each device it has run on."""
    measured, rows = measured_runs(), []
    for path in sorted((root / "configs").glob("*.yaml")):
        found = measured.get(path.stem, [])
        cells = {}
        for on_gpu in (False, True):
            fitting = [result for result in found if is_on_gpu(result) == on_gpu]
            times = [f"{duration(seconds_of(r))}, {r.rows[0].device}" for r in fitting]
            cells[on_gpu] = "; ".join(times) or UNMEASURED
        rows.append(
            [
                f"`{path.stem}`",
                profiles(root, path.stem),
                f"*CPU:* {cells[False]}",
                f"*GPU:* {cells[True]}",
            ]
        )
    header = ["Run", "Profiles", "On CPUs", "On a GPU"]
    return table(header, rows, [32, 20, 28, 20], "costs")


def session_cost(root: Path, labels: str) -> str:
    """Say in two lines what the chapters of a session take: their pages, and the runs behind them.

    ``labels`` are those of chapters, with commas between them.
    Raises: PageError if one is no chapter's.
    """
    by_label = {chapter.label: chapter for chapter in chapters(root)}
    wanted = [label.strip() for label in labels.split(",")]
    if unknown := [label for label in wanted if label not in by_label]:
        raise PageError(f"A session names {unknown[0]!r}, which is no chapter's label.")
    return _cost([by_label[label] for label in wanted], live_seconds(root), measured_runs())


def _cost(session: list[Chapter], live: dict[str, float], measured: dict) -> str:
    known = [live[chapter.name] for chapter in session if chapter.name in live]
    pages = duration(sum(known)) if len(known) == len(session) else UNMEASURED
    runs = list(dict.fromkeys(run for chapter in session for run in chapter.runs))
    behind = f"{count(len(runs), 'run')} behind" if runs else "No run behind"
    them = "it" if len(session) == 1 else "them"
    lines = [f"*Executing {count(len(session), 'page')} on one CPU core:* {pages}."]
    if runs:
        on_cpu, on_gpu = (together(runs, measured, gpu) for gpu in (False, True))
        lines.append(f"*{behind} {them}:* CPU {on_cpu}; GPU {on_gpu}.")
    else:
        lines.append(f"{behind} {them}.")
    return "\n".join(lines)


def exercise_list(root: Path) -> str:
    """List the exercises of each chapter in the order of the book."""
    rows = []
    for chapter in chapters(root):
        found = EXERCISE.findall(chapter.text)
        rows.append(
            [
                f"{{ref}}`{chapter.label}`",
                "\n\n".join(f"{{ref}}`{title} <{label}>`" for title, label in found) or "none",
            ]
        )
    return table(["Chapter", "Exercises"], rows, [40, 60])
