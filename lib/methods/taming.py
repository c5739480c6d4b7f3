"""Taming normalizing flows (Malnick, Avidan, Fried, 2024): one function an equation.

NLL stands for the negative log-likelihood of an image. All functions take it in any unit, but
Eq. (8) is not free of the unit: the square of a distance in nats is much larger than that of the
same distance in bits per dimension. The authors' code uses bits per dimension.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lib import distributed

NLL = Callable[[nn.Module, Tensor], Tensor]
KL = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Prepare = Callable[[Tensor, torch.Generator], Tensor]
Step = tuple[nn.Module, dict[str, float]]
REMEMBER_TERMS = ("kl_forward", "kl_reverse", "average_nll")


def average_nll(nll: Tensor) -> Tensor:
    """Average the negative log-likelihood, the loss that trained the base model.

    Implements TNF Eq. (5).

    Shapes: ``nll`` (batch,); returns a scalar in the same unit.
    """
    return nll.mean()


def nll_statistics(nll: Tensor) -> tuple[Tensor, Tensor]:
    """Describe the NLL of the remember set by its mean and standard deviation.

    Implements TNF Eq. (6).

    Shapes: ``nll`` (batch,); returns two scalars in the same unit.
    Raises: ValueError if there are fewer than two images.
    """
    if len(nll) < 2:
        raise ValueError(
            f"A standard deviation needs at least 2 remember images, got {len(nll)}; "
            "enlarge the remember batch."
        )
    return nll.mean(), nll.std(correction=0)


def signed_distance(nll: Tensor, mu_r: Tensor, sigma_r: Tensor, delta: float) -> Tensor:
    """Measure how far each image is from the forgetting threshold, in standard deviations.

    Implements TNF Eq. (7).

    Shapes: ``nll`` (batch,), ``mu_r`` and ``sigma_r`` scalars, all in one unit; returns (batch,).
    Raises: ValueError if ``sigma_r`` is not positive.
    """
    if not sigma_r > 0:
        raise ValueError(
            f"sigma_r must be positive, got {float(sigma_r)}; are all remember images the same?"
        )
    return (nll - (mu_r + delta * sigma_r)) / sigma_r


def forget_loss(distance: Tensor, sigma_r: Tensor) -> Tensor:
    """Pull every forget image to the threshold, from both sides.

    Implements TNF Eq. (8). The loss is 0.5 at the threshold and saturates at 1 far from it.

    Shapes: ``distance`` (batch,) in standard deviations, ``sigma_r`` a scalar; returns a scalar.
    """
    return torch.sigmoid(sigma_r**2 * distance**2).mean()


def threshold_met(distance: Tensor, epsilon: float) -> bool:
    """Say whether every forget image is within ``epsilon`` standard deviations of the threshold.

    Implements TNF Eq. (9).

    Raises: ValueError if ``epsilon`` is not positive.
    """
    if epsilon <= 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}; the paper uses 0.3.")
    return bool((distance.abs() < epsilon).all())


def is_forgotten(nll: Tensor, mu_r: Tensor, sigma_r: Tensor, delta: float) -> Tensor:
    """Say for each image whether it is less likely than a share 1 - Phi(delta) of the remembered.

    Implements TNF Eq. (10), with the inequality turned round: as printed, it calls the LIKELY
    images forgotten.

    Shapes: ``nll`` (batch,), the rest scalars; returns booleans (batch,).
    """
    tail = torch.special.ndtr(torch.tensor(-delta, dtype=torch.float64))
    return likelihood_quantile(nll, mu_r, sigma_r) <= tail


def likelihood_quantile(nll: Tensor, mu_r: Tensor, sigma_r: Tensor) -> Tensor:
    """Return the share of remembered images with a higher NLL, if their NLL is normal.

    Implements TNF Eq. (11). Computed in float64, since the tail is below float32's resolution
    of numbers near one.

    Shapes: ``nll`` (batch,), the rest scalars; returns (batch,) in [0, 1].
    """
    z = (nll.double() - mu_r) / sigma_r
    return torch.special.ndtr(-z)


def mean_likelihood_quantile(nll: Tensor, mu_r: Tensor, sigma_r: Tensor) -> Tensor:
    """Average the likelihood quantile over a set of images.

    Implements TNF Eq. (14).

    Shapes: ``nll`` (batch,); returns a scalar.
    """
    return likelihood_quantile(nll, mu_r, sigma_r).mean()


def gaussian_kl(mu_p: Tensor, sigma_p: Tensor, mu_q: Tensor, sigma_q: Tensor) -> Tensor:
    """Return KL(p || q) between two univariate normals, in nats. Closed form."""
    return (
        torch.log(sigma_q / sigma_p) + (sigma_p**2 + (mu_p - mu_q) ** 2) / (2.0 * sigma_q**2) - 0.5
    )


def gaussian_kl_detached_log(mu_p: Tensor, sigma_p: Tensor, mu_q: Tensor, sigma_q: Tensor):
    """Return the same value as :func:`gaussian_kl`, but with no gradient through the logarithm.

    This is what the authors' released code computes (a logarithm of plain numbers). It is here
    to measure what that changes; taming itself uses :func:`gaussian_kl`.
    """
    value = gaussian_kl(mu_p, sigma_p, mu_q, sigma_q)
    log_ratio = torch.log(sigma_q / sigma_p)
    return value - log_ratio + log_ratio.detach()


def remember_loss(
    nll_tamed: Tensor,
    nll_base: Tensor,
    gamma: float,
    kl: KL = gaussian_kl,
    without: Collection[str] = (),
) -> tuple[Tensor, dict[str, Tensor]]:
    """Keep the NLL distribution of the remember batch where the base model had it.

    Implements TNF Eq. (12). The forward KL is KL(base || tamed). Terms named in ``without`` are
    computed but do not count, as in the paper's ablation.

    Shapes: both NLLs (batch,), of the same images; returns a scalar and its terms.
    """
    base, tamed = nll_statistics(nll_base), nll_statistics(nll_tamed)
    terms = {
        "kl_forward": kl(*base, *tamed),
        "kl_reverse": kl(*tamed, *base),
        "average_nll": average_nll(nll_tamed),
    }
    kept = {name: 0.0 if name in without else value for name, value in terms.items()}
    both_kls = kept["kl_forward"] + kept["kl_reverse"]
    return gamma * both_kls + (1.0 - gamma) * kept["average_nll"], terms


def taming_loss(forget: Tensor, remember: Tensor, alpha: float) -> Tensor:
    """Weigh forgetting against remembering.

    Implements TNF Eq. (13).
    """
    return alpha * forget + (1.0 - alpha) * remember


@dataclass(frozen=True)
class TamingSettings:
    """The knobs of Algorithm 1; the defaults are the paper's, the batch its code's.

    ``offset`` moves the target beyond the threshold; the authors' runs had 0.3. ``epsilon`` None
    leaves out the stop rule, as their runs on attributes do. ``without`` names terms of the
    remember loss that do not count; alpha 1 leaves out all of it.
    """

    delta: float = 4.0
    epsilon: float | None = 0.3
    alpha: float = 0.6
    gamma: float = 0.6
    lr: float = 5e-5
    batch_forget: int = 8
    batch_remember: int = 8
    refresh_every: int = 10
    statistics_images: int = 1024
    offset: float = 0.0
    max_steps: int = 300
    without: tuple[str, ...] = ()

    def __post_init__(self):
        if unknown := set(self.without) - set(REMEMBER_TERMS):
            raise ValueError(
                f"The remember loss has no term {', '.join(sorted(unknown))}; it has "
                f"{', '.join(REMEMBER_TERMS)}."
            )
        if self.delta <= 0:
            raise ValueError(f"delta must be positive, got {self.delta}; the paper uses 4.")
        if not 0 <= self.alpha <= 1 or not 0 <= self.gamma <= 1:
            raise ValueError(
                f"alpha and gamma must lie in [0, 1], got {self.alpha} and {self.gamma}."
            )


def tame(
    base: nn.Module,
    forget: Tensor,
    remember: Tensor,
    nll: NLL,
    settings: TamingSettings,
    generator: torch.Generator,
    kl: KL = gaussian_kl,
    prepare: Prepare = lambda images, generator: images,
) -> Iterator[Step]:
    """Tame a copy of ``base``; yield the model and the step's terms before every step.

    Algorithm 1 of the paper. What is forgotten depends on the sets alone: the pictures of a person,
    those with an attribute, or, to have more of an attribute, those without it.
    ``nll(model, x)`` returns (batch,). ``prepare`` makes its input from the images that were
    drawn, once for both models: for Glow it is the dequantisation. The last pair has ``stopped``
    set to 1.0 if the stop rule (9) was met; it is tested on all of ``forget`` before each step.

    The model is one object that the next step changes; see :func:`best_of` for the result of all.

    Several processes that all call this with the same arguments share the work of the statistics
    and of the stop rule, which need no gradient and are most of it; their models stay equal.

    Shapes: ``forget`` and ``remember`` (n, ...), as ``prepare`` takes them.
    Raises: ValueError if one of the sets is empty, their images differ in shape, or an image is in
    both.
    """
    _check_sets(forget, remember)
    tamed = copy.deepcopy(base)
    optimizer = torch.optim.Adam(tamed.parameters(), lr=settings.lr, fused=True)
    shared_nll = partial(distributed.by_share, partial(nll, tamed))
    target = settings.delta + settings.offset
    for step in range(settings.max_steps + 1):
        if step % settings.refresh_every == 0:
            with torch.no_grad():
                subset = draw(remember, settings.statistics_images, generator)
                mu_r, sigma_r = nll_statistics(shared_nll(prepare(subset, generator)))
        terms = {"step": step, "mu_r": float(mu_r), "sigma_r": float(sigma_r), "stopped": 0.0}
        if settings.epsilon is not None:
            with torch.no_grad():
                nll_all = shared_nll(prepare(forget, generator))
            distance_all = signed_distance(nll_all, mu_r, sigma_r, target)
            terms["stopped"] = float(threshold_met(distance_all, settings.epsilon))
            terms["distance"] = float(distance_all.mean())
            terms["distance_max"] = float(distance_all.abs().max())
        if terms["stopped"] or step == settings.max_steps:
            yield tamed, terms
            return

        x_forget = prepare(draw(forget, settings.batch_forget, generator), generator)
        x_remember = prepare(draw(remember, settings.batch_remember, generator), generator)
        # One pass of both batches costs less than two.
        nll_both = nll(tamed, torch.cat((x_forget, x_remember)))
        nll_forget, nll_remember = nll_both.split((len(x_forget), len(x_remember)))
        loss_forget = forget_loss(signed_distance(nll_forget, mu_r, sigma_r, target), sigma_r)
        with torch.no_grad():
            nll_base = nll(base, x_remember)
        loss_remember, remember_terms = remember_loss(
            nll_remember, nll_base, settings.gamma, kl, settings.without
        )
        total = taming_loss(loss_forget, loss_remember, settings.alpha)
        terms |= {"forget": loss_forget.item(), "remember": loss_remember.item()}
        terms |= {"total": total.item()}
        terms |= {name: value.item() for name, value in remember_terms.items()}
        yield tamed, terms
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        # Equal but for rounding, which would let the processes drift apart and stop at other steps.
        distributed.average([p.grad for p in tamed.parameters() if p.grad is not None])
        optimizer.step()


def best_of(steps: Iterable[Step]) -> Step:
    """Go through all steps of :func:`tame`; return the model to keep, with its terms.

    That is the one which met the stop rule. Where none did, it is the one whose farthest forget
    image was nearest to the threshold, with ``stopped`` 0; where the rule is not tested, the last.
    """
    best, best_terms = None, {"distance_max": float("inf")}
    for model, terms in steps:
        if terms["stopped"] or "distance_max" not in terms:
            best, best_terms = model, terms
        elif terms["distance_max"] < best_terms["distance_max"]:
            best, best_terms = copy.deepcopy(model), terms
    return best, best_terms


def draw(images: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Draw ``n`` images without replacement, or return all of them if there are no more."""
    if len(images) <= n:
        return images
    order = torch.randperm(len(images), generator=generator, device=generator.device)
    return images[order[:n].to(images.device)]


def _check_sets(forget: Tensor, remember: Tensor) -> None:
    if len(forget) == 0 or len(remember) < 2:
        raise ValueError(
            f"Taming needs forget and remember images, got {len(forget)} and {len(remember)}."
        )
    if forget.shape[1:] != remember.shape[1:]:
        raise ValueError(
            f"The forget images have the shape {tuple(forget.shape[1:])} and the remember images "
            f"{tuple(remember.shape[1:])}; load both at the model's size."
        )
    forgotten = {image.tobytes() for image in forget.detach().cpu().numpy()}
    both = sum(image.tobytes() in forgotten for image in remember.detach().cpu().numpy())
    if both:
        raise ValueError(
            f"{both} of {len(remember)} remember images are also to be forgotten, which pulls the "
            "model both ways; take them out of the remember set."
        )
