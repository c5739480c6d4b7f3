import math
from functools import partial

import pytest
import torch
from torch import nn

from lib.methods import amnesia
from lib.methods.amnesia import (
    Anchor,
    amnesia_loss,
    bayes_forget_loss,
    bayes_replay_loss,
    ewc_penalty,
)
from lib.methods.fisher import diagonal_fisher
from lib.models.cvae import ConditionalVAE


def moved_model():
    """A model away from its anchor, and the same penalty by a loop over names."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(8, 3)).double()
    fisher = {n: torch.rand_like(p) for n, p in model.named_parameters()}
    anchor = Anchor.of(model, fisher)
    star = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))

    def loop(factor):
        return sum(
            factor * (fisher[n] * (p - star[n]) ** 2).sum() for n, p in model.named_parameters()
        )

    return model, anchor, loop


def gradients(value, model):
    return torch.autograd.grad(value, list(model.parameters()))


def test_penalty_and_gradient_match_a_loop():
    model, anchor, loop = moved_model()
    for factor in (0.5, 1.0):
        penalty = 3 * ewc_penalty(model, anchor, factor)
        torch.testing.assert_close(penalty, 3 * loop(factor))
        for found, expected in zip(
            gradients(penalty, model), gradients(3 * loop(factor), model), strict=True
        ):
            torch.testing.assert_close(found, expected)


def test_gradient_of_penalty_by_finite_differences():
    model, anchor, _ = moved_model()
    theta = [p.detach().clone().requires_grad_() for p in model.parameters()]
    apply = partial(amnesia._WeightedSquare.apply, 0.5, anchor)
    assert torch.autograd.gradcheck(apply, theta)


def test_penalty_is_the_kl_of_gaussians_that_differ_in_their_mean():
    """F is the precision of the Laplace posterior, which fixes the ½ without the paper's text."""
    precision, shift = torch.tensor([2.0, 5.0]), torch.tensor([0.3, -0.4])
    layer = nn.Linear(2, 1, bias=False)
    anchor = Anchor.of(layer, {"weight": precision[None]})
    with torch.no_grad():
        layer.weight += shift
    here, there = (
        torch.distributions.Normal(mean, precision.rsqrt()) for mean in (shift, torch.zeros(2))
    )
    kl = torch.distributions.kl_divergence(here, there).sum()
    torch.testing.assert_close(ewc_penalty(layer, anchor), kl)
    assert not torch.isclose(ewc_penalty(layer, anchor, factor=1.0), kl)  # the authors' code


def test_penalty_vanishes_at_theta_star():
    model, _, _ = moved_model()
    anchor = Anchor.of(model, {n: torch.ones_like(p) for n, p in model.named_parameters()})
    assert ewc_penalty(model, anchor).item() == 0
    assert all(not g.any() for g in gradients(ewc_penalty(model, anchor), model))


class Table(nn.Module):
    """Any conditional distribution on a finite set: logits (classes, outcomes); exact log p."""

    def __init__(self, log_p):
        super().__init__()
        self.logits = nn.Parameter(log_p.clone())

    def elbo(self, x, c):
        return self.logits.log_softmax(1)[c, x]


def discrete_world(seed=0, classes=3, outcomes=5):
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(classes, outcomes, generator=generator, dtype=torch.float64) + 0.05
    q = torch.rand(outcomes, generator=generator, dtype=torch.float64) + 0.05
    return p / p.sum(1, keepdim=True), q / q.sum()


def maximise(expectation, start):
    """Find the parameters that maximise an exact expectation, by L-BFGS from ``start``."""
    table = Table(start)
    minimise(lambda: -expectation(table.logits.log_softmax(1)), table)
    return table.logits.detach().log_softmax(1)


def minimise(loss, model):
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)


@pytest.mark.parametrize("seed", range(3))
def test_theorem_1_and_corollary_1_on_a_discrete_world(seed):
    p, q = discrete_world(seed)
    forget = torch.tensor([0, 1])  # two classes to forget, each with its own weight p_f(c)
    p_f, surrogate = torch.tensor([0.3, 0.7], dtype=torch.float64), torch.stack([q, q.flip(0)])
    theta_star = maximise(lambda log_p: (p * log_p).sum(), torch.zeros_like(p))
    theta_q = maximise(lambda log_p: (p_f * (surrogate * log_p[forget]).sum(1)).sum(), theta_star)
    before = (p_f * (p[forget] * theta_star[forget]).sum(1)).sum()
    after = (p_f * (p[forget] * theta_q[forget]).sum(1)).sum()
    assert after < before  # Theorem 1
    kl = (p_f * (p[forget] * (p[forget] / surrogate).log()).sum(1)).sum()
    torch.testing.assert_close(after - before, -kl, rtol=0, atol=1e-6)  # Corollary 1
    reverse = (p_f * (surrogate * (surrogate / p[forget]).log()).sum(1)).sum()
    assert abs(after - before + reverse) > 1e-3  # the arguments of the KL are not to be swapped


def world_batches(p, q):
    """Weight-free stand-ins for expectations: every outcome once, weighted inside the ELBO."""
    outcomes = torch.arange(p.shape[1])
    surrogate = outcomes, torch.zeros_like(outcomes)
    replay = (
        outcomes.repeat(p.shape[0] - 1),
        torch.arange(1, p.shape[0]).repeat_interleave(p.shape[1]),
    )
    weight = p.clone()
    weight[0] = q
    return surrogate, replay, lambda table, x, c: weight[c, x] * table.elbo(x, c)


def test_the_whole_objective_reaches_the_surrogate_and_keeps_the_rest():
    p, q = discrete_world()
    table = Table(p.log())
    surrogate, replay, weighted = world_batches(p, q)
    anchor = Anchor.of(table, {"logits": torch.zeros_like(p)})

    def loss():
        penalty = ewc_penalty(table, anchor)
        return amnesia_loss(partial(weighted, table), surrogate, replay, penalty, 1.0, "sum")[0]

    minimise(loss, table)
    reached = table.logits.detach().softmax(1)
    torch.testing.assert_close(reached[0], q, atol=1e-5, rtol=0)
    torch.testing.assert_close(reached[1:], p[1:], atol=1e-5, rtol=0)


def test_terms_have_the_signs_and_weights_of_the_equations():
    """Numbers that differ by powers of ten: a dropped ½, sign or weight changes a digit."""
    elbo = lambda x, c: -x * torch.where(c == 0, 1.0, 10.0)  # noqa: E731
    forget = torch.tensor([1.0, 3.0]), torch.tensor([0, 0])
    replay = torch.tensor([3.0, 5.0]), torch.tensor([1, 2])
    penalty, lam = torch.tensor(100.0), 4.0
    assert bayes_forget_loss(elbo, forget, penalty, lam)[0] == -2 + 400
    assert bayes_replay_loss(elbo, forget, replay, penalty, lam)[0] == -2 + 400 + 40
    total, terms = amnesia_loss(elbo, forget, replay, penalty, lam)
    assert total == 2 + 400 + 40
    assert terms == {"surrogate": 2, "ewc": 400, "replay": 40}
    assert amnesia_loss(elbo, forget, replay, penalty, lam, "sum")[0] == 4 + 400 + 80
    alone, terms = amnesia_loss(elbo, forget, None, penalty, lam)
    assert alone == 2 + 400 and "replay" not in terms


def test_lambda_of_the_authors_is_the_papers_over_half_a_batch():
    """With summed losses and no ½, lambda 100 at batch n is lambda 200 / n in the paper's form."""
    model, anchor, _ = moved_model()
    elbo = lambda x, c: model(x).log_softmax(1).gather(1, c[:, None])[:, 0]  # noqa: E731
    n = 16
    x, c = torch.rand(n, 1, 3, 3, dtype=torch.float64), torch.arange(n) % 3
    authors, _ = amnesia_loss(elbo, (x, c), (x, c), ewc_penalty(model, anchor, 1.0), 100.0, "sum")
    paper, _ = amnesia_loss(elbo, (x, c), (x, c), ewc_penalty(model, anchor), 2 * 100.0 / n)
    torch.testing.assert_close(authors, n * paper)


def test_forgets_a_class_of_a_small_vae():
    """Fisher, penalty and loss together: the class fades, the likelihood of its images falls."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    patterns = torch.eye(3).repeat_interleave(3, 1).reshape(3, 1, 3, 3)
    model = ConditionalVAE((1, 3, 3), 3, hidden=(16,), latent_dim=2)
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(300):
        c = torch.randint(3, (32,), generator=generator)
        adam.zero_grad()
        (-model.elbo(patterns[c], c, generator).mean()).backward()
        adam.step()
    frozen = ConditionalVAE((1, 3, 3), 3, hidden=(16,), latent_dim=2)
    frozen.load_state_dict(model.state_dict())
    c = torch.randint(3, (500,), generator=generator)
    noise = torch.randn(500, 2, generator=generator)
    samples = frozen.sample(c, generator)
    fisher = diagonal_fisher(model, ConditionalVAE.elbo_from_noise, [(samples, c, noise)])
    anchor = Anchor.of(model, fisher)
    noise_images = amnesia.uniform_noise((1, 3, 3))
    adam = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(200):
        keep = torch.randint(1, 3, (32,), generator=generator)
        total, _ = amnesia_loss(
            lambda x, c: model.elbo(x, c, generator),
            (noise_images(32, generator), torch.zeros(32, dtype=torch.long)),
            (frozen.sample(keep, generator), keep),
            ewc_penalty(model, anchor),
            1.0,
        )
        adam.zero_grad()
        total.backward()
        adam.step()
    means = model.sample(torch.arange(3).repeat(100), generator).unflatten(0, (100, 3)).mean(0)
    assert (means[0] - 0.5).abs().max() < 0.2
    assert (means[1:] - patterns[1:]).abs().max() < 0.2
    c = torch.arange(3)
    loss = frozen.log_likelihood(patterns, c, 100) - model.log_likelihood(patterns, c, 100)
    assert loss[0] > 3 and loss[1:].abs().max() < 1


def test_surrogates():
    generator = torch.Generator().manual_seed(0)
    noise = amnesia.uniform_noise((1, 28, 28))(100, generator)
    assert noise.shape == (100, 1, 28, 28)
    assert noise.mean() == pytest.approx(0.5, abs=0.01)
    assert noise.var() == pytest.approx(1 / 12, abs=0.001)
    assert (amnesia.constant_grey((3, 4, 4), 0.25)(2, generator) == 0.25).all()


def test_bad_input_is_named():
    model, anchor, _ = moved_model()
    elbo, batch = lambda x, c: x, (torch.ones(2), torch.zeros(2, dtype=torch.long))
    for lam in (-1.0, math.nan):
        with pytest.raises(ValueError, match=f"lambda is {lam}; it must be at least 0"):
            amnesia_loss(elbo, batch, batch, torch.tensor(0.0), lam)
        with pytest.raises(ValueError, match="lambda is"):
            bayes_replay_loss(elbo, batch, batch, torch.tensor(0.0), lam)
    with pytest.raises(ValueError, match="choose 'mean' or 'sum'"):
        amnesia_loss(elbo, batch, batch, torch.tensor(0.0), 1.0, "none")
    with pytest.raises(ValueError, match="do not match the anchor"):
        ewc_penalty(nn.Linear(2, 2), anchor)
    fisher = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"disagree on 1 parameters \(2.bias\)"):
        Anchor.of(model, {n: f for n, f in fisher.items() if n != "2.bias"})
    with pytest.raises(ValueError, match=r"'2.bias' has shape \(4,\), the parameter has \(3,\)"):
        Anchor.of(model, fisher | {"2.bias": torch.ones(4)})
    with pytest.raises(ValueError, match="negative or non-finite"):
        Anchor.of(model, fisher | {"2.bias": -torch.ones(3)})
    with pytest.raises(ValueError, match=r"grey level is 2; it must be in \[0, 1\]"):
        amnesia.constant_grey((1,), 2)
