"""Each trap of the build has a guard, and each guard is shown to fail.

The tests run the real ``make book`` on a tiny book in a folder whose name has a space, under the
plain C locale, with this repository's configuration, extensions and static files.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import chapter_cache
import pytest

from lib import ROOT

HEADER = """---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, language: python, name: python3}
---
"""
CHAPTER = """# Chapter NAME

```{code-cell} python3
from pathlib import Path
root = Path("../..")
with open(root / "executed.log", "a") as log:
    print("NAME", file=log)
print("config says", (root / "configs/number.txt").read_text())
```
"""
FAULTS = """
![A far picture](https://example.org/a.png) and {ref}`nowhere`.
"""
STRAY = ("notes.md", ".venv2/README.md", ".pytest_cache/README.md", "lib/README.md")


@dataclass
class Book:
    """A tiny book on disk."""

    root: Path

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf8")
        return path

    def write_chapter(self, name: str, text: str = CHAPTER, header: str = HEADER) -> Path:
        return self.write(f"chapters/part/{name}.md", header + text.replace("NAME", name))

    def list_chapters(self, *names: str) -> None:
        files = "".join(f"\n  - file: chapters/part/{name}" for name in names)
        self.write("book/_toc.yml", f"format: jb-book\nroot: book/intro\nchapters:{files}\n")

    def make(self, *arguments: str) -> subprocess.CompletedProcess:
        """Run make in the book, with the running interpreter in the place of .venv."""
        return subprocess.run(
            ["make", "-o", ".venv/installed", *arguments],
            cwd=self.root,
            env={"LC_ALL": "C", "BOOK_PROFILE": "cpu"}
            | {k: os.environ[k] for k in ("PATH", "HOME", "BOOK_DATA") if k in os.environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf8",
        )

    def executed(self) -> list[str]:
        """List the chapters that were executed since the last call."""
        log = self.root / "executed.log"
        names = sorted(log.read_text("utf8").split()) if log.exists() else []
        log.unlink(missing_ok=True)
        return names

    def page(self, name: str) -> Path:
        return self.root / f"_build/html/chapters/part/{name}.html"


@pytest.fixture(scope="module")
def book(tmp_path_factory) -> Book:
    """A book of two chapters, built once."""
    book = Book(tmp_path_factory.mktemp("a book"))
    for name in ("Makefile", "_config.yml", "requirements.txt", "pyproject.toml"):
        shutil.copy2(ROOT / name, book.root)
    ours = shutil.ignore_patterns("*.md", "_toc.yml", "reference", "__pycache__")
    shutil.copytree(ROOT / "book", book.root / "book", ignore=ours)
    (book.root / ".venv").symlink_to(sys.prefix)
    book.write("book/intro.md", "# A book\n")
    book.write("configs/number.txt", "101")
    book.write_chapter("one")
    book.write_chapter("two")
    book.list_chapters("one", "two")
    for name in STRAY:
        book.write(name, "# Stray\n")
    built = book.make("book")
    assert built.returncode == 0, built.stdout
    index = built.stdout.splitlines()[-1]
    assert Path(index) == book.root / "_build/html/index.html" and Path(index).exists()
    assert book.executed() == ["one", "two"]
    return book


def test_stray_folders_are_not_published(book):
    published = {p.name for p in (book.root / "_build/html").rglob("*") if "Stray" in read(p)}
    assert not published
    assert "config says 101" in read(book.page("one"))


def read(path: Path) -> str:
    return path.read_text("utf8", errors="ignore") if path.suffix in (".html", ".md") else ""


def test_edit_of_one_chapter_executes_it_alone_and_removed_pages_go(book):
    book.write_chapter("one", CHAPTER.replace("config says", "now it says"))
    book.list_chapters("one")
    (book.root / "chapters/part/two.md").unlink()
    built = book.make("book")
    book.write_chapter("two")
    book.list_chapters("one", "two")
    assert built.returncode == 0, built.stdout
    assert book.executed() == ["one"]
    assert "now it says 101" in read(book.page("one"))
    assert not book.page("two").exists()


def test_edit_of_a_config_is_never_served_stale_and_tests_share_the_execution(book, monkeypatch):
    book.write_chapter("one")
    book.write("configs/number.txt", "202")
    built = book.make("preview")
    assert built.returncode == 0, built.stdout
    assert book.executed() == ["one", "two"]
    assert "config says 202" in read(book.page("two"))
    monkeypatch.setenv("BOOK_PROFILE", "cpu")
    folder = chapter_cache.cache_folder(book.root)
    chapter = chapter_cache.execute(book.root / "chapters/part/two.md", book.root, folder)
    assert chapter_cache.code_cells(chapter.notebook)[0].outputs[0].text == "config says 202\n"
    assert book.executed() == []


@pytest.fixture
def broken(book):
    """The book with a third chapter, for a test to break; removed afterwards."""
    book.list_chapters("one", "two", "three")
    yield book
    book.list_chapters("one", "two")
    (book.root / "chapters/part/three.md").unlink()
    book.executed()


def test_raising_cell_fails_the_build_also_the_second_time(broken):
    broken.write_chapter("three", CHAPTER.replace("print(", "raise RuntimeError('planted') #"))
    for _ in range(2):
        built = broken.make("book")
        assert built.returncode != 0
        assert "chapters/part/three.md" in built.stdout
        assert "RuntimeError: planted" in built.stdout


def test_chapter_without_header_fails_the_build(broken):
    broken.write_chapter("three", header="")
    built = broken.make("book")
    assert built.returncode != 0
    assert re.search(r"chapters/part/three.*header", built.stdout)


def test_faults_of_a_page_fail_the_build(broken):
    """One build with three faults, of which each is a warning that ``-W`` makes fatal."""
    broken.write_chapter("three", CHAPTER.replace("log)", "__import__('sys').stderr)") + FAULTS)
    built = broken.make("book")
    assert built.returncode != 0
    complaints = re.findall(r"(?:WARNING|ERROR): (.*)", built.stdout)
    for fault in ("stderr", "https://example.org/a.png", "nowhere"):
        assert any(fault in complaint for complaint in complaints), built.stdout


def test_digest_covers_all_that_can_change_an_output(tmp_path, monkeypatch):
    monkeypatch.setenv("BOOK_PROFILE", "cpu")
    monkeypatch.setenv("BOOK_DATA", str(tmp_path / "snapshots"))
    files = ("lib/a.py", "configs/a.yaml", "results/a/cpu/metrics.json", "checkpoints/a.bin")
    inputs = (*files, "book/papers/a.yaml", "snapshots/mnist/train.parquet")
    for name in inputs:
        tmp_path.joinpath(name).parent.mkdir(parents=True)
        tmp_path.joinpath(name).write_text("old", "utf8")
    digests = {chapter_cache.inputs_digest(tmp_path)}
    for name in inputs:
        tmp_path.joinpath(name).write_text("newer", "utf8")
        digests.add(chapter_cache.inputs_digest(tmp_path))
    monkeypatch.setenv("BOOK_PROFILE", "gpu")
    digests.add(chapter_cache.inputs_digest(tmp_path))
    monkeypatch.setattr(sys, "version", "4.0")
    digests.add(chapter_cache.inputs_digest(tmp_path))
    monkeypatch.setattr("importlib.metadata.distributions", lambda path: [])
    digests.add(chapter_cache.inputs_digest(tmp_path))
    assert len(digests) == 1 + len(inputs) + 3
    tmp_path.joinpath("lib/__pycache__").mkdir()
    tmp_path.joinpath("lib/__pycache__/a.pyc").write_text("compiled", "utf8")
    assert chapter_cache.inputs_digest(tmp_path) in digests


def test_last_three_caches_are_kept(tmp_path):
    for age in range(5):
        folder = tmp_path / chapter_cache.CACHES / f"old{age}"
        folder.mkdir(parents=True)
        os.utime(folder, (1000 - age, 1000 - age))
    valid = chapter_cache.cache_folder(tmp_path)
    assert {path.name for path in valid.parent.iterdir()} == {valid.name, "old0", "old1"}


def test_folder_that_cannot_be_written_is_named_without_a_traceback(book, tmp_path):
    executed = book.root / chapter_cache.CACHES
    executed.rename(tmp_path / "kept")
    executed.write_text("not a folder", "utf8")
    built = book.make("book")
    executed.unlink()
    (tmp_path / "kept").rename(executed)
    assert built.returncode != 0 and "Traceback" not in built.stdout
    assert re.search("cannot be kept in .*_build.*: Not a directory. Make", built.stdout)


def test_full_disk_is_named_before_anything_is_executed(tmp_path, monkeypatch):
    usage = type(shutil.disk_usage(tmp_path))(2**40, 2**40 - 2**21, 2**21)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="has 2 MB left, and the book needs 300 MB: delete"):
        chapter_cache.cache_folder(tmp_path)


def test_tag_of_a_cell_is_part_of_the_cache_key(book, monkeypatch):
    monkeypatch.setenv("BOOK_PROFILE", "cpu")
    folder = chapter_cache.cache_folder(book.root)
    tagged = CHAPTER.replace("python3\n", "python3\n:tags: [hide-input]\n")
    path = book.write_chapter("two", tagged)
    chapter = chapter_cache.execute(path, book.root, folder)
    assert chapter_cache.code_cells(chapter.notebook)[0].metadata.tags == ["hide-input"]
    assert book.executed() == ["two"]


def test_slowest_chapter_starts_first(tmp_path, monkeypatch):
    order = []

    def note(path, root, folder):
        order.append(path.stem)
        return chapter_cache.Execution(None, None)

    monkeypatch.setattr(chapter_cache, "KERNELS", 1)
    monkeypatch.setattr(chapter_cache, "execute", note)
    chapter_cache.write_seconds(tmp_path / "seconds.json", {"quick.md": 1.0, "slow.md": 90.0})
    paths = [tmp_path / f"{name}.md" for name in ("quick", "slow", "unknown")]
    chapter_cache.execute_all(paths, tmp_path, tmp_path / "valid")
    assert order == ["unknown", "slow", "quick"]


def test_unknown_profile_ends_with_a_sentence(book):
    ended = book.make("book", "PROFILE=huge")
    assert ended.returncode != 0
    assert "PROFILE=huge is unknown: use one of smoke cpu gpu paper." in ended.stdout


def test_gpu_profile_without_a_gpu_ends_at_once_with_a_sentence(book):
    # An empty list of visible devices hides the GPUs of a machine that has some.
    commands = ("--keep-going", "book", "preview", "test", "reference", "run")
    ended = book.make(*commands, "RUN=any", "PROFILE=gpu", "CUDA_VISIBLE_DEVICES=")
    assert ended.returncode != 0
    assert ended.stdout.count("PROFILE=gpu needs a CUDA device and none was found") == 1
    assert not re.search("jupyter-book|pytest|lib.run", ended.stdout)
