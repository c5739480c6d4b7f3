"""The unlearning loop and its baselines, on a decoder that can be read."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from lib.methods.feature_baselines import edited_sample, finetune_on_negatives, latent_rejection
from lib.methods.feature_unlearning import (
    Feature,
    UnlearningSettings,
    edited_latent,
    indicator,
    unlearn,
)

SIZE, DIM = 16, 4
FEATURE = Feature(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor(0.3))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Quarters(nn.Module):
    """Paint each quarter of a picture with the brightness tanh(z_i) and a fixed pattern.

    The correction, zero at first, is what training can change.
    """

    def __init__(self):
        super().__init__()
        self.correction = nn.Sequential(nn.Linear(DIM, 32), nn.ReLU(), nn.Linear(32, DIM))
        nn.init.zeros_(self.correction[2].weight)
        nn.init.zeros_(self.correction[2].bias)
        pattern = 0.75 + 0.25 * torch.sin(torch.arange(SIZE) / 2.0)
        quarters = torch.zeros(DIM, 2, SIZE // 2, 2, SIZE // 2)
        for i in range(DIM):
            quarters[i, i // 2, :, i % 2] = 1.0
        self.register_buffer("patterns", quarters.reshape(DIM, SIZE, SIZE) * pattern)

    def forward(self, z):
        brightness = torch.tanh(z + self.correction(z))
        return torch.einsum("nd,dhw->nhw", brightness, self.patterns).unsqueeze(1)


def decode(model, z):
    return model(z)


def draw(n, generator):
    return torch.randn(n, DIM, generator=generator)


def quarters() -> Quarters:
    torch.manual_seed(0)
    return Quarters()


@pytest.fixture(scope="module")
def unlearned():
    settings = UnlearningSettings(lr=1e-2, batch=64, max_steps=150)
    base = quarters()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    steps = list(unlearn(base, decode, draw, [FEATURE], settings, seeded()))
    for name, value in base.state_dict().items():
        assert (value == before[name]).all(), "the base was changed"
    return base, steps[-1][0], [terms for _, terms in steps]


@torch.no_grad()
def test_unlearning_removes_the_feature_and_keeps_the_rest(unlearned):
    base, model, history = unlearned
    z = draw(2000, seeded(5))
    edited, has_feature = edited_latent(z, [FEATURE])
    chosen = has_feature > 0
    before, after = base(z), model(z)
    first = (slice(None), slice(None), slice(0, SIZE // 2), slice(0, SIZE // 2))

    def share(images):
        return (images[first].amax((1, 2, 3)) > math.tanh(0.5)).double().mean()

    assert share(before) > 0.25 and share(after) < 0.1 * share(before)
    assert (after - before)[~chosen].abs().mean() < 0.02
    assert (after - base(edited)).abs().mean() < 0.02  # g draws what editing the latents gives
    others = (after - before)[chosen]
    others[first] = 0.0
    assert others.abs().mean() < 0.02
    assert [terms["step"] for terms in history] == list(range(151))
    assert history[0]["recon"] == 0.0 and history[0]["unlearn"] > 0.01  # g starts as f
    assert history[-1]["total"] < 0.2 * history[0]["total"]
    assert np.mean([terms["share"] for terms in history]) == pytest.approx(0.38, abs=0.03)


def first_terms(n=6, seed=0, **settings):
    given = UnlearningSettings(max_steps=n, lr=5e-3, **settings)
    steps = unlearn(quarters(), decode, draw, [FEATURE], given, seeded(seed))
    return [terms for _, terms in steps]


def test_unlearning_is_the_same_again_and_different_by_seed():
    assert first_terms() == first_terms()
    assert first_terms() != first_terms(seed=1)


@torch.no_grad()
def moved_by(**settings) -> tuple[float, float]:
    """Return how far pictures with and without the feature moved after 25 steps."""
    base = quarters()
    given = UnlearningSettings(**{"max_steps": 25, "lr": 1e-2, "batch": 32} | settings)
    with torch.enable_grad():
        *_, (model, _terms) = unlearn(base, decode, draw, [FEATURE], given, seeded())
    z = draw(500, seeded(3))
    chosen = indicator(z, *FEATURE) > 0
    moved = (model(z) - base(z)).abs().mean((1, 2, 3))
    return moved[chosen].mean().item(), moved[~chosen].mean().item()


def test_each_loss_can_be_removed():
    with_feature, rest = moved_by()
    assert moved_by(alpha=0.0) == (0.0, 0.0)
    assert moved_by(without=("unlearn", "percep")) == (0.0, 0.0)
    assert moved_by(without=("recon",))[1] > 2 * rest
    only_l1, only_percep = moved_by(without=("percep",)), moved_by(without=("unlearn",))
    assert only_l1 != only_percep
    assert min(with_feature, only_l1[0], only_percep[0]) > 0.03
    assert "percep" not in first_terms(n=1, without=("percep",))[0]


def test_a_decoder_with_fresh_noise_is_refused():
    def noisy(model, z):
        return model(z) + 0.1 * torch.randn(len(z), 1, SIZE, SIZE)

    steps = unlearn(quarters(), noisy, draw, [FEATURE], UnlearningSettings(), seeded())
    with pytest.raises(ValueError, match=r"two pictures for one latent, up to .* fix the noise"):
        next(steps)


# Baselines


def test_rejected_latents_have_no_feature_and_are_otherwise_the_prior():
    z = latent_rejection(3000, draw, [FEATURE], seeded())
    assert z.shape == (3000, DIM) and (z[:, 0] < 0.3).all()
    assert z[:, 1:].mean().item() == pytest.approx(0.0, abs=0.05)
    assert z[:, 1:].std().item() == pytest.approx(1.0, abs=0.05)
    # The mean of a standard normal below 0.3 is -phi(0.3) / Phi(0.3).
    density, below = math.exp(-0.045) / math.sqrt(2 * math.pi), 0.5 * (1 + math.erf(0.3 / 2**0.5))
    assert z[:, 0].mean().item() == pytest.approx(-density / below, abs=0.05)
    hopeless = Feature(FEATURE.z_e, torch.tensor(-9.0))
    with pytest.raises(ValueError, match="Only 0 of 500 latents lie below"):
        latent_rejection(5, draw, [hopeless], seeded())


def test_an_edited_sample_is_the_picture_at_the_threshold():
    z = torch.tensor([[2.0, 0.1, 0.2, 0.3], [-1.0, 0.1, 0.2, 0.3]])
    at_threshold = torch.tensor([[0.3, 0.1, 0.2, 0.3], [-1.0, 0.1, 0.2, 0.3]])
    base = quarters()
    assert torch.allclose(edited_sample(base, decode, z, [FEATURE]), base(at_threshold))


def test_finetuning_sees_only_negatives_and_leaves_the_base_alone():
    base, negatives, seen = nn.Linear(2, 2), torch.arange(20.0).reshape(10, 2), []

    def loss(model, images, generator):
        seen.append(images)
        return (model(images) - images).square().mean()

    kept = base.weight.detach().clone()
    steps = list(finetune_on_negatives(base, loss, negatives, seeded(), lr=0.01, max_steps=50))
    assert (base.weight == kept).all() and steps[-1][0] is not base
    assert {tuple(row.tolist()) for row in torch.cat(seen)} == set(map(tuple, negatives.tolist()))
    assert steps[-1][1]["step"] == 50 and steps[-1][1]["total"] < 0.5 * steps[0][1]["total"]


NONE, SETTINGS = torch.ones(0, 2), UnlearningSettings(max_steps=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: next(unlearn(quarters(), decode, draw, [], SETTINGS, seeded())),
            "nothing to unlearn",
        ),
        (
            lambda: next(finetune_on_negatives(quarters(), None, NONE, seeded())),
            "no negative pictures",
        ),
    ],
)
def test_bad_input_is_named_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
