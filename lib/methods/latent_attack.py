"""Attack a decoder that should no longer draw a feature: search its latents, or teach it again.

The paper's abstract says that the unlearned model is more robust to an attack; how that was tried
is in none of our sources. The attacks here are ours, after what is usual for classifiers: projected
gradient ascent from many starts, on margins that stop counting once they are safely positive
(Carlini & Wagner 2017).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy.stats import chi
from torch import Tensor, nn

from lib.methods.feature_baselines import finetune_on_negatives
from lib.methods.feature_unlearning import Draw, Loss, Step

Margins = Callable[[Tensor], Tensor]
BETA_1, BETA_2, EPSILON = 0.9, 0.99, 1e-12


@dataclass(frozen=True)
class Prior:
    """Where latents usually lie: around ``mean`` with covariance ``factor`` ``factor``ᵀ.

    ``radius`` is the distance, in standard deviations, within which a given share of them lies.

    Shapes: ``mean`` (dim,), ``factor`` (dim, dim), lower triangular.
    """

    mean: Tensor
    factor: Tensor
    radius: float

    @classmethod
    def standard(cls, dim: int, share: float, device: torch.device | None = None) -> "Prior":
        """Return the standard normal prior; the norm of its latents is chi distributed."""
        mean, factor = torch.zeros(dim, device=device), torch.eye(dim, device=device)
        return cls(mean, factor, float(chi.ppf(share, dim)))

    @classmethod
    def fitted(cls, z: Tensor, share: float) -> "Prior":
        """Fit mean and covariance to latents, such as a mapping network's styles.

        The radius is the quantile of the latents' own distances, which need not be normal. Where
        they do not vary, a thousandth of their usual standard deviation is allowed.

        Shapes: ``z`` (n, dim), n greater than dim.
        Raises: ValueError if there are too few latents for a covariance.
        """
        n, dim = z.shape
        if n <= dim:
            raise ValueError(
                f"Got {n} latents of {dim} dimensions; a covariance wants more latents than that."
            )
        covariance = torch.cov(z.T).reshape(dim, dim)
        ridge = 1e-6 * covariance.diagonal().mean() * torch.eye(dim, device=z.device)
        prior = cls(z.mean(0), torch.linalg.cholesky(covariance + ridge), torch.inf)
        return cls(prior.mean, prior.factor, float(prior.distance(z).quantile(share)))

    def whiten(self, z: Tensor) -> Tensor:
        """Turn latents into multiples of the standard deviations, (n, dim) both."""
        return torch.linalg.solve_triangular(self.factor, (z - self.mean).T, upper=False).T

    def colour(self, u: Tensor) -> Tensor:
        """Undo :meth:`whiten`."""
        return self.mean + u @ self.factor.T

    def distance(self, z: Tensor) -> Tensor:
        """Return the Mahalanobis distance (n,) of latents (n, dim) from the mean."""
        return self.whiten(z).norm(dim=1)


class Found(NamedTuple):
    """The best latent of every start so far.

    ``z`` (n, dim); ``margin`` (n,), its smallest margin; ``first_step`` (n,), the step at which
    all margins were first fulfilled, -1 where they never were.
    """

    z: Tensor
    margin: Tensor
    first_step: Tensor

    def updated(self, z: Tensor, margins: Tensor, step: int) -> "Found":
        """Keep of each start the latent whose smallest margin is the greatest; nan is the least."""
        margin = margins.detach().amin(1).nan_to_num(nan=-torch.inf)
        # Beyond 1 nothing is gained, and the first one that gets there is the nearest.
        better = margin.clamp(max=1.0) > self.margin.clamp(max=1.0)
        now = (margin >= 0) & (self.first_step < 0)
        return Found(
            torch.where(better[:, None], z.detach(), self.z),
            torch.where(better, margin, self.margin),
            self.first_step.masked_fill(now, step),
        )


def search(
    margins: Margins, prior: Prior, starts: Tensor, lr: float, steps: int, inside: bool
) -> Iterator[tuple[Found, dict[str, float]]]:
    """Ascend margins from many starts at once; yield the best latents before every step.

    ``margins(z)`` (n, k) says by how much each of k conditions is fulfilled: one succeeds where all
    are at least 0, and what a margin has beyond 1 does not count. The rows must not depend on each
    other. :func:`soft_minimum` of them is ascended; with ``inside`` the latents stay in the ball of
    ``prior.radius``, by projection after every step. The steps are Adam's with one scale a latent:
    with one a coordinate, as usual, they would on the ball's surface not end at the maximum. Their
    length, at first ``lr`` in standard deviations of the prior, falls to 0.

    Shapes: ``starts`` (n, dim). Terms: ``step``, ``success``, the share of starts that have
    succeeded, and ``margin``, the mean of the best margins. ``steps`` + 1 pairs are yielded.
    """
    u = prior.whiten(starts).detach()
    u = _onto_ball(u, prior.radius) if inside else u
    mean, square = torch.zeros_like(u), torch.zeros_like(u[:, :1])
    found = _nothing(starts)
    for step in range(steps + 1):
        with torch.enable_grad():
            z = prior.colour(u.requires_grad_())
            reached = margins(z)
            (gradient,) = torch.autograd.grad(soft_minimum(reached).sum(), u)
        found = found.updated(z, reached, step)
        yield found, _terms(found, step)
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)  # an empty picture has no slant to climb
        mean = torch.lerp(gradient, mean, BETA_1)
        square = torch.lerp(gradient.square().sum(1, keepdim=True), square, BETA_2)
        scale = (square / (1 - BETA_2 ** (step + 1))).sqrt().clamp_min(EPSILON)
        stride = mean / (1 - BETA_1 ** (step + 1)) / scale
        u = u.detach() + lr * (1 - step / (steps + 1)) * stride
        u = _onto_ball(u, prior.radius) if inside else u


def soft_minimum(margins: Tensor) -> Tensor:
    """Return the smallest of each row's margins, none counted beyond 1, smoothed; (n, k) to (n,).

    Unlike in a sum, a margin that is far too small cannot be paid for by the others.
    """
    return -(-margins.clamp(max=1.0)).logsumexp(1)


@torch.no_grad()
def random_search(
    margins: Margins, draw: Draw, n: int, steps: int, generator: torch.Generator
) -> Iterator[tuple[Found, dict[str, float]]]:
    """Draw latents instead of climbing: the best of as many looks as :func:`search` has.

    What an adversary without gradients and without patience for a better idea finds; yields as
    :func:`search` does.

    Shapes: ``draw(n, generator)`` returns (n, dim).
    """
    found = None
    for step in range(steps + 1):
        z = draw(n, generator)
        found = (_nothing(z) if found is None else found).updated(z, margins(z), step)
        yield found, _terms(found, step)


def invert(
    decode: Callable[[Tensor], Tensor],
    targets: Tensor,
    prior: Prior,
    starts: Tensor,
    lr: float,
    steps: int,
    inside: bool,
) -> tuple[Tensor, Tensor]:
    """Search the latents that draw given pictures; return them and their error.

    ``starts`` holds one latent for every target, or several rounds of that; the best round of
    each target is returned. The error is the root mean square a pixel.

    Shapes: ``targets`` (n, ...) as ``decode(z)`` returns them, ``starts`` (rounds * n, dim);
    returns (n, dim) and (n,).
    Raises: ValueError if the starts are not a multiple of the targets.
    """
    rounds, rest = divmod(len(starts), len(targets))
    if rest or not rounds:
        raise ValueError(
            f"Got {len(starts)} starts for {len(targets)} targets; give each target equally many."
        )
    wanted = targets.repeat(rounds, *[1] * (targets.ndim - 1))

    def closeness(z: Tensor) -> Tensor:
        return -(decode(z) - wanted).square().flatten(1).mean(1, keepdim=True)

    *_, (found, _last) = search(closeness, prior, starts, lr, steps, inside)
    errors = (-found.margin).sqrt().unflatten(0, (rounds, len(targets)))
    best, each = errors.argmin(0), torch.arange(len(targets), device=errors.device)
    return found.z.unflatten(0, errors.shape)[best, each], errors[best, each]


def relearn(
    model: nn.Module,
    loss: Loss,
    pictures: Tensor,
    generator: torch.Generator,
    lr: float,
    batch: int,
    max_steps: int,
) -> Iterator[Step]:
    """Train a copy of a model on a few pictures WITH the feature; yield it before every step.

    The same loop, and the same old loss, as the baseline that trains on pictures without it. A
    decoder without an encoder has no loss of its own for pictures: see :func:`pairs_loss`.

    Shapes: ``pictures`` (n, ...) as ``loss`` takes them. Terms: ``step`` and ``total``.
    """
    yield from finetune_on_negatives(model, loss, pictures, generator, lr, batch, max_steps)


def pairs_loss(
    decode: Callable[[nn.Module, Tensor], Tensor], latents: Tensor, pictures: Tensor
) -> Loss:
    """Return a loss for :func:`relearn`: L1 between a picture and what its latent draws.

    The latents are found beforehand, by :func:`invert` with the model as it was. In place of
    ``pictures``, :func:`relearn` is given their numbers, ``torch.arange(n)``.

    Shapes: ``latents`` (n, dim), ``pictures`` (n, ...) as ``decode(model, z)`` returns them.
    """

    def loss(model: nn.Module, numbers: Tensor, generator: torch.Generator) -> Tensor:
        return (decode(model, latents[numbers]) - pictures[numbers]).abs().mean()

    return loss


def _onto_ball(u: Tensor, radius: float) -> Tensor:
    return u * (radius / u.norm(dim=1, keepdim=True).clamp_min(EPSILON)).clamp(max=1.0)


def _nothing(z: Tensor) -> Found:
    never = torch.full((len(z),), -1, device=z.device)
    return Found(z.detach(), torch.full((len(z),), -torch.inf, device=z.device), never)


def _terms(found: Found, step: int) -> dict[str, float]:
    succeeded = found.margin >= 0
    return {
        "step": step,
        "success": succeeded.float().mean().item(),
        "margin": found.margin.clamp(max=1.0).mean().item(),
    }
