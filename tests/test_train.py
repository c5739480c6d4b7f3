"""The fit loop: exact resume, EMA, interruption, and losses that stop being finite."""

import json
import os
import signal

import pytest
import torch
from safetensors import safe_open
from torch import nn

from lib.checkpoints import CheckpointError
from lib.train import Interrupted, TrainingError, cosine, fit, pick_device


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))


def regression(model, generator):
    x = torch.randn(16, 3, generator=generator)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    return loss, {"error": loss.detach().sqrt()}


def run(steps, path=None, step_loss=regression, seed=1, **options):
    options = {"lr": 1e-2, "ema_decay": 0.9, "grad_clip": 1.0, "progress": False, **options}
    generator = torch.Generator().manual_seed(seed)
    model = build()
    result = fit(model, step_loss, steps=steps, generator=generator, checkpoint=path, **options)
    return model, result


def test_resume_is_bit_for_bit(tmp_path):
    raw, whole = run(20, tmp_path / "whole.safetensors", schedule=None)
    run(10, tmp_path / "part.safetensors")
    raw2, resumed = run(20, tmp_path / "part.safetensors", resume=True, seed=99)
    for a, b in zip(raw.state_dict().values(), raw2.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed.steps == 20
    assert whole.history[-1]["total"] == resumed.history[-1]["total"]


def test_training_lowers_the_loss_and_returns_the_average():
    raw, result = run(300, log_every=1)
    totals = [line["total"] for line in result.history]
    assert sum(totals[-20:]) < 0.2 * sum(totals[:20])
    assert result.history[0]["error"] == pytest.approx(totals[0] ** 0.5, rel=1e-5)
    assert not torch.equal(next(raw.parameters()), next(result.model.parameters()))
    assert not result.model.training


def test_the_schedule_reaches_the_optimiser():
    frozen, _ = run(5, schedule=lambda progress: 0.0)
    assert torch.equal(next(frozen.parameters()), next(build().parameters()))
    factors = [cosine(progress) for progress in (0.0, 0.02, 0.04, 0.5, 1.0)]
    assert factors == pytest.approx([0.0025, 0.5015, 0.9961, 0.5, 0.0], abs=5e-3)


def test_checkpoints_are_written_while_training(tmp_path):
    path = tmp_path / "c.safetensors"

    def watched(model, generator):
        watched.seen += path.is_file()
        return regression(model, generator)

    watched.seen = 0
    run(5, path, watched, checkpoint_every_s=0.0)
    assert watched.seen == 4
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["progress"])["steps"] == 5
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path):
    path = tmp_path / "c.safetensors"
    run(3, path)
    before = path.read_bytes()

    def broken(model, generator):
        loss, terms = regression(model, generator)
        return loss * float("nan"), terms

    with pytest.raises(TrainingError, match=r"became nan at step 3; the checkpoint .* lower the"):
        run(10, path, broken, resume=True)
    assert path.read_bytes() == before


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    path = tmp_path / "c.safetensors"

    def pressed(model, generator):
        pressed.calls += 1
        if pressed.calls == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return regression(model, generator)

    pressed.calls = 0
    previous = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"Stopped after step 4 of 20; go on with --resume"):
        run(20, path, pressed)
    assert signal.getsignal(signal.SIGINT) is previous
    whole, _ = run(20)
    resumed, _ = run(20, path, resume=True)
    assert torch.equal(next(whole.parameters()), next(resumed.parameters()))


def test_a_checkpoint_of_another_model_or_a_damaged_one_is_a_sentence(tmp_path):
    path = tmp_path / "c.safetensors"
    run(2, path)
    with pytest.raises(CheckpointError, match=r"Cannot resume from .* delete the file"):
        fit(
            nn.Linear(3, 1),
            regression,
            steps=4,
            lr=0.1,
            generator=torch.Generator(),
            checkpoint=path,
            resume=True,
            progress=False,
        )
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="Cannot resume from"):
        run(4, path, resume=True)


def test_a_step_takes_the_mean_over_streams():
    options = {"optimizer": torch.optim.SGD, "ema_decay": None, "grad_clip": None, "lr": 0.1}
    raw, result = run(1, streams=3, log_every=1, **options)
    first = torch.Generator().manual_seed(1)
    seeds = torch.randint(2**63 - 1, (2,), generator=first).tolist()
    by_hand = build()
    losses = [
        regression(by_hand, generator)[0]
        for generator in (first, *(torch.Generator().manual_seed(seed) for seed in seeds))
    ]
    mean = torch.stack(losses).mean()
    gradients = torch.autograd.grad(mean, list(by_hand.parameters()))
    assert len({loss.item() for loss in losses}) == 3
    assert result.history[0]["total"] == pytest.approx(mean.item(), rel=1e-6)
    roots = [loss.item() ** 0.5 for loss in losses]
    assert result.history[0]["error"] == pytest.approx(sum(roots) / 3, rel=1e-6)
    for after, before, gradient in zip(
        raw.parameters(), by_hand.parameters(), gradients, strict=True
    ):
        torch.testing.assert_close(after, before - 0.1 * gradient)


def test_cuda_asked_for_and_absent(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TrainingError, match="no usable GPU; use the cpu profile"):
        pick_device("cuda")
    assert pick_device().type == "cpu"
