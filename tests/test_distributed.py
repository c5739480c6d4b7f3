"""Two processes compute what one does with two streams, and a lost one ends both with a sentence.

Starting processes takes most of the time, so that ``_two_processes.py`` goes through all checks in
one launch; a second one, by ``accelerate launch``, is killed.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import _two_processes as two
import numpy as np
import pytest
import torch
from safetensors import safe_open

from lib import distributed
from lib.checkpoints import CheckpointError
from lib.config import load_config
from lib.distributed import ProcessError
from lib.run import _end_with_a_sentence, execute

SCRIPT = Path(two.__file__)
LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1".split()
LAUNCH += "--mixed_precision no --dynamo_backend no --main_process_port".split()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Run both launches; return the folder with what they found."""
    path = tmp_path_factory.mktemp("two")
    two.train(path / "one.safetensors", steps=two.STEPS // 2, streams=2)
    two.train(path / "single.safetensors", steps=2)
    base = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    joined = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    joined |= base | {"MASTER_PORT": free_port()}
    command = [sys.executable, str(SCRIPT), "checks", str(path)]
    started = [(command, joined | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    launch = [sys.executable, *LAUNCH, free_port(), str(SCRIPT), "run", str(path / "launched")]
    started.append((launch, base))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen(c, env=environment, **pipes) for c, environment in started]
    try:
        said = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes[:2]] == [0, -9], said
    (path / "launch.json").write_text(json.dumps([processes[2].returncode, said[2]]))
    return path


@pytest.fixture(scope="session")
def found(folder):
    """Return the findings of both processes."""
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def alone():
    """Train in one process with two streams; return the fit, the model and what it drew."""
    draws = two.Draws()
    whole, model = two.train(None, draws=draws, streams=2)
    return whole, model, draws


def assert_same_curve(history, expected):
    assert [line["step"] for line in history] == list(range(two.STEPS))
    for name in ("total", "error"):
        curve, wanted = ([line[name] for line in lines] for lines in (history, expected))
        np.testing.assert_allclose(curve, wanted, rtol=1e-5)
        assert len(set(curve)) == two.STEPS


def test_two_processes_train_as_one_with_twice_the_batch(found, alone, folder):
    whole, model, _ = alone
    assert_same_curve(found[0]["history"], whole.history)
    with safe_open(folder / "whole.safetensors", "pt") as file:
        for group, module in (("model", model), ("ema.module", whole.model)):
            for name, value in module.state_dict().items():
                stored = file.get_tensor(f"{group}.{name}")
                torch.testing.assert_close(stored, value, rtol=1e-5, atol=1e-6)


def test_weights_average_and_history_are_the_same_in_both(found):
    for key in ("weights", "average", "history", "passes", "rows", "taming", "fisher"):
        assert found[0][key] == found[1][key]
    assert found[0]["weights"] != found[0]["average"]


def test_the_first_process_decides_how_training_begins(found):
    assert found[1]["started_apart_weights"] == found[0]["weights"]
    assert found[1]["started_apart"] == found[0]["history"]
    start = [distributed.fingerprint(two.build(seed).parameters()) for seed in (0, 1)]
    assert start[0] != start[1]


def test_streams_share_no_draw_and_no_noise(found, alone):
    draws = alone[2]
    for key in ("index", "noise"):
        first, second = (found[rank][key] for rank in (0, 1))
        assert first != second
        assert getattr(draws, key) == [
            of for both in zip(first, second, strict=True) for of in both
        ]
    noise = np.array([found[rank]["noise"] for rank in (0, 1)])
    assert len(np.unique(noise)) > 0.99 * noise.size  # equal noise would halve it
    assert abs(np.corrcoef(noise.reshape(2, -1))[0, 1]) < 0.1
    assert abs(noise.mean() - 0.5) < 0.03


def test_a_checkpoint_goes_on_with_the_other_number_of_processes(found, alone, folder):
    whole = alone[0]
    assert_same_curve(found[0]["resumed"], whole.history)
    resumed, _ = two.train(folder / "half.safetensors", seed=99, resume=True)
    assert_same_curve(resumed.history, whole.history)


def test_one_process_with_streams_resumes_bit_for_bit(alone, tmp_path):
    whole, model, _ = alone
    two.train(tmp_path / "part.safetensors", steps=2, streams=2)
    resumed, again = two.train(tmp_path / "part.safetensors", seed=99, resume=True)
    for one, other in ((model, again), (whole.model, resumed.model)):
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_the_number_of_streams_belongs_to_the_checkpoint(found, folder):
    assert found[0]["few"].startswith("TrainingError: A step draws from 1 stream, too few for 2")
    with pytest.raises(CheckpointError, match="has 2 streams and 3 are asked for"):
        two.train(folder / "whole.safetensors", streams=3, resume=True)


def test_a_loss_that_is_not_finite_in_one_process_ends_both(found, folder):
    for each in found:
        assert each["nan"].startswith("TrainingError: The loss became nan at step 2; no checkpoint")
    assert not (folder / "nan.safetensors").exists()


def test_weights_that_a_process_sets_for_itself_are_noticed(found):
    for each in found:
        assert each["own_start"].startswith("TrainingError: The processes differ in their steps or")


def test_ctrl_c_in_one_process_stops_both_after_the_same_step(found, folder, alone):
    for each in found:
        assert each["ctrl_c"].startswith("Interrupted: Stopped after step 2 of 6; go on with")
    resumed, _ = two.train(folder / "ctrl_c.safetensors", resume=True)
    assert_same_curve(resumed.history, alone[0].history)


def test_the_fisher_information_is_shared_out(found):
    expected, taken = two.fisher()
    assert (found[0]["fisher_samples"], found[1]["fisher_samples"], taken) == (30, 20, 50)
    for name, value in expected.items():
        shared = torch.tensor(found[1]["fisher"][name])
        torch.testing.assert_close(shared, value, rtol=1e-5, atol=1e-7 * float(value.max()))


def test_the_statistics_of_taming_are_shared_out(found):
    expected, rows = two.taming()
    assert len(expected) == 13
    for terms, wanted in zip(found[1]["taming"], expected, strict=True):
        assert terms == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert len({terms["mu_r"] for terms in expected}) == 4  # refreshed every fourth step
    # Four statistics of 31 rows and 13 stop rules of 3 are shared, the 12 steps are not.
    steps = 12 * (3 + 8 + 8)
    assert rows == 4 * 31 + 13 * 3 + steps
    assert [each["taming_rows"] - steps for each in found] == [4 * 16 + 13 * 2, 4 * 15 + 13]


def test_a_run_is_written_once(found, folder, tmp_path):
    single = execute(load_config(two.RUN, "smoke"), runs=tmp_path)
    results = folder / "runs" / two.RUN / "smoke" / "results" / two.RUN / "smoke"
    stored = {row["quantity"]: row for row in json.loads((results / "metrics.json").read_text())}
    assert stored.keys() == {row.quantity for row in single.rows}
    assert {name: stored[name]["value"] for name in found[1]["rows"]} == found[1]["rows"]
    assert found[0]["device"] == "2 CPU cores, float32"
    assert (folder / "written_by_0").exists() and not (folder / "written_by_1").exists()


def assert_readable(path):
    with safe_open(path, "pt") as file:
        assert all(torch.isfinite(file.get_tensor(key).float()).all() for key in file.keys())
        return json.loads(file.metadata()["progress"])["steps"]


def test_a_killed_process_ends_the_other_with_a_sentence(found, folder, alone):
    said = found[0]["killed"]
    assert said.startswith("TrainingError: Stopped after step 3; ")
    assert "killed.safetensors is the last checkpoint. Process 0 lost another process" in said
    assert "go on with --resume" in said
    assert found[0]["killed_after_s"] < 30
    assert assert_readable(folder / "killed.safetensors") == 3
    assert not list(folder.rglob(".*"))
    resumed, _ = two.train(folder / "killed.safetensors", resume=True)
    assert_same_curve(resumed.history, alone[0].history)


def test_the_launcher_does_not_cut_off_a_sentence_under_way():
    before = signal.signal(signal.SIGTERM, _end_with_a_sentence)
    try:
        with pytest.raises(ProcessError, match="Process 0 was told to end"):
            signal.raise_signal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, _end_with_a_sentence)
        try:
            raise ProcessError("lost another")
        except ProcessError:
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_killed_process_of_a_launched_run_ends_it(folder):
    status, said = json.loads((folder / "launch.json").read_text())
    assert status == 1
    lines = [line for line in said.splitlines() if "Error: Stopped after step" in line]
    assert len(lines) == 1 and "model.safetensors is the last checkpoint" in lines[0], said
    assert "lib/run.py" not in said  # no traceback of ours
    work = folder / "launched" / two.RUN / "smoke"
    assert assert_readable(work / "model.safetensors") > 0
    assert {path.name for path in work.iterdir()} == {"model.safetensors", "seconds.json"}
