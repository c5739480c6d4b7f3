"""Every config end to end in its smoke profile, and the command line's answers to mistakes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from lib import ROOT
from lib.config import config_names, load_config
from lib.results import ResultsError
from lib.run import Run, execute, main, seed_everything

SMOKE_TWICE = "toy_taming"


@pytest.mark.parametrize("name", config_names())
def test_smoke(name, tmp_path):
    run = execute(load_config(name, "smoke"), runs=tmp_path)
    folder = tmp_path / name / "smoke" / "results" / name / "smoke"
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    assert stored["name"] == name and stored["profile"] == "smoke"
    assert run.rows
    for row in run.rows:
        assert row.wall_s <= run.seconds + 1
        assert row.config_sha == run.config_sha
    measured = {row.quantity for row in run.rows}
    assert {entry["quantity"] for entry in load_config(name, "smoke").verdict} <= measured


def test_smoke_is_deterministic(tmp_path):
    def values(folder):
        rows = execute(load_config(SMOKE_TWICE, "smoke"), runs=tmp_path / folder).rows
        return {row.quantity: row.value for row in rows if row.unit != "s"}

    assert values("first") == values("second")


def test_a_row_is_mean_and_spread_over_seeds(tmp_path):
    run = Run(load_config(SMOKE_TWICE, "smoke"), runs=tmp_path)
    about = {"n_samples": 5, "unit": "share", "data": "none"}
    run.row("three", [1.0, 2.0, 6.0], seeds=[0, 1, 2], **about)
    run.row("one", 4.0, seeds=[0], **about)
    assert (run.rows[0].value, run.rows[1].value, run.rows[1].sd) == (3.0, 4.0, None)
    assert run.rows[0].sd == pytest.approx(np.std([1, 2, 6], ddof=1))
    with pytest.raises(ResultsError, match="has 2 values for 1 seeds"):
        run.row("wrong", [1.0, 2.0], seeds=[0], **about)


def test_the_clock_counts_on_after_a_resume(tmp_path):
    loaded = load_config(SMOKE_TWICE, "smoke")
    first = Run(loaded, runs=tmp_path)
    first._start -= 100
    first.pause_clock()
    assert Run(loaded, runs=tmp_path).seconds < 50
    assert Run(loaded, resume=True, runs=tmp_path).seconds >= 100


def test_the_clock_of_a_killed_run_is_that_of_its_checkpoints(tmp_path):
    loaded = load_config(SMOKE_TWICE, "smoke")
    killed = Run(loaded, runs=tmp_path)
    for part, seconds in (("first", 70.0), ("second", 50.0)):
        progress = {"progress": json.dumps({"steps": 1, "seconds": seconds, "history": []})}
        save_file({"x": torch.zeros(1)}, killed.checkpoint(part), progress)
    save_file({"x": torch.zeros(1)}, killed.checkpoint("shipped"))  # not one of fit's
    assert 120 <= Run(loaded, resume=True, runs=tmp_path).seconds < 150
    assert Run(loaded, runs=tmp_path).seconds < 50


def test_a_finished_part_is_only_read_again_by_a_resumed_run(tmp_path):
    loaded, calls = load_config(SMOKE_TWICE, "smoke"), []

    def compute():
        calls.append(1)
        return {"number": 0.1, "array": np.arange(3, dtype=np.uint8)}

    first = Run(loaded, runs=tmp_path).part("person0", compute)
    again = Run(loaded, resume=True, runs=tmp_path).part("person0", compute)
    assert len(calls) == 1
    assert float(again["number"]) == float(first["number"]) == 0.1
    assert again["array"].dtype == np.uint8 and list(again["array"]) == [0, 1, 2]
    Run(loaded, runs=tmp_path).part("person0", compute)
    assert len(calls) == 2


def test_the_seed_fixes_every_source_of_randomness():
    def drawn():
        generator = seed_everything(3)
        return torch.rand(1), torch.rand(1, generator=generator), np.random.rand()

    assert drawn() == drawn()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nope"], "ConfigError: There is no config named 'nope'; the configs are: "),
        ([SMOKE_TWICE, "--profile", "gpu"], "TrainingError: CUDA was asked for"),
    ],
)
def test_mistakes_are_one_sentence(arguments, sentence, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = str(torch.get_num_threads())
    assert main([*arguments, "--threads", threads]) == 1
    error = capsys.readouterr().err
    assert error.startswith(sentence)
    assert "Traceback" not in error and error.count("\n") == 1


def test_missing_data_says_both_ways_to_get_it(tmp_path):
    environment = os.environ | {"BOOK_DATA": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", "from lib.data import load; load('mnist')"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "DataError" in last and "BOOK_DATA" in last and "hub" in last
