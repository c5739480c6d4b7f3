"""Results: the schema, whole-folder writing and the comparison tables."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml

from lib import results as module
from lib.results import (
    COLUMNS,
    ResultsError,
    ResultsMissing,
    Row,
    comparison,
    read_results,
    write_results,
)

ROW = Row(
    quantity="share_centre",
    value=0.0042,
    sd=0.0011,
    seeds=[0, 1, 2],
    n_samples=20_000,
    unit="",
    data="five_gaussians",
    feature_extractor=None,
    preprocessing=None,
    device="2 CPU cores, float32",
    wall_s=61.5,
    commit="0123456789",
    config_sha="abcdef012345",
)
BASE = dataclasses.replace(ROW, quantity="share_base", value=0.2, sd=None, seeds=[0])
RULE = {
    "quantity": "share_centre",
    "claim": "The centre disappears.",
    "paper": None,
    "reproduced_if": "< 0.005",
    "same_ordering_if": "< share_base",
}
CONFIG = {"experiment": "toy", "delta": 4.0, "epsilon": 0.3, "sizes": [1, 4], "verdict": [RULE]}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Point the library at an empty results folder and return that of run ``toy`` on cpu."""
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "TABLES", tmp_path / "tables")
    monkeypatch.delenv("BOOK_PROFILE", raising=False)
    return tmp_path / "results" / "toy" / "cpu"


def test_written_results_are_read_back(folder):
    arrays = {"density": np.arange(6.0).reshape(2, 3), "delta": np.array([1, 2])}
    write_results(folder, CONFIG, [ROW, BASE], arrays)
    read = read_results("toy")
    assert (read.name, read.profile, read.folder) == ("toy", "cpu", folder)
    assert read.rows == (ROW, BASE)
    assert read.config == CONFIG
    assert read.value("share_centre") == 0.0042
    assert read.row("share_base").seeds == [0]
    assert {key: array.tolist() for key, array in read.arrays().items()} == {
        key: array.tolist() for key, array in arrays.items()
    }
    with pytest.raises(ResultsError, match=r"toy/cpu has no quantity 'x'; it has: share_centre"):
        read.value("x")


def test_figures_are_kept_and_counted(folder):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 1))
    write_results(folder, CONFIG, [ROW], figures={"density": figure})
    assert (folder / "density.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ResultsError, match="at most 3 figures, but 4 were given"):
        write_results(folder, CONFIG, [ROW], figures=dict.fromkeys("abcd", figure))


def test_a_later_result_replaces_the_earlier_as_a_whole(folder):
    write_results(folder, CONFIG, [ROW, BASE], {"a": np.zeros(2)})
    write_results(folder, CONFIG, [BASE])
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "metrics.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["cpu"]
    with pytest.raises(ResultsError, match="toy/cpu kept no arrays"):
        read_results("toy").arrays()


@pytest.mark.parametrize("failing", ["savez_compressed", "replace"])
def test_a_failing_write_leaves_the_earlier_result(folder, monkeypatch, failing):
    write_results(folder, CONFIG, [ROW])
    replace = os.replace

    def fail(*arguments, **_):
        if failing == "savez_compressed" or str(arguments[0]).endswith(".new"):
            raise OSError("disk full")
        return replace(*arguments)

    monkeypatch.setattr(np if failing == "savez_compressed" else os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        write_results(folder, CONFIG, [BASE], {"a": np.zeros(2)})
    assert read_results("toy").rows == (ROW,)
    assert [path.name for path in folder.parent.iterdir()] == ["cpu"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("quantity", ""),
        ("value", float("nan")),
        ("value", float("inf")),
        ("value", "0.1"),
        ("value", True),
        ("value", None),
        ("sd", -0.1),
        ("seeds", []),
        ("seeds", [0, 0]),
        ("seeds", [0.5]),
        ("n_samples", 0),
        ("n_samples", 10.0),
        ("unit", None),
        ("data", ""),
        ("feature_extractor", ""),
        ("device", None),
        ("wall_s", -1),
        ("commit", ""),
        ("config_sha", 7),
    ],
)
def test_wrong_fields_are_refused_in_and_out(folder, field, value):
    wrong = dataclasses.replace(ROW, **{field: value})
    with pytest.raises(ResultsError, match=f"row 1: the field '{field}' is"):
        write_results(folder, CONFIG, [BASE, wrong])
    assert not folder.exists()
    write_results(folder, CONFIG, [BASE, ROW])
    rows = [dataclasses.asdict(BASE), dataclasses.asdict(wrong)]
    (folder / "metrics.json").write_text(json.dumps(rows))
    with pytest.raises(ResultsError, match=f"metrics.json, row 1: the field '{field}' is"):
        read_results("toy")


def test_two_rows_of_one_quantity_are_refused(folder):
    with pytest.raises(ResultsError, match="two rows for 'share_centre'"):
        write_results(folder, CONFIG, [ROW, BASE, ROW])


def test_numpy_numbers_are_refused_before_they_reach_json(folder):
    with pytest.raises(ResultsError, match="'n_samples'"):
        write_results(folder, CONFIG, [dataclasses.replace(ROW, n_samples=np.int64(5))])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.json", '[\n{"quantity": "sha', "metrics.json is half-written or damaged"),
        ("metrics.json", "", "metrics.json is half-written or damaged"),
        ("metrics.json", "[]", "metrics.json must hold a list of at least one row"),
        ("metrics.json", '{"quantity": "a"}', "must hold a list of at least one row"),
        ("metrics.json", "[3]", "row 0 must be a mapping"),
        ("metrics.json", '[{"quantity": "a"}]', r"row 0 lacks \['commit', .*'wall_s'\]"),
        ("metrics.json", None, "metrics.json is missing; make it again with `make run RUN=toy"),
        ("config.yaml", None, "config.yaml is missing"),
        ("config.yaml", "a: [1", "is damaged"),
        ("config.yaml", "", "config.yaml must hold a mapping"),
    ],
)
def test_half_written_files_say_which_and_what(folder, file, content, message):
    write_results(folder, CONFIG, [ROW])
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(ResultsError, match=message) as caught:
        read_results("toy")
    assert not isinstance(caught.value, ResultsMissing) and "\n" not in str(caught.value)


def test_unknown_fields_are_refused(folder):
    write_results(folder, CONFIG, [ROW])
    rows = [dataclasses.asdict(ROW) | {"colour": "red"}]
    (folder / "metrics.json").write_text(json.dumps(rows))
    with pytest.raises(ResultsError, match=r"unknown fields \['colour'\]"):
        read_results("toy")


@pytest.mark.parametrize("damage", ["truncated", "pickled"])
def test_damaged_arrays_are_refused(folder, damage):
    write_results(folder, CONFIG, [ROW], {"a": np.zeros(100)})
    path = folder / "arrays.npz"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:50])
    else:
        np.savez(path, a=np.array([{"an": "object"}]))
    with pytest.raises(ResultsError, match=r"arrays.npz cannot be read .*RUN=toy PROFILE=cpu"):
        read_results("toy").arrays()


def test_object_arrays_are_not_written(folder):
    with pytest.raises(ValueError, match=r"[Oo]bject"):
        write_results(folder, CONFIG, [ROW], {"a": np.array([{"an": "object"}])})
    assert not folder.exists()


def test_profile_falls_back_to_cpu_and_says_so(folder, monkeypatch):
    write_results(folder, CONFIG, [ROW])
    monkeypatch.setenv("BOOK_PROFILE", "gpu")
    assert read_results("toy").profile == "cpu"
    write_results(folder.with_name("gpu"), CONFIG, [BASE])
    assert read_results("toy").profile == "gpu"
    assert read_results("toy", "cpu").profile == "cpu"
    with pytest.raises(ResultsMissing, match="`make run RUN=toy PROFILE=paper`"):
        read_results("toy", "paper")
    with pytest.raises(ResultsMissing, match="no results for other/gpu"):
        read_results("other")


def test_comparison_sets_ours_beside_the_paper(folder):
    entries = [
        RULE,
        RULE | {"quantity": "share_base", "paper": "taming/table_1/4/DF_tamed"},
        RULE | {"quantity": "unmeasured", "paper": "feature_unlearning/settings/alpha/value"},
    ]
    write_results(folder, CONFIG | {"verdict": entries}, [ROW, BASE])
    frame = comparison("toy")
    assert [frame.columns.name, *frame.columns] == list(COLUMNS)
    assert frame.reset_index().values.tolist() == [
        [
            "share centre",
            "no number to compare with",
            "0.0042 ± 0.0011 (3 seeds)",
            "reproduced",
            "toy/cpu",
        ],
        ["share base", "7.4e-6 (Table 1)", "0.2 (1 seed)", "not reproduced", "toy/cpu"],
        [
            "unmeasured",
            "not given (Sec. 3 and 4): no source at hand gives it, and there is no public code",
            "",
            "not attempted",
            "toy/cpu",
        ],
    ]


def test_units_stand_behind_the_numbers():
    row = dataclasses.replace(ROW, value=2.153, unit="bits per dimension")
    assert module.format_ours(row) == "2.15 ± 0.0011 bits per dimension (3 seeds)"


def test_runs_without_results_are_read_from_their_config(folder, tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "toy.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.setattr(module, "ROOT", tmp_path)
    frame = comparison("toy", "gpu")
    assert frame["verdict"].tolist() == ["not attempted"]
    assert frame["run"].tolist() == ["toy/gpu"]
    with pytest.raises(ResultsMissing, match="RUN=other"):
        comparison("other")


def test_make_tables_writes_what_the_results_say(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "ROOT", tmp_path)
    write_results(folder, CONFIG, [ROW, BASE])
    write_results(folder.with_name("gpu"), CONFIG, [dataclasses.replace(ROW, value=0.3), BASE])
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "gone-cpu.csv").write_text("stale")
    assert module.main() == 0 and "2 tables" in capsys.readouterr().out
    written = {path.name: path.read_text() for path in (tmp_path / "tables").iterdir()}
    assert written == module.tables()
    assert sorted(written) == ["toy-cpu.csv", "toy-gpu.csv"]
    assert written["toy-gpu.csv"].splitlines()[1].endswith("not reproduced,toy/gpu")
    write_results(folder, CONFIG, [dataclasses.replace(ROW, value=0.0043), BASE])
    assert written["toy-cpu.csv"] != module.tables()["toy-cpu.csv"]


def test_make_tables_says_in_one_sentence_what_is_wrong(folder, capsys):
    write_results(folder, CONFIG, [ROW])
    (folder / "metrics.json").write_text("[")
    assert module.main() == 1
    assert re.fullmatch(r"ResultsError: .*half-written.*\n", capsys.readouterr().err)


def test_committed_tables_are_those_of_the_committed_results():
    committed = {path.name: path.read_text() for path in module.TABLES.glob("*.csv")}
    assert committed == module.tables(), "run `make tables`"


def test_importing_results_is_cheap():
    code = "import sys, lib.results; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert not {"torch", "pandas", "datasets", "matplotlib"} & set(loaded)
