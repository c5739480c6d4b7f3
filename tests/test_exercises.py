"""The export of exercises: nothing of a solution is left, and everything else is."""

import re

import nbformat
import pytest

from lib import ROOT
from lib.exercises import EXERCISE, ExerciseError, export, without_solutions

CHAPTERS = sorted((ROOT / "chapters").glob("*/*.md"))
PAGE = """---
kernelspec: {name: python3, display_name: Python 3}
---
# Page

```{code-cell} ipython3
kept = 1
```

```{exercise} Predict first: how many?
:label: ex-many

Think.
```

````{solution-start} ex-many
:class: dropdown
````

```{code-cell} ipython3
secret = 2
```

The answer is secret too.

````{solution-end}
````

**Summary.** The end.
"""


def test_a_solution_becomes_an_empty_cell():
    text = without_solutions(PAGE)
    assert "secret" not in text and "solution" not in text
    assert "# TODO: Predict first: how many?" in text
    assert "kept = 1" in text and text.endswith("**Summary.** The end.\n")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{solution-start} ex-many", "{solution-start} ex-few", "no exercise with this label"),
        ("````{solution-end}\n````", "", "was not removed"),
    ],
)
def test_a_broken_page_is_refused(old, new, message):
    with pytest.raises(ExerciseError, match=message):
        without_solutions(PAGE.replace(old, new))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_chapter_is_exported(path, tmp_path):
    text, target = path.read_text(encoding="utf-8"), tmp_path / "sub/page.ipynb"
    labels = [found["label"] for found in EXERCISE.finditer(text)]
    solved = re.findall(r"\{solution-start\} (\S+)", text)
    assert set(solved) <= set(labels)
    assert export(path, target) == bool(labels)
    if labels:
        cells = nbformat.read(target, as_version=4).cells
        todo = [cell for cell in cells if cell.source.startswith("# TODO: ")]
        assert len(todo) == len(solved)
        code = text.count("```{code-cell}")
        inside = sum(
            part.split("{solution-end}")[0].count("```{code-cell}")
            for part in text.split("{solution-start}")[1:]
        )
        assert sum(cell.cell_type == "code" for cell in cells) == code - inside + len(solved)
        assert not any(cell.get("outputs") for cell in cells)
