"""Schedule and samplers against diffusers' and against closed forms for Gaussian data."""

import math

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from lib.models import diffusion
from lib.models.diffusion import (
    NoiseSchedule,
    ancestral_path,
    ancestral_step,
    bound_weights,
    ddim_path,
    ddim_step,
    ddim_steps,
    last,
    q_sample,
    variational_bound,
)

T = 1000
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def precise(scheduler):
    """Give a scheduler of diffusers float64 tables: its float32 loses 1 - alpha_bar near t = 0."""
    scheduler.betas = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    return scheduler


@torch.no_grad()
def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


# --- against diffusers ---


def test_schedule_and_q_sample_equal_diffusers():
    schedule, theirs = NoiseSchedule(), DDPMScheduler(T, **LINEAR)
    assert (schedule.beta[0].item(), schedule.beta[-1].item()) == pytest.approx((1e-4, 0.02))
    assert difference(schedule.alpha_bar, theirs.alphas_cumprod.double()) < 1e-5
    x0, noise, t = drawn(50, 1, 4, 4), drawn(50, 1, 4, 4, seed=1), torch.arange(0, T, 20)
    ours = q_sample(x0, t, noise, schedule)
    assert difference(ours, theirs.add_noise(x0, noise, t)) < 1e-5
    assert difference(q_sample(x0, t + 1, noise, schedule), ours) > 1e-3


def ancestral_error(t: int, clip: bool, step=ancestral_step) -> float:
    """Compare one ancestral step with diffusers', with the same fresh noise."""
    scheduler = precise(DDPMScheduler(T, **LINEAR, variance_type="fixed_small", clip_sample=clip))
    x, noise = drawn(4, 3, 5, 5), drawn(4, 3, 5, 5, seed=1)
    theirs = scheduler.step(noise, t, x, torch.Generator().manual_seed(2)).prev_sample
    return difference(step(x, noise, t, NoiseSchedule(), drawn(4, 3, 5, 5, seed=2), clip), theirs)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("t", [0, 1, 10, 500, 999])
def test_ancestral_step_equals_diffusers(t, clip):
    assert ancestral_error(t, clip) < 1e-5


def ddim_error(t: int, t_next: int, eta: float, clip: bool) -> float:
    """Compare one DDIM step with diffusers', with the same fresh noise."""
    scheduler = precise(DDIMScheduler(T, **LINEAR, clip_sample=clip))
    scheduler.set_timesteps(T // (t - t_next))
    x, noise, fresh = (drawn(4, 3, 5, 5, seed=seed) for seed in range(3))
    theirs = scheduler.step(
        noise, t, x, eta=eta, variance_noise=fresh, use_clipped_model_output=clip
    ).prev_sample
    return difference(ddim_step(x, noise, t, t_next, NoiseSchedule(), eta, fresh, clip), theirs)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("t", [39, 519, 999])
def test_ddim_step_equals_diffusers(t, eta, clip):
    assert ddim_error(t, t - 40, eta, clip) < 1e-5


@pytest.mark.parametrize("steps", [1, 4, 25, 1000])
def test_ddim_steps_equal_diffusers(steps):
    scheduler = DDIMScheduler(T, **LINEAR, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert ddim_steps(T, steps) == scheduler.timesteps.tolist()
    assert ddim_steps(T, 7)[0] == T - 1 and len(set(ddim_steps(T, 999))) == 999


@pytest.mark.parametrize("clip", [False, True])
def test_ddim_with_eta_1_and_all_steps_is_ancestral(clip):
    schedule, x = NoiseSchedule(20), drawn(2, 5).double()
    paths = (
        ddim_path(wavy, x, schedule, 20, 1.0, torch.Generator().manual_seed(3), clip),
        ancestral_path(wavy, x, schedule, torch.Generator().manual_seed(3), clip),
    )
    one, other = (last(path) for path in paths)
    assert difference(one, other) < 1e-9


def wavy(x: torch.Tensor, t: int) -> torch.Tensor:
    """Stand in for a network."""
    return torch.sin(3 * x + t)


# --- closed forms ---

MEAN, SD = 0.3, 0.5


def optimal_noise(schedule: NoiseSchedule):
    """Return E[noise | x_t], which is linear in x_t, for data from N(MEAN, SD^2)."""

    def predict(x, t):
        a = schedule.share_left(t)
        return math.sqrt(1 - a) / (a * SD**2 + 1 - a) * (x - math.sqrt(a) * MEAN)

    return predict


def test_ddim_maps_the_normal_onto_gaussian_data():
    schedule, x = NoiseSchedule(), torch.tensor([0.0, 1.0], dtype=torch.float64)
    middle, one = last(ddim_path(optimal_noise(schedule), x, schedule, T)).tolist()
    assert (middle, one - middle) == pytest.approx((MEAN, SD), rel=5e-3)


@pytest.mark.parametrize(("steps", "eta"), [(1000, 1.0), (400, 0.3), (None, None)])
def test_samplers_return_the_moments_of_gaussian_data(steps, eta):
    schedule, generator = NoiseSchedule(), torch.Generator().manual_seed(1)
    x, predict = drawn(10_000, 1).double(), optimal_noise(schedule)
    if steps is None:
        x = last(ancestral_path(predict, x, schedule, generator))
    else:
        x = last(ddim_path(predict, x, schedule, steps, eta, generator))
    # About four standard errors.
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x.std().item() == pytest.approx(SD, rel=0.03)


def test_one_ddim_step_gives_the_mean():
    schedule = NoiseSchedule()
    x = last(ddim_path(optimal_noise(schedule), drawn(1000, 1), schedule, 1))
    assert x.mean().item() == pytest.approx(MEAN, abs=1e-2) and x.std().item() < 0.01


def normal_kl(mean: float, variance: torch.Tensor, other: torch.Tensor | float) -> torch.Tensor:
    """Return KL(N(mean, variance) || N(0, other))."""
    ratio = variance / other
    return 0.5 * (ratio - 1 - ratio.log() + mean**2 / other)


def gap_of_gaussian_data() -> float:
    """Return E[log p - bound] for the optimal predictor: KL terms of the true and model chains."""
    beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    share = (1 - beta).cumprod(0)
    variance = share * SD**2 + 1 - share  # of x_t
    before = torch.cat([torch.tensor([SD**2]), variance[:-1]])
    truth = 1 / (1 / before + (1 - beta) / beta)  # of x_{t-1} given x_t
    model = beta * (1 - share / (1 - beta)) / (1 - share)
    model[0] = beta[0] / (1 - beta[0])
    end = normal_kl(share[-1].sqrt().item() * MEAN, variance[-1], 1.0)
    return (normal_kl(0.0, truth, model).sum() + end).item()


def gap_of_our_bound(schedule: NoiseSchedule) -> float:
    """Return the same from our bound, which is linear in the squared error and in x0^2."""
    share = (1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64)).cumprod(0)
    error = share * SD**2 / (share * SD**2 + 1 - share)  # the variance of the noise given x_t
    x0 = torch.full((T, 1), math.hypot(MEAN, SD), dtype=torch.float64)
    bound = variational_bound(x0, torch.arange(T), error, schedule).mean().item()
    return -0.5 * math.log(2 * math.pi * math.e * SD**2) - bound


def test_bound_has_the_gap_of_its_closed_form():
    gap = gap_of_gaussian_data()
    assert gap > 0
    assert gap_of_our_bound(NoiseSchedule()) == pytest.approx(gap, rel=1e-6)


def test_bad_input_is_named():
    schedule, x = NoiseSchedule(), drawn(1, 1)
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=rf"Got {steps} sampling steps; .* choose 1 to 1000"):
            last(ddim_path(wavy, x, schedule, steps))
    with pytest.raises(ValueError, match=r"eta is 1.5; it must lie between 0"):
        last(ddim_path(wavy, x, schedule, 2, eta=1.5))
    with pytest.raises(ValueError, match="Got 0 steps with variances"):
        NoiseSchedule(0)


# --- planted errors ---


def test_a_shifted_alpha_bar_is_noticed(monkeypatch):
    right = NoiseSchedule.share_left
    monkeypatch.setattr(NoiseSchedule, "share_left", lambda self, t: right(self, t - 1))
    assert ancestral_error(10, clip=False) > 1e-4 and ddim_error(519, 479, 0.0, False) > 1e-4
    monkeypatch.undo()
    schedule = NoiseSchedule()
    schedule.alpha_bar = torch.cat([schedule.alpha_bar[1:], schedule.alpha_bar[-1:]])
    assert abs(gap_of_our_bound(schedule) / gap_of_gaussian_data() - 1) > 0.01


def test_a_wrong_weight_of_the_bound_is_noticed(monkeypatch):
    weights = bound_weights(NoiseSchedule())
    for wrong in (2 * weights, weights.roll(-1), torch.ones_like(weights)):
        monkeypatch.setattr(diffusion, "bound_weights", lambda schedule, wrong=wrong: wrong)
        assert abs(gap_of_our_bound(NoiseSchedule()) / gap_of_gaussian_data() - 1) > 0.01


def test_the_variance_of_the_other_choice_is_noticed():
    def larger(x, noise, t, schedule, fresh, clip):
        missing = schedule.beta[t].sqrt() - math.sqrt(
            (1 - schedule.share_left(t - 1)) / (1 - schedule.share_left(t)) * schedule.beta[t]
        )
        return ancestral_step(x, noise, t, schedule, fresh, clip) + missing * fresh

    assert ancestral_error(10, False, larger) > 1e-5
