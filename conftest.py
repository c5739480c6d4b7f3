"""Collect the chapters as tests: each code cell runs, and prints what its reference says.

``pytest chapters/0_background/flows.md`` tests one chapter; ``--update-reference`` rewrites its
reference in ``book/reference/<profile>/`` and leaves it alone when a cell raises. What is compared,
and how closely, is described in ``book/_ext/chapter_reference.py``. Chapters are executed through
the book's cache (``book/_ext/chapter_cache.py``), so that one execution serves the book and the
tests. A cell fails if it raises, writes to standard error, shows a figure without alternative text,
or prints something else than its reference. A chapter fails if its reference is missing or holds
cells that it no longer has. With ``BOOK_PROFILE=gpu`` the chapters are skipped by name where there
is no GPU.
"""

import functools
from collections import Counter
from pathlib import Path

import chapter_cache
import chapter_reference
import pytest
from nbval.plugin import IPyNbCell, IPyNbFile, NbCellError

import lib  # noqa: F401  # before any test imports torch: it settles on one thread a process

ORIGIN = "outputs of a chapter"
UPDATE = "rewrite it with `pytest --update-reference` (or `make reference`) and read the diff."


def pytest_addoption(parser):
    """Add the option that rewrites references."""
    parser.addoption(
        "--update-reference",
        action="store_true",
        help="rewrite the reference outputs of the collected chapters",
    )


def pytest_collect_file(file_path, parent):
    """Collect all of ``chapters/``, and the book's own pages that are executed."""
    if file_path.suffix != ".md":
        return None
    top = file_path.relative_to(parent.config.rootpath).parts[0]
    if top == "chapters" or (top == "book" and chapter_cache.is_chapter(file_path)):
        return ChapterFile.from_parent(parent, path=file_path)
    return None


@functools.cache
def gpu_is_missing():
    """Tell whether the profile needs a GPU that is not there."""
    if chapter_cache.profile() != "gpu":
        return False
    import torch

    return not torch.cuda.is_available()


@functools.cache
def valid_cache(root: Path) -> Path:
    """Locate the cache of this session; its digest takes a moment to compute."""
    return chapter_cache.cache_folder(root)


def pytest_terminal_summary(terminalreporter):
    """Say how many chapters were executed, and how many by the book or earlier tests."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    origins = Counter(
        value for report in reports for key, value in report.user_properties if key == ORIGIN
    )
    if origins:
        counts = ", ".join(f"{n} {origin}" for origin, n in sorted(origins.items()))
        terminalreporter.write_line(f"Outputs of chapters: {counts}.")


class ChapterFile(IPyNbFile):
    """A chapter; nbval's file, which reads MyST and is executed through the cache."""

    def collect(self):
        """Yield a test for each code cell, and one for the reference as a whole."""
        root = self.config.rootpath
        try:
            chapter_cache.check_header(self.path, root)
        except ValueError as error:
            raise self.CollectError(str(error)) from error
        cells = chapter_cache.code_cells(chapter_cache.read_chapter(self.path, root))
        for number, cell in enumerate(cells):
            yield ChapterCell.from_parent(
                self, name=f"Cell {number}", cell_num=number, cell=cell, options={}
            )
        yield ChapterReference.from_parent(self, name="reference")

    def setup(self):
        """Execute the chapter, and read its reference or write it."""
        if gpu_is_missing():
            pytest.skip(f"{self.name} under BOOK_PROFILE=gpu needs a CUDA device")
        root = self.config.rootpath
        execution = chapter_cache.execute(self.path, root, valid_cache(root))
        self.cells = chapter_cache.code_cells(execution.notebook)
        self.error = execution.error
        self.origin = "from the cache" if execution.cached else "executed now"
        path = chapter_reference.reference_path(self.path, root, chapter_cache.profile())
        self.reference_name = path.relative_to(root).as_posix()
        if self.config.option.update_reference and self.error is None:
            chapter_reference.write_reference(path, self.cells)
        self.reference_exists = path.exists()
        sections = chapter_reference.read_reference(path) if self.reference_exists else []
        self.references, self.stale = chapter_reference.match_sections(self.cells, sections)


class ChapterCell(IPyNbCell):
    """A code cell; nbval's cell, compared with tolerances."""

    def runtest(self):
        """Check that the cell ran, kept silent on standard error, and printed its reference."""
        cell = self.parent.cells[self.cell_num]
        raised = any(output.output_type == "error" for output in cell.outputs)
        if raised and "raises-exception" not in cell.metadata.get("tags", []):
            self.raise_cell_error("The cell raised an error.", self.parent.error)
        if self.parent.error and cell.execution_count is None:
            pytest.skip(f"{self.parent.name}: a cell before this one raised an error")
        if warning := chapter_reference.error_text(cell):
            self.raise_cell_error("The cell wrote to standard error.", warning)
        if chapter_reference.shows_silent_figure(cell):
            self.raise_cell_error("The cell's figure needs `mystnb: {image: {alt: ...}}`.")
        printed = chapter_reference.printed_text(cell)
        reference = self.parent.references[self.cell_num]
        if self.parent.reference_exists and reference is None and printed:
            self.raise_cell_error(
                f"The cell is new or was edited and {self.parent.reference_name} lacks it: {UPDATE}"
            )
        if reference is not None:
            within = chapter_reference.tolerance(cell)
            if difference := chapter_reference.compare(printed, reference, within):
                self.raise_cell_error(f"The cell's output changed: {difference}")

    def repr_failure(self, excinfo):
        """Report a failure beginning with its sentence, so that the summary quotes it."""
        error = excinfo.value
        if isinstance(error, NbCellError):
            return "\n\n".join(filter(None, (str(error), error.source, error.inner_traceback)))
        return super().repr_failure(excinfo)


class ChapterReference(pytest.Item):
    """The reference of a chapter as a whole."""

    def runtest(self):
        """Check that the chapter ran to its end and its reference holds its cells alone."""
        chapter = self.parent
        self.user_properties.append((ORIGIN, chapter.origin))
        if chapter.error:  # the only sign of a cell that ran out of time
            reason = chapter.error.splitlines()[0]
            raise ReferenceFailure(f"{chapter.name} did not run to its end: {reason}")
        if not chapter.reference_exists:
            raise ReferenceFailure(f"{chapter.reference_name} is missing: {UPDATE}")
        if chapter.stale:
            raise ReferenceFailure(
                f"{chapter.reference_name} holds {chapter.stale} cell(s) that the chapter no "
                f"longer has: {UPDATE}"
            )

    def repr_failure(self, excinfo):
        """Report the sentence alone."""
        if isinstance(excinfo.value, ReferenceFailure):
            return str(excinfo.value)
        return super().repr_failure(excinfo)

    def reportinfo(self):
        """Name the test in a report."""
        return self.path, None, f"{self.parent.name}: reference"


class ReferenceFailure(Exception):
    """A chapter has no end to compare, or its reference is missing or holds too much."""
