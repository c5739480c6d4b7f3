"""Every equation of the taming paper against a second computation, and with planted errors."""

import inspect
import math
import re

import pytest
import torch
from scipy import stats

from lib.methods import taming
from lib.methods.taming import (
    TamingSettings,
    best_of,
    forget_loss,
    gaussian_kl,
    gaussian_kl_detached_log,
    is_forgotten,
    likelihood_quantile,
    mean_likelihood_quantile,
    nll_statistics,
    remember_loss,
    signed_distance,
    tame,
    taming_loss,
    threshold_met,
)

NLL = torch.tensor([1.0, 2.0, 4.0, 9.0])
MU, SIGMA = torch.tensor(2.0), torch.tensor(0.5)


def test_statistics_by_hand():
    mu, sigma = nll_statistics(NLL)
    assert mu == 4.0
    assert sigma.item() == pytest.approx(math.sqrt((9 + 4 + 0 + 25) / 4))


def check_signed_distance(function):
    # At mu + 3 sigma with delta = 4, an image is one standard deviation below the threshold.
    assert function(torch.tensor([3.5]), MU, SIGMA, 4.0).item() == pytest.approx(-1.0)
    assert function(torch.tensor([4.0]), MU, SIGMA, 4.0).item() == pytest.approx(0.0)


def check_forget_loss(function):
    # sigma^2 d^2 = (0.5 * 2)^2 = 1 for both signs.
    value = function(torch.tensor([2.0, -2.0]), SIGMA).item()
    assert value == pytest.approx(1 / (1 + math.exp(-1)))
    assert function(torch.tensor([0.0]), SIGMA).item() == 0.5


def check_remember_loss(function):
    base, tamed = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 5.0])  # N(1, 1) and N(3, 2)
    forward, reverse = numeric_kl(1, 1, 3, 2), numeric_kl(3, 2, 1, 1)
    total, terms = function(tamed, base, gamma=0.6)
    assert terms["kl_forward"].item() == pytest.approx(forward, rel=1e-4)
    assert terms["kl_reverse"].item() == pytest.approx(reverse, rel=1e-4)
    assert total.item() == pytest.approx(0.6 * (forward + reverse) + 0.4 * 3.0, rel=1e-4)


def numeric_kl(mu_p, sigma_p, mu_q, sigma_q):
    x = torch.linspace(-60, 60, 200_001, dtype=torch.float64)
    log_p = torch.distributions.Normal(mu_p, sigma_p).log_prob(x)
    log_q = torch.distributions.Normal(mu_q, sigma_q).log_prob(x)
    return torch.trapezoid(log_p.exp() * (log_p - log_q), x).item()


CHECKS = {
    signed_distance: check_signed_distance,
    forget_loss: check_forget_loss,
    remember_loss: check_remember_loss,
}
PLANTED = [
    (signed_distance, "mu_r + delta * sigma_r", "mu_r - delta * sigma_r"),
    (
        signed_distance,
        "(nll - (mu_r + delta * sigma_r)) / sigma_r",
        "nll - (mu_r + delta * sigma_r)",
    ),
    (forget_loss, "sigma_r**2 * distance**2", "distance**2"),
    (forget_loss, "sigma_r**2 * distance**2", "-(sigma_r**2) * distance**2"),
    (remember_loss, "kl(*base, *tamed)", "kl(*tamed, *base)"),
    (remember_loss, "average_nll(nll_tamed)", "average_nll(nll_base)"),
    (remember_loss, "(1.0 - gamma) *", "gamma *"),
]


@pytest.mark.parametrize("function", CHECKS)
def test_equation(function):
    CHECKS[function](function)


@pytest.mark.parametrize(("function", "right", "wrong"), PLANTED)
def test_a_planted_error_is_noticed(function, right, wrong):
    source = inspect.getsource(function)
    assert right in source
    namespace = dict(vars(taming))
    exec(source.replace(right, wrong), namespace)
    with pytest.raises(AssertionError):
        CHECKS[function](namespace[function.__name__])


@pytest.mark.parametrize(
    "numbers", [(0.0, 1.0, 0.5, 2.0), (3.0, 0.2, 2.5, 0.7), (1.0, 1.0, 1.0, 1.0)]
)
def test_kl_equals_an_integral(numbers):
    tensors = [torch.tensor(v, dtype=torch.float64) for v in numbers]
    assert gaussian_kl(*tensors).item() == pytest.approx(numeric_kl(*numbers), abs=1e-6)
    assert gaussian_kl_detached_log(*tensors).item() == pytest.approx(gaussian_kl(*tensors).item())


def test_the_detached_log_leaves_a_gradient_where_the_true_kl_has_none():
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    for kl, forward, reverse in ((gaussian_kl, 0.0, 0.0), (gaussian_kl_detached_log, -1.0, 1.0)):
        sigma = torch.tensor(1.0, requires_grad=True)
        assert torch.autograd.grad(kl(zero, one, zero, sigma), sigma)[0] == forward
        assert torch.autograd.grad(kl(zero, sigma, zero, one), sigma)[0] == reverse


def test_quantile_is_the_normal_tail_even_far_out():
    nll = torch.tensor([2.0, 4.0, 5.0])
    expected = stats.norm.sf([0.0, 4.0, 6.0])
    torch.testing.assert_close(
        likelihood_quantile(nll, MU, SIGMA), torch.tensor(expected), rtol=1e-6, atol=0
    )
    assert mean_likelihood_quantile(nll, MU, SIGMA).item() == pytest.approx(expected.mean())


def test_forgotten_means_unlikely():
    # NLL 4.1 lies beyond mu + 4 sigma = 4, NLL 2 is typical: Eq. (10) as printed says the reverse.
    assert is_forgotten(torch.tensor([4.1, 2.0]), MU, SIGMA, 4.0).tolist() == [True, False]


def test_stop_rule_has_two_sides_and_wants_all():
    assert threshold_met(torch.tensor([0.2, -0.2]), 0.3)
    assert not threshold_met(torch.tensor([0.2, -0.4]), 0.3)
    assert not threshold_met(torch.tensor([0.2, 0.4]), 0.3)


def test_total_weighs_by_alpha():
    assert taming_loss(torch.tensor(1.0), torch.tensor(3.0), 0.25).item() == 2.5


class Shift(torch.nn.Module):
    """A one-parameter model, NLL = (x - m)^2 / 2, whose taming can be followed by hand."""

    def __init__(self):
        super().__init__()
        self.m = torch.nn.Parameter(torch.zeros(1))


def shift_nll(model, x):
    return 0.5 * (x - model.m).square()


def settings(**changes):
    return TamingSettings(**{"lr": 1e-2, "max_steps": 5, "delta": 1.0, **changes})


def test_tame_leaves_the_base_alone_and_yields_every_step():
    base, generator = Shift(), torch.Generator().manual_seed(0)
    remember = torch.randn(64, generator=generator)
    steps = list(tame(base, torch.tensor([0.1]), remember, shift_nll, settings(), generator))
    assert base.m.item() == 0.0
    assert [terms["step"] for _, terms in steps] == list(range(6))
    assert steps[-1][0].m.item() != 0.0
    assert {"forget", "remember", "kl_forward", "kl_reverse", "total"} <= steps[0][1].keys()


def test_tame_stops_before_a_step_once_the_rule_is_met():
    generator = torch.Generator().manual_seed(0)
    remember = torch.randn(64, generator=generator)
    mu, sigma = nll_statistics(shift_nll(Shift(), remember))
    forget = (2 * (mu + sigma)).sqrt().reshape(1)  # exactly at the threshold
    [(model, terms)] = list(tame(Shift(), forget, remember, shift_nll, settings(), generator))
    assert terms["stopped"] == 1.0
    assert model.m.item() == 0.0


def run_of(**changes):
    """Tame the shifted normal on fixed sets."""
    generator = torch.Generator().manual_seed(0)
    remember = torch.randn(64, generator=generator)
    changes = {"delta": 4.0, "alpha": 1.0, "lr": 0.05, "max_steps": 40} | changes
    forget = torch.tensor([0.1])
    return tame(Shift(), forget, remember, shift_nll, settings(**changes), generator)


def test_without_a_stop_rule_every_step_is_made_and_the_last_model_is_kept():
    steps = list(run_of(epsilon=None))
    model, terms = best_of(run_of(epsilon=None))
    assert "distance" not in terms and terms["step"] == 40 == len(steps) - 1
    assert model.m.item() == steps[-1][0].m.item()


def test_a_rule_that_is_never_met_leaves_the_nearest_model_and_says_so():
    passed = [(float(model.m.detach()), terms) for model, terms in run_of(epsilon=1e-6, lr=0.5)]
    nearest, wanted = min(passed, key=lambda pair: pair[1]["distance_max"])
    assert 0 < wanted["step"] < 40  # else the last model would pass too
    model, terms = best_of(run_of(epsilon=1e-6, lr=0.5))
    assert terms["stopped"] == 0.0
    assert (model.m.item(), terms["step"]) == (nearest, wanted["step"])


def test_both_models_see_the_same_noise():
    seen = []

    def nll(model, x):
        seen.append((id(model), x))
        return shift_nll(model, x)

    base, remember = Shift(), torch.arange(64.0)
    noisy = tame(
        base,
        torch.tensor([-5.0]),
        remember,
        nll,
        settings(epsilon=None, max_steps=1),
        torch.Generator().manual_seed(0),
        prepare=lambda x, generator: x + torch.rand(x.shape, generator=generator),
    )
    list(noisy)
    [of_base] = [x for model, x in seen if model == id(base)]
    of_tamed = [x for model, x in seen if model != id(base)]
    assert any(torch.equal(x[-len(of_base) :], of_base) for x in of_tamed)
    drawn = torch.cat([x for _, x in seen])
    assert (drawn % 1 > 0).all()


@pytest.mark.parametrize("name", taming.REMEMBER_TERMS)
def test_a_term_left_out_does_not_count(name):
    base, tamed = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 5.0])
    full, terms = remember_loss(tamed, base, gamma=0.6)
    rest, _ = remember_loss(tamed, base, gamma=0.6, without=(name,))
    weight = 0.4 if name == "average_nll" else 0.6
    assert (full - rest).item() == pytest.approx(weight * terms[name].item(), rel=1e-5)


def test_statistics_are_refreshed_as_often_as_asked():
    def sigmas(refresh_every):
        generator = torch.Generator().manual_seed(0)
        remember = torch.randn(64, generator=generator)
        pairs = tame(
            Shift(),
            torch.tensor([0.1]),
            remember,
            shift_nll,
            settings(refresh_every=refresh_every, statistics_images=16),
            generator,
        )
        return [terms["sigma_r"] for _, terms in pairs]

    assert len(set(sigmas(10))) == 1
    assert len(set(sigmas(1))) == 6


def tame_pictures(shape_of_forget, shape_of_remember):
    generator = torch.Generator()
    sets = torch.ones(shape_of_forget), torch.ones(shape_of_remember)
    next(tame(Shift(), *sets, shift_nll, settings(), generator))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: nll_statistics(torch.ones(1)), "at least 2 remember images, got 1"),
        (lambda: signed_distance(NLL, MU, torch.tensor(0.0), 4.0), "sigma_r must be positive"),
        (lambda: threshold_met(NLL, 0.0), "epsilon must be positive"),
        (lambda: settings(delta=0.0), "delta must be positive"),
        (lambda: settings(alpha=1.5), r"must lie in \[0, 1\]"),
        (
            lambda: next(
                tame(
                    Shift(), torch.ones(0), torch.ones(4), shift_nll, settings(), torch.Generator()
                )
            ),
            "needs forget and remember images, got 0 and 4",
        ),
        (lambda: tame_pictures((1, 3, 8, 8), (4, 3, 16, 16)), "load both at the model's size"),
        (lambda: tame_pictures((1, 3, 8, 8), (4, 3, 8, 8)), "4 of 4 remember images are also"),
        (lambda: settings(without=("kl",)), "no term kl; it has kl_forward, kl_reverse, average"),
    ],
)
def test_bad_input_is_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_every_equation_is_cited_once():
    cited = re.findall(r"Implements TNF Eq\. \((\d+)\)", inspect.getsource(taming))
    assert sorted(map(int, cited)) == list(range(5, 15))
