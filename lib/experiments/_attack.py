"""What an attack on Feature Unlearning is made of: systems, ways to search, and two opinions.

A gradient that climbs a classifier finds pictures that deceive the classifier. So the adversary
climbs one opinion, and a picture counts as a success only if a second one agrees.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.experiments._digits import unit
from lib.experiments._faces import Faces
from lib.experiments._unlearning import Subject, as_uint8
from lib.methods.feature_unlearning import Draw, Feature, edited_latent, join_layers, projection
from lib.methods.latent_attack import Found, Prior
from lib.models.classifier import FaceCNN, predict_logits
from lib.train import cosine, fit

N_FITTED = 10_000  # styles that a mapping network's mean and covariance are taken from
SAFE_LOGIT = 2.0  # beyond its limit, a logit that the adversary is content with
STIFFNESS = 10.0  # of a refusal: a tenth of a unit of the latents is a safe distance


@dataclass(frozen=True)
class Inversion:
    """Held-out pictures to look for: ``n_targets`` of what was forgotten, as many of the rest."""

    n_targets: int
    rounds: int
    steps: int
    lr: float


@dataclass(frozen=True)
class System:
    """What stands between an adversary and a picture: a model, and perhaps a rule beside it.

    ``edits`` are features erased from every latent before it is decoded; latents that have one of
    ``refuses`` get no picture.
    """

    subject: Subject
    model: nn.Module
    edits: tuple[Feature, ...] = ()
    refuses: tuple[Feature, ...] = ()

    def pictures(self, latents: Tensor) -> Tensor:
        """Return pictures in [0, 1] of the subject's latents; gradients flow, also through edits.

        The refused ones are drawn as well; see :meth:`allowed`.
        """
        if self.edits:
            latents, _ = edited_latent(latents, self.edits)
        return self.subject.to_unit(self.subject.decode(self.model, latents))

    def allowed(self, latents: Tensor) -> Tensor:
        """Return by how much latents are below each threshold, (n, number of refusals)."""
        below = [t - projection(latents, z_e) for z_e, t in self.refuses]
        return STIFFNESS * torch.stack(below, 1) if below else latents.new_empty(len(latents), 0)


@dataclass(frozen=True)
class Way:
    """A place to search: the adversary's latents, their prior, and how they become the subject's.

    With ``inside`` they must stay within the prior's radius.
    """

    name: str
    draw: Draw
    lift: Callable[[Tensor], Tensor]
    prior: Prior
    inside: bool


def ways_of(subject: Subject, share: float, generator: torch.Generator) -> list[Way]:
    """List where to search; the first is open to everybody, the others need the weights.

    ``inside`` are latents z of the prior, in the ball that holds ``share`` of them. A GAN's mapping
    normalises z, so nothing is outside. With the weights of a VAE one may leave the ball, ``free``;
    of a GAN in a space of styles one may search styles, within the radius of ``share`` of the
    mapping's own (``style``), or anywhere (``free``).
    """
    prior = Prior.standard(subject.model.latent_dim, share, subject.device)
    inside = Way("inside", subject.model.draw_latents, partial(_lift, subject), prior, True)
    if subject.space == "z":
        free = Way("free", inside.draw, inside.lift, prior, False)
        return [inside] if subject.is_gan else [inside, free]
    styles = Prior.fitted(subject.draw(N_FITTED, generator), share)
    return [inside] + [
        Way(name, subject.draw, lambda w: w, styles, within)
        for name, within in (("style", True), ("free", False))
    ]


def _lift(subject: Subject, z: Tensor) -> Tensor:
    """Return the subject's latents of a z, by its mapping where it has one; gradients flow."""
    if subject.space == "z":
        return z
    w = subject.model.mapping(z)
    return w if subject.space == "w" else join_layers([w] * subject.model.n_levels)


@dataclass(frozen=True)
class Opinions:
    """Two opinions on pictures, each at least 0 where it says yes.

    The first is the subject's own: a ruler, or a judge's logit; ``safe`` beyond its limit the
    adversary is content. Of a ruler's feature the second says whether a digit is there at all, with
    at least ``confidence`` in some class by the subject's judge; of an attribute it is ``second``,
    another judge of the same attribute.
    """

    subject: Subject
    feature: str
    safe: float
    confidence: float
    second_judge: nn.Module | None = None

    def first(self, images: Tensor) -> Tensor:
        """Return the first opinion (n,) on pictures in [0, 1], in units of ``safe``."""
        return self.subject.score(self.feature, images) / self.safe

    def second(self, images: Tensor) -> Tensor:
        """Return the second opinion (n,), a logit beyond its limit in units of ``SAFE_LOGIT``."""
        if self.second_judge is not None:
            return self.second_judge(images)[:, 0] / SAFE_LOGIT
        limit = float(np.log(self.confidence) - np.log1p(-self.confidence))
        return (best_log_odds(self.subject.judge(images)) - limit) / SAFE_LOGIT

    @torch.no_grad()
    def ask(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Say which pictures have the feature by the first opinion, and which by both: (n,)."""
        parts = images.split(500)
        first = torch.cat([self.first(part) for part in parts]) >= 0
        return first, first & (torch.cat([self.second(part) for part in parts]) >= 0)


def best_log_odds(logits: Tensor) -> Tensor:
    """Return the log-odds (n,) of the likeliest class, from logits (n, n_classes)."""
    best, which = logits.max(1)
    others = logits.scatter(1, which.unsqueeze(1), -torch.inf)
    return best - others.logsumexp(1)


def margins_of(
    system: System, way: Way, opinions: Opinions, both: bool
) -> Callable[[Tensor], Tensor]:
    """Return what an adversary climbs: the first opinion or both, and to be allowed."""

    def margins(z: Tensor) -> Tensor:
        latents = way.lift(z)
        images = system.pictures(latents)
        columns = [opinions.first(images)] + ([opinions.second(images)] if both else [])
        return torch.cat([torch.stack(columns, 1), system.allowed(latents)], 1)

    return margins


@torch.no_grad()
def outcome(
    found: Found, system: System, way: Way, opinions: Opinions, n_shown: int
) -> dict[str, np.ndarray]:
    """Judge what a search has found, one entry a start.

    ``claimed`` by the first opinion and ``success`` by both, among what is allowed; ``distance``
    from the prior's mean in standard deviations; ``steps`` to the first latent that the adversary
    was content with, -1 for never; and the first ``pictures``.
    """
    latents = way.lift(found.z)
    images = torch.cat([system.pictures(part) for part in latents.split(500)])
    first, both = opinions.ask(images)
    allowed = (system.allowed(latents) >= 0).all(1)
    return {
        "claimed": (first & allowed).cpu().numpy(),
        "success": (both & allowed).cpu().numpy(),
        "distance": way.prior.distance(found.z).cpu().numpy(),
        "steps": found.first_step.cpu().numpy(),
        "pictures": as_uint8(images[:n_shown]),
    }


@dataclass(frozen=True)
class SecondJudge:
    """The schedule of another judge of one attribute; without ``iterations`` it is untrained."""

    iterations: int
    n_train: int
    n_test: int
    batch: int
    lr: float
    dropout: float
    seed: int


def second_judge(
    config: SecondJudge, subject: Subject, data: str, attribute: str
) -> tuple[nn.Module, float]:
    """Train a judge of one attribute from other weights, with dropout; return it and its accuracy.

    The accuracy is the mean of that on pictures with and that on pictures without the attribute,
    from the split ``test``; for an untrained judge, which looks at no data, it is 0.5.
    """
    device, shape = subject.device, subject.model.image_shape
    torch.manual_seed(config.seed)
    judge = FaceCNN(1, shape, (attribute,), config.dropout).to(device)
    if not config.iterations:
        return judge.eval().requires_grad_(False), 0.5
    train = Faces.load(data, "train", shape[1], limit=config.n_train)
    labels = torch.from_numpy(train.labels(attribute)).float().to(device)

    def step_loss(model: nn.Module, generator: torch.Generator):
        images, index = train.drawn(config.batch, generator, False)
        wanted = labels[torch.from_numpy(index).to(device)]
        loss = F.binary_cross_entropy_with_logits(model(unit(images))[:, 0], wanted)
        return loss, {"cross_entropy": loss.detach()}

    judge = fit(
        judge.train(),
        step_loss,
        steps=config.iterations,
        lr=config.lr,
        generator=torch.Generator(device).manual_seed(config.seed),
        device=device,
        schedule=partial(cosine, warmup=0.1),
    ).model
    test = Faces.load(data, "test", shape[1], limit=config.n_test)
    images = unit(test.at(np.arange(len(test)), device))
    called, truth = predict_logits(judge, images)[:, 0].cpu() >= 0, test.labels(attribute) == 1
    recalls = [float((called.numpy() == kind)[truth == kind].mean()) for kind in (True, False)]
    return judge.eval().requires_grad_(False), float(np.mean(recalls))
