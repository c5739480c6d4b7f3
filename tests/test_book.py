"""The house style of the chapters, checked by functions that return what they miss."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import chapter_cache
import pytest
import yaml
from page_equations import CITED, LABELLED

from lib import ROOT

PARTS = (
    "The claim",
    "The idea on a toy",
    "Objective and code",
    "Checks",
    "The run",
    "Results",
    "Deviations",
    "Exercises and summary",
)
FIRST_BOX = re.compile(r"^:::+\{admonition\} Before you run this page$", re.M)
MAX_CELLS, MAX_LINES, MAX_WORDS = 25, 25, 2500
MAX_BYTES = 16 * 2**20
PAPERS = {"TNF": "1_taming_flows", "SA": "2_selective_amnesia", "FU": "3_feature_unlearning"}

CHAPTERS = sorted((ROOT / "chapters").rglob("*.md"))
BACKGROUND = [path for path in CHAPTERS if path.parent.name == "0_background"]
METHOD = [path for path in CHAPTERS if path.parent.name != "0_background"]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "book").glob("*.md"), *CHAPTERS])


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def fences_removed(text: str) -> str:
    """Delete fenced code, whose comments look like headings."""
    return re.sub(r"^(`{3,})[^`\n]*\n.*?^\1\s*$", "", text, flags=re.M | re.S)


def headings(text: str) -> list[str]:
    return re.findall(r"^## (.+?)\s*$", fences_removed(text), re.M)


def missing_parts(text: str) -> list[str]:
    """Compare a method chapter with the nine parts and their order."""
    problems = [] if FIRST_BOX.search(text) else ["no box 'Before you run this page'"]
    found = [heading for heading in headings(text) if heading in PARTS]
    if found != list(PARTS):
        problems.append(f"parts {found} instead of {list(PARTS)}")
    return problems


def missing_background_parts(text: str) -> list[str]:
    """Ask of a background chapter the first box and exercises."""
    problems = [] if FIRST_BOX.search(text) else ["no box 'Before you run this page'"]
    if not any("Exercises" in heading for heading in headings(text)):
        problems.append("no section of exercises")
    return problems


def long_cells(sources: list[str]) -> list[str]:
    """Count the code cells of a chapter and their lines."""
    problems = [f"{len(sources)} code cells"] if len(sources) > MAX_CELLS else []
    for number, source in enumerate(sources, start=1):
        lines = len(source.strip().splitlines())
        if lines > MAX_LINES:
            problems.append(f"code cell {number} has {lines} lines")
    return problems


def images_without_alt(text: str) -> list[str]:
    """List images that a page includes without alternative text."""
    silent = re.findall(r"!\[\s*\]\(.*?\)|<img(?![^>]*\balt=\"[^\"])[^>]*>", text)
    for directive in re.finditer(
        r"^(`{3,}|:{3,})\{(?:figure|image)\} .*?\n(.*?)^\1", text, re.M | re.S
    ):
        if not re.search(r"^:alt: \S", directive[2], re.M):
            silent.append(directive[0].splitlines()[0])
    return silent


def broken_links(text: str, folder: Path) -> list[str]:
    """List links to files that are not there."""
    targets = re.findall(r"\]\(([^)\s]+)\)", fences_removed(text))
    local = [target.split("#")[0] for target in targets if not re.match(r"\w+:|#", target)]
    return [target for target in local if not (folder / target).exists()]


def labelled_equations(text: str) -> dict[str, bool]:
    """Map the label of each equation of a paper to whether code must implement it."""
    found = {}
    for match in LABELLED.finditer(text):
        before = text[: match.start()].splitlines()
        opening = max(i for i, line in enumerate(before) if line.startswith("$$"))
        found[match[1]] = not before[opening - 1].startswith("% no code: ")
    return found


def cited_equations(source: str) -> set[str]:
    """List the labels of the equations that docstrings say they implement."""
    joined = re.sub(r"\s+", " ", source)
    return {
        f"{paper.lower()}-{number.lower()}"
        for paper, numbers in CITED.findall(joined)
        for number in re.findall(r"\((\w+)\)", numbers)
    }


def private_words(text: str) -> list[str]:
    """List paths that exist on one machine only."""
    outside = "../" + "shared"  # put together here, so that this file passes its own test
    return re.findall(rf"{re.escape(outside)}|(?<![\w.:/~-])/(?:work|home|root)/", text)


def tracked_files() -> list[Path]:
    """List the files that git has, or would take."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("the list of files needs a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    paths = (ROOT / name for name in listed.stdout.decode().split("\0") if name)
    return [path for path in paths if path.is_file()]


def test_there_are_chapters():
    assert BACKGROUND and METHOD


@pytest.mark.parametrize("path", METHOD, ids=name)
def test_method_chapter_has_its_nine_parts(path):
    assert missing_parts(path.read_text("utf8")) == []


@pytest.mark.parametrize("path", BACKGROUND, ids=name)
def test_background_chapter_has_its_parts(path):
    assert missing_background_parts(path.read_text("utf8")) == []


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_code_cells_are_few_and_short(path):
    notebook = chapter_cache.read_chapter(path, ROOT)
    assert long_cells([cell.source for cell in chapter_cache.code_cells(notebook)]) == []


@pytest.mark.parametrize("path", CHAPTERS, ids=name)
def test_chapter_is_not_too_long(path):
    notebook = chapter_cache.read_chapter(path, ROOT)
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert len(" ".join(prose).split()) <= MAX_WORDS


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_images_have_alternative_text(path):
    assert images_without_alt(path.read_text("utf8")) == []


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_to_files(path):
    assert broken_links(path.read_text("utf8"), path.parent) == []


def test_table_of_contents_lists_every_chapter():
    toc = yaml.safe_load((ROOT / "book/_toc.yml").read_text("utf8"))
    listed = re.findall(r"'file': '(chapters/.*?)'", str(toc))
    assert sorted(listed) == [name(path.with_suffix("")) for path in CHAPTERS]


@pytest.mark.parametrize("paper", PAPERS)
def test_equations_and_functions_cite_each_other(paper):
    prefix = paper.lower() + "-"
    labelled = {}
    for path in CHAPTERS:
        labelled |= labelled_equations(path.read_text("utf8"))
    cited = {c for p in (ROOT / "lib").rglob("*.py") for c in cited_equations(p.read_text("utf8"))}
    with_code = {label for label, code in labelled.items() if code and label.startswith(prefix)}
    assert with_code <= cited, "equations without a function"
    if (ROOT / "chapters" / PAPERS[paper] / "1_method.md").exists():
        ours = {label for label in cited if label.startswith(prefix)}
        assert ours, "no function cites the paper"
        assert ours <= labelled.keys(), "functions whose equation no chapter shows"


def test_no_private_paths():
    exempt = ROOT / ".ci/run"  # looks for data snapshots beside the checkout
    binary = {".png", ".npz", ".safetensors", ".ico", ".woff2"}
    found = {}
    for path in tracked_files():
        if path.suffix not in binary and path != exempt:
            if words := private_words(path.read_text("utf8")):
                found[name(path)] = words
    assert found == {}


def test_files_are_small_and_none_is_data():
    banned = {".parquet", ".pkl", ".pickle", ".ckpt", ".pt", ".pth", ".jpg", ".jpeg", ".ipynb"}
    pictures = ("results/", "book/_static/")
    files = tracked_files()
    assert files
    assert [name(p) for p in files if p.stat().st_size > MAX_BYTES] == []
    assert [name(p) for p in files if p.suffix.lower() in banned] == []
    assert [name(p) for p in files if p.suffix == ".png" and not name(p).startswith(pictures)] == []


def test_code_is_short_and_clean():
    files = [path for path in tracked_files() if path.suffix == ".py"]
    assert [name(path) for path in files if len(path.read_text("utf8").splitlines()) > 400] == []
    for check in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, "--quiet", "."]
        checked = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf8")
        assert checked.returncode == 0, checked.stdout


GOOD = ":::{admonition} Before you run this page\n:::\n" + "".join(f"\n## {p}\n" for p in PARTS)


def test_planted_faults_of_style_are_found():
    assert missing_parts(GOOD) == []
    assert missing_parts(GOOD.replace("Before", "After"))
    assert missing_parts(GOOD.replace("## Checks\n", ""))
    assert missing_parts(GOOD.replace("## Checks", "## Chicks"))
    swapped = GOOD.replace("## Checks", "## @").replace("## The run", "## Checks")
    assert missing_parts(swapped.replace("## @", "## The run"))
    assert missing_parts(GOOD.replace("## Checks", "```python\n## Checks\n```"))
    assert missing_background_parts(GOOD) == []
    assert missing_background_parts(GOOD.replace("Exercises", "Practice"))
    assert long_cells(["a\n" * 25] * 25) == []
    assert long_cells(["a\n" * 26]) and long_cells(["a"] * 26)


def test_planted_faults_of_pictures_and_links_are_found():
    assert images_without_alt("![a flow](a.png)\n```{figure} a.png\n:alt: a flow\nText\n```") == []
    assert images_without_alt("![](a.png)")
    assert images_without_alt("```{figure} a.png\n:name: fig\n\nText\n```")
    assert images_without_alt(":::{image} a.png\n:::")
    assert images_without_alt('<img src="a.png" alt="">') and images_without_alt("<img src='a'>")
    links = "[a](conftest.py#top) [b](https://x.org) [c](#here)"
    assert broken_links(links + " [d](gone.md)", ROOT) == ["gone.md"]


def test_planted_faults_of_equations_and_paths_are_found():
    text = "$$\nx\n$$ (tnf-7)\n\n% no code: a definition\n$$\ny\n$$ (sa-1)\n"
    assert labelled_equations(text) == {"tnf-7": True, "sa-1": False}
    source = "Implements TNF Eqs. (10), (11)\n  and (14). Implements SA Eq. (3), twice SA Eq. (2)."
    assert cited_equations(source) == {"tnf-10", "tnf-11", "tnf-14", "sa-3"}
    private = ["/wor" + "k/", "../" + "shared"]
    assert private_words("see {}main and {}/x".format(*private)) == private
    assert private_words("https://x.org/work/ and lib/work/a") == []
