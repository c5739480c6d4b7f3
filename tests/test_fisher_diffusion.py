"""The Fisher estimators against a loop, and against means and variances in closed form."""

import pytest
import torch
from torch import nn

from lib.methods import fisher_diffusion
from lib.methods.amnesia import Anchor
from lib.methods.fisher_diffusion import (
    diffusion_fisher,
    exact,
    product,
    stratified_steps,
    subsampled,
)
from lib.models.ddpm import ConditionalDDPM
from lib.models.diffusion import NoiseSchedule, q_sample


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Scaled(nn.Module):
    """Predict the noise as ±theta x_t, pixel by pixel: mean and variance have closed forms.

    The sign turns from step to step, so that gradients differ much between neighbours.
    """

    def __init__(self, theta: torch.Tensor, n_steps: int):
        super().__init__()
        self.theta = nn.Parameter(theta)
        self.schedule = NoiseSchedule(n_steps, 0.05, 0.7)
        self.eval()

    def loss_from_noise(self, x0, c, t, noise):
        x = q_sample(x0, t, noise, self.schedule)
        sign = 1 - 2 * (t % 2)[:, None]
        return (sign * self.theta * x - noise).square().sum(1)

    def check_images(self, x0):
        assert x0.abs().max() <= 1

    def check_classes(self, c, batch):
        assert len(c) == batch

    def moments(self, x0):
        """Return mean and variance (T, pixels) of the gradient at each step over the noise.

        Half of it, x (theta x - sign noise) with x = a x0 + s noise, is a polynomial of second
        degree in the noise.
        """
        a = self.schedule.alpha_bar.sqrt()[:, None]
        s = (1 - self.schedule.alpha_bar).sqrt()[:, None]
        sign = torch.tensor([1.0, -1.0]).repeat(len(a))[: len(a), None]
        theta = self.theta.detach()
        constant = theta * (a * x0) ** 2
        linear, square = a * x0 * (2 * theta * s - sign), s * (theta * s - sign)
        return 2 * (constant + square), 4 * (linear**2 + 2 * square**2)


N_STEPS, M = 6, 2
PIXELS = torch.tensor([[-0.9, 0.2], [0.1, 0.8], [0.7, 1.3]], dtype=torch.float64)  # x0 and theta
REPLICAS, DRAWS = 50, 800


def measured_and_moments(estimator: str) -> tuple[torch.Tensor, ...]:
    """Average an estimator over noise (replicas of the pixels) and steps (draws)."""
    x0, theta = PIXELS.T
    model = Scaled(theta.repeat(REPLICAS), N_STEPS)
    images = x0.repeat(REPLICAS).expand(DRAWS, -1)
    found = diffusion_fisher(
        model,
        [(images, torch.zeros(DRAWS, dtype=torch.long))],
        estimator=estimator,
        n_steps=M,
        generator=seeded(),
        clamp=False,
    )
    mean, variance = Scaled(theta, N_STEPS).moments(x0)
    return found["theta"].reshape(REPLICAS, -1).mean(0), mean, variance


def expected(estimator: str, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    mu_squared, v, length = mean.sum(0).square(), variance.sum(0), N_STEPS // M
    b = mean.reshape(M, length, -1).var(1, correction=0).sum(0)
    return {
        "exact": mu_squared + v,
        "subsampled": mu_squared + length * v + length**2 * b,
        "product": mu_squared,
    }[estimator]


@pytest.mark.parametrize("estimator", ["exact", "subsampled", "product"])
def test_means_are_those_of_the_closed_forms(estimator):
    found, mean, variance = measured_and_moments(estimator)
    error = (found - expected(estimator, mean, variance)).abs()
    assert (error < 0.1 * expected("exact", mean, variance)).all()


@pytest.mark.parametrize("planted", [subsampled, "same steps"])
def test_a_biased_product_is_noticed(planted, monkeypatch):
    def same_steps(gradient, n_total, n_steps, generator):
        drawn = stratified_steps(n_total, n_steps, generator)
        return torch._foreach_mul(gradient(*drawn), gradient(*drawn))

    wrong = same_steps if planted == "same steps" else planted
    monkeypatch.setitem(fisher_diffusion.ESTIMATORS, "product", wrong)
    with pytest.raises(AssertionError):
        test_means_are_those_of_the_closed_forms("product")


@pytest.fixture(scope="module")
def tiny() -> ConditionalDDPM:
    torch.manual_seed(0)
    model = ConditionalDDPM([1, 8, 8], 3, [8, 8], groups=4, n_steps=5).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def drawn(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    images = 2 * torch.rand(n, 1, 8, 8, generator=seeded(9), dtype=torch.float64) - 1
    return images, torch.arange(n) % 3


@pytest.mark.parametrize("chunk", [2, 5, 64])
def test_exact_is_the_square_of_the_gradient_summed_over_all_steps(tiny, chunk):
    images, classes = drawn(3)
    generator = seeded(4)
    sums = {name: torch.zeros_like(p) for name, p in tiny.named_parameters()}
    for i in range(3):
        noise = torch.randn(5, 1, 8, 8, generator=generator, dtype=torch.float64)
        tiny.zero_grad()
        for t in range(5):
            step = torch.tensor([t])
            one = slice(i, i + 1)
            tiny.loss_from_noise(images[one], classes[one], step, noise[step]).sum().backward()
        for name, parameter in tiny.named_parameters():
            sums[name] += parameter.grad**2 / 3
    tiny.zero_grad()
    batches = [(images[:2], classes[:2]), (images[2:], classes[2:])]
    found = diffusion_fisher(tiny, batches, estimator="exact", chunk=chunk, generator=seeded(4))
    assert all(parameter.grad is None for parameter in tiny.parameters())
    assert found.keys() == sums.keys()
    for name in sums:
        largest = float(sums[name].max())
        assert largest > 0
        torch.testing.assert_close(found[name], sums[name], rtol=1e-5, atol=1e-8 * largest)


def test_all_steps_in_a_minibatch_are_the_exact_ones():
    table = torch.randn(7, 4, generator=seeded())

    def gradient(steps, weights):
        return [(weights[:, None] * table[steps]).sum(0)]

    want = table.sum(0).square()
    for estimator in (exact, subsampled, product):
        (found,) = estimator(gradient, 7, 7, seeded(1))
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize(("n_total", "n_steps"), [(6, 2), (7, 3), (1000, 8), (5, 1), (5, 5)])
def test_a_step_is_drawn_uniformly_from_each_part(n_total, n_steps):
    generator, draws = seeded(), 3000
    weighted = torch.zeros(n_total)
    for _ in range(draws):
        steps, lengths = stratified_steps(n_total, n_steps, generator)
        assert lengths.sum() == n_total and lengths.max() - lengths.min() <= 1
        starts = lengths.cumsum(0) - lengths
        assert ((starts <= steps) & (steps < starts + lengths)).all()
        weighted[steps] += lengths / draws
    # Each step has mean weight 1, and the standard deviation of a share of draws.
    error = ((lengths.max() - 1) / draws) ** 0.5
    assert (weighted - 1).abs().max() <= 5 * error + 1e-3


def test_a_generator_fixes_the_estimate(tiny):
    def estimate(seed):
        return diffusion_fisher(tiny, [drawn(2)], n_steps=2, generator=seeded(seed))

    first, again, other = (estimate(seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_clamping_makes_a_product_fit_for_a_penalty(tiny):
    options = {"n_steps": 1, "estimator": "product"}
    raw = diffusion_fisher(tiny, [drawn(2)], generator=seeded(), clamp=False, **options)
    assert any((value < 0).any() for value in raw.values())
    with pytest.raises(ValueError, match="negative"):
        Anchor.of(tiny, raw)
    clamped = diffusion_fisher(tiny, [drawn(2)], generator=seeded(), **options)
    assert all(torch.equal(clamped[name], raw[name].clamp(min=0)) for name in raw)
    Anchor.of(tiny, clamped)


def test_frozen_parameters_are_left_out(tiny):
    everything = diffusion_fisher(tiny, [drawn(2)], n_steps=2, generator=seeded())
    tiny.unet.conv_out.requires_grad_(False)
    try:
        found = diffusion_fisher(tiny, [drawn(2)], n_steps=2, generator=seeded())
    finally:
        tiny.unet.conv_out.requires_grad_(True)
    assert everything.keys() - found.keys() == {"unet.conv_out.weight", "unet.conv_out.bias"}
    torch.testing.assert_close(found["unet.conv_in.weight"], everything["unet.conv_in.weight"])


def test_bad_input_is_named(tiny):
    def call(batches, model=tiny, **options):
        diffusion_fisher(model, batches, generator=seeded(), **{"n_steps": 2, **options})

    images, classes = drawn(2)
    with pytest.raises(ValueError, match="'root'; choose from exact, subsampled, product"):
        call([drawn(2)], estimator="root")
    for n_steps in (0, 6):
        with pytest.raises(ValueError, match=f"n_steps = {n_steps}; .* choose 1 to 5"):
            call([drawn(2)], n_steps=n_steps)
    with pytest.raises(ValueError, match="chunk is 0"):
        call([drawn(2)], chunk=0)
    with pytest.raises(ValueError, match="got no samples"):
        call([])
    with pytest.raises(ValueError, match="convert them with to_signed"):
        call([(images * 127.5, classes)])
    with pytest.raises(ValueError, match="choose a class in that range"):
        call([(images, classes + 3)])
    with pytest.raises(ValueError, match="training mode"):
        try:
            call([drawn(2)], model=tiny.train())
        finally:
            tiny.eval()
    with pytest.raises(ValueError, match="gradient is not finite"):
        call([(images.flatten(1), classes)], model=Scaled(torch.full([64], torch.nan), 5))
