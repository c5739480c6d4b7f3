"""Unlearn one feature in many ways: what alpha, the threshold, the losses and the clicks matter.

All variants are measured on the same latents, have the same batches and, but for the users, the
same marks; each changes one thing of the default. Quantities end in the variant's name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
import torch
from torch import Tensor

from lib.experiments._latents import Pictures
from lib.experiments._unlearning import (
    UNITS,
    Marked,
    Subject,
    SubjectConfig,
    as_uint8,
    feature_of,
    load_subject,
    marked_by_user,
    unlearned_model,
)
from lib.experiments._unlearning_measures import Yardstick
from lib.methods.feature_unlearning import LOSSES, Feature, UnlearningSettings, target_vector
from lib.methods.selection import simulated_users
from lib.run import Run

LATENTS_SEED = 1000  # of the latents that everything is measured on
QUANTITIES = {
    "share_after": "share",
    "share_after_forget": "share",
    "share_edited": "share",
    "beyond": "share",
    "beyond_forget": "share",
    "pixels_rest": "mean absolute difference, range 1",
    "pixels_bystanders": "mean absolute difference, range 1",
    "kept_rest": "share",
    "kept_bystanders": "share",
    "moved_forget": None,  # in the unit of the feature
    "moved_bystanders": None,
    "frechet": "Fréchet distance",
    "frechet_free_ratio": "ratio",
    "sharpness": "ratio",
    "length": "of the space's unit",
    "cosine": "cosine",
}


@dataclass(frozen=True, kw_only=True)
class Config(SubjectConfig):
    """A subject with one feature, the values to compare, and the size of the measurements.

    ``clicks`` are the numbers of pictures that users see, the last the default, and
    ``error_rates`` the shares that they get wrong, the first the default. ``spaces`` are compared
    with the default one. The default alpha is that of ``unlearning``.
    """

    clicks: tuple[int, ...]
    error_rates: tuple[float, ...]
    alphas: tuple[float, ...]
    percentiles: tuple[float, ...]
    spaces: tuple[str, ...]
    unlearning: UnlearningSettings
    n_samples: int
    seed: int

    def __post_init__(self):
        super().__post_init__()
        if len(self.features) != 1 or self.unlearning.alpha not in self.alphas:
            raise ValueError(
                f"there are {len(self.features)} features and alpha {self.unlearning.alpha:g}, "
                f"wanted one feature and a default alpha among {list(self.alphas)}"
            )


@dataclass(frozen=True)
class Variant:
    """What one variant changes: the settings of the training, or how the feature is found."""

    settings: Mapping = field(default_factory=dict)
    normalise: bool = True
    percentile: float | None = None
    balanced: bool = False
    user: tuple[int, float] | None = None
    space: str | None = None


def variants(config: Config) -> dict[str, Variant]:
    """Return the variants by name, ``default`` first and those of the users last."""
    found = {"default": Variant()}
    for alpha in config.alphas:
        if alpha != config.unlearning.alpha:
            found[name_of("alpha", alpha)] = Variant({"alpha": alpha})
    for percentile in config.percentiles:
        found[name_of("percentile", percentile)] = Variant(percentile=percentile)
    found["balanced"] = Variant(balanced=True)
    found["as_printed"] = Variant(normalise=False)
    for loss in LOSSES:
        found[f"no_{loss}"] = Variant({"without": (loss,)})
    for space in config.spaces:
        found[f"space_{space}"] = Variant(space=space)
    for user in product(config.clicks, config.error_rates):
        if user != (config.clicks[-1], config.error_rates[0]):
            found[name_of("clicks", user[0]) + name_of("_error", user[1])] = Variant(user=user)
    return found


def name_of(what: str, number: float) -> str:
    """Return a name that rules of verdicts can read, such as ``alpha_0_1``."""
    return f"{what}_{number:g}".replace(".", "_")


def run(config: Config, run: Run) -> None:
    """Unlearn in every variant whose user marked enough, and compare them."""
    bench = Bench(config, run.device)
    yardstick, (name,) = bench.yardsticks[config.space], config.features
    report_base(bench, run)
    parts = {}
    for variant_name, variant in variants(config).items():
        user = bench.user(variant)
        if user.is_enough:
            parts[variant_name] = run.part(
                variant_name, lambda variant=variant, user=user: bench.measure(variant, user)
            )
    for variant_name, part in parts.items():
        of_user = variant_name.startswith("clicks")
        for quantity, unit in QUANTITIES.items():
            if not np.isfinite(part[quantity]):
                continue
            is_distance = quantity.startswith("frechet")
            run.row(
                f"{quantity}_{variant_name}",
                float(part[quantity]),
                n_samples=config.n_samples,
                unit=unit or UNITS.get(name, "logits"),
                data=yardstick.source if is_distance else "samples",
                seeds=[config.seed],
                feature_extractor=yardstick.extractor if is_distance else None,
                preprocessing="simulated user" if of_user else None,
            )
    shown = {key: part["pictures"] for key, part in parts.items() if not key.startswith("clicks")}
    sliders = {
        alpha: "default" if alpha == config.unlearning.alpha else name_of("alpha", alpha)
        for alpha in config.alphas
    }
    if not parts:
        return
    run.arrays(
        base=as_uint8(yardstick.before[: config.n_shown]),
        pictures=np.stack(list(shown.values())),
        pictures_of=np.array(list(shown)),
        alpha=np.array(config.alphas),
        alpha_pictures=np.stack([shown[key] for key in sliders.values()]),
        clicks=np.array(config.clicks),
        error_rates=np.array(config.error_rates),
        **by_user(config, parts),
    )


class Bench:
    """A subject in each of the spaces, its yardstick there, and the users who mark its samples."""

    def __init__(self, config: Config, device: torch.device):
        self.config = config
        subject = load_subject(config, device)
        held_out = Pictures.load(config.data, config.held_out, config.size, device)
        self.yardsticks: dict[str, Yardstick] = {}
        self.users: dict[str, dict[tuple[int, float], Marked]] = {}
        for space in (config.space, *config.spaces):
            here = replace(subject, space=space)
            self.yardsticks[space] = Yardstick(here, held_out, config.n_samples, LATENTS_SEED)
            self.users[space] = self.all_users(here)

    def all_users(self, subject: Subject) -> dict[tuple[int, float], Marked]:
        """Return what each user marked, by number of pictures and error rate; all see the same."""
        config = self.config
        seen = marked_by_user(subject, config.features[0], max(config.clicks), 0.0, config.seed)
        users = simulated_users(
            seen.truth, tuple(config.clicks), tuple(config.error_rates), config.seed
        )
        return {(n, error): replace(seen, marks=marks) for n, error, marks in users}

    def user(self, variant: Variant) -> Marked:
        """Return what the variant's user marked."""
        default = (self.config.clicks[-1], self.config.error_rates[0])
        return self.users[variant.space or self.config.space][variant.user or default]

    def measure(self, variant: Variant, user: Marked) -> dict[str, float | np.ndarray]:
        """Unlearn as the variant says; return ``QUANTITIES`` and pictures of the first latents."""
        config = self.config
        space, (name,) = variant.space or config.space, config.features
        yardstick = self.yardsticks[space]
        subject = yardstick.subject
        feature = feature_of(user, variant.normalise, variant.percentile, variant.balanced)
        settings = replace(config.unlearning, **variant.settings)
        unlearned, _ = unlearned_model(subject, [feature], settings, config.seed)
        after = subject.pictures(unlearned, yardstick.z)
        edited, changed = yardstick.edited(feature)
        found = yardstick.compare(name, feature, after)
        found |= {
            "share_edited": float(subject.has(name, edited).float().mean()),
            "sharpness": float(roughness(after[changed]) / roughness(edited[changed])),
            "length": float(target_vector(*user.marks.split(user.z), normalise=False).norm()),
            "cosine": self.cosine(feature) if space == config.space else np.nan,
        }
        numbers = {quantity: found[quantity] for quantity in QUANTITIES}
        return numbers | {"pictures": as_uint8(after[: config.n_shown])}

    def cosine(self, feature: Feature) -> float:
        """Compare a target vector's direction with that of the default user."""
        default = feature_of(self.user(Variant()), normalise=True)
        return float(torch.cosine_similarity(feature.z_e, default.z_e, dim=0))


def roughness(images: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbouring pixels, which blur makes smaller."""
    return (images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()) / 2


def by_user(config: Config, parts: Mapping[str, Mapping]) -> dict[str, np.ndarray]:
    """Return tables (numbers of pictures, error rates), nan where a user marked too little."""
    tables = {}
    default = (config.clicks[-1], config.error_rates[0])
    for quantity in ("share_after", "beyond", "cosine", "frechet_free_ratio", "kept_rest"):
        table = np.full((len(config.clicks), len(config.error_rates)), np.nan)
        for (i, n), (j, error) in product(enumerate(config.clicks), enumerate(config.error_rates)):
            key = name_of("clicks", n) + name_of("_error", error)
            key = "default" if (n, error) == default else key
            if key in parts:
                table[i, j] = parts[key][quantity]
        tables[f"users_{quantity}"] = table
    return tables


def report_base(bench: Bench, run: Run) -> None:
    """Add the rows on the base: its share of the feature, its distance, and who marked what."""
    config = bench.config
    yardstick, (name,) = bench.yardsticks[config.space], config.features
    about = {"seeds": [config.seed], "n_samples": config.n_samples}
    found = yardstick.distances(name, yardstick.before)
    run.row("share_base", found["share_after"], unit="share", data="samples", **about)
    run.row(
        "frechet_base",
        found["frechet"],
        unit="Fréchet distance",
        data=yardstick.source,
        feature_extractor=yardstick.extractor,
        **about,
    )
    user = bench.user(Variant())
    about = {"seeds": [config.seed], "n_samples": len(user.truth), "unit": "pictures"}
    run.row("marked", len(user.marks.positives), data="samples", **about)
