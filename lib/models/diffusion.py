"""Diffusion without a network: the noise schedule, and samplers for any predictor of the noise.

Steps run from 0 to T - 1 as in diffusers; step t is t + 1 in Ho et al. (2020). The clean data stand
at step -1, where ``alpha_bar`` is 1.

A predictor of the noise is a function ``predict(x, t) -> noise`` for a whole batch at one step t.
Samplers are generators that yield x after every step; :func:`last` keeps only the result.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

PredictNoise = Callable[[Tensor, int], Tensor]


class NoiseSchedule:
    """The linear variances beta of Ho et al. (2020) with what follows from them, in float64.

    ``beta`` (T,) are the variances of the single steps, and ``alpha_bar`` (T,) is the share of the
    data's variance that is left after each: x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise.
    """

    def __init__(self, n_steps: int = 1000, first: float = 1e-4, last: float = 0.02):
        if n_steps < 1 or not 0 < first <= last < 1:
            raise ValueError(
                f"Got {n_steps} steps with variances from {first} to {last}; the schedule wants at "
                "least one step and variances that grow between 0 and 1."
            )
        self.n_steps = n_steps
        self.beta = torch.linspace(first, last, n_steps, dtype=torch.float64)
        self.alpha_bar = (1 - self.beta).cumprod(0)

    def share_left(self, t: int) -> float:
        """Return ``alpha_bar`` at one step; it is 1 at step -1."""
        return 1.0 if t < 0 else self.alpha_bar[t].item()

    def of_each(self, values: Tensor, t: Tensor, like: Tensor) -> Tensor:
        """Look up ``values`` (T,) at each image's step ``t`` (batch,), to multiply ``like`` by."""
        return values.to(like.device, like.dtype)[t].reshape(-1, *[1] * (like.ndim - 1))


def q_sample(x0: Tensor, t: Tensor, noise: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Return x_t, the data after t + 1 steps of noise at once (Ho et al. 2020, Eq. 4).

    Shapes: ``x0`` and ``noise`` (batch, ...), ``t`` (batch,) whole numbers; returns (batch, ...).
    """
    signal = schedule.of_each(schedule.alpha_bar.sqrt(), t, x0)
    sigma = schedule.of_each((1 - schedule.alpha_bar).sqrt(), t, x0)
    return signal * x0 + sigma * noise


def predict_clean(
    x: Tensor, noise: Tensor, t: int, schedule: NoiseSchedule, clip: bool = False
) -> Tensor:
    """Return the data that x_t and its noise stand for; ``clip`` holds them in [-1, 1]."""
    share = schedule.share_left(t)
    x0 = (x - math.sqrt(1 - share) * noise) / math.sqrt(share)
    return x0.clamp(-1, 1) if clip else x0


def ancestral_step(
    x: Tensor, noise: Tensor, t: int, schedule: NoiseSchedule, fresh: Tensor, clip: bool = False
) -> Tensor:
    """Draw x at step t - 1 from q(x_{t-1} | x_t, x_0) at the predicted x_0.

    Mean and variance are Eqs. 6 and 7 of Ho et al. (2020); the variance is the smaller of their
    two choices. ``noise`` is the predicted noise of ``x``, ``fresh`` a standard normal draw.
    """
    share, before = schedule.share_left(t), schedule.share_left(t - 1)
    beta = schedule.beta[t].item()
    x0 = predict_clean(x, noise, t, schedule, clip)
    of_x0 = math.sqrt(before) * beta / (1 - share)
    of_x = math.sqrt(1 - beta) * (1 - before) / (1 - share)
    sigma = math.sqrt((1 - before) / (1 - share) * beta)
    return of_x0 * x0 + of_x * x + sigma * fresh


def ddim_step(
    x: Tensor,
    noise: Tensor,
    t: int,
    t_next: int,
    schedule: NoiseSchedule,
    eta: float = 0.0,
    fresh: Tensor | float = 0.0,
    clip: bool = False,
) -> Tensor:
    """Jump from step t to ``t_next`` < t (Song et al. 2021, Eqs. 12 and 16).

    ``eta`` scales the standard deviation of what is drawn anew: at 0 nothing is, at 1 and with
    ``t_next`` = t - 1 the step is :func:`ancestral_step`.
    ``clip`` holds the predicted data in [-1, 1] and takes for the noise what is then left of x_t:
    noise and data that do not make x_t together would lead guided samples astray.
    """
    share, after = schedule.share_left(t), schedule.share_left(t_next)
    sigma = eta * math.sqrt((1 - after) / (1 - share) * (1 - share / after))
    x0 = predict_clean(x, noise, t, schedule, clip)
    if clip:
        noise = (x - math.sqrt(share) * x0) / math.sqrt(1 - share)
    kept = math.sqrt(max(1 - after - sigma**2, 0.0))
    return math.sqrt(after) * x0 + kept * noise + sigma * fresh


def ddim_steps(n_steps: int, steps: int) -> list[int]:
    """Spread ``steps`` of the ``n_steps`` evenly, from the last one down.

    The first is always T - 1, where the data are all noise ("trailing" in diffusers).

    Raises: ValueError if ``steps`` is not in 1..T.
    """
    if not 1 <= steps <= n_steps:
        raise ValueError(
            f"Got {steps} sampling steps; the model has {n_steps}: choose 1 to {n_steps}."
        )
    return [round(n_steps * (steps - i) / steps) - 1 for i in range(steps)]


@torch.no_grad()
def ddim_path(
    predict: PredictNoise,
    x: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    clip: bool = False,
) -> Iterator[Tensor]:
    """Turn standard normal ``x`` into data in ``steps`` steps, and yield it after each of them.

    Raises: ValueError if ``steps`` is not in 1..T or ``eta`` is not in [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(
            f"eta is {eta}; it must lie between 0 (DDIM) and 1 (the variance of ancestral steps)."
        )
    times = ddim_steps(schedule.n_steps, steps)
    for t, t_next in zip(times, [*times[1:], -1], strict=True):
        fresh = _fresh_noise(x, generator) if eta > 0 else 0.0
        x = ddim_step(x, predict(x, t), t, t_next, schedule, eta, fresh, clip)
        yield x


@torch.no_grad()
def ancestral_path(
    predict: PredictNoise,
    x: Tensor,
    schedule: NoiseSchedule,
    generator: torch.Generator | None = None,
    clip: bool = False,
) -> Iterator[Tensor]:
    """Turn standard normal ``x`` into data in all T steps, and yield it after each of them."""
    for t in reversed(range(schedule.n_steps)):
        fresh = _fresh_noise(x, generator)
        x = ancestral_step(x, predict(x, t), t, schedule, fresh, clip)
        yield x


def last(path: Iterator[Tensor]) -> Tensor:
    """Run a sampler and return the data it ends with."""
    return deque(path, maxlen=1)[0]


def bound_weights(schedule: NoiseSchedule) -> Tensor:
    """Return the factors (T,) of the squared noise errors in the variational bound.

    For t > 0 the bound holds KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), which is
    (SNR(t-1) / SNR(t) - 1) / 2 times the squared error, with SNR = alpha_bar / (1 - alpha_bar).
    At t = 0 stands -log p(x_0 | x_t) with variance 1 / SNR(0): half the squared error and the
    constant of :func:`variational_bound`. The simple loss has 1 everywhere.
    """
    snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
    return torch.cat([snr.new_full((1,), 0.5), (snr[:-1] / snr[1:] - 1) / 2])


def variational_bound(
    x0: Tensor, t: Tensor, squared_error: Tensor, schedule: NoiseSchedule
) -> Tensor:
    """Bound the log-density of ``x0`` from below by the noise error at one random step, in nats.

    With t uniform it estimates the bound of Ho et al. (2020), Eq. 5, for densities, unbiasedly.

    Shapes: ``x0`` (batch, ...), ``t`` and ``squared_error`` (batch,), the latter summed over the
    entries of an image; returns (batch,).
    """
    dim, end = x0[0].numel(), schedule.share_left(schedule.n_steps - 1)
    variance = 1 / schedule.alpha_bar[0].item() - 1
    constant = 0.5 * dim * math.log(2 * math.pi * variance)
    kl_end = 0.5 * (end * x0.square().flatten(1).sum(1) - dim * (end + math.log1p(-end)))
    weights = bound_weights(schedule).to(x0.device, x0.dtype)[t]
    return -(schedule.n_steps * weights * squared_error + constant + kl_end)


def _fresh_noise(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
