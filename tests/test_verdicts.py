"""The verdict rule."""

import pytest

from lib.papers import PaperError
from lib.verdicts import VerdictError, standard_normal_cdf, verdict, worst

RULE = {
    "quantity": "share_centre",
    "claim": "The centre disappears.",
    "paper": None,
    "reproduced_if": "< 0.005",
    "same_ordering_if": "< share_base",
}
CONFIG = {"experiment": "toy", "delta": 4.0, "epsilon": 0.3, "sizes": [1, 4], "verdict": [RULE]}


def judged(entry: dict, value: float) -> str:
    return verdict(entry, {"share_centre": value, "share_base": 0.2}, CONFIG, "toy/cpu")


def test_verdict_follows_the_rule():
    assert judged(RULE, 0.0049) == "reproduced"
    assert judged(RULE, 0.005) == "same ordering"
    assert judged(RULE, 0.2) == "not reproduced"
    without = {key: value for key, value in RULE.items() if key != "same_ordering_if"}
    assert judged(without, 0.005) == "not reproduced"
    assert verdict(RULE, {}, CONFIG, "toy/cpu") == "not attempted"
    assert judged(RULE | {"quantity": "unmeasured"}, 0.0) == "not attempted"


@pytest.mark.parametrize(
    ("rule", "value", "holds"),
    [
        ("< 1 - Phi(delta - epsilon)", 1.0e-4, True),
        ("< 1 - Phi(delta - epsilon)", 1.2e-4, False),
        (">= paper", 7.4e-6, True),
        (">= paper", 7.3e-6, False),
        ("> 0.1 and value < 0.3", 0.2, True),
        ("> 0.1 and value < 0.3", 0.4, False),
        ("> -0.1", -0.05, True),
        ("== value and abs(value - share_base) < 0.03", 0.22, True),
        ("!= 0", 0.0, False),
        ("<= 1e-7", 1e-7, True),
    ],
)
def test_rules_know_config_quantities_paper_and_phi(rule, value, holds):
    entry = RULE | {"reproduced_if": rule, "paper": "taming/table_1/4/DF_tamed"}
    del entry["same_ordering_if"]
    assert judged(entry, value) == ("reproduced" if holds else "not reproduced")


def test_phi_is_the_normal_distribution_function():
    assert abs(standard_normal_cdf(0.0) - 0.5) < 1e-15
    assert abs(standard_normal_cdf(1.959963984540054) - 0.975) < 1e-12
    assert abs(standard_normal_cdf(-4.0) / 3.167124183311986e-05 - 1) < 1e-9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reproduced_if": "0.1 < 0.2"}, "must begin with a comparison"),
        ({"reproduced_if": "< sigma"}, "unknown name 'sigma'; known are delta, epsilon"),
        ({"reproduced_if": "< sizes"}, "unknown name 'sizes'"),
        ({"reproduced_if": "< open('x')"}, "cannot be evaluated"),
        ({"reproduced_if": "< "}, "cannot be evaluated"),
        ({"reproduced_if": "< 'a'"}, "cannot be evaluated"),
        ({"reproduced_if": "< 1 / 0"}, "cannot be evaluated"),
        ({"reproduced_if": "< 1 and 3"}, "gives 3, but must be true or false"),
        ({"reproduced_if": "< paper"}, "uses 'paper', but the entry names no paper value"),
        (
            {"reproduced_if": "< paper", "paper": "feature_unlearning/settings/alpha/value"},
            "uses 'paper', but no source at hand gives it",
        ),
        ({"same_order_if": "< 1"}, r"unknown keys \['same_order_if'\]"),
    ],
)
def test_malformed_rules_are_refused(change, message):
    with pytest.raises(VerdictError, match=message):
        judged(RULE | change, 0.01)


def test_incomplete_entries_are_refused():
    with pytest.raises(VerdictError, match=r"lacks \['claim', 'paper', 'reproduced_if'\]"):
        judged({"quantity": "share_centre"}, 0.01)


def test_wrong_paper_paths_are_refused():
    with pytest.raises(PaperError, match="fails at 'table_9'"):
        judged(RULE | {"paper": "taming/table_9/1/DF_tamed"}, 0.01)


@pytest.mark.parametrize(
    ("verdicts", "answer"),
    [
        (["reproduced", "not reproduced", "same ordering"], "not reproduced"),
        (["reproduced", "same ordering"], "same ordering"),
        (["not attempted", "reproduced"], "reproduced"),
        (["not attempted"], "not attempted"),
        ([], "not attempted"),
    ],
)
def test_the_worst_of_what_was_measured_counts(verdicts, answer):
    assert worst(verdicts) == answer
