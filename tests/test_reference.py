"""The collector notices what it should, and nothing else."""

import os
import shutil
import sys
from types import SimpleNamespace

import chapter_cache
import chapter_reference
import pytest
from chapter_reference import Tolerance, compare
from nbformat.v4 import new_code_cell, new_output

from lib import ROOT

pytest_plugins = ["pytester"]

HEADER = """---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
---
# A chapter

"""
SEEDED = """```{code-cell} python3
import random
from pathlib import Path
seed = int(Path("../configs/seed.yaml").read_text())
```

```{code-cell} python3
print(f"loss {random.Random(seed).uniform(1, 2):.6f} nats")
```
"""
RAISES = """```{code-cell} python3
print("loss 1.0 nats")
raise RuntimeError("planted")
```
"""
SLEEPS = """```{code-cell} python3
import time
time.sleep(60)
```
"""
WARNS = """```{code-cell} python3
import sys
print("careful", file=sys.stderr)
```
"""


@pytest.mark.parametrize(
    ("printed", "reference", "within"),
    [
        ("loss 1.00001 nats", "loss 1.00000 nats", Tolerance()),
        ("loss  9.99999", "loss 10.00000", Tolerance()),
        ("share 0.1234", "share 0.1239", Tolerance(rtol=1e-2)),
        ("gap 3e-9", "gap -2e-9", Tolerance(atol=1e-8)),
        ("time: 1.2 s", "time: 7.4 s", Tolerance()),
        ("", "", Tolerance()),
    ],
)
def test_close_enough(printed, reference, within):
    assert compare(printed, reference, within) is None


@pytest.mark.parametrize(
    ("printed", "reference", "within"),
    [
        ("loss 1.001 nats", "loss 1.000 nats", Tolerance()),
        ("loss -1.0 nats", "loss 1.0 nats", Tolerance()),
        ("loss 1.0 bits", "loss 1.0 nats", Tolerance()),
        ("a 1.0 b 2.0", "a 2.0 b 1.0", Tolerance()),
        ("sha 12ab34cd", "sha 12ab34ce", Tolerance()),
        ("share 0.1234", "share 0.1259", Tolerance(rtol=1e-2)),
        ("loss nan", "loss 1.0", Tolerance()),
        ("one\ntwo", "one", Tolerance()),
        ("one", "one\ntwo", Tolerance()),
        ("", "time: 1.2 s", Tolerance()),
        ("the time: 1.2 s", "the time: 7.4 s", Tolerance()),
    ],
)
def test_too_far(printed, reference, within):
    assert compare(printed, reference, within).endswith(".")


def test_printed_text_drops_figures_and_addresses_only():
    outputs = [
        new_output("stream", name="stdout", text="share 0.2\n"),
        new_output("stream", name="stderr", text="a warning\n"),
        new_output("display_data", {"text/plain": "<Figure size 640x480 with 1 Axes>"}),
        new_output("execute_result", {"text/plain": "[<Line2D at 0x7f00aa>]"}),
        new_output("execute_result", {"text/plain": "Explorer(delta, sha 12ab)", "text/html": "x"}),
    ]
    cell = new_code_cell("share", outputs=outputs)
    assert chapter_reference.printed_text(cell) == "share 0.2\nExplorer(delta, sha 12ab)"
    assert chapter_reference.error_text(cell) == "a warning\n"


def test_figure_needs_alternative_text():
    figure = new_output("display_data", {"image/png": "…", "text/plain": "<Figure>"})
    described = {"mystnb": {"image": {"alt": "two clusters"}}}
    shows_silent_figure = chapter_reference.shows_silent_figure
    assert shows_silent_figure(new_code_cell("", outputs=[figure]))
    assert not shows_silent_figure(new_code_cell("", outputs=[figure], metadata=described))
    assert not shows_silent_figure(new_code_cell("", outputs=[new_output("stream", text="1")]))


def test_tags_loosen_the_numbers_of_a_cell():
    cell = new_code_cell("", metadata={"tags": ["rtol-1e-2", "atol-0.5", "hide-input"]})
    assert chapter_reference.tolerance(cell) == Tolerance(rtol=1e-2, atol=0.5)
    assert chapter_reference.tolerance(new_code_cell("")) == Tolerance(rtol=1e-4, atol=0.0)


def test_every_reference_belongs_to_a_chapter():
    for path in (ROOT / "book/reference").rglob("*.txt"):
        chapter = ROOT.joinpath(*path.relative_to(ROOT / "book/reference").parts[1:])
        assert chapter.with_suffix(".md").exists(), f"delete {path}: its chapter is gone"


@pytest.fixture
def project(pytester, monkeypatch):
    """A project of one chapter whose random seed stands in a config, as pytest sees it."""
    monkeypatch.setenv("BOOK_PROFILE", "cpu")
    monkeypatch.setattr(chapter_cache, "INPUT_FOLDERS", ("configs",))
    pytester.makeini("[pytest]\naddopts = -p no:xdist -p no:cacheprovider")
    shutil.copy(ROOT / "conftest.py", pytester.path)
    (pytester.path / "_config.yml").write_text("title: a book", "utf8")
    pytester.mkdir("configs").joinpath("seed.yaml").write_text("0", "utf8")
    pytester.mkdir("chapters").joinpath("one.md").write_text(HEADER + SEEDED, "utf8")
    return pytester


def test_life_of_a_reference(project):
    """Missing, written, equal, near, far, another seed, stale: each is told apart."""
    chapter = project.path / "chapters/one.md"
    reference = project.path / "book/reference/cpu/chapters/one.txt"

    missing = project.runpytest_inprocess()
    missing.assert_outcomes(passed=2, failed=1)
    missing.stdout.fnmatch_lines("*one.txt is missing*--update-reference*")
    missing.stdout.fnmatch_lines("Outputs of chapters: 1 executed now.")
    assert not reference.exists()

    project.runpytest_inprocess("--update-reference").assert_outcomes(passed=3)
    written = reference.read_text("utf8")
    assert "loss 1.844422 nats" in written
    equal = project.runpytest_inprocess()
    equal.assert_outcomes(passed=3)
    equal.stdout.fnmatch_lines("Outputs of chapters: 1 from the cache.")

    reference.write_text(written.replace("1.844422", "1.844440"), "utf8")
    project.runpytest_inprocess().assert_outcomes(passed=3)

    reference.write_text(written.replace("1.844422", "1.846266"), "utf8")
    far = project.runpytest_inprocess()
    far.assert_outcomes(passed=2, failed=1)
    far.stdout.fnmatch_lines("*1.844422 in line 1 is farther than rtol 0.0001*1.846266*")

    reference.write_text(written, "utf8")
    (project.path / "configs/seed.yaml").write_text("1", "utf8")
    seed = project.runpytest_inprocess()
    seed.assert_outcomes(passed=2, failed=1)
    seed.stdout.fnmatch_lines("*1.134364 in line 1 is farther*")
    seed.stdout.fnmatch_lines("Outputs of chapters: 1 executed now.")

    chapter.write_text(HEADER + SEEDED.replace("uniform(1, 2)", "uniform(0, 2)"), "utf8")
    stale = project.runpytest_inprocess()
    stale.assert_outcomes(passed=1, failed=2)
    stale.stdout.fnmatch_lines("*The cell is new or was edited*--update-reference*")
    stale.stdout.fnmatch_lines("*holds 1 cell(s) that the chapter no longer has*")


def test_raising_cell_fails_and_leaves_its_reference_alone(project):
    reference = project.path / "book/reference/cpu/chapters/one.txt"
    reference.parent.mkdir(parents=True)
    reference.write_text("kept", "utf8")
    (project.path / "chapters/one.md").write_text(HEADER + RAISES + SEEDED, "utf8")
    raised = project.runpytest_inprocess("--update-reference")
    raised.assert_outcomes(failed=2, skipped=2)
    raised.stdout.fnmatch_lines("*RuntimeError: planted*")
    assert reference.read_text("utf8") == "kept"


def test_cell_that_runs_out_of_time_fails(project, monkeypatch):
    monkeypatch.setattr(chapter_cache, "CELL_SECONDS", 1)
    (project.path / "chapters/one.md").write_text(HEADER + SLEEPS, "utf8")
    late = project.runpytest_inprocess("--update-reference")
    assert late.parseoutcomes()["failed"] >= 1
    late.stdout.fnmatch_lines("*one.md did not run to its end: A cell timed out*")


def test_standard_error_fails(project):
    (project.path / "chapters/one.md").write_text(HEADER + WARNS, "utf8")
    warned = project.runpytest_inprocess("--update-reference")
    warned.assert_outcomes(failed=1, passed=1)
    warned.stdout.fnmatch_lines("*The cell wrote to standard error.*")


def test_gpu_profile_has_its_own_reference_and_is_skipped_by_name(project, monkeypatch):
    monkeypatch.setenv("BOOK_PROFILE", "gpu")
    cuda = SimpleNamespace(is_available=lambda: os.environ["FAKE_GPU"] == "1")
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))

    monkeypatch.setenv("FAKE_GPU", "0")
    skipped = project.runpytest_inprocess("-rs")
    skipped.assert_outcomes(skipped=3)
    skipped.stdout.fnmatch_lines("*one.md under BOOK_PROFILE=gpu needs a CUDA device*")

    monkeypatch.setenv("FAKE_GPU", "1")
    project.runpytest_inprocess("--update-reference").assert_outcomes(passed=3)
    assert (project.path / "book/reference/gpu/chapters/one.txt").exists()


def test_chapter_without_header_fails(project):
    (project.path / "chapters/one.md").write_text("# A chapter\n\n" + SEEDED, "utf8")
    project.runpytest_inprocess().stdout.fnmatch_lines("*one.md has no jupytext header*")
