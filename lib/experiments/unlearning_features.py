"""Unlearn features of a GAN or a VAE from a simulated user's marks, and see what else changes.

Every feature is unlearned by itself from each seed's marks and batches, and once two of them
together. Beside it stand, with the same latents, the edit at sampling time that the unlearning
copies and fine-tuning on what the user did not mark (the first seed only), and with other latents
rejection. A quantity without the name of a way is that of the unlearned model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lib.experiments._latents import Pictures, load_judge
from lib.experiments._unlearning import (
    UNITS,
    Marked,
    SubjectConfig,
    as_uint8,
    feature_of,
    load_subject,
    marked_by_user,
    trivial_pictures,
    unlearned_model,
)
from lib.experiments._unlearning_measures import Yardstick
from lib.experiments._unlearning_tuning import Tuning, tune
from lib.methods.feature_baselines import latent_rejection
from lib.methods.feature_unlearning import Feature, UnlearningSettings
from lib.run import Run

LATENTS_SEED = 1000  # of the latents that everything is measured on
N_SEEN = 60  # pictures of the first user that are kept for a figure


@dataclass(frozen=True, kw_only=True)
class Config(SubjectConfig):
    """A subject, its users, and what is measured on ``n_samples`` latents.

    A user sees ``clicks`` samples and gets the share ``error_rate`` of them wrong. ``percentile``
    null is the paper's threshold, the mean. ``joint`` names two features to unlearn together.
    ``n_trivial`` pictures of noise are judged. ``scorer`` is a classifier for an inception-type
    score, null for none.
    """

    clicks: int
    error_rate: float
    normalise: bool
    percentile: float | None
    joint: tuple[str, ...]
    unlearning: UnlearningSettings
    tuning: Tuning
    scorer: str | None
    n_samples: int
    n_trivial: int
    seeds: tuple[int, ...]

    def __post_init__(self):
        super().__post_init__()
        known = set(self.joint) <= set(self.features)
        if self.joint and not (known and len(set(self.joint)) == 2):
            raise ValueError(f"joint is {list(self.joint)}, wanted none or two of the features")


def run(config: Config, run: Run) -> None:
    """Unlearn each feature that samples of the base have; measure before, after, and beside."""
    subject = load_subject(config, run.device)
    held_out = Pictures.load(config.data, config.held_out, config.size, run.device)
    shape = subject.model.image_shape
    scorer = None if config.scorer is None else load_judge(config.scorer, shape, run.device)
    yardstick = Yardstick(subject, held_out, config.n_samples, LATENTS_SEED, scorer)
    report = Report(config, yardstick, run)
    report.base()
    shown = {"base": as_uint8(yardstick.before[: config.n_shown])}
    found: dict[str, Feature] = {}
    for name in config.features:
        report.of_feature(name)
        users = [
            marked_by_user(subject, name, config.clicks, config.error_rate, seed)
            for seed in config.seeds
        ]
        shown |= seen_by_user(users[0], name) if config.n_shown else {}
        n_marked = [len(user.marks.positives) for user in users]
        report.row("marked", name, n_marked, "pictures", n=config.clicks)
        if not all(user.is_enough for user in users):
            continue  # what the base does not draw cannot be marked
        features = [feature_of(user, config.normalise, config.percentile) for user in users]
        found[name] = features[0]
        parts = []
        for seed, feature in zip(config.seeds, features, strict=True):
            first = seed == config.seeds[0]

            def compute(name=name, seed=seed, feature=feature, first=first):
                return one_unlearning(yardstick, config, name, feature, seed, first)

            parts.append(run.part(f"{name}-{seed}", compute))
        report.unlearned(name, "", parts)
        beside = run.part(
            f"{name}-beside",
            lambda name=name, user=users[0]: besides(yardstick, config, name, found[name], user),
        )
        for way in ("edited", "tuned", "rejected", "fresh"):
            report.unlearned(name, way, [behind(way, beside)])
        shown |= {f"{k}_{name}": v for k, v in (parts[0] | beside).items() if v.ndim}
    if config.joint and set(config.joint) <= set(found):
        pair = [found[name] for name in config.joint]
        both = run.part("joint", lambda: together(yardstick, config, pair))
        for name in config.joint:
            report.unlearned(name, "joint", [behind(name, both)])
        shown["joint"] = both["joint"]
    run.arrays(**shown)


def one_unlearning(
    yardstick: Yardstick, config: Config, name: str, feature: Feature, seed: int, keep: bool
) -> dict[str, float | np.ndarray]:
    """Unlearn one feature and compare; with ``keep`` the pictures for figures come along."""
    subject = yardstick.subject
    unlearned, history = unlearned_model(subject, [feature], config.unlearning, seed)
    after = subject.pictures(unlearned, yardstick.z)
    found = yardstick.compare(name, feature, after)
    if keep:
        found |= pictures_of(yardstick, config, name, after, "unlearned")
        loss = [[terms.get(key, math.nan) for terms in history] for key in ("total", "recon")]
        found["loss"] = np.array(loss, dtype=np.float32)
    return found


def besides(
    yardstick: Yardstick, config: Config, name: str, feature: Feature, user: Marked
) -> dict[str, float | np.ndarray]:
    """Measure the rivals of the unlearning, each quantity behind ``way/``.

    ``fresh`` is f itself with other latents: it says how much a ratio of distances tells.
    """
    subject, f = yardstick.subject, yardstick.subject.model
    device = subject.device

    def generator(seed: int) -> torch.Generator:
        return torch.Generator(device).manual_seed(seed)

    edited, _ = yardstick.edited(feature)
    negatives = user.images[user.marks.negatives]
    tuned = subject.pictures(tune(subject, negatives, config.tuning, generator(0)), yardstick.z)
    n = config.n_samples
    kept = latent_rejection(n, subject.draw_samples, [feature], generator(LATENTS_SEED + 1))
    other = subject.draw_samples(n, generator(LATENTS_SEED + 1))
    measured = {
        "edited": yardstick.compare(name, feature, edited),
        "tuned": yardstick.compare(name, feature, tuned),
        "rejected": yardstick.distances(name, subject.pictures(f, kept)),
        "fresh": yardstick.distances(name, subject.pictures(f, other)),
    }
    found = {f"{way}/{k}": v for way, values in measured.items() for k, v in values.items()}
    found |= pictures_of(yardstick, config, name, yardstick.before, "base")
    del found["base"]  # the same for all features
    return found | pictures_of(yardstick, config, name, edited, "edited")


def together(
    yardstick: Yardstick, config: Config, pair: Sequence[Feature]
) -> dict[str, float | np.ndarray]:
    """Unlearn two features in one training and measure each, behind ``name/``."""
    subject = yardstick.subject
    unlearned, _ = unlearned_model(subject, pair, config.unlearning, config.seeds[0])
    after = subject.pictures(unlearned, yardstick.z)
    found = {
        f"{name}/{k}": v
        for name, feature in zip(config.joint, pair, strict=True)
        for k, v in yardstick.compare(name, feature, after).items()
    }
    return found | {"joint": as_uint8(after[: config.n_shown])}


def behind(prefix: str, part: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the quantities behind ``prefix/``, without it."""
    whole = f"{prefix}/"
    return {k.removeprefix(whole): v for k, v in part.items() if k.startswith(whole)}


def pictures_of(
    yardstick: Yardstick, config: Config, name: str, images: Tensor, way: str
) -> dict[str, np.ndarray]:
    """Keep the first pictures, the first of latents whose picture has the feature, and scores."""
    forget = yardstick.subject.has(name, yardstick.before).nonzero()[: config.n_shown, 0]
    scores = yardstick.subject.scores(name, images)
    return {
        way: as_uint8(images[: config.n_shown]),
        f"forget_{way}": as_uint8(images[forget]),
        f"score_{way}": scores.cpu().numpy().astype(np.float16),
    }


def seen_by_user(user: Marked, name: str) -> dict[str, np.ndarray]:
    """Keep what the first user saw first, and whether it has the feature."""
    return {
        "seen": as_uint8(user.images[:N_SEEN]),
        f"seen_{name}": user.truth[:N_SEEN].cpu().numpy(),
    }


class Report:
    """Name and describe the rows."""

    def __init__(self, config: Config, yardstick: Yardstick, run: Run):
        self.config, self.yardstick, self.run = config, yardstick, run
        self.judge, self.extractor = config.judge, yardstick.extractor

    def row(
        self,
        quantity: str,
        name: str,
        values: float | Sequence[float],
        unit: str,
        n: int | None = None,
        data: str = "samples of the model",
        extractor: str | None = None,
    ) -> None:
        """Add the row ``quantity_name`` of one value a seed; one that is nan is left out."""
        numbers = np.atleast_1d(np.asarray(values, dtype=float))
        if not np.isfinite(numbers).all():
            return
        self.run.row(
            f"{quantity}_{name}",
            numbers,
            n_samples=n or self.config.n_samples,
            unit=unit,
            data=data,
            seeds=self.config.seeds[: len(numbers)],
            feature_extractor=extractor,
        )

    def base(self) -> None:
        """Say how close samples of the base are to held-out pictures, by the judge's features."""
        about = {"data": self.yardstick.source, "extractor": self.extractor}
        found = self.yardstick.distances(self.config.features[0], self.yardstick.before)
        self.row("frechet", "base", found["frechet"], "Fréchet distance", **about)
        if "inception_score" in found:
            score = found["inception_score"]
            self.row("inception_score", "base", score, "classes", extractor=self.config.scorer)

    def of_feature(self, name: str) -> None:
        """Report the share in samples of the base and in real pictures, and question the oracle."""
        subject, real = self.yardstick.subject, self.yardstick.real
        unit, oracle = UNITS.get(name, "logits"), self.oracle(name)
        self.row("limit", name, subject.limits[name], unit, extractor=oracle)
        share = subject.has(name, self.yardstick.before).float().mean()
        self.row("share_base", name, float(share), "share", extractor=oracle)
        share = subject.has(name, real).float().mean()
        about = {"n": len(real), "data": self.yardstick.source, "extractor": oracle}
        self.row("share_real", name, float(share), "share", **about)
        for kind, images in trivial_pictures(subject, self.config.n_trivial).items():
            share = subject.has(name, images).float().mean()
            about = {"n": len(images), "data": f"pictures of {kind}", "extractor": oracle}
            self.row(f"called_{kind}", name, float(share), "share", **about)

    def oracle(self, name: str) -> str:
        """Say who decides whether a picture has the feature."""
        return f"ruler {name}" if name in UNITS else self.judge

    def unlearned(self, name: str, way: str, parts: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Add a row for every number in the parts, one part a seed."""
        for quantity, value in parts[0].items():
            if value.ndim or (way and quantity.startswith(("size", "beyond"))):
                continue  # pictures; and what is the same for every way
            unit, extractor = self.about(quantity, name)
            self.row(
                f"{quantity}_{way}" if way else quantity,
                name,
                [float(part[quantity]) for part in parts],
                unit,
                data=self.yardstick.source if quantity.startswith("frechet") else "samples",
                extractor=extractor,
            )

    def about(self, quantity: str, name: str) -> tuple[str, str | None]:
        """Return unit and extractor of a quantity of ``Yardstick``."""
        if quantity.startswith("frechet_free_ratio"):
            return "ratio", self.extractor
        if quantity.startswith("frechet"):
            return "Fréchet distance", self.extractor
        if quantity.startswith("inception"):
            return "classes", self.config.scorer
        if quantity.startswith("pixels"):
            return "mean absolute difference, range 1", None
        if quantity.startswith("kept"):
            return "share", self.judge
        if quantity.startswith("moved"):
            return UNITS.get(name, "logits"), self.oracle(name)
        return "share", None if quantity == "beyond" else self.oracle(name)
