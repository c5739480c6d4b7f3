"""The planning page: its counts against a hand count, its arithmetic, and that it is up to date."""

import json
import os
import subprocess
import sys

import page_planning
import pytest
import yaml
from page_planning import Count, Training, count_step, estimates, find, operations_per_second
from page_text import PageError

from lib import ROOT, results
from lib.models.glow import Glow

ASSUMED = yaml.safe_load((ROOT / page_planning.ASSUMED).read_text("utf8"))
TINY = {
    "experiment": "train_glow",
    "size": 8,
    "n_bits": 5,
    "n_blocks": 1,
    "n_flows": 1,
    "hidden": 6,
    "coupling": "additive",
}


def test_a_step_is_counted_as_by_hand():
    counted = count_step(TINY)
    assert counted.parameters == sum(p.numel() for p in Glow((3, 8, 8), 1, 1, 6).parameters())
    # 16 positions of 12 channels; the coupling's layers are 3x3, 1x1 and 3x3 wide, and each
    # multiplication and addition counts. Backwards costs twice as much, but for the gradient of
    # the image, which nobody wants; the prior sees no neighbour.
    mixing, coupling = 12 * 12, 9 * 6 * 6 + 6 * 6 + 9 * 6 * 6
    forwards = 2 * 16 * (mixing + coupling)
    assert forwards < counted.operations < 4.5 * forwards
    wider = count_step(TINY | {"hidden": 12})
    assert wider.operations > counted.operations + 2 * 16 * 3 * (9 * 6 * 6)
    assert wider.activation_bytes >= counted.activation_bytes + 4 * 16 * 6


def test_the_committed_counts_are_those_of_the_code():
    counts = page_planning.read_counts(ROOT)
    model, stored = min(counts, key=lambda entry: entry[1].parameters)
    assert count_step(model) == stored
    for training in page_planning.paper_trainings()[0]:
        assert find(counts, training).operations > 1e9


def test_no_build_imports_torch():
    code = "import sys, bookassets, chapter_cache, generated_pages, page_planning; "
    code += "assert page_planning.paper_trainings()[0]; print(*sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "book/_ext")}
    command = [sys.executable, "-c", code]
    loaded = subprocess.check_output(command, env=environment, text=True).split()
    assert not {"torch", "pandas", "matplotlib", "scipy"} & set(loaded)


def test_memory_is_that_of_weights_and_batch():
    count = Count(parameters=1000, operations=1.0, activation_bytes=50.0)
    assert count.memory(batch=4, averaged=False) == 4 * 4 * 1000 + 200
    assert count.memory(batch=4, averaged=True) == 5 * 4 * 1000 + 200


def training(**values):
    shape = {key: TINY[key] for key in page_planning.SHAPING["train_glow"]}
    values = shape | {"iterations": 100, "batch": 8} | values
    return Training("tiny", "train_glow", values)


def measured(name, device, seconds=2.0, **values):
    own = Training(name, "train_glow", training(**values).values)
    return page_planning.Measured(own, f"{name}/gpu", device, seconds)


def test_a_measured_gpu_comes_before_the_guess():
    counts = [(TINY, Count(10, 5.0, 1.0))]
    guess = ASSUMED["share_of_peak"] * ASSUMED["peak"]["float32"]

    def rate(*found):
        return operations_per_second(training(), counts, list(found), ASSUMED)

    assert rate() == (guess, rate()[1]) and rate()[1].startswith("guessed: 20% of the peak")
    assert rate(measured("tiny", "2 CPU cores, float32"))[0] == guess
    assert rate(measured("tiny", "a GPU, bf16", bf16=True))[0] == guess
    other, own = measured("other", "a GPU, float32", 4.0), measured("tiny", "a GPU, float32")
    assert rate(other) == (100 * 8 / 4.0 * 5.0, "measured: `other/gpu` on a GPU, float32")
    assert rate(other, own)[0] == 100 * 8 / 2.0 * 5.0


def test_hours_and_cost_follow_from_the_rate(tmp_path, monkeypatch):
    (tmp_path / "book").mkdir()
    assumed = {
        "price_per_gpu_hour": 2.5,
        "gpu": "toy GPU",
        "peak": {"float32": 1000.0},
        "share_of_peak": 0.5,
    }
    (tmp_path / page_planning.ASSUMED).write_text(yaml.safe_dump(assumed))
    count = {"parameters": 3_000_000, "operations": 4500.0, "activation_bytes": 2.0**28}
    entries = [{"model": TINY, "count": count}]
    (tmp_path / page_planning.COUNTS).write_text(json.dumps(entries))
    monkeypatch.setattr(page_planning, "measured_trainings", lambda: [])
    monkeypatch.setattr(page_planning, "paper_trainings", lambda: ([training()], ["another"]))
    text = estimates(tmp_path)
    # 800 images of 4,500 operations at 500 a second are 7,200 s.
    for cell in (
        "- 0.11\n",
        "- 2 h\n",
        "- 5 US$\n",
        "- 2 GiB\n",
        "50% of the peak of one toy GPU",
    ):
        assert cell in text
    assert "`another`\n  - not counted" in text
    monkeypatch.setattr(page_planning, "paper_trainings", lambda: ([training(hidden=7)], []))
    with pytest.raises(PageError, match=r"tiny is not counted as it is now; run `python"):
        estimates(tmp_path)


def test_only_timed_results_are_measured(monkeypatch, tmp_path):
    labels = [each.label for each in page_planning.measured_trainings()]
    assert "glow_avatars/cpu" in labels and "vae_mnist/cpu" not in labels
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert page_planning.measured_trainings() == []


def test_the_page_of_this_book():
    text = estimates(ROOT)
    for name in ("glow_celeba128", "ddpm_cifar10", "ddpm_stl10"):
        assert f"`{name}`" in text
    assert "glow_avatars/cpu" in page_planning.measured_steps(ROOT)
    assert "3.00 US$ an hour" in page_planning.assumptions(ROOT)
    page = (ROOT / "book/planning.md").read_text("utf8")
    assert "is an estimate" in page
