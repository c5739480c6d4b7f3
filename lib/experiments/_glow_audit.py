"""What the exact likelihood and the exact inverse of a Glow give away about what it forgot."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lib.experiments._taming import Bench
from lib.methods.audit import Curve, relearn
from lib.methods.taming import draw, mean_likelihood_quantile, nll_statistics
from lib.models.glow import Glow, to_uint8

INVERTED = ("forget", "reference", "strangers")
AGAINST = ("reference", "held_out", "strangers")
SEED, NOISE_SEED = 0, 77


@dataclass(frozen=True)
class Relearning:
    """Plain training on ``n_taught`` forget pictures, measured after the steps ``at``.

    ``n_crowd`` pictures give mu and sigma on the way. A set is back when its quantile is again
    ``back`` times the base's.
    """

    n_taught: int
    lr: float
    at: tuple[int, ...]
    n_crowd: int
    back: float


def places(
    nll: dict[str, Tensor], base: dict[str, Tensor], sets: Iterable[str]
) -> dict[str, float]:
    """Say where sets lie in the crowd of the same model, and where that has gone from the base's.

    ``nll`` and ``base`` hold the bits per dimension (n,) of the sets and of the ``crowd``. The
    distances are in standard deviations above the crowd's mean.
    """
    mu, sigma = nll_statistics(nll["crowd"])
    mu_base, sigma_base = nll_statistics(base["crowd"])
    found = {"bits_crowd": mu, "crowd_shift": (mu - mu_base) / sigma_base}
    found["crowd_spread"] = sigma / sigma_base
    for name in sets:
        found[f"quantile_{name}"] = mean_likelihood_quantile(nll[name], mu, sigma)
        found[f"distance_{name}"] = ((nll[name] - mu) / sigma).mean()
    return {quantity: float(value) for quantity, value in found.items()}


def auc(positive: Tensor, negative: Tensor) -> float:
    """Return the chance that a positive scores higher than a negative, ties counting a half.

    Shapes: (n,) and (m,). 0.5 tells nothing apart.
    """
    difference = positive[:, None] - negative[None]
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def membership(
    nll: dict[str, Tensor], base: dict[str, Tensor], thresholds: Iterable[float]
) -> dict[str, float]:
    """Say how well a likelihood points to the forget pictures.

    ``auc`` ranks pictures by their NLL, the unlikeliest first, and ``auc_rise``, for who has both
    models, by how much it rose. ``beyond_k`` is the share of a set that a rule flags which calls
    all pictures more than k standard deviations above the crowd's mean suspicious.
    """
    found = {}
    for name in AGAINST:
        found[f"auc_{name}"] = auc(nll["forget"], nll[name])
        rise = {part: nll[part] - base[part] for part in ("forget", name)}
        found[f"auc_rise_{name}"] = auc(rise["forget"], rise[name])
    mu, sigma = nll_statistics(nll["crowd"])
    for k in thresholds:
        for name in ("forget", *AGAINST):
            beyond = nll[name] > mu + k * sigma
            found[f"beyond_{k:g}_{name}"] = float(beyond.double().mean())
    return found


@torch.no_grad()
def latents(bench: Bench, model: Glow, images: Tensor) -> tuple[Tensor, tuple, Tensor, Tensor]:
    """Encode uint8 images with the same noise for every model.

    Returns the model's input, its latents, their squared norms (n,) and the log-determinants (n,).
    """
    x = bench.prepare(images, torch.Generator(bench.device).manual_seed(NOISE_SEED))
    z, log_det = model.encode(x)
    return x, z, sum(part.square().sum((1, 2, 3)) for part in z), log_det


@torch.no_grad()
def inverted(bench: Bench, model: Glow, sets: dict[str, Tensor]) -> dict[str, float]:
    """Draw the forget pictures again from their latents, and say where latents lie.

    ``latent_norm`` is the root mean square of a latent's entries, 1 for a draw of the prior and t
    for a sample at temperature t; ``latent_z`` says how many standard deviations of chi-square the
    squared norm is from its mean. Of what makes the forget pictures unlikelier than the base has
    them, ``energy_rise`` nats are their latents' distance, ``log_det_fall`` nats the volume's.
    """
    found, dim = {}, model.dim
    for name in INVERTED:
        x, z, energy, log_det = latents(bench, model, sets[name])
        found[f"latent_norm_{name}"] = (energy / dim).sqrt().mean()
        found[f"latent_z_{name}"] = ((energy - dim) / math.sqrt(2 * dim)).mean()
        if name == "forget":
            again = model.decode(z)
            found["redraw_error_forget"] = (again - x).abs().max()
            same = to_uint8(again, bench.config.n_bits) == to_uint8(x, bench.config.n_bits)
            found["redraw_same_forget"] = same.double().mean()
            _, _, energy_base, log_det_base = latents(bench, bench.base, sets[name])
            found["energy_rise_forget"] = 0.5 * (energy - energy_base).mean()
            found["log_det_fall_forget"] = (log_det_base - log_det).mean()
    return {quantity: float(value) for quantity, value in found.items()}


@torch.no_grad()
def typical(bench: Bench, model: Glow, images: Tensor) -> Tensor:
    """Return uint8 pictures from the images' latents, each scaled to the norm of a typical draw.

    If they show the person, the model still draws them, in a direction that random latents miss.
    """
    _, z, energy, _ = latents(bench, model, images)
    scale = (model.dim / energy).sqrt().view(-1, 1, 1, 1)
    return to_uint8(model.decode(tuple(part * scale for part in z)), bench.config.n_bits)


def relearned(
    bench: Bench, model: Glow, lesson: Tensor, sets: dict[str, Tensor], settings: Relearning
) -> Curve:
    """Train a model plainly on a lesson, and follow sets of pictures.

    Values are (checks, 2 * sets): their mean likelihood quantiles, then their mean distances above
    the crowd's mean in standard deviations.
    """

    def step_loss(taught: Glow, generator: torch.Generator):
        x = bench.prepare(draw(lesson, settings.n_taught, generator), generator)
        return bench.nll(taught, x).mean(), {}

    def measure(taught: Glow) -> list[float]:
        generator = torch.Generator(bench.device).manual_seed(NOISE_SEED)
        crowd = bench.crowd[: settings.n_crowd]
        mu, sigma = nll_statistics(bench.score(taught, crowd, generator, 1))
        scores = [bench.score(taught, images, generator, 1) for images in sets.values()]
        quantiles = [float(mean_likelihood_quantile(nll, mu, sigma)) for nll in scores]
        return quantiles + [float(((nll - mu) / sigma).mean()) for nll in scores]

    generator = torch.Generator(bench.device).manual_seed(SEED)
    return relearn(model, step_loss, measure, settings.at, settings.lr, generator)


def returns(curves: dict[str, Curve], back: float) -> dict[str, float]:
    """Say where each curve starts and ends, and after how many steps a set came back, if at all.

    The mark is ``back`` times the base's own quantile of the same pictures. A set that is not back
    by the last check counts with the steps to there, and its ``back`` is 0.
    """
    found = {}
    for name, curve in curves.items():
        base = curves["unknown_before" if name.startswith("unknown") else "original_forget"]
        for column, part in enumerate(("taught", "others")):
            quantile = curve.values[:, column]
            over = np.flatnonzero(quantile >= back * base.values[0, column])
            found |= {
                f"relearn_start_{part}_{name}": quantile[0],
                f"relearn_end_{part}_{name}": quantile[-1],
                f"back_{part}_{name}": float(len(over) > 0),
                f"back_steps_{part}_{name}": int(curve.steps[over[0] if len(over) else -1]),
            }
    return found
