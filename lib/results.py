"""Results of runs: metrics.json in and out, and the tables that set them beside the papers.

A result is the folder ``results/<name>/<profile>/`` with ``config.yaml``, ``metrics.json`` (one
row a quantity), and where the run keeps them ``arrays.npz`` and figures. A number of a paper is
named by its path ``file/table/row/column`` in ``book/papers/<file>.yaml``; see :mod:`lib.papers`.
``python -m lib.results`` (``make tables``) writes ``book/tables/<name>-<profile>.csv`` for every
result.
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
import yaml

from lib import ROOT
from lib.config import ConfigError, current_profile
from lib.papers import PaperError, format_number, paper_cell
from lib.verdicts import VerdictError, verdict

if TYPE_CHECKING:
    import pandas as pd

RESULTS = ROOT / "results"
TABLES = ROOT / "book" / "tables"
COLUMNS = ("quantity", "paper (table)", "ours (mean ± sd, seeds)", "verdict", "run")
MAX_FIGURES = 3


class ResultsError(RuntimeError):
    """Say in one sentence what is wrong with a result and what to do."""


class ResultsMissing(ResultsError):
    """Say which run has no results yet and the command that makes them."""


@dataclass(frozen=True)
class Row:
    """One measured quantity: the mean over seeds, its spread, and how it was measured.

    ``sd`` is None for a single seed. ``feature_extractor`` and ``preprocessing`` are None where
    no such step belongs to the quantity.
    """

    quantity: str
    value: float
    sd: float | None
    seeds: list[int]
    n_samples: int
    unit: str
    data: str
    feature_extractor: str | None
    preprocessing: str | None
    device: str
    wall_s: float
    commit: str
    config_sha: str


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def _is_seeds(x: Any) -> bool:
    whole = isinstance(x, list | tuple) and all(type(seed) is int for seed in x)
    return whole and len(x) > 0 and len(set(x)) == len(x)


def _is_text(x: Any) -> bool:
    return isinstance(x, str) and bool(x.strip())


# What each field must be, in words for the error and as a test.
_FIELDS = {
    "quantity": ("a name", _is_text),
    "value": ("a finite number", _is_number),
    "sd": (
        "a finite number of at least 0, or null",
        lambda x: x is None or (_is_number(x) and x >= 0),
    ),
    "seeds": ("a list of different whole numbers", _is_seeds),
    "n_samples": ("a whole number of at least 1", lambda x: type(x) is int and x >= 1),
    "unit": ("a text", lambda x: isinstance(x, str)),
    "data": ("a text", _is_text),
    "feature_extractor": ("a text or null", lambda x: x is None or _is_text(x)),
    "preprocessing": ("a text or null", lambda x: x is None or _is_text(x)),
    "device": ("a text", _is_text),
    "wall_s": ("a finite number of at least 0", lambda x: _is_number(x) and x >= 0),
    "commit": ("a text", _is_text),
    "config_sha": ("a text", _is_text),
}
assert tuple(_FIELDS) == tuple(field.name for field in fields(Row))


def _check_rows(rows: Any, place: str) -> list[Row]:
    """Turn a list of mappings into rows; name ``place`` and the field where one is wrong."""
    if not isinstance(rows, list) or not rows:
        raise ResultsError(f"{place} must hold a list of at least one row, not {rows!r:.60}.")
    for number, row in enumerate(rows):
        where = f"{place}, row {number}"
        if not isinstance(row, dict):
            raise ResultsError(f"{where} must be a mapping, not {row!r:.60}.")
        if set(row) != set(_FIELDS):
            missing, extra = set(_FIELDS) - set(row), set(row) - set(_FIELDS)
            raise ResultsError(
                f"{where} lacks {sorted(missing) or 'nothing'} and has the unknown fields "
                f"{sorted(extra) or 'none'}; run the config again with this version of the code."
            )
        for field, (wanted, test) in _FIELDS.items():
            if not test(row[field]):
                raise ResultsError(
                    f"{where}: the field {field!r} is {row[field]!r:.60}, but must be {wanted}."
                )
    names = [row["quantity"] for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ResultsError(f"{place} has two rows for {twice[0]!r}; give each its own name.")
    return [Row(**row) for row in rows]


@dataclass(frozen=True)
class Results:
    """What a run left behind: its rows, its resolved config, and where they came from."""

    name: str
    profile: str
    folder: Path
    rows: tuple[Row, ...]
    config: dict[str, Any]

    def row(self, quantity: str) -> Row:
        """Return the row of a quantity.

        Raises: ResultsError if the run did not measure it.
        """
        for row in self.rows:
            if row.quantity == quantity:
                return row
        known = ", ".join(row.quantity for row in self.rows)
        raise ResultsError(f"Run {self._label} has no quantity {quantity!r}; it has: {known}.")

    def value(self, quantity: str) -> float:
        """Return the mean over seeds of a quantity, in the unit of its row."""
        return self.row(quantity).value

    def arrays(self) -> dict[str, np.ndarray]:
        """Read the arrays that the run kept for sliders and figures.

        Raises: ResultsError if there are none or the file is damaged.
        """
        path = self.folder / "arrays.npz"
        if not path.is_file():
            raise ResultsError(f"Run {self._label} kept no arrays: there is no {path}.")
        try:
            with np.load(path, allow_pickle=False) as archive:
                return dict(archive)
        except (BadZipFile, ValueError, OSError, EOFError) as error:
            raise ResultsError(
                f"{path} cannot be read ({error}); make it again with "
                f"`{make_command(self.name, self.profile)}`."
            ) from error

    @property
    def _label(self) -> str:
        return f"{self.name}/{self.profile}"


def make_command(name: str, profile: str) -> str:
    """Return the command that makes a result."""
    return f"make run RUN={name} PROFILE={profile}"


def write_results(
    folder: Path,
    config: Mapping[str, Any],
    rows: Sequence[Row],
    arrays: Mapping[str, np.ndarray] | None = None,
    figures: Mapping[str, Any] | None = None,
) -> None:
    """Write a result as a whole: a reader sees the earlier folder or the new one, never a mix.

    ``figures`` are matplotlib figures by file name, at most three.

    Raises: ResultsError if a row breaks the schema or there are too many figures.
    """
    arrays, figures = dict(arrays or {}), dict(figures or {})
    checked = _check_rows([asdict(row) for row in rows], f"The result for {folder}")
    if len(figures) > MAX_FIGURES:
        raise ResultsError(
            f"A run keeps at most {MAX_FIGURES} figures, but {len(figures)} were given: "
            f"{', '.join(figures)}; join or drop some."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        new.mkdir()
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        (new / "config.yaml").write_text(text, encoding="utf-8")
        lines = [json.dumps(asdict(r), ensure_ascii=False, allow_nan=False) for r in checked]
        text = "[\n" + ",\n".join(lines) + "\n]\n"  # a row a line keeps differences readable
        (new / "metrics.json").write_text(text, encoding="utf-8")
        if arrays:
            with open(new / "arrays.npz", "wb") as file:
                np.savez_compressed(file, allow_pickle=False, **arrays)
        for name, figure in figures.items():
            figure.savefig(new / f"{name}.png", dpi=120)
        # A folder cannot replace one that is not empty, so the earlier one steps aside first.
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def read_results(name: str, profile: str | None = None) -> Results:
    """Read the result of a run.

    Without ``profile`` take ``BOOK_PROFILE``, or ``cpu`` where that one has not been run; the
    ``profile`` of the answer says which it is.

    Raises: ResultsMissing if there is none, ResultsError if a file is half-written or breaks the
    schema, ConfigError if ``BOOK_PROFILE`` is unknown.
    """
    wanted = profile or current_profile()
    for candidate in [wanted] if profile else dict.fromkeys([wanted, "cpu"]):
        folder = RESULTS / name / candidate
        if folder.is_dir():
            return _read_folder(name, candidate, folder)
    raise ResultsMissing(
        f"There are no results for {name}/{wanted}; make them with `{make_command(name, wanted)}`."
    )


def _read_folder(name: str, profile: str, folder: Path) -> Results:
    again = f"make it again with `{make_command(name, profile)}`"
    metrics, config = folder / "metrics.json", folder / "config.yaml"
    try:
        rows = json.loads(metrics.read_text(encoding="utf-8"))
        resolved = yaml.safe_load(config.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ResultsError(f"{error.filename} is missing; {again}.") from None
    except json.JSONDecodeError as error:
        raise ResultsError(
            f"{metrics} is half-written or damaged (line {error.lineno}: {error.msg}); {again}."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ResultsError(f"A file in {folder} is damaged ({reason}); {again}.") from None
    if not isinstance(resolved, dict):
        raise ResultsError(f"{config} must hold a mapping, not {resolved!r:.60}; {again}.")
    return Results(name, profile, folder, tuple(_check_rows(rows, str(metrics))), resolved)


def format_ours(row: Row) -> str:
    """Write a row's mean, spread and unit with its number of seeds: ``0.2 ± 0.01 (5 seeds)``."""
    spread = "" if row.sd is None else f" ± {format_number(row.sd)}"
    unit = f" {row.unit}" if row.unit else ""
    seeds = f"{len(row.seeds)} seed{'s' if len(row.seeds) > 1 else ''}"
    return f"{format_number(row.value)}{spread}{unit} ({seeds})"


@dataclass(frozen=True)
class Judged:
    """One verdict entry of a config with the row that it judges, None where there is none."""

    run: str
    entry: dict[str, Any]
    row: Row | None
    verdict: str


def judge(name: str, profile: str | None = None) -> list[Judged]:
    """Judge a run by each verdict entry of its config.

    The entries are those stored with the result, so that a rule counts as it was before the run.
    A run without results is read from ``configs/`` and every verdict is "not attempted".

    Raises: ResultsError as :func:`read_results`, VerdictError as :func:`lib.verdicts.verdict`.
    """
    try:
        results = read_results(name, profile)
        label, entries = f"{name}/{results.profile}", results.config.get("verdict") or []
        rows = {row.quantity: row for row in results.rows}
        config = results.config
    except ResultsMissing:
        path = ROOT / "configs" / f"{name}.yaml"
        if not path.is_file():
            raise
        label, rows, config = f"{name}/{profile or current_profile()}", {}, {}
        entries = yaml.safe_load(path.read_text(encoding="utf-8")).get("verdict") or []
    values = {quantity: row.value for quantity, row in rows.items()}
    return [
        Judged(label, entry, rows.get(entry["quantity"]), verdict(entry, values, config, label))
        for entry in entries
    ]


def comparison(name: str, profile: str | None = None) -> "pd.DataFrame":
    """Set a run beside its paper: one line for each verdict entry, judged by :func:`judge`."""
    import pandas as pd

    lines = []
    for judged in judge(name, profile):
        quantity = judged.entry["quantity"].replace("_", " ")
        ours = "" if judged.row is None else format_ours(judged.row)
        lines.append(
            (quantity, paper_cell(judged.entry["paper"]), ours, judged.verdict, judged.run)
        )
    frame = pd.DataFrame(lines, columns=list(COLUMNS)).set_index(COLUMNS[0])
    return frame.rename_axis(index=None, columns=COLUMNS[0])  # one header line, no row numbers


def tables() -> dict[str, str]:
    """Return the csv text of every result's comparison by file name."""
    folders = sorted(path.parent for path in RESULTS.glob("[!.]*/[!.]*/metrics.json"))
    texts = {}
    for folder in folders:
        frame = comparison(folder.parent.name, folder.name)
        texts[f"{folder.parent.name}-{folder.name}.csv"] = frame.to_csv(
            index_label=COLUMNS[0], lineterminator="\n"
        )
    return texts


def main() -> int:
    """Write the csv of every result and remove those whose result is gone."""
    try:
        texts = tables()
    except (ConfigError, PaperError, ResultsError, VerdictError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    TABLES.mkdir(parents=True, exist_ok=True)
    for stale in {path.name for path in TABLES.glob("*.csv")} - set(texts):
        (TABLES / stale).unlink()
    for name, text in texts.items():
        temporary = TABLES / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, TABLES / name)
    print(f"{len(texts)} tables written to {TABLES.relative_to(ROOT)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
