"""The generated pages, on a tiny book with planted errors and on this one."""

import copy
import json
import re
from pathlib import Path

import page_deviations
import page_equations
import page_scoreboard
import page_status
import pytest
import yaml
from page_scoreboard import NEAREST_FIRST, availability, paper_tables, read_board
from page_text import PageError, chapters

from lib import ROOT, results
from lib.papers import PAPERS

CHAPTER = """---
kernelspec: {display_name: Python 3, language: python, name: python3}
---
(ch-toy)=
# A toy

**Paper** one · **Runs** `toy`, `other` · **Data** none

$$
x = 1 \\qquad \\text{[TNF (7)]}
$$ (tnf-7)

% no code: a definition
$$
y = 2 \\qquad \\text{[TNF (8)]}
$$ (tnf-8)

$$
z = 3 \\qquad \\text{[TNF (9)]}
$$ (tnf-9)

## Deviations

| id | paper | authors' code | ours | measured effect |
|---|---|---|---|---|
| TNF-one | $|x|$ | none | {eq}`tnf-7` | halves the loss |
| TNF-two | a | b | c | not measured yet |

## Exercises and summary

| id | paper | authors' code | ours | measured effect |
|---|---|---|---|---|
| TNF-three | a | b | c | d |
""".replace("$|x|$", r"$\|x\|$")
LISTED = {
    "elsewhere": {},
    "taming": {
        "short": "Taming",
        "groups": [
            {
                "title": "Table 1",
                "items": [
                    {"label": "4 images", "says": "to {DF_tamed}", "paths": ["table_1/4"]},
                    {"label": "8 images", "says": "to {DF_tamed}", "paths": ["table_1/8"]},
                    {"label": "Figure 2", "says": "empty", "judged_by": ["toy/centre"]},
                ],
            }
        ],
    },
}
LIBRARY = '''
def distance(x):
    """Measure.

    Implements TNF Eq. (7).
    """


def stray():
    """Do. Implements TNF Eqs. (10), (11)."""
'''
TESTS = """
from lib.toy import distance

def helper(x):
    return distance(x)

CHECKS = [helper]

def test_through_a_helper():
    for check in CHECKS:
        check(1)

def test_of_something_else():
    pass
"""


class Book:
    """A tiny book on disk."""

    def __init__(self, root: Path):
        self.root = root
        self.write("book/_toc.yml", "root: book/intro\nchapters: [{file: chapters/1_part/1_toy}]")
        self.write("chapters/1_part/1_toy.md", CHAPTER)
        self.write("_config.yml", "repository: {url: ''}")
        self.list(LISTED)

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf8")

    def list(self, listed: dict) -> None:
        self.write("book/scoreboard.yaml", yaml.safe_dump(listed, sort_keys=False))

    def config(self, run: str, *entries: tuple) -> dict:
        """Write a config whose entries are (quantity, paper, rule) and a weaker rule."""
        keys = ("quantity", "paper", "reproduced_if", "same_ordering_if")
        verdict = [{"claim": "It holds", **dict(zip(keys, e, strict=False))} for e in entries]
        config = {"experiment": "toy", "verdict": verdict}
        self.write(f"configs/{run}.yaml", yaml.safe_dump(config))
        return config

    def run(self, run: str, *entries: tuple, profile: str = "cpu", **values: float) -> None:
        config = self.config(run, *entries)
        folder = f"results/{run}/{profile}"
        common = {
            "sd": None, "seeds": [0, 1], "n_samples": 8, "data": "toy",
            "feature_extractor": None, "preprocessing": None, "device": "1 CPU core",
            "commit": "abc", "config_sha": "def",
        }  # fmt: skip
        rows = [
            {"quantity": quantity, "value": value, "wall_s": 90.0 + number, **common}
            | {"unit": "Fréchet distance" if quantity.startswith("frechet") else ""}
            for number, (quantity, value) in enumerate(values.items())
        ]
        self.write(f"{folder}/metrics.json", json.dumps(rows))
        self.write(f"{folder}/config.yaml", yaml.safe_dump(config))

    def verdicts(self) -> dict[str, str]:
        return {item.label: item.verdict for item in read_board(self.root).items}


CENTRE = ("centre", None, "< 0.1", "< 0.3")
TAMED, BASE = "taming/table_1/4/DF_tamed", "taming/table_1/4/DF_base"


@pytest.fixture
def book(tmp_path, monkeypatch) -> Book:
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results")
    monkeypatch.delenv("BOOK_PROFILE", raising=False)
    book = Book(tmp_path)
    book.config("toy", CENTRE)
    return book


def test_what_no_run_has_measured_is_not_attempted(book):
    assert set(book.verdicts().values()) == {"not attempted"}
    page = paper_tables(book.root, "taming")
    assert page.count("[not attempted]") == 3 and "`toy` (not run yet)" in page
    assert "To 7.4e-6." in page


@pytest.mark.parametrize(
    ("value", "verdict"),
    [(0.05, "reproduced"), (0.2, "same ordering"), (0.5, "not reproduced")],
)
def test_the_rule_and_the_result_decide(book, value, verdict):
    book.run("toy", CENTRE, centre=value)
    assert book.verdicts()["Figure 2"] == verdict
    page = paper_tables(book.root, "taming")
    assert f"[{verdict}]" in page and "{ref}`ch-toy`, `toy/cpu`" in page
    counts = page_scoreboard.counts_table(book.root)
    assert re.search(rf"\[{verdict}\].*\n  - 1\n", counts) and "**listed**\n  - **3**" in counts


def test_a_row_gets_the_worst_of_what_was_measured_and_tells_the_rest(book):
    entries = [("a", TAMED, "< 1"), ("b", BASE, "< 1"), ("c", BASE, "< 1")]
    book.run("faces", *entries, a=0.5, b=2.0)
    assert book.verdicts() == {
        "4 images": "not reproduced",
        "8 images": "not attempted",
        "Figure 2": "not attempted",
    }
    page = paper_tables(book.root, "taming")
    assert "1 reproduced, 1 not reproduced, 1 not attempted" in page
    assert "a 0.5 (2 seeds); b 2 (2 seeds)." in page


def test_a_frechet_distance_stands_beside_that_of_before(book):
    book.run("faces", ("frechet_a_b", TAMED, "< 1"), frechet_a_b=2.0, frechet_base=1.0)
    assert "(2 seeds), before 1." in paper_tables(book.root, "taming")
    measured = {"frechet_a_b": 2.0, "frechet_base": 1.0, "frechet_a_original": 3.0}
    book.run("faces", ("frechet_a_b", TAMED, "< 1"), **measured)
    assert "(2 seeds), before 3." in paper_tables(book.root, "taming")


def test_what_a_chapter_shows_without_a_rule_says_so(book):
    assert "no rule" not in paper_tables(book.root, "taming")
    listed = copy.deepcopy(LISTED)
    listed["taming"]["groups"][0]["items"][1]["chapter"] = "ch-toy"
    book.list(listed)
    assert paper_tables(book.root, "taming").count("shown, but no rule judges it") == 1
    assert book.verdicts()["8 images"] == "not attempted"


def test_the_profile_nearest_to_the_paper_counts_and_smoke_never(book):
    book.run("toy", CENTRE, profile="smoke", centre=0.05)
    assert book.verdicts()["Figure 2"] == "not attempted"
    for profile, value in zip(reversed(NEAREST_FIRST), (0.05, 0.2, 0.5), strict=True):
        book.run("toy", CENTRE, profile=profile, centre=value)
        judged = read_board(book.root).items[2].judged
        assert [j.run for j in judged] == [f"toy/{profile}"]
    assert book.verdicts()["Figure 2"] == "not reproduced"


def test_a_run_that_is_no_attempt_stands_beside_the_paper_only(book):
    book.run("plane", ("a", TAMED, "< 1"), a=0.5)
    assert book.verdicts()["4 images"] == "reproduced"
    book.list(LISTED | {"elsewhere": {"plane": "not faces"}})
    assert book.verdicts()["4 images"] == "not attempted"
    own = page_scoreboard.own_claims(book.root)
    assert "Beside the paper's 7.4e-6 (Table 1)." in own and "for orientation: not faces" in own


def test_claims_without_a_number_of_the_paper_are_our_own(book):
    book.run("toy", CENTRE, ("edge", None, "< 1"), centre=0.05, edge=2.0)
    own = page_scoreboard.own_claims(book.root)
    assert "edge 2 (2 seeds)" in own and "centre" not in own
    assert "1 claim: 1 not reproduced.\nShown in {ref}`ch-toy`." in own


def test_a_number_that_the_list_leaves_out_gets_its_own_line(book):
    book.run("faces", ("a", "taming/claims/figure_6/limit", "> 1"), a=2.0)
    assert read_board(book.root).items[-1].label == "Figure 6"
    assert "### Further numbers" in paper_tables(book.root, "taming")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chapter": "ch-gone"}, "links 'Figure 2' to 'ch-gone', which is no chapter's label"),
        ({"judged_by": ["toy/gone"]}, "by 'toy/gone', which no config has"),
        ({"variants": ["gone"]}, "the run 'gone', which has no config"),
        ({"verdict": "reproduced"}, "unknown key 'verdict'"),
    ],
)
def test_wrong_names_in_the_list_are_refused(book, change, message):
    listed = yaml.safe_load(yaml.safe_dump(LISTED))
    listed["taming"]["groups"][0]["items"][2] |= change
    book.list(listed)
    with pytest.raises(PageError, match=message):
        read_board(book.root)
    book.list(LISTED | {"elsewhere": {"gone": "why"}})
    with pytest.raises(PageError, match="the run 'gone'"):
        read_board(book.root)


@pytest.fixture(scope="module")
def board():
    return read_board(ROOT)


def test_the_scoreboard_lists_every_table_row_and_figure_once(board):
    wanted = []
    for path in sorted(PAPERS.glob("*.yaml")):
        paper = yaml.safe_load(path.read_text("utf8"))
        for name, block in paper["tables"].items():
            if block["kind"] == "printed" and re.match(r"Tables? |WACV", block["label"]):
                column = next(iter(block["columns"]))
                wanted += [f"{path.stem}/{name}/{row}/{column}" for row in block["rows"]]
        figures = [place for place in paper["claims"] if place.startswith("figure_")]
        wanted += [f"{path.stem}/claims/{place}/x" for place in figures]
    covered = {path: sum(item.covers(path) for item in board.items) for path in wanted}
    assert len(wanted) > 70 and set(covered.values()) == {1}, covered


def test_missing_numbers_of_the_papers_are_said_to_be_missing(board):
    said = {(item.group, item.label): availability(item) for item in board.items}
    assert said["Table 1: forget a person of the training set", "4 images"] == ""
    cifar = said["Table 1, CIFAR-10: forget airplanes", "without replay"]
    assert cifar == "The paper's numbers are not available to us."
    mnist = said["Table 1, MNIST: forget the digit 0", "original model"]
    assert mnist == "Of the paper's 5 numbers, 2 are available to us."
    assert said["Tables", "Tables 1 to 8"] == "The content is not known to us."


def test_runs_named_by_chapters_have_configs():
    named = {run for chapter in chapters(ROOT) for run in chapter.runs}
    assert named and named <= {path.stem for path in (ROOT / "configs").glob("*.yaml")}


def test_a_chapter_may_shorten_the_names_of_its_runs(book):
    book.write("chapters/1_part/1_toy.md", CHAPTER.replace("`other`", "`faces` and its `_big`"))
    assert chapters(book.root)[0].runs == ["toy", "faces", "faces_big"]


def test_deviations_are_gathered(book):
    one, two = page_deviations.all_deviations(book.root)
    assert (one.id, one.paper, one.ours) == ("TNF-one", r"$\|x\|$", "{eq}`tnf-7`")
    assert one.is_measured and not two.is_measured
    page = page_deviations.part_deviations(book.root, "1_part")
    assert "{ref}`ch-toy`" in page and "halves the loss" in page and "TNF-three" not in page
    assert "**2 deviations** in 1 chapter" in page_deviations.counts(book.root)
    assert "No chapter" in page_deviations.part_deviations(book.root, "2_part")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("| TNF-two", "| TNF-one", "Two deviations have the id 'TNF-one'"),
        ("| a | b | c | not", "| a | b | not", "'TNF-two' in chapters/1_part/1_toy.md has 4"),
        ("authors' code", "code", "need a table: id | paper"),
    ],
)
def test_wrong_tables_of_deviations_are_refused(book, old, new, message):
    book.write("chapters/1_part/1_toy.md", CHAPTER.replace(old, new, 1))
    with pytest.raises(PageError, match=re.escape(message)):
        page_deviations.all_deviations(book.root)


def test_every_part_with_deviations_is_on_the_page():
    page = (ROOT / "book/deviations.md").read_text("utf8")
    found = page_deviations.all_deviations(ROOT)
    assert found
    assert {d.chapter.part for d in found} <= set(re.findall(r"\{deviations\} (\w+)", page))


def test_equations_tell_what_is_missing(book):
    book.write("lib/toy.py", LIBRARY)
    book.write("tests/test_toy.py", TESTS)
    book.write("tests/test_other.py", "def test_distance(distance):\n    distance(1)\n")
    found = {e.label: (e.problem, e.no_code) for e in page_equations.all_equations(book.root)}
    assert found == {
        "tnf-7": (None, None),
        "tnf-8": (None, "a definition"),
        "tnf-9": ("no function yet", None),
        "tnf-10": ("no chapter shows it", None),
        "tnf-11": ("no chapter shows it", None),
    }
    page = page_equations.paper_equations(book.root, "TNF")
    place, function = "Eq. {eq}`tnf-7` of {ref}`ch-toy`", "*Function:* `distance` in lib/toy.py:2"
    assert f"{place}\n    \n    {function}\n" in page
    assert "$$\n    x = 1\n    $$\n" in page  # without the number of the paper
    assert "*Tests:* `test_through_a_helper` in tests/test_toy.py\n" in page
    assert "**no function yet**" in page and "**no test names it**" in page
    assert "No chapter" in page_equations.paper_equations(book.root, "FU")
    book.write("_config.yml", "repository: {url: https://x.org/r, branch: main}")
    page = page_equations.paper_equations(book.root, "TNF")
    assert "[lib/toy.py:2](https://x.org/r/blob/main/lib/toy.py#L2)" in page


def test_status_reports_what_is_there(book):
    book.run("toy", CENTRE, centre=0.05, edge=2.0)
    book.config("planned")
    page = page_status.runs(book.root)
    assert "`toy/cpu`\n  - 1 CPU core\n  - 1.52 min\n  - 2 seeds\n  - `abc`" in page
    assert "`planned`\n  - no result yet" in page
    times = page_status.chapter_times(book.root)
    assert "{ref}`ch-toy`\n  - not measured\n  - 0 cells\n  - no reference for cpu" in times
    book.write("_build/.executed/seconds.json", '{"chapters/1_part/1_toy.md": 130.2}')
    assert "130 s, longer than two minutes" in page_status.chapter_times(book.root)
    assert re.search(r"Cores\n  - \d+", page_status.machine(book.root))
    assert re.search(r"torch\n  - \d", page_status.versions(book.root))


def test_the_directives_make_sections_links_and_warnings(book, tmp_path):
    from sphinx.application import Sphinx

    book.write("chapters/1_part/1_toy.md", CHAPTER)
    page = "# Page\n\n## Taming\n\n```{scoreboard} taming\n```\n\n```{equations} TNF\n```\n"
    book.write("index.md", page + "\n```{toctree}\nchapters/1_part/1_toy\n```\n")
    book.write("book/wrong.md", "---\norphan: true\n---\n# Wrong\n\n```{scoreboard} nothing\n```\n")
    book.run("toy", CENTRE, centre=0.05)
    overrides = {
        "extensions": ["myst_parser", "generated_pages"],
        "myst_enable_extensions": ["attrs_inline", "dollarmath"],
    }
    out = tmp_path / "out"
    with open(tmp_path / "warnings", "w+") as warnings:
        app = Sphinx(
            book.root, None, out, out / "trees", "html", overrides, None, warnings, keep_going=True
        )
        app.build()
        warnings.seek(0)
        said = [line for line in warnings if "WARNING" in line or "ERROR" in line]
    assert len(said) == 1 and "The scoreboard lists nothing of 'nothing'" in said[0]
    html = (out / "index.html").read_text("utf8")
    assert '<h3>Table 1<a class="headerlink"' in html
    assert '<span class="verdict reproduced">reproduced</span>' in html
    assert 'href="chapters/1_part/1_toy.html#equation-tnf-7"' in html
    assert 'href="chapters/1_part/1_toy.html#ch-toy"' in html
