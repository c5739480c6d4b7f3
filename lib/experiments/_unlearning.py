"""What the experiments with Feature Unlearning share: a base model, its features, and its users.

A :class:`Subject` is a base model with the features it may lose. Thickness and slant of digits are
measured by a ruler, and as in the paper the top 10% of the training data have the feature; the
other features are attributes that a judge of faces sees, by a logit of at least 0. A feature has
one differentiable score, and a picture has it where the score is at least 0.
"""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from lib.checkpoints import load_checkpoint
from lib.experiments._digits import Digits
from lib.experiments._latents import DIGITS, as_floats, seen_by
from lib.methods.feature_unlearning import (
    Feature,
    UnlearningSettings,
    find_feature,
    join_layers,
    split_layers,
    unlearn,
)
from lib.methods.selection import Marks, simulated_user
from lib.metrics.fidelity import extract_features
from lib.metrics.image_features import slant, stroke_width, top_threshold
from lib.models.classifier import DigitJudge, FaceCNN, predict_logits
from lib.models.conv_vae import ConvVAE
from lib.models.gan import StyleGenerator
from lib.models.stylegan2 import StyleGAN2, load_stylegan2, to_port

RULERS = {"thick": stroke_width, "left_slant": lambda images: -slant(images)}
UNITS = {"thick": "pixels", "left_slant": "degrees"}  # of scores; those of attributes are logits
TOP_SHARE = 0.1
SPACES = ("z", "w", "layers")
CHUNK = 500
CHUNK_PIXELS = CHUNK * 64**2  # larger pictures are decoded in smaller chunks
MARKS_SEED = 7000  # plus a user's seed, so that nobody marks what is trained on


@dataclass(frozen=True, kw_only=True)
class SubjectConfig:
    """A base model and its features.

    ``base`` is a checkpoint, or a file of StyleGAN2 in ``$BOOK_DATA`` whose name ends in .pt, or
    ``random_vae``, ``random_gan`` or ``random_stylegan2`` for an untrained one. ``space`` is
    where latents live: ``z``, or of a GAN ``w`` or ``layers``, one style w a resolution.
    ``features`` are names of ``RULERS``, or attributes that the ``judge`` knows; its opinion on
    everything else is what should be kept, and its features are those of Fréchet distances.
    ``held_out`` is the split of ``data`` that samples are compared with. ``n_shown`` pictures are
    kept for a figure, with 0 no picture at all.
    """

    data: str
    size: int
    held_out: str
    base: str
    space: str
    judge: str
    features: tuple[str, ...]
    n_shown: int = 0

    def __post_init__(self):
        if self.space not in SPACES:
            raise ValueError(f"The latent space {self.space!r} is unknown; choose from {SPACES}")
        if self.n_shown and self.base.endswith(".pt"):
            raise ValueError(
                f"n_shown is {self.n_shown}, wanted 0 for {self.base}: what looks like a "
                "photograph of a person is not kept"
            )


@dataclass(frozen=True)
class Subject:
    """A base model, ready to be asked: latents, pictures, and who has which feature.

    ``model`` is f, in evaluation mode on its device; no method changes it. ``limits`` hold the
    measure from which on a picture has the feature, by its name. ``judge`` sees what else is in a
    picture, and ``judge_name`` is its checkpoint.
    """

    model: nn.Module
    space: str
    judge: nn.Module
    judge_name: str
    limits: Mapping[str, float]

    @property
    def device(self) -> torch.device:
        """Return the device of the model; generators must live there."""
        return next(self.model.parameters()).device

    @property
    def is_gan(self) -> bool:
        """Say whether the model is a GAN's generator, with pixels in [-1, 1] that may overshoot."""
        return isinstance(self.model, StyleGenerator)

    @property
    def value_range(self) -> tuple[float, float]:
        """Return the range of what :meth:`decode` returns."""
        return (-1.0, 1.0) if self.is_gan else (0.0, 1.0)

    @torch.no_grad()
    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw latents (n, dim) of the chosen space, to mark and to train on.

        In the space ``layers`` every resolution has a style of its own, which the model was not
        trained on; see :meth:`draw_samples`.
        """
        z = self.model.draw_latents(n, generator)
        if self.space == "z":
            return z
        if self.space == "w":
            return self.model.mapping(z)
        others = [self.model.draw_latents(n, generator) for _ in range(self.model.n_levels - 1)]
        return join_layers([self.model.mapping(each) for each in (z, *others)])

    @torch.no_grad()
    def draw_samples(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw latents (n, dim) as the model samples: with one style for all resolutions."""
        if self.space != "layers":
            return self.draw(n, generator)
        w = self.model.mapping(self.model.draw_latents(n, generator))
        return join_layers([w] * self.model.n_levels)

    def decode(self, model: nn.Module, z: Tensor) -> Tensor:
        """Return the pictures (n, channels, height, width) of latents in :attr:`value_range`.

        ``model`` is f or a copy of it, such as an unlearned g; gradients flow. A GAN's noise is
        its fixed one. Styles w are those of f's mapping, which unlearning in w leaves as it is.
        """
        if not self.is_gan:
            return model.decode(z)
        if self.space == "z":
            return model(z)
        if self.space == "w":
            return model.synthesis(z)
        levels = split_layers(z, [model.latent_dim] * model.n_levels)
        return model.synthesis(torch.stack(levels, dim=1))

    def to_unit(self, decoded: Tensor) -> Tensor:
        """Move what :meth:`decode` returns to [0, 1], cut off there; gradients flow inside."""
        low, high = self.value_range
        return ((decoded - low) / (high - low)).clamp(0.0, 1.0)

    @torch.no_grad()
    def pictures(self, model: nn.Module, z: Tensor) -> Tensor:
        """Return the pictures of latents as floats in [0, 1], without gradients, in chunks."""
        chunk = min(CHUNK, max(1, CHUNK_PIXELS // self.model.image_shape[1] ** 2))
        return torch.cat([self.to_unit(self.decode(model, part)) for part in z.split(chunk)])

    def score(self, name: str, images: Tensor) -> Tensor:
        """Return how much of a feature each picture has, at least 0 for those that have it.

        Differentiable; pixels (thick), degrees (left_slant) or a logit, minus the limit. It is nan
        for an empty picture, which has no feature.

        Shapes: ``images`` (n, channels, height, width), floats in [0, 1]; returns (n,).
        Raises: ValueError if the feature is unknown.
        """
        if name not in self.limits:
            raise ValueError(f"There is no feature {name!r}; there are {', '.join(self.limits)}.")
        if name in RULERS:
            return RULERS[name](images) - self.limits[name]
        logits = self.judge(seen_by(self.judge, images))
        return logits[:, self.judge.names.index(name)] - self.limits[name]

    @torch.no_grad()
    def scores(self, name: str, images: Tensor) -> Tensor:
        """Return :meth:`score` without gradients, in chunks; uint8 pictures are welcome too."""
        return torch.cat([self.score(name, as_floats(part)) for part in images.split(CHUNK)])

    def has(self, name: str, images: Tensor) -> Tensor:
        """Say for each picture (uint8, or floats in [0, 1]) whether it has the feature: (n,)."""
        return self.scores(name, images) >= 0

    @torch.no_grad()
    def opinion(self, name: str, images: Tensor) -> Tensor:
        """Return what the judge says of everything but the feature, as whole numbers (n, k).

        Of digits it is the class, of faces whether each of the other attributes is there.
        """
        logits = predict_logits(self.judge, seen_by(self.judge, images))
        if isinstance(self.judge, DigitJudge):
            return logits.argmax(1, keepdim=True)
        others = [i for i, other in enumerate(self.judge.names) if other != name]
        return (logits[:, others] >= 0).long()

    def seen(self, images: Tensor) -> tuple[Tensor, str]:
        """Return the judge's features (n, d) of pictures, and the name of the extractor."""
        shown = seen_by(self.judge, images)
        return extract_features(self.judge, shown, self.judge_name)


def load_subject(config: SubjectConfig, device: torch.device) -> Subject:
    """Load the base and the judge, and measure on the training data where its top 10% begin.

    An untrained base draws no feature, so the limits of one are the medians of its own samples.
    Raises: ValueError if the judge does not know a feature, or a VAE is to have styles.
    """
    model = load_base(config).to(device).eval().requires_grad_(False)
    if config.judge == "random":
        names = (*config.features, "another")
        judge = FaceCNN(len(names), model.image_shape, names)
    else:
        judge = load_checkpoint(config.judge)
    judge = judge.to(device).eval().requires_grad_(False)
    if config.space != "z" and not isinstance(model, StyleGenerator):
        raise ValueError(f"{config.base} has no styles, so its latent space is z.")
    for name in config.features:
        if name not in RULERS and name not in getattr(judge, "names", ()):
            known = (*RULERS, *getattr(judge, "names", ()))
            raise ValueError(f"There is no feature {name!r}; choose from {', '.join(known)}.")
    limits = dict.fromkeys(config.features, 0.0)
    subject = Subject(model, config.space, judge, config.judge, limits)
    ruled = [name for name in config.features if name in RULERS]
    if config.base.startswith("random"):
        z = subject.draw(64, torch.Generator(device).manual_seed(0))
        images = subject.pictures(model, z)
        limits = {name: float(subject.scores(name, images).median()) for name in limits}
    elif ruled:
        train = Digits.load(config.data, "train", config.size, device).images
        limits |= {name: top_threshold(subject.scores(name, train), TOP_SHARE) for name in ruled}
    return replace(subject, limits=limits)


def load_base(config: SubjectConfig) -> nn.Module:
    """Load the base, or build an untrained one; that of StyleGAN2 goes through a file as well."""
    if config.base.endswith(".pt"):
        return load_stylegan2(Path(os.environ.get("BOOK_DATA", "no BOOK_DATA")) / config.base)
    if not config.base.startswith("random"):
        return load_checkpoint(config.base)
    kinds = {"random_gan": StyleGenerator, "random_stylegan2": StyleGAN2}
    shape = (1 if config.data in DIGITS else 3, config.size, config.size)
    model = kinds.get(config.base, ConvVAE)(shape, (8, 8), 4)
    if not isinstance(model, StyleGAN2):
        return model
    with TemporaryDirectory() as folder:
        path = Path(folder) / "untrained.pt"
        torch.save({"g_ema": to_port(model)}, path)
        return load_stylegan2(path)


@dataclass(frozen=True)
class Marked:
    """What a simulated user saw, and marked: latents (n, dim), pictures, truth (n,) and marks."""

    z: Tensor
    images: Tensor
    truth: Tensor
    marks: Marks

    @property
    def is_enough(self) -> bool:
        """Say whether there are at least two pictures of either kind, to make a vector from."""
        return min(len(self.marks.positives), len(self.marks.negatives)) >= 2


def marked_by_user(
    subject: Subject, name: str, n_pictures: int, error_rate: float, seed: int
) -> Marked:
    """Let a simulated user, who asks the subject's score, mark fresh samples of the base."""
    generator = torch.Generator(subject.device).manual_seed(MARKS_SEED + seed)
    z = subject.draw(n_pictures, generator)
    images = subject.pictures(subject.model, z)
    truth = subject.has(name, images)
    return Marked(z, images, truth, simulated_user(truth, n_pictures, error_rate, generator))


def feature_of(
    marked: Marked, normalise: bool, percentile: float | None = None, balanced: bool = False
) -> Feature:
    """Return the target vector and threshold; ``balanced`` uses as many unmarked as marked."""
    positive, negative = marked.marks.split(marked.z)
    if balanced:
        n = min(len(positive), len(negative))
        positive, negative = positive[:n], negative[:n]
    return find_feature(positive, negative, normalise, percentile)


def unlearned_model(
    subject: Subject, features: Sequence[Feature], settings: UnlearningSettings, seed: int
) -> tuple[nn.Module, list[dict[str, float]]]:
    """Unlearn to the last step; return a copy g of the base, and the terms before every step."""
    settings = replace(settings, value_range=subject.value_range)
    generator = torch.Generator(subject.device).manual_seed(seed)
    base = copy.deepcopy(subject.model).requires_grad_(True)
    steps = list(unlearn(base, subject.decode, subject.draw, features, settings, generator))
    unlearned, _ = steps[-1]
    return unlearned.requires_grad_(False), [terms for _, terms in steps]


def trivial_pictures(subject: Subject, n: int, seed: int = 0) -> dict[str, Tensor]:
    """Return pictures that show nothing: ``n`` of noise, and one each of flat grey and black.

    Black is a digit's paper. Whoever sees a feature in them sees more than is there.
    """
    shape, device = tuple(subject.model.image_shape), subject.device
    generator = torch.Generator(device).manual_seed(seed)
    return {
        "noise": torch.rand(n, *shape, generator=generator, device=device),
        "grey": torch.full((1, *shape), 0.5, device=device),
        "black": torch.zeros(1, *shape, device=device),
    }


def as_uint8(images: Tensor):
    """Turn pictures in [0, 1] into uint8 numpy (n, height, width, channels) for a figure."""
    levels = (255 * images).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()
