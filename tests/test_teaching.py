"""The teaching page: measured times alone, and a plan that names what there is."""

import re

import page_teaching
import pytest
from page_text import PageError, chapters
from test_pages import book  # noqa: F401  a fixture

from lib import ROOT
from lib.exercises import EXERCISE

PAGE = (ROOT / "book/teaching.md").read_text("utf8")


@pytest.mark.parametrize(
    ("seconds", "written"),
    [(0.4, "0 s"), (89.4, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h")],
)
def test_a_duration_has_a_readable_unit(seconds, written):
    assert page_teaching.duration(seconds) == written


def test_costs_of_chapters_and_runs_are_measured_or_said_not_to_be(book):  # noqa: F811
    book.config("other")
    assert page_teaching.chapter_costs(book.root).count("not measured") == 3
    book.run("toy", centre=1.0, edge=2.0)  # the second row was written after 91 s
    book.write("_build/.executed/seconds.json", '{"chapters/1_part/1_toy.md": 31.2}')
    page = page_teaching.chapter_costs(book.root)
    assert "{ref}`ch-toy`\n  - 31 s\n  - 2 runs\n" in page
    assert "*CPU:* 2 min and 1 run not measured\n  - *GPU:* not measured" in page
    page = page_teaching.run_costs(book.root)
    assert "`toy`\n  - cpu\n  - *CPU:* 2 min, 1 CPU core\n  - *GPU:* not measured" in page
    assert "`other`\n  - cpu\n  - *CPU:* not measured\n" in page


def test_a_run_on_a_gpu_has_its_own_time_and_smoke_has_none(book):  # noqa: F811
    book.run("toy", profile="smoke", centre=1.0)
    assert "2 min" not in page_teaching.run_costs(book.root)
    book.run("toy", profile="gpu", centre=1.0)
    path = book.root / "results/toy/gpu/metrics.json"
    path.write_text(path.read_text("utf8").replace("1 CPU core", "one H200, bf16"), "utf8")
    book.write("configs/toy.yaml", "experiment: toy\ngpu: {steps: 1}\nsmoke: {steps: 1}\n")
    page = page_teaching.run_costs(book.root)
    assert "`toy`\n  - smoke, cpu, gpu\n" in page
    assert "*CPU:* not measured\n  - *GPU:* 2 min, one H200, bf16" in page


def test_a_session_adds_up_its_chapters(book):  # noqa: F811
    text = page_teaching.session_cost(book.root, "ch-toy")
    assert "1 page on one CPU core:* not measured." in text
    assert "2 runs behind it:* CPU not measured; GPU not measured." in text
    book.write("_build/.executed/seconds.json", '{"chapters/1_part/1_toy.md": 31.2}')
    book.run("toy", centre=1.0)
    book.run("other", centre=1.0)
    text = page_teaching.session_cost(book.root, "ch-toy")
    assert "31 s." in text and "CPU 3 min; GPU not measured." in text
    with pytest.raises(PageError, match="'ch-gone', which is no chapter's label"):
        page_teaching.session_cost(book.root, "ch-toy,ch-gone")


def test_the_plan_has_twelve_sessions_and_hands_out_every_exercise_of_its_chapters():
    assert re.findall(r"^### (\d+) · ", PAGE, re.M) == [str(number) for number in range(1, 13)]
    named = {
        label.strip()
        for labels in re.findall(r"\{session-cost\} (\S+)", PAGE)
        for label in labels.split(",")
    }
    by_label = {chapter.label: chapter for chapter in chapters(ROOT)}
    assert named and named <= set(by_label)
    sessions = PAGE.split("## The sessions")[1].split("## How to grade")[0]
    given = set(re.findall(r"\{ref\}`(ex-[\w-]+)`", sessions))
    wanted = {
        found["label"]
        for label in named
        for found in EXERCISE.finditer(by_label[label].path.read_text("utf8"))
    }
    assert given == wanted
    for label in sorted(named):  # and says what to expect of each chapter
        discoveries = PAGE.split("### Discoveries to expect")[1].split("### ")[0]
        assert f"* {{ref}}`{label}`:" in discoveries, label


def test_every_exercise_is_on_the_list():
    page = page_teaching.exercise_list(ROOT)
    texts = [chapter.path.read_text("utf8") for chapter in chapters(ROOT)]
    wanted = [found["label"] for text in texts for found in EXERCISE.finditer(text)]
    assert re.findall(r"<(ex-[\w-]+)>`", page) == wanted


def test_no_time_of_a_machine_is_typed_into_the_plan():
    prose = re.sub(r"^```.*?^```$", "", PAGE, flags=re.M | re.S)
    typed = re.findall(r"\b[\d.]+ (?:s|seconds?|min|minutes?|h|hours?)\b", prose)
    assert typed == ["90 minutes"]  # the length of a session, which is a plan
