"""The attacks, where the answer is known: on a linear decoder, on a ball, beside a fence."""

import math

import numpy as np
import pytest
import torch
from _planted import planted
from scipy.spatial.distance import mahalanobis
from torch import nn

from lib.experiments import _attack, unlearning_attack
from lib.experiments._unlearning import Subject
from lib.methods import latent_attack
from lib.methods.feature_unlearning import Feature, edited_latent
from lib.methods.latent_attack import Found, Prior, invert, pairs_loss, relearn, search
from lib.models.classifier import FaceCNN
from lib.models.conv_vae import ConvVAE
from lib.models.gan import StyleGenerator

DIM = 3
DIRECTION = torch.tensor([2.0, -1.0, 0.5])
NEVER = 100.0  # a score that nothing reaches
SHARE = 0.99


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def starts(n: int = 20) -> torch.Tensor:
    return torch.randn(n, DIM, generator=seeded())


def skewed(attack=latent_attack) -> Prior:
    factor = torch.tensor([[1.0, 0, 0], [0.5, 2.0, 0], [-0.3, 0.2, 0.4]])
    return attack.Prior(torch.tensor([1.0, -1.0, 0.5]), factor, 2.5)


def score_above(limit: float):
    return lambda z: (z @ DIRECTION - limit).unsqueeze(1) / 100


def last(steps) -> Found:
    *_, (found, _) = steps
    return found


# The search


def check_maximum_on_the_ball(attack) -> None:
    for prior in (attack.Prior.standard(DIM, SHARE), skewed(attack)):
        steps = attack.search(score_above(NEVER), prior, starts(), 0.5, 120, inside=True)
        across = prior.factor.T @ DIRECTION
        limit = prior.colour((prior.radius * across / across.norm()).unsqueeze(0))
        found = last(steps)
        assert torch.allclose(found.z, limit.expand_as(found.z), atol=0.02)
        assert torch.allclose(prior.distance(found.z), torch.tensor(prior.radius), rtol=1e-4)
        assert (found.first_step == -1).all() and (found.margin < 0).all()


def check_out_of_reach_inside_is_reached_outside(attack) -> None:
    prior = attack.Prior.standard(DIM, SHARE)
    limit = 1.1 * prior.radius * float(DIRECTION.norm())
    for inside in (True, False):
        found = last(attack.search(score_above(limit), prior, starts(), 0.2, 80, inside))
        assert ((found.margin >= 0) == (not inside)).all()
        assert ((found.first_step > 0) == (not inside)).all()
        assert ((prior.distance(found.z) <= prior.radius * 1.0001) == inside).all()


def check_the_fence_is_respected(attack) -> None:
    """One direction would do but is fenced off; another does as well, and is free."""

    def margins(z):
        reached = torch.maximum(z[:, 0], 0.2 * z[:, 1]) - 0.3
        return torch.stack([10 * reached, 0.1 - z[:, 0]], 1)

    def hopeless(z):
        return torch.stack([10 * (z[:, 0] - 0.3), 0.1 - z[:, 0]], 1)

    prior = Prior.standard(DIM, SHARE)
    beyond = torch.tensor([[0.5, 2.0, 0.0]]).repeat(5, 1)
    found = last(attack.search(margins, prior, beyond, 0.1, 60, inside=True))
    assert (found.margin >= 0).all() and (found.z[:, 0] <= 0.1).all()
    found = last(attack.search(hopeless, prior, beyond, 0.1, 60, inside=True))
    assert (found.margin < 0).all() and (found.first_step == -1).all()


def check_no_margin_pays(attack) -> None:
    margins = torch.tensor([[-20.0, 0.5], [0.2, 9.0], [0.3, 0.3]], requires_grad=True)
    smallest = attack.soft_minimum(margins)
    hard = margins.detach().clamp(max=1.0).amin(1)
    assert (smallest <= hard).all() and (smallest >= hard - math.log(2) - 1e-6).all()
    (gradient,) = torch.autograd.grad(smallest.sum(), margins)
    assert torch.allclose(gradient[0], torch.tensor([1.0, 0.0]), atol=1e-6)
    assert gradient[1, 1] == 0 and torch.allclose(gradient[2], torch.tensor([0.5, 0.5]))


def check_empty_pictures_are_passed(attack) -> None:
    """Between 0 and 0.3 there is no score, as an empty picture has none, and no gradient."""

    def margins(z):
        mass = ((z[:, :1] < 0) | (z[:, :1] > 0.3)).float()
        return (z[:, :1] - 1.0) * mass / mass

    begin = torch.tensor([[-0.5, 0.0, 0.0], [0.1, 0.0, 0.0]])
    found = last(attack.search(margins, Prior.standard(DIM, SHARE), begin, 0.1, 60, inside=True))
    assert found.margin[0] >= 0 and found.z[0, 0] >= 1.0
    assert found.margin[1] == -torch.inf and found.first_step[1] == -1


CHECKS = (
    check_maximum_on_the_ball,
    check_out_of_reach_inside_is_reached_outside,
    check_the_fence_is_respected,
    check_no_margin_pays,
    check_empty_pictures_are_passed,
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_search(check):
    check(latent_attack)


PLANTED = [
    ("u.detach() + lr", "u.detach() - lr", check_maximum_on_the_ball),
    ("sum(1, keepdim=True), square", "expand_as(mean), square.expand_as(mean)", CHECKS[0]),
    ("u @ self.factor.T", "u @ self.factor", check_maximum_on_the_ball),
    (
        "(u, prior.radius) if inside",
        "(u, 99.0) if inside",
        check_out_of_reach_inside_is_reached_outside,
    ),
    ("amin(1).nan", "amax(1).nan", check_the_fence_is_respected),
    ("-(-margins.clamp(max=1.0)).logsumexp(1)", "margins.sum(1)", check_no_margin_pays),
    ("gradient.nan_to_num(0.0, 0.0, 0.0)", "gradient", check_empty_pictures_are_passed),
    ("nan_to_num(nan=-torch.inf)", "nan_to_num(nan=1.0)", check_empty_pictures_are_passed),
]


@pytest.mark.parametrize(("right", "wrong", "check"), PLANTED)
def test_planted_errors_of_the_search_are_noticed(right, wrong, check):
    broken = planted(latent_attack, right, wrong)
    with pytest.raises(AssertionError):
        check(broken)


def test_the_search_stops_where_a_margin_is_safe():
    """Ten times the needed score would be on the ball's edge, far away for nothing."""
    prior = Prior.standard(DIM, SHARE)
    found = last(search(lambda z: z @ DIRECTION[:, None], prior, starts(), 0.1, 60, inside=True))
    assert (found.margin >= 1).all() and prior.distance(found.z).mean() < 2.5


def test_random_search_keeps_the_best_of_all_looks():
    def draw(n, generator):
        return torch.randn(n, DIM, generator=generator)

    steps = list(latent_attack.random_search(score_above(1.0), draw, 4, 9, seeded(7)))
    generator = seeded(7)
    drawn = torch.stack([draw(4, generator) for _ in range(10)])
    scores = drawn @ DIRECTION
    assert torch.allclose(last(steps).margin, (scores.amax(0) - 1.0) / 100, atol=1e-6)
    assert (last(steps).z == drawn[scores.argmax(0), range(4)]).all()
    first = [int((row >= 1).nonzero()[0]) if (row >= 1).any() else -1 for row in scores.T]
    assert last(steps).first_step.tolist() == first
    assert [terms["step"] for _, terms in steps] == list(range(10))


# The prior


def test_the_radius_holds_its_share():
    z = torch.randn(20_000, 8, generator=seeded())
    for prior in (Prior.standard(8, SHARE), Prior.fitted(z, SHARE)):
        inside = prior.distance(z) <= prior.radius
        assert inside.double().mean().item() == pytest.approx(SHARE, abs=0.003)


def test_distances_are_those_of_mahalanobis():
    prior, u = skewed(), torch.randn(5000, DIM, generator=seeded())
    z = prior.colour(u)
    assert torch.allclose(prior.whiten(z), u, atol=1e-4)
    fitted = Prior.fitted(z, SHARE)
    inverse = np.linalg.inv(np.cov(z.double().numpy().T))
    expected = [mahalanobis(each, z.double().mean(0).numpy(), inverse) for each in z[:9].double()]
    assert fitted.distance(z[:9]).tolist() == pytest.approx(expected, rel=1e-3)
    flat = torch.cat([z, torch.ones(5000, 1)], 1)  # a latent that never varies
    assert Prior.fitted(flat, SHARE).distance(flat[:9]).tolist() == pytest.approx(
        expected, rel=1e-2
    )
    with pytest.raises(ValueError, match="Got 3 latents of 3 dimensions"):
        Prior.fitted(z[:3], SHARE)


# Inversion and relearning

PAINT = torch.randn(DIM, 1, 4, 4, generator=torch.Generator().manual_seed(3))


def paint(z):
    return torch.einsum("nd,dchw->nchw", z, PAINT)


def test_inversion_finds_the_latent_or_the_nearest_picture():
    z = starts(6)
    noise = torch.randn(6, 1, 4, 4, generator=seeded(9))
    wide = torch.randn(18, DIM, generator=seeded(2))
    for targets in (paint(z), paint(z) + noise):
        prior = Prior.standard(DIM, SHARE)
        found, errors = invert(paint, targets, prior, wide, 0.2, 200, inside=False)
        basis = PAINT.flatten(1).T.double()
        known = torch.linalg.lstsq(basis, targets.flatten(1).T.double())
        assert torch.allclose(found, known.solution.T.float(), atol=0.03)
        rest = targets.flatten(1).double() - (basis @ known.solution).T
        assert errors.tolist() == pytest.approx(rest.square().mean(1).sqrt().tolist(), abs=0.03)
    with pytest.raises(ValueError, match="Got 17 starts for 6 targets"):
        invert(paint, paint(z), Prior.standard(DIM, SHARE), wide[:17], 0.1, 1, inside=False)


def test_relearning_fits_the_pairs_and_leaves_the_model_alone():
    model, z = nn.Linear(DIM, 4), starts(5)
    kept = model.weight.detach().clone()
    pictures = z @ torch.randn(DIM, 4, generator=seeded(1))
    loss = pairs_loss(lambda model, z: model(z), z, pictures)
    steps = list(relearn(model, loss, torch.arange(5), seeded(), 0.02, batch=5, max_steps=150))
    assert (model.weight == kept).all()
    assert steps[-1][1]["step"] == 150
    assert steps[-1][1]["total"] < 0.15 * steps[0][1]["total"]
    assert steps[0][1]["total"] > 0.3


# What the experiment is made of


def a_subject(model=None, space="z") -> Subject:
    torch.manual_seed(0)
    model = model or ConvVAE((1, 8, 8), (8, 8), 4)
    judge = FaceCNN(2, (1, 8, 8), ("left_slant", "another")).eval().requires_grad_(False)
    return Subject(
        model.eval().requires_grad_(False), space, judge, "random", {"left_slant": -90.0}
    )


FEATURE = Feature(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor(0.2))


def test_systems_edit_and_refuse():
    subject = a_subject()
    z = torch.tensor([[1.0, 0.5, 0, 0], [-1.0, 0.5, 0, 0]], requires_grad=True)
    edits = _attack.System(subject, subject.model, edits=(FEATURE,))
    shown = edits.pictures(z)
    assert torch.equal(shown, subject.model.decode(edited_latent(z, [FEATURE])[0]))
    (gradient,) = torch.autograd.grad(shown.square().sum(), z)
    assert gradient[0, 0].abs() < 1e-6  # beyond the threshold nothing along the vector is seen
    assert gradient[1, 0].abs() > 1e-4 and gradient[0, 1].abs() > 1e-4
    refuses = _attack.System(subject, subject.model, refuses=(FEATURE,))
    assert ((refuses.allowed(z) >= 0)[:, 0] == torch.tensor([False, True])).all()
    assert torch.equal(refuses.pictures(z), subject.model.decode(z))
    assert edits.allowed(z).shape == (2, 0)


def test_what_is_refused_is_no_success():
    subject = a_subject()
    opinions = _attack.Opinions(subject, "left_slant", safe=3.0, confidence=0.01)
    way = _attack.ways_of(subject, SHARE, seeded())[0]
    z = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0]])
    found = Found(z, torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    for refuses, expected in (((), [True, True]), ((FEATURE,), [False, True])):
        system = _attack.System(subject, subject.model, refuses=refuses)
        result = _attack.outcome(found, system, way, opinions, 1)
        assert result["claimed"].tolist() == result["success"].tolist() == expected
        assert result["distance"].tolist() == [1.0, 1.0]


def test_a_success_takes_both_opinions():
    class No(nn.Module):
        def forward(self, images):
            return torch.full((len(images), 1), -1.0)

    subject = a_subject()
    images = subject.model.decode(torch.randn(6, 4, generator=seeded()))
    first, both = _attack.Opinions(subject, "left_slant", 3.0, 0.9, No()).ask(images)
    assert first.all() and not both.any()


def test_the_ways_of_a_gan_lead_through_its_mapping():
    model = StyleGenerator((1, 8, 8), (8, 8), 4)
    by_space = {space: _attack.ways_of(a_subject(model, space), SHARE, seeded()) for space in "zw"}
    assert [way.name for way in by_space["z"]] == ["inside"]
    assert [way.name for way in by_space["w"]] == ["inside", "style", "free"]
    assert [way.inside for way in by_space["w"]] == [True, True, False]
    z = torch.randn(5, 4, generator=seeded(), requires_grad=True)
    lifted = by_space["w"][0].lift(z)
    assert torch.equal(lifted, model.mapping(z)) and lifted.requires_grad
    subject = a_subject(model, "w")
    assert torch.equal(subject.decode(model, lifted), model(z))
    assert [way.name for way in _attack.ways_of(a_subject(), SHARE, seeded())] == ["inside", "free"]


def test_log_odds_of_the_likeliest_class():
    logits = torch.randn(7, 10, generator=seeded()) * 3
    p = logits.double().softmax(1).amax(1)
    assert _attack.best_log_odds(logits).tolist() == pytest.approx(
        (p / (1 - p)).log().tolist(), abs=1e-5
    )
    certain = torch.tensor([[1000.0, 0.0, 0.0]])
    assert _attack.best_log_odds(certain).item() == pytest.approx(1000 - math.log(2))


def test_a_second_judge_is_trained_on_the_attribute():
    model = ConvVAE((3, 16, 16), (8, 8), 4)
    schedule = {"n_train": 128, "n_test": 128, "batch": 16, "lr": 3e-3, "dropout": 0.1, "seed": 0}
    judges = [
        _attack.second_judge(
            _attack.SecondJudge(iterations=n, **schedule), a_subject(model), "avatars", "black_hair"
        )
        for n in (0, 60)
    ]
    (untrained, chance), (trained, accuracy) = judges
    assert chance == 0.5 < 0.6 < accuracy <= 1.0
    assert not trained.training and not any(p.requires_grad for p in trained.parameters())
    assert untrained.names == trained.names == ("black_hair",)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"features": ("thick",)}, r"features are \['thick'\], wanted one and a control"),
        ({"features": ("hat", "thick")}, "an attribute wants a second_judge"),
    ],
)
def test_a_config_that_cannot_be_attacked_is_refused(changes, sentence):
    fields = dict.fromkeys(unlearning_attack.Config.__dataclass_fields__)
    good = fields | {"space": "z", "features": ("left_slant", "thick")}
    unlearning_attack.Config(**good)
    with pytest.raises(ValueError, match=sentence):
        unlearning_attack.Config(**good | changes)
