"""The status page: times of chapters, versions, machine, benchmarks, runs with their results."""

import importlib.metadata
import json
import platform
from pathlib import Path

import chapter_cache
import chapter_reference
from page_text import PageError, chapters, count, table

from lib import results
from lib.machine import cores, memory, processor
from lib.papers import format_number
from lib.results import read_results

LIVE_SECONDS = 120  # what a chapter may take
PACKAGES = (
    "torch diffusers accelerate datasets numpy scipy scikit-learn matplotlib "
    "jupyter-book Sphinx myst-nb"
).split()


def chapter_times(root: Path) -> str:
    """List each chapter with its measured seconds, its code cells, and its reference."""
    seconds = chapter_cache.read_seconds(root / chapter_cache.CACHES / "seconds.json")
    profile, rows = chapter_cache.profile(), []
    for chapter in chapters(root):
        cells = chapter_cache.code_cells(chapter_cache.read_chapter(chapter.path, root))
        took = seconds.get(chapter.name)
        time = "not measured" if took is None else f"{took:.0f} s"
        if took is not None and took > LIVE_SECONDS:
            time += ", longer than two minutes"
        reference = chapter_reference.reference_path(chapter.path, root, profile).is_file()
        compared = "with its reference" if reference else f"no reference for {profile}"
        rows.append([f"{{ref}}`{chapter.label}`", time, count(len(cells), "cell"), compared])
    known = [seconds[chapter.name] for chapter in chapters(root) if chapter.name in seconds]
    total = f"{sum(known) / 60:.1f} min" if known else "not measured"
    rows.append(["**together**", f"**{total}**", "", ""])
    return table(["Chapter", "Time", "Code", "Compared"], rows, [40, 22, 14, 24], "chapters")


def versions(root: Path) -> str:
    """List the versions of Python and the main packages."""
    rows = [["Python", platform.python_version()]]
    for package in PACKAGES:
        try:
            rows.append([package, importlib.metadata.version(package)])
        except importlib.metadata.PackageNotFoundError:
            rows.append([package, "not installed"])
    return table(["Package", "Version"], rows, [60, 40], "versions")


def machine(root: Path) -> str:
    """Describe the machine that built the pages."""
    rows = [
        ["Processor", processor()],
        ["Cores", str(cores())],
        ["Memory", memory()],
        ["System", f"{platform.system()}, {platform.machine()}"],
        ["Profile", chapter_cache.profile()],
    ]
    return table(["Part", "This machine"], rows, [30, 70], "machine")


def benchmarks(root: Path) -> str:
    """Show the last committed table of ``make bench``, with its machine and versions.

    Raises: PageError if there is none or it cannot be read.
    """
    path = root / "book/tables/benchmarks.json"
    try:
        found = json.loads(path.read_text("utf8"))
        lines = found["lines"]
        versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        made = f"Made on {found['date']} at commit `{found['commit']}` on {found['machine']}"
        rows, above = [], None
        for line in lines:
            what = line["what"] if line["what"] != above else ""
            above = line["what"]
            ratio = "" if line["ratio"] is None else f"{line['ratio']:.2f}×"
            value = f"{format_number(line['value'])} {line['unit']}"
            rows.append([what, line["way"], value, ratio])
    except (OSError, ValueError, KeyError) as error:
        raise PageError(f"{path} cannot be shown ({error}); make it with `make bench`.") from error
    head = ["What", "Way", "Value", "Against the first"]
    return f"{made}, with {versions}.\n\n" + table(head, rows, [38, 28, 18, 16], "benchmarks")


def runs(root: Path) -> str:
    """List the results, and the configs that have none."""
    found = sorted(path.parent for path in results.RESULTS.glob("[!.]*/[!.]*/metrics.json"))
    rows = []
    for folder in found:
        result = read_results(folder.parent.name, folder.name)
        first = result.rows[0]
        seconds = max(row.wall_s for row in result.rows)  # each row has the time up to its own
        minutes = f"{format_number(seconds / 60)} min" if seconds >= 60 else f"{seconds:.0f} s"
        seeds = count(len(first.seeds), "seed")
        label = f"`{result.name}/{result.profile}`"
        rows.append([label, first.device, minutes, seeds, f"`{first.commit}`"])
    done = {folder.parent.name for folder in found}
    for path in sorted((root / "configs").glob("*.yaml")):
        if path.stem not in done:
            rows.append([f"`{path.stem}`", "no result yet", "", "", ""])
    return table(["Run", "Device", "Time", "Seeds", "Commit"], rows, [34, 24, 14, 12, 16], "runs")
