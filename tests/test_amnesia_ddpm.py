"""Forgetting in a diffusion model: terms of the step, what is drawn once, and what is measured."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lib.checkpoints import CheckpointError
from lib.config import load_config
from lib.experiments import _amnesia_ddpm, amnesia_ddpm
from lib.experiments._amnesia_ddpm import Memory, fisher_of, forget, signed_noise
from lib.experiments._diffusion import (
    RealImages,
    arguments_of,
    draw,
    in_turn,
    noise_distances,
    sample_grid,
    stretch,
)
from lib.experiments._digits import Digits
from lib.models.classifier import SmallCNN
from lib.models.ddpm import ConditionalDDPM, to_signed
from lib.run import Run

CPU = torch.device("cpu")
SMOKE = load_config("amnesia_ddpm_mnist_probes", "smoke")
TASK = amnesia_ddpm.task_of(SMOKE.config)
TINY = {"image_shape": [1, 8, 8], "n_classes": 3, "channels": [8, 8], "patch": 2, "n_steps": 20}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tiny() -> ConditionalDDPM:
    torch.manual_seed(0)
    model = ConditionalDDPM(**TINY)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def memory() -> Memory:
    images = torch.randint(256, (30, 1, 8, 8), generator=seeded(1)).to(torch.uint8)
    return Memory(images, in_turn(range(3), 10, CPU))


def ones(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.ones_like(p) for name, p in model.named_parameters()}


def make_forget(model, memory, fisher=None, seed=0, **changes):
    task = replace(TASK, **{"iterations": 1, **changes})
    fisher = ones(model) if fisher is None else fisher
    return forget(model, 1, task, memory, fisher, seeded(seed), progress=False)


@torch.no_grad()
def distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return float(sum((p - q).square().sum() for p, q in pairs))


def test_the_terms_of_a_step(tiny, memory):
    """One step by hand, in the order in which the random numbers are drawn."""
    calls = []

    def watch(module, inputs, output):
        calls.append([value.clone() for value in inputs[:3]])

    handle = tiny.unet.register_forward_hook(watch)
    line = make_forget(tiny, memory, batch=4, drop=0.5).fit.history[0]
    handle.remove()
    g = seeded()
    kept = memory.without(1)
    x_r, c_r = kept.batch(4, g)
    dropped = torch.rand(4, generator=g) < 0.5
    q = 2 * torch.rand(4, 1, 8, 8, generator=g) - 1
    t, noise = torch.randint(20, (8,), generator=g), torch.randn(8, 1, 8, 8, generator=g)
    c = torch.cat([torch.full((4,), 1), torch.where(dropped, 3, c_r)])
    assert 1 <= dropped.sum() <= 3 and not (c_r == 1).any()
    with torch.no_grad():
        losses = tiny.loss_from_noise(torch.cat([q, x_r]), c, t, noise)
    assert line["surrogate"] == pytest.approx(float(losses[:4].mean()), rel=1e-4)
    assert line["replay"] == pytest.approx(float(losses[4:].mean()), rel=1e-4)
    assert line["ewc"] == 0.0
    mean = make_forget(tiny, memory, batch=4, drop=0.5, reduction="mean").fit.history[0]
    assert mean["surrogate"] == pytest.approx(line["surrogate"] / 64, rel=1e-4)
    assert "replay" not in make_forget(tiny, memory, replay=False).fit.history[0]


def test_the_penalty_is_felt(tiny, memory):
    free, held = (
        make_forget(tiny, memory, iterations=12, batch=8, lr=0.01, lam=lam) for lam in (0.0, 1e6)
    )
    assert distance(held.raw, tiny) < distance(free.raw, tiny) / 2
    last = {lam: r.fit.history[-1]["ewc"] for lam, r in ((0, free), (1, held))}
    assert last[0] == 0.0 and last[1] > 0


def test_the_surrogate_is_noise_in_the_models_range(tiny):
    noise = signed_noise("noise", tiny, CPU)(500, seeded())
    assert noise.shape == (500, 1, 8, 8)
    assert -1 <= noise.min() < -0.99 and 0.99 < noise.max() <= 1
    assert abs(float(noise.mean())) < 0.02
    assert float(noise.var()) == pytest.approx(1 / 3, rel=0.02)
    assert not signed_noise("grey", tiny, CPU)(2, seeded()).any()


def test_the_average_starts_at_the_base(tiny, memory):
    one = make_forget(tiny, memory, ema_decay=0.9)
    assert distance(one.ema, tiny) == 0 == distance(one.raw, tiny)
    two = make_forget(tiny, memory, iterations=2, ema_decay=0.9)
    assert distance(two.raw, tiny) > 0
    for base, raw, ema in zip(
        tiny.parameters(), two.raw.parameters(), two.ema.parameters(), strict=True
    ):
        torch.testing.assert_close(ema, 0.9 * base + 0.1 * raw, rtol=1e-5, atol=1e-7)
    assert not two.raw.training and not two.ema.training


def test_the_base_is_not_touched(tiny, memory):
    before = [p.clone() for p in tiny.parameters()]
    make_forget(tiny, memory, iterations=3)
    assert all(torch.equal(p, q) for p, q in zip(tiny.parameters(), before, strict=True))


def test_the_fisher_information_sees_the_range_that_is_asked_for(tiny, memory, monkeypatch):
    seen = []

    def stand_in(model, samples, **settings):
        seen.append((torch.cat([x for x, _ in samples]), settings))
        return ones(model)

    monkeypatch.setattr(_amnesia_ddpm, "diffusion_fisher", stand_in)
    fisher_of(tiny, memory, replace(TASK, fisher_samples=20, fisher_steps=5), seeded())
    fisher_of(tiny, memory, replace(TASK, fisher_samples=20, fisher_range="unit"), seeded())
    (signed, settings), (unit, _) = seen
    assert settings["estimator"] == "product" and settings["n_steps"] == 5
    assert signed.shape == (20, 1, 8, 8) and signed.min() < -0.9
    torch.testing.assert_close((signed + 1) / 2, unit)
    torch.testing.assert_close(signed, to_signed(memory.images[:20]))
    with pytest.raises(ValueError, match=r"on 31 samples, but only 30 are drawn .* replay_a_class"):
        fisher_of(tiny, memory, replace(TASK, fisher_samples=31), seeded())


def test_stretched_pictures_run_from_black_to_white(memory):
    dim = torch.tensor([[100, 150], [125, 100]], dtype=torch.uint8).expand(2, 1, 2, 2)
    assert stretch(dim)[1, 0].tolist() == [[0, 255], [128, 0]]
    assert not stretch(torch.full((1, 1, 2, 2), 9, dtype=torch.uint8)).any()
    once = stretch(memory.images)
    assert torch.equal(stretch(once), once) and (once.flatten(1).amax(1) == 255).all()
    assert torch.equal(memory.stretched().images, once)


def test_noise_is_told_from_digits_and_from_grey():
    noise = torch.randint(256, (50, 1, 28, 28), generator=seeded()).to(torch.uint8)
    found = noise_distances(noise)
    assert found["grey_distance"] == pytest.approx(12**-0.5, abs=0.005)
    assert found["uniform_distance"] < 0.01 and abs(found["neighbour_correlation"]) < 0.02
    digits = noise_distances(Digits.load("digits", "test", 28, CPU).images[:50])
    assert digits["uniform_distance"] > 0.1 and digits["neighbour_correlation"] > 0.5
    grey = noise_distances(torch.full_like(noise, 128))
    assert grey["grey_distance"] < 0.01 and grey["uniform_distance"] == pytest.approx(
        0.25, abs=0.01
    )
    assert grey["neighbour_correlation"] == 0


def test_real_images_are_compared_in_the_features_of_the_judge():
    digits = Digits.load("digits", "train", 28, CPU)
    torch.manual_seed(0)
    judge = SmallCNN().eval()
    real = RealImages(judge, "some judge", digits, range(1, 10), n_real=20, n_samples=10)
    assert real.extractor.startswith("some judge (SmallCNN, 50 features of 1×28×28")
    same = torch.cat([digits.images[digits.labels == c][:10] for c in range(1, 10)])
    found = real.compare(same)
    assert found["precision"] == found["recall"] == 1.0
    half = real.compare(torch.cat([same[:45], torch.zeros_like(same[:45])]))
    assert half["frechet"] > found["frechet"] and half["precision"] < 1
    assert half["precision_swapped"] == half["recall"]
    assert half["recall_swapped"] == half["precision"]


def test_a_model_is_built_again_from_its_arguments():
    wanted = {**TINY, "attention": [4], "layers_per_block": 2, "groups": 4, "dropout": 0.1}
    found = arguments_of(ConditionalDDPM(**wanted))
    assert found == wanted
    assert arguments_of(ConditionalDDPM(**found)) == found


def test_samples_are_drawn_in_batches_and_in_order(tiny):
    c = in_turn([0, 2], 2, CPU)
    assert c.tolist() == [0, 2, 0, 2]
    drawn = draw(tiny, c, SMOKE.config, seeded(3))
    assert drawn.shape == (4, 1, 8, 8) and drawn.dtype == torch.uint8
    grid = sample_grid(tiny, SMOKE.config)
    assert grid.shape == (3, 8, 8, 8) and grid.dtype == np.uint8
    assert len(Memory.of(tiny, 2, SMOKE.config, seeded()).images) == 6


def lab_of(tmp_path, resume=False, **changes):
    torch.manual_seed(0)  # base and judge are random ones
    run = Run(SMOKE, resume=resume, runs=tmp_path)
    return amnesia_ddpm.Lab(replace(SMOKE.config, n_samples=2, **changes), run)


def test_variants_share_what_they_can_and_a_resume_computes_nothing(tmp_path, monkeypatch):
    made = []

    def counted(function):
        def call(*arguments, **options):
            made.append(function.__qualname__)
            return function(*arguments, **options)

        return call

    for owner, name in (
        (amnesia_ddpm, "fisher_of"),
        (amnesia_ddpm, "forget"),
        (amnesia_ddpm.Memory, "of"),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    variants = {
        "one": {},
        "other_lambda": {"lam": 1.0},
        "average": {"weights": "ema"},
        "unit": {"fisher_range": "unit"},
    }
    first = lab_of(tmp_path, variants=variants)
    first.work()
    assert {name: made.count(name) for name in made} == {
        "Memory.of": 1,
        "fisher_of": 2,
        "forget": 3,
    }
    arrays = first.run._arrays
    assert list(arrays["samples_of"]) == ["base", *variants]
    assert arrays["samples"].shape == (5, 10, 8, 28, 28) and len(arrays["lam"]) == 4
    values = {row.quantity: row.value for row in first.run.rows}
    column = list(arrays["metrics_of"]).index("entropy")
    assert arrays["metrics"][2, column] == values["entropy_other_lambda"]
    made.clear()
    again = lab_of(tmp_path, resume=True, variants=variants)
    again.work()
    assert made == []
    for a, b in zip(first.run.rows, again.run.rows, strict=True):
        assert (a.quantity, a.value) == (b.quantity, b.value)
    (tmp_path / SMOKE.name / "smoke" / "average-0.npz").unlink()
    lab_of(tmp_path, resume=True, variants=variants).work()
    assert made == ["forget"]  # which goes on from its own finished checkpoint


def test_the_fisher_informations_are_compared():
    rng = np.random.default_rng(0)
    a = rng.random(100)
    assert amnesia_ddpm.rank_correlation(a, 3 * a**2) == pytest.approx(1)
    assert abs(amnesia_ddpm.rank_correlation(a, rng.random(100))) < 0.3
    assert amnesia_ddpm.flat({"b": torch.ones(2, 2), "a": torch.zeros(1)}).tolist() == [1] * 4 + [0]


@pytest.mark.parametrize("name", ["amnesia_ddpm_cifar10", "amnesia_ddpm_stl10"])
def test_a_missing_base_is_one_sentence(name, tmp_path):
    loaded = load_config(name, "cpu")
    config = replace(loaded.config, base="no_such_base")
    with pytest.raises(CheckpointError, match="no checkpoint named 'no_such_base'; shipped are"):
        amnesia_ddpm.run(config, Run(loaded, runs=tmp_path))


@pytest.mark.parametrize(
    ("field", "value"),
    [("surrogate", "black"), ("reduction", "max"), ("weights", "best"), ("fisher_range", "byte")],
)
def test_unknown_choices_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} '{value}' is unknown; choose from"):
        replace(TASK, **{field: value})


def test_two_classes_cannot_be_left_out_at_once():
    config = load_config("ddpm_mnist_nine", "cpu").config
    for changes in ({"without": (0, 1)}, {"n_real": 0}):
        with pytest.raises(ValueError, match="leave out one class at most"):
            replace(config, **changes)
