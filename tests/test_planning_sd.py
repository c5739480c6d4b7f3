"""The estimates for Stable Diffusion: each stage's passes by hand, and its part of the page."""

import page_planning
import pytest
import yaml
from page_planning import Count
from page_planning_sd import Work, latent_estimates, n_prompts, paper_configs, stages

from lib import ROOT

ASSUMED = yaml.safe_load((ROOT / page_planning.ASSUMED).read_text())
VALUES = {
    "requests": {
        "a": {"measured": {"person": "person"}, "pictures": 3},
        "b": {"measured": {"unprinted": "i2p"}, "pictures": 1, "methods": ["original", "sa"]},
    },
    "methods": {
        "original": {"kind": "original"},
        "sld": {"kind": "sld", "strength": "weak"},
        "esd": {"kind": "esd"},
        "sa": {"kind": "sa"},
    },
    "sa": {
        "replay": True,
        "iterations": 7,
        "batch": 2,
        "fisher_estimator": "exact",
        "fisher_steps": 8,
        "fisher_samples": 5,
    },
    "n_replay": 11,
    "n_surrogate": 13,
    "n_other": 17,
    "sample_steps": 10,
    "esd": {"max_steps": 19, "batch": 2},
    "esd_drawing": {"steps": 6},
    "bf16": True,
}


def test_passes_are_those_of_a_hand_count():
    found = stages(VALUES, ROOT, ASSUMED)
    assert found["Pictures to learn from"].forwards == (11 + 2 * 13) * 10 * 2
    assert found["Fisher information"].trainings == 5 * 1000
    assert found["Selective Amnesia"].trainings == 2 * 7 * (2 + 2) * 4
    assert found["Selective Amnesia"].precision == "bf16"
    assert (found["ESD"].forwards, found["ESD"].trainings) == (19 * 2 * (2 + 3 * 2), 19 * 2)
    first, second = 17 + 50 * 3, 17 + 4703
    drawn = first * (3 * 2 + 3) + second * 2 * 2  # SLD takes three passes a step
    assert found["Pictures to measure"].forwards == drawn * 10


def test_other_fisher_estimators_see_fewer_steps():
    def fisher(**changes):
        return stages(VALUES | {"sa": VALUES["sa"] | changes}, ROOT, ASSUMED)["Fisher information"]

    assert fisher(fisher_estimator="subsampled").trainings == 5 * 8
    assert fisher(fisher_estimator="product").trainings == 5 * 2 * 8
    assert fisher(fisher_estimator="product").batch == 8
    assert (fisher().batch, fisher(fisher_chunk=16).batch) == (64, 16)
    only = VALUES | {"methods": {"original": {"kind": "original"}}, "requests": {}}
    assert list(stages(only, ROOT, ASSUMED)) == ["Pictures to measure"]


def test_memory_and_operations_follow_from_the_count():
    count = Count(parameters=1000, operations=30.0, activation_bytes=50.0)
    work = Work(forwards=6, trainings=2, batch=3)
    assert work.operations(count) == 2 * 30 + 6 * 10
    assert work.memory("Selective Amnesia", count) == 9 * 4000 + 150
    assert work.memory("Pictures to measure", count) is None


def test_lists_that_are_not_printed_have_an_assumed_length():
    assert n_prompts("person", ROOT, ASSUMED) == 50 and n_prompts("i2p", ROOT, ASSUMED) == 4703
    with pytest.raises(KeyError):
        n_prompts("nothing", ROOT, ASSUMED)


def test_the_unet_that_is_counted_is_that_of_v1_4():
    count = page_planning.find_model(page_planning.read_counts(ROOT), page_planning.LATENT)
    assert count.parameters == 859_520_964
    assert 2.3e12 < count.operations < 2.6e12


def test_the_table_has_every_config_once():
    known, others = page_planning.paper_trainings()
    names = set(paper_configs())
    assert names == {"amnesia_sd14_person", "amnesia_sd14_concept", "erasing_sd14"}
    assert not names & {*others, *(each.name for each in known)}
    text = latent_estimates(ROOT)
    assert all(text.count(f"- `{name}`\n  - **all**") == 1 for name in names)
    assert "`amnesia_sd14_person`\n  - Selective Amnesia\n  - 2 million\n  - 43 GiB" in text
