"""Feature Unlearning (Moon, Cho, Kim 2024): one function an equation, for any decoder.

The authors published no code. Our sources for the formulas are the abstract, the captions of
Figs. 1 to 5 and a reader's note on the full text; none gives the equations' numbers, so they are
cited by our names for them. No source gives alpha, the learning rate, the number of steps or the
batch, so those of :class:`UnlearningSettings` are ours. Ours too, where the formulas are silent:

* an L1 norm is the mean over pixels, so that it has the scale of 1 - MS-SSIM; with the sum
  instead, the perceptual loss would be about a thousand times weaker;
* every loss is a mean over the WHOLE batch, the selected and the others, which is the expectation
  of the formula with its indicator inside, needs no 0/0, and weighs rare features little;
* the scales and the window of MS-SSIM, see :func:`ms_ssim_options`.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

Decode = Callable[[nn.Module, Tensor], Tensor]
Draw = Callable[[int, torch.Generator], Tensor]
Loss = Callable[[nn.Module, Tensor, torch.Generator], Tensor]
Step = tuple[nn.Module, dict[str, float]]
LOSSES = ("recon", "unlearn", "percep")
BETAS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # weights of the scales (Wang et al. 2003)


class Feature(NamedTuple):
    """A feature in latent space: its target vector z_e (dim,) and the threshold t along it."""

    z_e: Tensor
    t: Tensor


def join_layers(layers: Sequence[Tensor]) -> Tensor:
    """Concatenate the latents of several layers, so that one vector describes them all.

    Shapes: (n, dim) each, dim may differ; returns (n, sum of dims). See :func:`split_layers`.
    """
    return torch.cat(tuple(layers), dim=1)


def split_layers(z: Tensor, dims: Sequence[int]) -> tuple[Tensor, ...]:
    """Undo :func:`join_layers`, given the number of dimensions of each layer.

    Raises: ValueError if ``dims`` do not add up to the length of ``z``.
    """
    if sum(dims) != z.shape[1]:
        raise ValueError(
            f"The layers' dimensions {tuple(dims)} add up to {sum(dims)}, but the latents have "
            f"{z.shape[1]}; give the dimensions they were joined from."
        )
    return z.split(tuple(dims), dim=1)


def target_vector(z_positive: Tensor, z_negative: Tensor, normalise: bool) -> Tensor:
    """Point from the latents without the feature to those with it.

    Implements FU Eq. (target_vector), the difference of the means (after Radford et al. 2015).
    ``normalise`` scales it to length 1, which is not in the formula but which
    :func:`erased_latent` needs; choose it knowingly.

    Shapes: ``z_positive`` (n, dim), ``z_negative`` (m, dim); returns (dim,).
    Raises: ValueError if a set is empty, their sizes differ, or both have the same mean.
    """
    _check_marks(z_positive, z_negative)
    z_e = z_positive.mean(0) - z_negative.mean(0)
    _check_length(z_e)
    return z_e / z_e.norm() if normalise else z_e


def projection(z: Tensor, z_e: Tensor) -> Tensor:
    """Measure how far each latent goes along the target vector.

    Implements FU Eq. (projection). The unit is that of z: the length of ``z_e`` does not matter.

    Shapes: ``z`` (n, dim), ``z_e`` (dim,); returns (n,).
    Raises: ValueError if the sizes do not fit or ``z_e`` is zero.
    """
    if z.ndim != 2 or z_e.ndim != 1 or z.shape[1] != len(z_e):
        raise ValueError(
            f"The latents have shape {tuple(z.shape)} and the target vector {tuple(z_e.shape)}; "
            "wanted (n, dim) and (dim,) from one latent space, layers joined by join_layers."
        )
    return z @ z_e / _check_length(z_e)


def threshold(
    z_positive: Tensor, z_negative: Tensor, z_e: Tensor, percentile: float | None = None
) -> Tensor:
    """Choose where along the target vector the feature begins.

    Implements FU Eq. (threshold): the mean projection of all pictures shown, positive and negative.
    It moves with their balance. Where a user marks 10% of random pictures, it is near the mean of
    the prior, and then about half of ALL latents count as having the feature. ``percentile`` (ours)
    takes that percentile of the same projections instead, for instance 90.

    Shapes: ``z_positive`` (n, dim), ``z_negative`` (m, dim), ``z_e`` (dim,); returns a scalar.
    Raises: ValueError if a set is empty or ``percentile`` is not between 0 and 100.
    """
    _check_marks(z_positive, z_negative)
    shown = projection(torch.cat((z_positive, z_negative)), z_e)
    if percentile is None:
        return shown.mean()
    if not 0 < percentile < 100:
        raise ValueError(f"The percentile is {percentile}; it must lie between 0 and 100.")
    return shown.quantile(percentile / 100)


def find_feature(
    z_positive: Tensor, z_negative: Tensor, normalise: bool, percentile: float | None = None
) -> Feature:
    """Return the target vector and threshold of a feature from a user's marks."""
    z_e = target_vector(z_positive, z_negative, normalise)
    return Feature(z_e, threshold(z_positive, z_negative, z_e, percentile))


def indicator(z: Tensor, z_e: Tensor, t: Tensor | float) -> Tensor:
    """Say which latents count as having the feature: 1.0 from the threshold on, 0.0 below.

    Implements FU Eq. (indicator), sim(z, z_e).

    Shapes: ``z`` (n, dim), ``z_e`` (dim,), ``t`` a scalar; returns (n,).
    """
    return (projection(z, z_e) >= t).to(z.dtype)


def erased_latent(z: Tensor, z_e: Tensor, t: Tensor | float) -> Tensor:
    """Move latents along the target vector towards the threshold.

    Implements FU Eq. (erased_latent), printed in FU, Fig. 3: z_hat = z - (proj(z) - t) z_e. As
    written it lands on proj = t only if ``z_e`` has length 1, since
    proj(z_hat) = proj(z) - (proj(z) - t) ||z_e||: a shorter vector stops short of the threshold,
    a longer one overshoots, and beyond length 2 the result is farther away than before. Take the
    vector from :func:`target_vector` with ``normalise=True``.

    Shapes: ``z`` (n, dim), ``z_e`` (dim,), ``t`` a scalar; returns (n, dim). Latents below the
    threshold are moved UP to it; :func:`edited_latent` leaves them alone.
    """
    return z - (projection(z, z_e) - t).unsqueeze(1) * z_e


def edited_latent(z: Tensor, features: Sequence[Feature]) -> tuple[Tensor, Tensor]:
    """Erase the features from the latents that have them; return those and who was changed.

    Decoding the result is the baseline "edit at sampling time", and the target of the unlearning.
    Several features are erased one after the other (ours), so the order matters unless their
    vectors are orthogonal.

    Shapes: ``z`` (n, dim); returns (n, dim) and, as in :func:`indicator`, (n,).
    """
    edited, changed = z, z.new_zeros(len(z))
    for z_e, t in features:
        sim = indicator(edited, z_e, t)
        edited = torch.where(sim.unsqueeze(1) > 0, erased_latent(edited, z_e, t), edited)
        changed = torch.maximum(changed, sim)
    return edited, changed


def reconstruction_loss(g_images: Tensor, f_images: Tensor, sim: Tensor) -> Tensor:
    """Keep the pictures of latents without the feature: L1 between g(z) and f(z).

    Implements FU Eq. (recon), the mean over pixels and over the whole batch.

    Shapes: images (n, ...), ``sim`` (n,) from :func:`indicator`; returns a scalar.
    """
    return ((1.0 - sim) * _absolute_difference(g_images, f_images)).mean()


def unlearn_loss(g_images: Tensor, f_erased: Tensor, sim: Tensor) -> Tensor:
    """Turn the pictures of latents with the feature into f(z_hat): L1 between g(z) and f(z_hat).

    Implements FU Eq. (unlearn), the mean over pixels and over the whole batch.

    Shapes as in :func:`reconstruction_loss`.
    """
    return (sim * _absolute_difference(g_images, f_erased)).mean()


def perceptual_loss(
    g_images: Tensor, f_erased: Tensor, sim: Tensor, value_range: tuple[float, float] = (-1.0, 1.0)
) -> Tensor:
    """Compare structure as well, against the blur of L1: 1 - MS-SSIM of g(z) and f(z_hat).

    Implements FU Eq. (percep). MS-SSIM is torchmetrics', with :func:`ms_ssim_options`, on values
    moved from ``value_range`` to [0, 1]: its brightness term has no meaning for negative values.
    A negative similarity (a negative print of the picture) counts as 0, without a gradient.

    Shapes: images (n, channels, height, width), ``sim`` (n,); returns a scalar in [0, 1].
    """
    from torchmetrics.functional.image import (  # takes seconds to import
        multiscale_structural_similarity_index_measure as ms_ssim,
    )

    has_feature = sim > 0
    if not has_feature.any():
        return 0.0 * g_images.sum()  # a zero that can be differentiated
    low, high = value_range
    ours, wanted = ((x[has_feature].float() - low) / (high - low) for x in (g_images, f_erased))
    with torch.autocast(ours.device.type, enabled=False):  # differences of squares need float32
        similarity = ms_ssim(
            ours, wanted, reduction="none", data_range=1.0, **ms_ssim_options(*ours.shape[-2:])
        )
    return (1.0 - similarity).sum() / len(sim)


def ms_ssim_options(height: int, width: int) -> dict:
    """Choose scales and window of MS-SSIM for an image size, as arguments of torchmetrics.

    The standard has 5 scales and a Gaussian window 11 wide with sigma 1.5, for which torchmetrics
    asks at least 176 px. Smaller images get fewer scales (with the first of the standard weights,
    scaled to sum 1), and below 44 px a window 7 wide with sigma 0.8. So 28 and 32 px have 3 scales
    and window 7, and 64 px 3 scales and window 11.

    Raises: ValueError below 8 px.
    """
    side = min(height, width)
    choices = (176, 5, 11, 1.5), (99, 4, 11, 1.5), (44, 3, 11, 1.5), (28, 3, 7, 0.8), (8, 2, 7, 0.8)
    for smallest, n_scales, window, sigma in choices:
        if side >= smallest:
            weights = tuple(beta / sum(BETAS[:n_scales]) for beta in BETAS[:n_scales])
            return {"betas": weights, "kernel_size": window, "sigma": sigma, "normalize": "relu"}
    raise ValueError(
        f"MS-SSIM got images of {height}×{width}, wanted at least 8×8; leave out 'percep'."
    )


def unlearning_loss(
    g_images: Tensor,
    f_images: Tensor,
    f_erased: Tensor,
    sim: Tensor,
    alpha: float,
    without: Collection[str] = (),
    value_range: tuple[float, float] = (-1.0, 1.0),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weigh forgetting the feature against keeping the rest.

    Implements FU Eq. (total): alpha (L_unlearn + L_percep) + L_recon. Losses named in ``without``
    (``recon``, ``unlearn``, ``percep``) are left out, for ablations; a ``percep`` that is left out
    is not computed.

    Shapes: g(z), f(z) and f(z_hat) (n, channels, height, width), ``sim`` (n,); returns a scalar and
    its terms before alpha. Of ``f_images`` only those with sim = 0 count and of ``f_erased`` only
    those with sim = 1, so one tensor with f of :func:`edited_latent` may stand for both.
    Raises: ValueError if ``alpha`` is negative, a name is unknown, or shapes differ.
    """
    check_alpha(alpha)
    check_losses(without)
    if not g_images.shape == f_images.shape == f_erased.shape or len(sim) != len(g_images):
        shapes = ", ".join(str(tuple(x.shape)) for x in (g_images, f_images, f_erased, sim))
        raise ValueError(f"Got shapes {shapes}; wanted images of one shape and one sim for each.")
    terms = {
        "recon": reconstruction_loss(g_images, f_images, sim),
        "unlearn": unlearn_loss(g_images, f_erased, sim),
    }
    if "percep" not in without:
        terms["percep"] = perceptual_loss(g_images, f_erased, sim, value_range)
    kept = {name: 0.0 if name in without else terms[name] for name in LOSSES}
    total = alpha * (kept["unlearn"] + kept["percep"]) + kept["recon"]
    return total, {name: value.detach() for name, value in terms.items()}


@dataclass(frozen=True)
class UnlearningSettings:
    """The knobs of the training; none of these defaults is in our sources of the paper.

    ``without`` names losses that do not count. ``value_range`` is the range of decoded pixels.
    """

    alpha: float = 1.0
    lr: float = 1e-3
    batch: int = 32
    max_steps: int = 500
    without: tuple[str, ...] = ()
    value_range: tuple[float, float] = (-1.0, 1.0)

    def __post_init__(self):
        check_alpha(self.alpha)
        check_losses(self.without)


def unlearn(
    base: nn.Module,
    decode: Decode,
    draw: Draw,
    features: Sequence[Feature],
    settings: UnlearningSettings,
    generator: torch.Generator,
) -> Iterator[Step]:
    """Train a copy g of the frozen generator f; yield g and the step's terms before every step.

    FU, Fig. 3: latents with the feature give f(z_hat), all others f(z). In other words, g learns to
    draw by itself what editing latents at sampling time gives. No training data is needed.

    ``decode(model, z)`` returns pictures (n, channels, height, width), the same for the same z: fix
    a GAN's noise. ``draw(n, generator)`` returns latents (n, dim) of the space of ``features``: z,
    or w of a mapping network with ``decode`` the synthesis from w. Terms: ``total``, each loss, and
    ``share``, the share of the batch that counts as having a feature.

    The model is one object, in evaluation mode, that the next step changes; the last pair holds it
    after ``max_steps`` steps.
    Raises: ValueError if there is no feature or ``decode`` gives two pictures for one latent.
    """
    if not features:
        raise ValueError("There is nothing to unlearn, got no feature; make one by find_feature.")
    frozen = copy.deepcopy(base).eval().requires_grad_(False)
    unlearned = copy.deepcopy(base).eval()
    optimizer = torch.optim.Adam(unlearned.parameters(), lr=settings.lr, fused=True)
    for step in range(settings.max_steps + 1):
        with torch.no_grad():
            z = draw(settings.batch, generator)
            edited, sim = edited_latent(z, features)
            target = decode(frozen, edited)
            if step == 0:
                _check_deterministic(target, decode(frozen, edited))
        total, terms = unlearning_loss(
            decode(unlearned, z),
            target,
            target,
            sim,
            settings.alpha,
            settings.without,
            settings.value_range,
        )
        values = {"step": step, "total": total.item(), "share": sim.mean().item()}
        yield unlearned, values | {name: value.item() for name, value in terms.items()}
        if step < settings.max_steps:
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            optimizer.step()


def check_alpha(alpha: float) -> None:
    """Raise a ValueError if alpha is negative or not a number."""
    if not alpha >= 0:
        raise ValueError(
            f"alpha is {alpha}; it must be at least 0: a negative weight would reward the feature."
        )


def check_losses(names: Collection[str]) -> None:
    """Raise a ValueError if a name is not that of a loss."""
    if unknown := set(names) - set(LOSSES):
        raise ValueError(
            f"There is no loss {', '.join(sorted(unknown))}; there are {', '.join(LOSSES)}."
        )


def _absolute_difference(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs().flatten(1).mean(1)


def _check_marks(z_positive: Tensor, z_negative: Tensor) -> None:
    for z, kind, other in (z_positive, "positive", "unmarked"), (z_negative, "negative", "marked"):
        if len(z) == 0:
            raise ValueError(
                f"There are no {kind} latents, all pictures are {other}; a feature needs pictures "
                "with it and pictures without it, so show more of them or choose another feature."
            )
    if z_positive.ndim != 2 or z_positive.shape[1:] != z_negative.shape[1:]:
        raise ValueError(
            f"Positive and negative latents have shapes {tuple(z_positive.shape)} and "
            f"{tuple(z_negative.shape)}; wanted (n, dim) and (m, dim) from one latent space."
        )


def _check_length(z_e: Tensor) -> Tensor:
    length = z_e.norm()
    if not 0 < length < torch.inf:
        raise ValueError(
            f"The target vector has length {float(length):g}, so it points nowhere; the positive "
            "and negative latents must be finite and differ in their means."
        )
    return length


def _check_deterministic(once: Tensor, again: Tensor) -> None:
    if not torch.allclose(once, again, atol=1e-3):
        apart = float((once - again).abs().max())
        raise ValueError(
            f"decode gave two pictures for one latent, up to {apart:.2g} "
            "apart; fix the noise of the generator, since f and g must draw with the same."
        )
