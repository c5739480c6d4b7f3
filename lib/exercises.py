"""Export the chapters as notebooks without solutions, for a class.

``python -m lib.exercises`` (``make exercises``) writes ``_build/exercises/<part>/<chapter>.ipynb``
for every chapter with exercises. Each solution, text and code, becomes one empty cell with a
``# TODO`` that names its exercise. A notebook holds no outputs.
"""

import re
from pathlib import Path

import jupytext
import nbformat

from lib import ROOT
from lib.checkpoints import write_atomically

EXERCISE = re.compile(r"^`{3,}\{exercise\}[ \t]*(?P<title>[^\n]*)\n:label: (?P<label>\S+)$", re.M)
SOLUTION = re.compile(
    r"^(?P<open>`{3,})\{solution-start\} (?P<label>\S+)\n.*?"
    r"^(?P<close>`{3,})\{solution-end\}\n(?P=close)$",
    re.M | re.S,
)


class ExerciseError(ValueError):
    """Say in one sentence which exercise of which chapter cannot be exported."""


def without_solutions(text: str) -> str:
    """Replace the solutions in a chapter's text by ``# TODO`` cells.

    Raises: ExerciseError if a solution belongs to no exercise or is never closed.
    """
    titles = {found["label"]: found["title"] for found in EXERCISE.finditer(text)}

    def empty_cell(found: re.Match) -> str:
        if found["label"] not in titles:
            raise ExerciseError(
                f"There is a solution of {found['label']}, but no exercise with this label; the "
                f"exercises are {', '.join(titles) or 'none'}."
            )
        return f"```{{code-cell}} ipython3\n# TODO: {titles[found['label']]}\n```"

    stripped = SOLUTION.sub(empty_cell, text)
    if left := re.search(r"\{solution[^}]*\}[^\n]*", stripped):
        raise ExerciseError(
            f"The solution {left[0]!r} was not removed; write it between solution-start and "
            "solution-end."
        )
    return stripped


def export(chapter: Path, target: Path) -> bool:
    """Write a chapter without solutions as a notebook, unless it has no exercises.

    Returns whether it was written. Raises: ExerciseError as :func:`without_solutions`.
    """
    text = chapter.read_text(encoding="utf-8")
    if not EXERCISE.search(text):
        return False
    try:
        notebook = jupytext.reads(without_solutions(text), fmt="md:myst")
    except ExerciseError as error:
        raise ExerciseError(f"{chapter.name}: {error}") from None
    write_atomically(target, nbformat.writes(notebook).encode())
    return True


def main() -> None:
    chapters, folder = ROOT / "chapters", ROOT / "_build/exercises"
    for path in sorted(chapters.glob("*/*.md")):
        target = folder / path.relative_to(chapters).with_suffix(".ipynb")
        if export(path, target):
            print(target)


if __name__ == "__main__":
    main()
