"""Attack an unlearned GAN or VAE and its rivals: search latents, invert pictures, teach again.

Systems: ``base`` f; ``edited``, a service that decodes edited latents of f; ``rejected``, one that
refuses latents beyond the threshold; ``unlearned`` g; ``tuned``, f fine-tuned on what the user did
not mark. For the two services the adversary has gradients but not the weights: whoever has those
leaves out the rule, and has as much success as on ``base``.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lib.experiments._attack import (
    Inversion,
    Opinions,
    SecondJudge,
    System,
    Way,
    margins_of,
    outcome,
    second_judge,
    ways_of,
)
from lib.experiments._digits import unit
from lib.experiments._latents import Pictures
from lib.experiments._unlearning import (
    RULERS,
    Subject,
    SubjectConfig,
    feature_of,
    load_subject,
    marked_by_user,
    trivial_pictures,
    unlearned_model,
)
from lib.experiments._unlearning_tuning import Tuning, negative_elbo, tune
from lib.methods.feature_unlearning import Feature, UnlearningSettings
from lib.methods.latent_attack import invert, pairs_loss, random_search, relearn, search
from lib.run import Run

LATENTS_SEED = 2000  # of the samples that shares are measured on
N_CANDIDATES = 2000  # held-out pictures that are looked through for some with the feature


@dataclass(frozen=True)
class Relearning:
    """Fine-tuning on ``n_pictures`` with the feature; the share of it is measured at ``steps``."""

    n_pictures: int
    steps: tuple[int, ...]
    lr: float
    batch: int
    n_samples: int


@dataclass(frozen=True, kw_only=True)
class Config(SubjectConfig):
    """A subject whose first feature is unlearned and attacked; the second is the control's.

    ``clicks`` to ``tuning`` are as in ``unlearning_features``. The adversary has ``n_starts``
    latents and as many ``steps`` for each; ``share`` of the prior is inside. ``safe`` is in units
    of the feature's score, and ``confidence`` that of the judge in a digit; see ``Opinions``.
    """

    clicks: int
    error_rate: float
    normalise: bool
    percentile: float | None
    unlearning: UnlearningSettings
    tuning: Tuning
    share: float
    safe: float
    confidence: float
    second_judge: SecondJudge | None
    n_starts: int
    steps: int
    lr: float
    inversion: Inversion
    relearning: Relearning
    n_trivial: int
    seeds: tuple[int, ...]

    def __post_init__(self):
        super().__post_init__()
        if len(self.features) != 2:
            raise ValueError(f"features are {list(self.features)}, wanted one and a control")
        if (self.features[0] in RULERS) != (self.second_judge is None):
            raise ValueError("an attribute wants a second_judge, a ruler's feature none")


def run(config: Config, run: Run) -> None:
    """Attack by search, by inversion and by relearning, once a seed, and report the means.

    ``success_<way>_<system>`` is the share of starts that end in a picture with the feature by both
    opinions, ``claimed_...`` by the first alone; ``distance_...`` and ``steps_...`` say how far the
    pictures lie and how long the first took. Besides those of ``ways_of`` the ways are ``sample``,
    no search at all, ``random``, one that does not climb, and for a ruler's feature ``naive``, one
    that climbs the ruler alone. ``lead_over_...`` is how much less success is on ``unlearned``.
    ``error_...`` and ``drawn_...`` are those of inversion, ``relearned_<steps>_...`` shares of
    samples with the feature. Of ``other``, another feature has been unlearned.
    """
    subject = load_subject(config, run.device)
    feature, judge = config.features[0], None
    held_out = Pictures.load(config.data, config.held_out, config.size, run.device)
    rows = Rows(config, held_out.source, run)
    if config.second_judge is not None:
        judge, accuracy = second_judge(config.second_judge, subject, config.data, feature)
        rows.add("accuracy_second_judge", [accuracy], config.second_judge.n_test)
    opinions = Opinions(subject, feature, config.safe, config.confidence, judge)
    for kind, images in trivial_pictures(subject, config.n_trivial).items():
        for word, said in zip(("claimed", "success"), opinions.ask(images), strict=True):
            rows.add(f"{word}_{kind}", [float(said.float().mean())], len(images))
    parts = [
        run.part(f"seed-{seed}", lambda seed=seed: one_seed(config, opinions, held_out, seed))
        for seed in config.seeds
    ]
    for name, value in parts[0].items():
        if not value.ndim:
            rows.add(name, [float(part[name]) for part in parts])
    for rival in ("base", "edited", "rejected"):
        pairs = [(p[f"success_inside_{rival}"], p["success_inside_unlearned"]) for p in parts]
        rows.add(f"lead_over_{rival}", [float(theirs - ours) for theirs, ours in pairs])
    run.arrays(**{name: value for name, value in parts[0].items() if value.ndim})


def one_seed(
    config: Config, opinions: Opinions, held_out: Pictures, seed: int
) -> dict[str, float | np.ndarray]:
    """Unlearn from one user's marks, then try everything; numbers become rows, arrays figures."""
    subject = opinions.subject
    models, feature = models_of(subject, config, seed)
    systems = {
        "base": System(subject, models["base"]),
        "edited": System(subject, models["base"], edits=(feature,)),
        "rejected": System(subject, models["base"], refuses=(feature,)),
        "unlearned": System(subject, models["unlearned"]),
        "tuned": System(subject, models["tuned"]),
    }
    ways = ways_of(subject, config.share, seeded(subject, seed))
    found = searched(systems, ways, opinions, config, seed)
    candidates = unit(held_out.some(N_CANDIDATES))
    has = subject.has(opinions.feature, candidates)
    pair = {name: models[name] for name in ("base", "unlearned")}
    for kind, some in (("with", candidates[has]), ("without", candidates[~has])):
        targets = some[: config.inversion.n_targets]
        for name, model in pair.items() if len(targets) else ():
            z, errors = inverted(subject, model, targets, ways[-1], config.inversion, seed)
            _, drawn = opinions.ask(subject.pictures(model, z))
            found[f"error_{kind}_{name}"] = float(errors.mean())
            found[f"drawn_{kind}_{name}"] = float(drawn.float().mean())
    # The last ones, so that none of them is a target as well.
    pictures = candidates[has][-config.relearning.n_pictures :]
    for name, model in models.items() if len(pictures) else ():
        shares = relearned(opinions, model, pictures, ways[-1], config, seed)
        for step, share in zip(config.relearning.steps, shares, strict=True):
            found[f"relearned_{step}_{name}"] = share
    return found


def models_of(subject: Subject, config: Config, seed: int) -> tuple[dict[str, nn.Module], Feature]:
    """Return f and what a user's marks make of it, and the feature as found from them.

    ``other`` has unlearned the second feature instead, from marks of its own.
    """
    found, models = [], {"base": subject.model}
    for name, feature in zip(("unlearned", "other"), config.features, strict=True):
        user = marked_by_user(subject, feature, config.clicks, config.error_rate, seed)
        found.append(feature_of(user, config.normalise, config.percentile))
        models[name], _ = unlearned_model(subject, found[-1:], config.unlearning, seed)
        if name == "unlearned":
            unmarked = user.images[user.marks.negatives]
            models["tuned"] = tune(subject, unmarked, config.tuning, seeded(subject, seed))
    return models, found[0]


def searched(
    systems: dict[str, System], ways: list[Way], opinions: Opinions, config: Config, seed: int
) -> dict[str, float | np.ndarray]:
    """Search all systems in all ways, from the same starts; ``climb`` is the success by step."""
    found, first = {}, ways[0]
    is_ruled = opinions.second_judge is None

    def keep(way: str, name: str, steps: list, where: Way) -> None:
        result = outcome(steps[-1][0], systems[name], where, opinions, config.n_shown)
        never = result["steps"] < 0
        waited = np.where(never, len(steps), result["steps"])
        found[f"pictures_{way}_{name}"] = result["pictures"]
        found[f"climb_{way}_{name}"] = np.array([t["success"] for _, t in steps], np.float32)
        numbers = {"claimed": result["claimed"], "success": result["success"]}
        for quantity, values in (
            numbers | {"distance": result["distance"], "steps": waited}
        ).items():
            found[f"{quantity}_{way}_{name}"] = float(values.mean())

    for name, system in systems.items():
        for way, both in [(w, is_ruled) for w in ways] + ([(first, False)] if is_ruled else []):
            starts = way.draw(config.n_starts, seeded(opinions.subject, seed))
            margins = margins_of(system, way, opinions, both)
            steps = list(search(margins, way.prior, starts, config.lr, config.steps, way.inside))
            keep(way.name if both == is_ruled else "naive", name, steps, way)
        margins = margins_of(system, first, opinions, is_ruled)
        for way, n, tries in (
            ("random", config.n_starts, config.steps),
            ("sample", config.relearning.n_samples, 0),
        ):
            generator = seeded(opinions.subject, LATENTS_SEED + seed)
            keep(way, name, list(random_search(margins, first.draw, n, tries, generator)), first)
    return found


def inverted(
    subject: Subject, model: nn.Module, targets: Tensor, way: Way, config: Inversion, seed: int
) -> tuple[Tensor, Tensor]:
    """Search the latents that draw ``targets``, pictures in [0, 1]; return them and their errors.

    A VAE's first round starts from what its encoder says; its latents, like styles, may be far from
    the prior.
    """
    starts = way.draw(config.rounds * len(targets), seeded(subject, seed))
    if not subject.is_gan:
        with torch.no_grad():
            starts[: len(targets)] = model.encode(targets)[0]
    decode = partial(pixels, subject, model)
    return invert(decode, targets, way.prior, starts, config.lr, config.steps, inside=False)


def relearned(
    opinions: Opinions, model: nn.Module, pictures: Tensor, way: Way, config: Config, seed: int
) -> list[float]:
    """Fine-tune a copy of a model on ``pictures``; return the share with the feature, by step.

    A VAE has its ELBO. A GAN's generator learns to draw the pictures from the latents where it
    comes nearest to them as it is.
    """
    subject, plan = opinions.subject, config.relearning
    generator, loss, data = seeded(subject, seed), negative_elbo, pictures
    if subject.is_gan:
        latents, _ = inverted(subject, model, pictures, way, config.inversion, seed)
        loss = pairs_loss(partial(pixels, subject), latents, pictures)
        data = torch.arange(len(pictures), device=subject.device)
    z = subject.draw_samples(plan.n_samples, seeded(subject, LATENTS_SEED))
    start, shares = copy.deepcopy(model).requires_grad_(True), []
    steps = relearn(start, loss, data, generator, plan.lr, plan.batch, max(plan.steps))
    for taught, terms in steps:
        if terms["step"] in plan.steps:
            shares.append(float(opinions.ask(subject.pictures(taught, z))[1].float().mean()))
    return shares


def pixels(subject: Subject, model: nn.Module, z: Tensor) -> Tensor:
    """Return the pictures of latents, 0 to 1 but not cut off, so that no pixel lacks a gradient."""
    low, high = subject.value_range
    return (subject.decode(model, z) - low) / (high - low)


def seeded(subject: Subject, seed: int) -> torch.Generator:
    """Return a generator on the subject's device."""
    return torch.Generator(subject.device).manual_seed(seed)


class Rows:
    """Name the unit, the judges and the number of pictures of each row."""

    def __init__(self, config: Config, source: str, run: Run):
        self.config, self.source, self.run = config, source, run

    def add(self, quantity: str, values: Sequence[float], n: int | None = None) -> None:
        """Add a row of one value a seed, or one of all."""
        config, word, way = self.config, *quantity.split("_")[:2]
        units = {"distance": "standard deviations", "steps": "steps", "error": "rms a pixel"}
        sizes = {
            "error": config.inversion.n_targets,
            "drawn": config.inversion.n_targets,
            "relearned": config.relearning.n_samples,
        }
        if way == "sample":
            sizes[word] = config.relearning.n_samples
        judges = f"{'ruler, ' if config.second_judge is None else ''}{config.judge}"
        judged = word not in ("distance", "error")
        self.run.row(
            quantity,
            values,
            n_samples=n or sizes.get(word, config.n_starts),
            unit=units.get(word, "share"),
            data=self.source if word in ("error", "drawn") else "pictures of the models",
            seeds=config.seeds[: len(values)],
            feature_extractor=judges if judged else None,
        )
