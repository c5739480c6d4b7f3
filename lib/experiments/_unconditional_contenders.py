"""One request to an unconditional model, "no pictures of this digit": who serves it, and how well.

A contender is a model, perhaps with a rule beside it, and what it cost. All are measured on the
same latents, by the same judges, against the same references, with the same number of pictures.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lib.experiments._attack import Opinions, System
from lib.experiments._digits import Digits, unit
from lib.experiments._judges import Judge, train_judge
from lib.experiments._latents import load_judge, seen_by
from lib.experiments._unlearning import (
    CHUNK,
    Subject,
    SubjectConfig,
    feature_of,
    load_subject,
    marked_by_user,
    unlearned_model,
)
from lib.experiments._unlearning_tuning import Tuning, tune
from lib.machine import clock
from lib.methods.baselines import gradient_ascent_loss
from lib.methods.feature_baselines import latent_rejection
from lib.methods.feature_unlearning import UnlearningSettings, indicator
from lib.metrics.fidelity import frechet_distance
from lib.models.classifier import predict_logits
from lib.train import fit

LATENTS_SEED = 3000  # of the latents that everything is measured on
SAME_LATENTS = ("original", "edited", "feature_unlearning", "fine_tune", "gradient_ascent")


@dataclass(frozen=True)
class DigitSubject(Subject):
    """A subject whose features are digits, named ``"0"`` to ``"9"``, by the opinion of its judge.

    The score is the logit of the digit minus the largest other one.
    """

    def score(self, name: str, images: Tensor) -> Tensor:
        """Return by how much the judge prefers the digit to all others, minus its limit: (n,)."""
        logits = self.judge(seen_by(self.judge, images))
        return margin(logits, int(name)) - self.limits[name]

    def opinion(self, name: str, images: Tensor) -> Tensor:
        """Return the digit that the judge sees, as whole numbers (n, 1)."""
        return predict_logits(self.judge, seen_by(self.judge, images)).argmax(1, keepdim=True)


def margin(logits: Tensor, label: int) -> Tensor:
    """Return by how much a logit exceeds the largest other one; (n, n_classes) to (n,)."""
    others = logits.index_fill(1, torch.tensor([label], device=logits.device), -torch.inf)
    return logits[:, label] - others.amax(1)


class Margin(nn.Module):
    """Make a judge of digits one of a single digit, with one logit (n, 1): its :func:`margin`."""

    def __init__(self, judge: nn.Module, label: int):
        super().__init__()
        self.judge, self.label = judge, label

    def forward(self, images: Tensor) -> Tensor:
        return margin(self.judge(seen_by(self.judge, images)), self.label).unsqueeze(1)


def load_model(config, base: str, device: torch.device) -> Subject:
    """Load a base model, or build an untrained ``random_vae`` or ``random_gan``."""
    config = SubjectConfig(
        data=config.data,
        size=config.size,
        held_out="test",
        base=base,
        space=config.space,
        judge=config.judge,
        features=(),
    )
    return load_subject(config, device)


def load_digit_subject(config, device: torch.device) -> DigitSubject:
    """Load the base and the judge; an untrained base draws the digit in half of its pictures."""
    found = load_model(config, config.base, device)
    judge = load_judge(config.judge, found.model.image_shape, device).requires_grad_(False)
    name = str(config.forget)
    subject = DigitSubject(found.model, config.space, judge, config.judge, {name: 0.0})
    if config.base.startswith("random"):
        images = subject.pictures(subject.model, subject.draw(64, seeded(device, 0)))
        subject = replace(subject, limits={name: float(subject.scores(name, images).median())})
    return subject


def second_opinion(config: Judge, data: Digits, test: Digits, label: int) -> tuple[Margin, float]:
    """Train a judge of another kind, for those who would deceive the first; with its accuracy."""
    torch.manual_seed(1)
    judge = train_judge(config, data, seeded(data.images.device, 1)).requires_grad_(False)
    right = predict_logits(judge, unit(test.images)).argmax(1) == test.labels
    return Margin(judge, label), float(right.float().mean())


@dataclass(frozen=True)
class Ascent:
    """The schedule of gradient ascent on the digit; ``weight`` is that of the rest, 0 for none."""

    lr: float
    batch: int
    max_steps: int
    weight: float


@dataclass(frozen=True)
class Methods:
    """How each method is carried out; an ascent of null is left out, as of a GAN.

    A user sees ``clicks`` pictures and gets the share ``error_rate`` wrong; ``percentile`` null is
    the paper's threshold. ``n_real`` real pictures of either kind are at hand for the others.
    """

    clicks: int
    error_rate: float
    percentile: float | None
    unlearning: UnlearningSettings
    tuning: Tuning
    ascent: Ascent | None
    n_real: int


@dataclass(frozen=True)
class Contender:
    """What serves the request: a model or a service, and its ``cost``.

    Costs are ``steps`` of training, CPU ``seconds``, real ``pictures`` and ``clicks``.
    """

    system: System
    cost: Mapping[str, float]

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """Return the pictures of latents in [0, 1], in chunks."""
        return torch.cat([self.system.pictures(part) for part in latents.split(CHUNK)])


def contenders_of(
    subject: DigitSubject,
    methods: Methods,
    train: Digits,
    label: int,
    retrained: nn.Module | None,
    seed: int,
) -> dict[str, Contender]:
    """Carry out every method once; services keep the model and stand in front of it.

    What retraining cost stands in the results of that run.
    """
    device, free = subject.device, {"steps": 0, "seconds": 0.0, "pictures": 0, "clicks": 0}
    user = marked_by_user(subject, str(label), methods.clicks, methods.error_rate, seed)
    feature = feature_of(user, normalise=True, percentile=methods.percentile)
    clicks = free | {"clicks": methods.clicks}
    found = {"original": Contender(System(subject, subject.model), free)}
    if retrained is not None:
        found["retrained"] = Contender(System(subject, retrained), {})
    found["edited"] = Contender(System(subject, subject.model, edits=(feature,)), clicks)
    found["rejected"] = Contender(System(subject, subject.model, refuses=(feature,)), clicks)

    def trained(name: str, cost: Mapping, compute: Callable[[], nn.Module]) -> None:
        start = clock()
        model = compute()
        cost = {**cost, "seconds": clock() - start}
        found[name] = Contender(System(subject, model), cost)

    trained(
        "feature_unlearning",
        clicks | {"steps": methods.unlearning.max_steps},
        lambda: unlearned_model(subject, [feature], methods.unlearning, seed)[0],
    )
    rest = unit(train.without([label]).images[: methods.n_real])
    forget, _ = train.first(methods.n_real, label)
    trained(
        "fine_tune",
        free | {"steps": methods.tuning.max_steps, "pictures": len(rest)},
        lambda: tune(subject, rest, methods.tuning, seeded(device, seed)),
    )
    if methods.ascent is not None:
        n = len(forget) + (len(rest) if methods.ascent.weight else 0)
        trained(
            "gradient_ascent",
            free | {"steps": methods.ascent.max_steps, "pictures": n},
            lambda: ascend(subject, forget, rest, methods.ascent, seeded(device, seed)),
        )
    return found


def ascend(
    subject: Subject, forget: Tensor, rest: Tensor, config: Ascent, generator: torch.Generator
) -> nn.Module:
    """Train a copy of a VAE up its loss on the digit, and down that on the rest with a weight."""

    def some(images: Tensor) -> tuple[Tensor, None]:
        size = (config.batch,)
        index = torch.randint(len(images), size, generator=generator, device=generator.device)
        return images[index], None

    def step_loss(model: nn.Module, generator: torch.Generator):
        beside = some(rest) if config.weight else None
        return gradient_ascent_loss(
            lambda x, c: model.elbo(x, generator), some(forget), beside, config.weight
        )

    trained = fit(
        copy.deepcopy(subject.model).requires_grad_(True),
        step_loss,
        steps=config.max_steps,
        lr=config.lr,
        generator=generator,
        device=generator.device,
        progress=False,
    )
    return trained.model.eval().requires_grad_(False)


class Yardstick:
    """Measure every contender alike, on ``n`` samples.

    Fréchet distances compare ``n_compared`` of the samples that do not show the digit with as many
    ``references``: ``real`` held-out pictures of other digits, samples of the ``original`` from
    OTHER latents that do not show it either, and all samples of the ``retrained`` from these. So
    the original and the retrained model have a distance to themselves, which is that of chance.
    """

    def __init__(
        self,
        opinions: Opinions,
        real: Tensor,
        retrained: nn.Module | None,
        n: int,
        n_compared: int,
    ):
        self.opinions, self.subject, self.n_compared = opinions, opinions.subject, n_compared
        subject, f = self.subject, self.subject.model
        self.z = subject.draw_samples(n, seeded(subject.device, LATENTS_SEED))
        self.before = subject.pictures(f, self.z)
        self.forget = self.has(self.before)
        self.digits = subject.opinion(opinions.feature, self.before)
        others = subject.draw_samples(n, seeded(subject.device, LATENTS_SEED + 1))
        fresh = subject.pictures(f, others)
        references = {"real": real, "original": fresh[~self.has(fresh)]}
        if retrained is not None:
            references["retrained"] = subject.pictures(retrained, others)
        self.references = {name: self.seen(images) for name, images in references.items()}
        self.extractor = subject.seen(real[:1])[1]

    def has(self, images: Tensor) -> Tensor:
        """Say which pictures show the digit by the first judge: (n,)."""
        return self.subject.has(self.opinions.feature, images)

    def seen(self, images: Tensor) -> Tensor:
        """Return the features of the first pictures, as many as are compared."""
        return self.subject.seen(images[: self.n_compared])[0]

    def distance(self, images: Tensor, reference: str) -> float:
        """Return the Fréchet distance of pictures to a reference; nan where there are too few."""
        wanted = self.references[reference]
        if min(len(images), len(wanted)) < self.n_compared:
            return math.nan
        return frechet_distance(wanted, self.seen(images))

    def latents(self, contender: Contender) -> Tensor:
        """Return the latents of a contender's samples: those of all, unless it refuses some."""
        refuses, subject = contender.system.refuses, self.subject
        if not refuses:
            return self.z
        generator = seeded(subject.device, LATENTS_SEED + 2)
        return latent_rejection(len(self.z), subject.draw_samples, refuses, generator)

    def measure(self, name: str, contender: Contender, images: Tensor) -> dict[str, float]:
        """Return the shares with the digit, by one judge and by both, and what else became of it.

        ``changed`` is the share of latents without the digit whose picture now shows another one
        than by the original, and ``refused`` the share of them that get no picture.
        """
        first, both = self.opinions.ask(images)
        found = {"share": float(first.float().mean()), "share_both": float(both.float().mean())}
        for reference in self.references:
            found[f"frechet_{reference}"] = self.distance(images[~first], reference)
        if name in SAME_LATENTS:
            now = self.subject.opinion(self.opinions.feature, images)
            found["changed"] = float((now != self.digits)[~self.forget].float().mean())
        for z_e, t in contender.system.refuses:
            found["refused"] = float(indicator(self.z, z_e, t)[~self.forget].mean())
        return found


def seeded(device: torch.device, seed: int) -> torch.Generator:
    """Return a generator on a device."""
    return torch.Generator(device).manual_seed(seed)
