"""Each variant of the ablation leaves out what it names, and the sliders show what was measured."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lib.config import load_config
from lib.experiments import taming_ablation, taming_sliders
from lib.experiments.taming_ablation import CANCELLED, TRACED, WITH_KL, variants
from lib.explorer import Explorer
from lib.methods import taming
from lib.methods.taming import TamingSettings, remember_loss, tame
from lib.run import execute

LEFT_OUT = {
    "full": set(),
    "no_L_R": {"kl_forward", "kl_reverse", "average_nll"},
    "no_KL_reverse": {"kl_reverse"},
    "no_KL_forward": {"kl_forward"},
    "no_A": {"average_nll"},
    "no_KLs": {"kl_forward", "kl_reverse"},
    "control": {"forget"},
}


class Stretch(nn.Module):
    """A model whose NLL of x is a x², so that mean and spread change together."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(1.0))


def nll(model: Stretch, x: torch.Tensor) -> torch.Tensor:
    return model.a * x**2


@pytest.mark.parametrize("name", variants())
def test_a_variant_leaves_out_what_it_names(name, monkeypatch):
    """The gradient of the total with respect to each term, in the second step of Algorithm 1."""
    seen = []

    def spy(forget, remember, alpha):
        total = alpha * forget + (1 - alpha) * remember
        terms = {"forget": forget, **remember_terms}
        slopes = torch.autograd.grad(
            total, list(terms.values()), retain_graph=True, allow_unused=True
        )
        seen.append({k: s for k, s in zip(terms, slopes, strict=True) if s is not None and s != 0})
        return total

    remember_terms = {}

    def keep_terms(*args):
        total, terms = remember_loss(*args)
        remember_terms.update(terms)
        return total, terms

    monkeypatch.setattr(taming, "taming_loss", spy)
    monkeypatch.setattr(taming, "remember_loss", keep_terms)
    changes = dict(variants()[name])
    kl = changes.pop("kl")
    generator = torch.Generator().manual_seed(0)
    remember = torch.randn(64, generator=generator)
    settings = replace(TamingSettings(max_steps=2), **changes)
    list(tame(Stretch(), torch.tensor([0.1]), remember, nll, settings, generator, kl))
    everything = {"forget", "kl_forward", "kl_reverse", "average_nll"}
    assert len(seen) == 2
    assert set(seen[1]) == everything - LEFT_OUT[name.removesuffix("_detached")]


@pytest.mark.parametrize("name", WITH_KL)
def test_the_authors_kl_changes_the_gradient_and_not_the_value(name):
    base = torch.tensor([0.9, 1.0, 1.3])

    def loss(changes):
        tamed = torch.tensor([0.8, 1.1, 1.7], requires_grad=True)
        total, _ = remember_loss(tamed, base, 0.6, changes["kl"], changes.get("without", ()))
        return total.item(), torch.autograd.grad(total, tamed)[0]

    (value, slope), (value_detached, slope_detached) = (
        loss(variants()[name + suffix]) for suffix in ("", "_detached")
    )
    assert value == pytest.approx(value_detached, rel=1e-6)
    same = torch.allclose(slope, slope_detached, rtol=1e-4)
    assert same == (f"{name}_detached" in CANCELLED)


def test_a_trace_that_ends_early_is_padded_and_compared_at_its_end():
    def part(n_steps):
        trace = np.tile(np.arange(n_steps + 1, dtype=np.float32), (len(TRACED), 1))
        return {"nll": np.zeros(3), "samples": np.zeros((2, 4, 4, 3), np.uint8), "trace": trace}

    base = {k: v for k, v in part(0).items() if k != "trace"}
    arrays = taming_ablation.for_figures({"base": base, "full": part(2), "no_A": part(5)})
    assert arrays["names"].tolist() == ["base", "full", "no_A"]
    assert arrays["nll"].shape == (3, 3) and arrays["traces"].shape == (2, len(TRACED), 6)
    assert np.isnan(arrays["traces"][0, 0]).tolist() == [False] * 3 + [True] * 3
    assert taming_ablation.at_equal_steps(part(5), 2)["sigma_remember"] == 2
    assert taming_ablation.at_equal_steps(part(2), 5)["bits_remember"] == 2


def made_up_grid(n_deltas: int, n_alphas: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    numbers = (
        *(f"quantile_{name}" for name in ("forget", "reference", "remember")),
        *("bits_per_dim", "threshold", "steps", "stopped"),
    )
    grid = {name: random.random((n_deltas, n_alphas)) for name in numbers}
    pixels = random.integers(0, 256, (n_deltas, n_alphas, 8, 4, 4, 3), dtype=np.uint8)
    return grid | {
        "crowd": random.random((n_deltas, n_alphas, 5)),
        "forget": random.random((n_deltas, n_alphas, 3)),
        "samples": pixels,
    }


def test_one_position_computed_anew_looks_like_that_of_the_grid():
    fixed = {"edges": np.linspace(0, 1, 6), "base_crowd": np.ones(5)}
    grid = made_up_grid(2, 3)
    axes = {"δ (delta)": [1.0, 4.0], "α (alpha)": [0.0, 0.6, 1.0]}

    def compute(delta, alpha):
        i, j = axes["δ (delta)"].index(delta), axes["α (alpha)"].index(alpha)
        found = {name: array[i, j] for name, array in grid.items()}
        return taming_sliders.slider_panels(found | fixed)

    shown = Explorer(axes, **taming_sliders.slider_panels(grid | fixed), compute=compute)
    views = set()
    for i, delta in enumerate(axes["δ (delta)"]):
        for j, alpha in enumerate(axes["α (alpha)"]):
            anew = shown.at(delta=delta, alpha=alpha)
            assert anew.view(anew.start) == shown.view((i, j))
            views.add(shown.view((i, j)))
    assert len(views) == 6


def test_samples_are_laid_out_row_by_row():
    samples = np.arange(8, dtype=np.uint8).reshape(1, 8, 1, 1, 1)
    picture = taming_sliders.tiled(samples)
    assert picture[0, ..., 0].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_without_a_forget_loss_only_the_threshold_depends_on_delta(tmp_path):
    loaded = load_config("taming_sliders_avatars", "smoke")
    found = execute(loaded, runs=tmp_path)._arrays
    assert loaded.config.alphas[0] == 0
    for name in ("samples", "crowd", "forget", "steps"):
        np.testing.assert_array_equal(found[name][0, 0], found[name][1, 0])
    assert found["threshold"][0, 0] < found["threshold"][1, 0]
    assert found["stopped"][:, 0].tolist() == [0, 0]
