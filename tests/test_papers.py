"""The papers' tables: schema, reachability, literal values, and sanity of the arithmetic."""

import math
from pathlib import Path

import pytest
import yaml

from lib import ROOT
from lib.papers import PaperError, format_number, paper_cell, paper_entry, paper_value

FILES = sorted((ROOT / "book" / "papers").glob("*.yaml"))
KINDS = {"printed", "code", "derived", "secondary"}
TABLE_KEYS = {"label", "title", "source", "kind", "columns", "rows"}


def read(file: Path) -> dict:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def schema_faults(paper: dict) -> list[str]:
    """List what breaks the schema that the top of taming.yaml explains."""
    faults = []
    if set(paper) != {"paper", "sources", "tables", "claims"}:
        return [f"top-level keys {sorted(paper)}"]
    for name, table in paper["tables"].items():
        if TABLE_KEYS - set(table) or set(table) - TABLE_KEYS - {"missing", "note"}:
            faults.append(f"{name}: keys {sorted(table)}")
            continue
        if table["source"] not in paper["sources"] or table["kind"] not in KINDS:
            faults.append(f"{name}: source or kind")
        for row, cells in table["rows"].items():
            if not isinstance(row, str) or set(cells) != set(table["columns"]):
                faults.append(f"{name}/{row}: columns {sorted(cells)}")
            for column, cell in cells.items():
                cell = cell if isinstance(cell, dict) else {"value": cell}
                where = f"{name}/{row}/{column}"
                if "value" not in cell or set(cell) - {"value", "reason", "text", "note"}:
                    faults.append(f"{where}: keys {sorted(map(str, cell))}")
                elif cell["value"] is None and not (cell.get("reason") or table.get("missing")):
                    faults.append(f"{where}: null without a reason")
                elif cell["value"] is not None and type(cell["value"]) not in (int, float):
                    faults.append(f"{where}: {cell['value']!r} is not a number")
    for place, block in paper["claims"].items():
        if set(block) != {"label", "source", "items"} or block["source"] not in paper["sources"]:
            faults.append(f"claims/{place}: keys or source")
        for key, item in block["items"].items():
            item = {"text": item} if isinstance(item, str) else item
            if not item.get("text") or set(item) - {"text", "value", "note"}:
                faults.append(f"claims/{place}/{key}: {item}")
    return faults


def paths(file: Path) -> list[str]:
    paper = read(file)
    cells = [
        f"{file.stem}/{table}/{row}/{column}"
        for table, block in paper["tables"].items()
        for row, columns in block["rows"].items()
        for column in columns
    ]
    claims = [
        f"{file.stem}/claims/{place}/{key}"
        for place, block in paper["claims"].items()
        for key in block["items"]
    ]
    return cells + claims


def test_all_three_papers_are_there():
    assert [file.stem for file in FILES] == ["feature_unlearning", "selective_amnesia", "taming"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_files_keep_the_schema(file):
    assert schema_faults(read(file)) == []


def test_schema_faults_are_noticed():
    text = (ROOT / "book/papers/taming.yaml").read_text(encoding="utf-8")
    for good, bad, fault in [
        ("DF_tamed: 7.4e-6", "DF_tamed: 7.4e-6x", "table_1/4/DF_tamed: '7.4e-6x' is not a number"),
        ("DF_tamed: 7.4e-6", "DF_tamed: null", "table_1/4/DF_tamed: null without a reason"),
        ("DF_tamed: 7.4e-6", "DF: 7.4e-6", "table_1/4: columns"),
        ("source: arithmetic", "source: memory", "derived_iterations: source or kind"),
        ("items:\n      cost: Taming", "items:\n      cost: ''\n      x: Taming", "abstract/cost"),
    ]:
        assert text.count(good) >= 1
        faults = schema_faults(yaml.safe_load(text.replace(good, bad, 1)))
        assert faults and fault in faults[0], (bad, faults)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_cell_is_reachable_and_every_null_has_a_reason(file):
    for path in paths(file):
        entry = paper_entry(path)
        assert entry.label and entry.source
        if entry.value is None:
            assert entry.reason
        else:
            assert math.isfinite(entry.value) and entry.reason is None
        assert paper_cell(path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("taming/table_1/1/DF_tamed", 2.15e-7),
        ("taming/table_1/4/DF_base", 0.57),
        ("taming/table_1/4/DF_tamed", 7.4e-6),
        ("taming/table_1/8/DR_tamed", 0.50),
        ("taming/table_1/15/T_min", 27.8),
        ("taming/table_2/no_L_R/bpd_mean", 25.64),
        ("taming/table_2/no_KL_reverse/fid", 110.34),
        ("taming/table_2/no_KL_reverse/likelihood_quantile", 0.73),
        ("taming/table_2/no_KLs/likelihood_quantile", 8.53e-6),
        ("taming/table_2/tamed/fid", 141.63),
        ("taming/table_A1/15/DF_tamed", 5.41e-6),
        ("taming/table_A1/15/DFref_tamed", 0.08),
        ("taming/table_A2/8/celeba_T_pct", 0.14),
        ("taming/wacv_table_1/4/QD_DF", 0.41),
        ("taming/wacv_table_1/1/QD_DR", None),
        ("taming/derived_iterations/15/table_A1", 278),
        ("taming/settings/delta/paper", 4),
        ("taming/claims/figure_6/limit", 40),
        ("selective_amnesia/table_1/mnist_original/prob", 0.967),
        ("selective_amnesia/table_1/mnist_sa_lambda_100/prob", 0.058),
        ("selective_amnesia/table_1/cifar10_sa_lambda_10/FID", None),
        ("selective_amnesia/readme_runs/cifar10/FID", 9.670457625511688),
        ("selective_amnesia/follow_up/SA/I2P_ASR_pct", 2.81),
        ("selective_amnesia/follow_up/SLD-Max/COCO_FID", 28.75),
        ("selective_amnesia/follow_up_attacks/ESD/MMA", 9.27),
        ("selective_amnesia/follow_up_attacks/SDv1.4/last_column", None),
        ("feature_unlearning/user_study/people/value", 13),
        ("feature_unlearning/settings/alpha/value", None),
        ("feature_unlearning/tables/table_8/values", None),
    ],
)
def test_literal_values(path, value):
    assert paper_value(path) == value


def test_times_agree_with_the_base_models_training_time():
    base_minutes = paper_value("taming/settings/base_hours/paper") * 60
    for table, minutes, percent in [
        ("table_1", "T_min", "T_pct"),
        ("table_A1", "T_min", "T_pct"),
        ("table_A2", "both_T_min", "both_T_pct"),
    ]:
        for n in ("1", "4", "8", "15"):
            ratio = 100 * paper_value(f"taming/{table}/{n}/{minutes}") / base_minutes
            assert round(ratio, 2) == paper_value(f"taming/{table}/{n}/{percent}"), (table, n)


def test_celeba_times_agree_on_one_base_time():
    """The paper gives no base time for CelebA alone; some time must fit all four rows."""
    low, high = 0.0, math.inf
    for n in ("1", "4", "8", "15"):
        minutes = paper_value(f"taming/table_A2/{n}/celeba_T_min")
        percent = paper_value(f"taming/table_A2/{n}/celeba_T_pct")
        low = max(low, (minutes - 0.05) / (percent + 0.005) * 100)
        high = min(high, (minutes + 0.05) / (percent - 0.005) * 100)
    assert 160 * 60 < low < high < 180 * 60


def test_derived_iterations_follow_from_the_printed_times():
    seconds = paper_value("taming/settings/seconds_per_taming_iteration/code")
    for column, source in [
        ("table_1", "table_1/{}/T_min"),
        ("table_A1", "table_A1/{}/T_min"),
        ("table_A2_celeba_only", "table_A2/{}/celeba_T_min"),
    ]:
        for n in ("1", "4", "8", "15"):
            iterations = paper_value("taming/" + source.format(n)) * 60 / seconds
            assert round(iterations) == paper_value(f"taming/derived_iterations/{n}/{column}")


def test_table_A2_repeats_the_times_of_table_1():
    for n in ("1", "4", "8", "15"):
        for column in ("T_min", "T_pct"):
            again = paper_value(f"taming/table_A2/{n}/both_{column}")
            assert paper_value(f"taming/table_1/{n}/{column}") == again


def test_tamed_quantiles_lie_where_the_code_aims():
    """All but the doubtful 2.15e-7 lie between 4.0 and 4.6 standard deviations."""
    low, high = (math.erfc(z / math.sqrt(2)) / 2 for z in (4.6, 4.0))
    for table in ("table_1", "table_A1"):
        for n in ("1", "4", "8", "15"):
            inside = low <= paper_value(f"taming/{table}/{n}/DF_tamed") <= high
            assert inside == ((table, n) != ("table_1", "1"))
    assert "2.15e-5" in paper_entry("taming/table_1/1/DF_tamed").note


def test_average_of_the_attacks_on_selective_amnesia():
    row = {
        column: paper_value(f"selective_amnesia/follow_up_attacks/SA/{column}")
        for column in ("RingABell_K77", "RingABell_K38", "RingABell_K16", "MMA", "P4D")
    }
    ring = sum(row[f"RingABell_K{k}"] for k in (77, 38, 16)) / 3
    last = paper_value("selective_amnesia/follow_up_attacks/SA/last_column")
    average = (ring + row["MMA"] + row["P4D"] + last) / 4
    assert round(average, 2) == paper_value("selective_amnesia/follow_up_attacks/SA/avg")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("taming/table_1/4", "must have the form file/table/row/column"),
        ("tamed/table_1/4/DF_tamed", "fails at 'tamed'; known there are: feature_unlearning"),
        ("taming/table_9/4/DF_tamed", "fails at 'table_9'; known there are: table_1, table_2"),
        ("taming/table_1/5/DF_tamed", "fails at '5'; known there are: 1, 4, 8, 15"),
        ("taming/table_1/4/DF", "fails at 'DF'; known there are: DF_base, DF_tamed"),
        ("taming/claims/figure_9/x", "fails at 'figure_9'"),
        ("taming/claims/figure_6/x", "fails at 'x'; known there are: limit"),
    ],
)
def test_wrong_paths_say_where_they_fail(path, message):
    with pytest.raises(PaperError, match=message):
        paper_entry(path)


def test_cells_as_they_are_printed():
    assert paper_cell("taming/table_2/base/fid") == "140.89 (Table 2)"
    assert paper_cell("taming/wacv_table_1/8/QD_DR") == "< 1e-3 (WACV 2024, main table)"
    assert paper_cell("feature_unlearning/settings/alpha/value") == (
        "not given (Sec. 3 and 4): no source at hand gives it, and there is no public code"
    )
    assert paper_cell("taming/claims/figure_C1/blond").startswith("After forgetting blond hair")
    assert paper_cell(None) == "no number to compare with"


@pytest.mark.parametrize(
    ("x", "digits", "text"),
    [
        (0.0, 3, "0"),
        (0.20449, 3, "0.204"),
        (0.5, 3, "0.5"),
        (0.001, 3, "0.001"),
        (0.0009996, 3, "1e-3"),
        (2.15e-7, 3, "2.15e-7"),
        (-3.14159e-5, 3, "-3.14e-5"),
        (140.89, 3, "141"),
        (140.89, 5, "140.89"),
        (1430.4, 3, "1430"),
        (590000.0, 3, "5.9e5"),
        (-12.345, 3, "-12.3"),
    ],
)
def test_numbers_have_few_digits(x, digits, text):
    assert format_number(x, digits) == text
