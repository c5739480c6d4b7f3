"""What the experiments with diffusion models share: models, samples, and how these are measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from lib.checkpoints import load_checkpoint
from lib.experiments._digits import Digits, unit
from lib.metrics import forgetting as metrics
from lib.metrics.fidelity import extract_features, frechet_distance, precision_recall
from lib.models.classifier import SmallCNN, predict_logits
from lib.models.ddpm import ConditionalDDPM, to_uint8
from lib.run import Run

SAMPLE_BATCH = 100
GRID_COLUMNS = 8


@dataclass(frozen=True)
class Sampling:
    """How a config samples: DDIM with ``guidance``, ``sample_steps`` and ``eta``."""

    guidance: float
    sample_steps: int
    eta: float


def load_base(name: str, device: torch.device) -> ConditionalDDPM:
    """Load a shipped diffusion model; ``random`` stands for a small untrained one of digits."""
    if name == "random":
        model = ConditionalDDPM((1, 28, 28), 10, (8, 8), patch=2)
    else:
        model = load_checkpoint(name)
    return model.to(device).eval()


def load_judge(name: str | None, device: torch.device) -> nn.Module | None:
    """Load a shipped judge; ``random`` stands for an untrained one of digits, None for none."""
    if name is None:
        return None
    judge = SmallCNN() if name == "random" else load_checkpoint(name)
    return judge.to(device).eval()


def arguments_of(model: ConditionalDDPM) -> dict:
    """Return the keyword arguments that build a model of this shape again."""
    net = model.unet.config
    sizes = [net.sample_size // 2**level for level in range(len(net.block_out_channels))]
    kinds = zip(sizes, net.down_block_types, strict=True)
    return {
        "image_shape": list(model.image_shape),
        "n_classes": model.n_classes,
        "channels": list(net.block_out_channels),
        "layers_per_block": net.layers_per_block,
        "attention": [size for size, kind in kinds if kind.startswith("Attn")],
        "groups": net.norm_num_groups,
        "dropout": net.dropout,
        "patch": model.patch,
        "n_steps": model.schedule.n_steps,
    }


def draw(
    model: ConditionalDDPM, c: Tensor, sampling: Sampling, generator: torch.Generator
) -> Tensor:
    """Draw a uint8 image of each class ``c``: (n,) to (n, *image_shape)."""
    options = sampling.guidance, sampling.sample_steps, generator, sampling.eta
    return torch.cat([to_uint8(model.sample(part, *options)) for part in c.split(SAMPLE_BATCH)])


def in_turn(classes: Sequence[int], a_class: int, device: torch.device) -> Tensor:
    """Return every class ``a_class`` times: first each of them once, then each again."""
    return torch.tensor(list(classes), device=device).repeat(a_class)


def stretch(images: Tensor) -> Tensor:
    """Stretch each uint8 image to run from black to white, as torchvision's ``normalize=True``.

    A flat image becomes black.
    """
    x = images.flatten(1).float()
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    levels = 255 * (x - low) / (high - low).clamp_min(1)
    return levels.round().to(torch.uint8).view_as(images)


def noise_distances(samples: Tensor) -> dict[str, float]:
    """Measure how near uint8 samples (n, channels, height, width) are to uniform noise.

    ``grey_distance`` is the mean distance to flat grey; it is 0.289 for uniform noise, and at least
    that for other noise that is black or white more often. ``uniform_distance`` is the Wasserstein
    distance between the levels of all pixels and the uniform distribution on [0, 1].
    ``neighbour_correlation`` is that of horizontal neighbours; pixels of noise do not know each
    other, so it is 0.
    """
    x = unit(samples)
    levels = x.flatten().sort().values
    ideal = (torch.arange(len(levels), device=x.device) + 0.5) / len(levels)
    left, right = x[..., :-1].flatten(), x[..., 1:].flatten()
    grey = torch.full_like(x[0], 0.5)
    return {
        "grey_distance": float(metrics.distance_to_image(x, grey).mean()),
        "uniform_distance": float((levels - ideal).abs().mean()),
        "neighbour_correlation": float(
            torch.corrcoef(torch.stack([left, right])).nan_to_num()[0, 1]
        ),
    }


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return Spearman's correlation of two rows of numbers."""
    return float(spearmanr(a, b).statistic)


def judged_class(judge: nn.Module, samples: Tensor, label: int) -> dict[str, float]:
    """Ask a judge what it thinks of uint8 samples of one class."""
    logits = predict_logits(judge, unit(samples))
    return {
        "prob": float(metrics.class_probability(logits, label).mean()),
        "entropy": float(metrics.predictive_entropy(logits).mean()),
    }


def judged_others(judge: nn.Module, samples: Tensor, c: Tensor) -> dict[str, float]:
    """Ask a judge whether it recognises uint8 samples of the classes ``c``."""
    logits = predict_logits(judge, unit(samples))
    return {
        "remember_prob": float(logits.softmax(1).gather(1, c[:, None]).mean()),
        "remember_accuracy": metrics.accuracy(logits, c),
    }


class RealImages:
    """Real images of some classes as a judge sees them, equally many a class.

    The Fréchet distance is to ``n_real`` training images a class. Precision and recall take as many
    training images as there are samples, ``n_samples`` a class, because both depend on the numbers.
    ``change`` is done to real images and samples alike.
    """

    def __init__(
        self,
        judge: nn.Module,
        name: str,
        train: Digits,
        classes: Sequence[int],
        n_real: int,
        n_samples: int,
        change: Callable[[Tensor], Tensor] = lambda images: images,
    ):
        self.judge, self.name, self.change = judge, name, change
        self.train, self.extractor = self._features(first_of_each(train, classes, n_real))
        self.as_many, _ = self._features(first_of_each(train, classes, n_samples))
        self.about = (
            f"against {n_real} training images a class; precision and recall against {n_samples}, "
            "k = 3"
        )

    def _features(self, images: Tensor) -> tuple[Tensor, str]:
        return extract_features(self.judge, self.change(images), self.name)

    def compare(self, samples: Tensor) -> dict[str, float]:
        """Return Fréchet distance, precision and recall of uint8 samples.

        ``swapped`` are what precision and recall become where the arguments are exchanged.
        """
        features, _ = self._features(samples)
        shares = precision_recall(self.as_many, features)
        swapped = precision_recall(features, self.as_many)
        return {
            "frechet": frechet_distance(self.train, features),
            "precision": shares.precision,
            "recall": shares.recall,
            "precision_swapped": swapped.precision,
            "recall_swapped": swapped.recall,
        }


OF_THE_CLASS = {
    "prob": "probability",
    "entropy": "nats",
    "prob_stretched": "probability",
    "entropy_stretched": "nats",
    "grey_distance": "rms a pixel",
    "uniform_distance": "levels in [0, 1]",
    "neighbour_correlation": "correlation",
}
OF_THE_OTHERS = {
    "remember_prob": "probability",
    "remember_accuracy": "share",
    "frechet": "Fréchet distance",
    "precision": "share",
    "recall": "share",
    "precision_swapped": "share",
    "recall_swapped": "share",
    "frechet_stretched": "Fréchet distance",
}
FIDELITY = ("frechet", "precision", "recall")


class Measured(Protocol):
    """What the measures need of a config."""

    judge: str | None
    data: str
    guidance: float
    sample_steps: int
    eta: float
    n_samples: int
    n_remember: int
    n_real: int


class Measures:
    """What is measured of a model: ``n_samples`` of one class, ``n_remember`` of each other.

    Without a judge only the samples of the class are, by their distance to noise. With ``probe``
    the same pictures are judged once more, each stretched from black to white, and precision and
    recall once more with their arguments exchanged.
    """

    def __init__(
        self,
        config: Measured,
        label: int,
        image_shape: Sequence[int],
        n_classes: int,
        run: Run,
        probe: bool = False,
    ):
        self.config, self.label, self.run, self.probe = config, label, run, probe
        self.others = [c for c in range(n_classes) if c != label]
        self.judge = load_judge(config.judge, run.device)
        if self.judge is None:
            return
        self.train, self.test = (
            Digits.load(config.data, split, image_shape[-1], run.device)
            for split in ("train", "test")
        )
        numbers = self.others, config.n_real, config.n_remember
        self.real = RealImages(self.judge, config.judge, self.train, *numbers)
        self.stretched = RealImages(self.judge, config.judge, self.train, *numbers, stretch)

    def of(self, model: ConditionalDDPM, seed: int) -> dict[str, float | np.ndarray]:
        """Draw and measure; ``grid`` holds the first samples of every class, uint8."""
        config, device = self.config, self.run.device
        generator = self.run.generator(1000 + seed)
        own = draw(model, torch.full((config.n_samples,), self.label), config, generator)
        found = noise_distances(own)
        if self.judge is not None:
            found |= judged_class(self.judge, own, self.label)
            c = in_turn(self.others, config.n_remember, device)
            samples = draw(model, c, config, generator)
            found |= judged_others(self.judge, samples, c)
            fidelity = self.real.compare(samples)
            found |= fidelity if self.probe else {k: fidelity[k] for k in FIDELITY}
        if self.judge is not None and self.probe:
            judged = judged_class(self.judge, stretch(own), self.label)
            judged["frechet"] = self.stretched.compare(samples)["frechet"]
            found |= {f"{name}_stretched": value for name, value in judged.items()}
        found["grid"] = sample_grid(model, config)
        return found

    def report(self, suffix: str, found: Sequence[dict[str, float]], seeds: Sequence[int]) -> None:
        """Write rows of what :meth:`of` found, one dictionary a seed."""
        for quantities, n in (
            (OF_THE_CLASS, self.config.n_samples),
            (OF_THE_OTHERS, self.config.n_remember * len(self.others)),
        ):
            for quantity in filter(found[0].__contains__, quantities):
                self._row(
                    f"{quantity}_{suffix}",
                    quantity,
                    [float(each[quantity]) for each in found],
                    n,
                    "samples of the model",
                    seeds,
                )

    def report_real(self) -> None:
        """Write what real test images get, and what the judge says of black and white noise."""
        if self.judge is None:
            return
        test = first_of_each(self.test, self.others, self.config.n_remember)
        for quantity, value in self.real.compare(test).items():
            if quantity in FIDELITY:
                name = f"{quantity}_real"
                self._row(
                    name, quantity, [value], len(test), f"test images of {self.test.source}", [0]
                )
        shape = (self.config.n_samples, *test.shape[1:])
        coins = torch.rand(shape, generator=self.run.generator(0), device=test.device) < 0.5
        judged = judged_class(self.judge, 255 * coins.to(torch.uint8), self.label)
        for quantity, value in judged.items():
            name = f"{quantity}_binary_noise"
            self._row(name, quantity, [value], len(coins), "pixels black or white by chance", [0])

    def _row(self, name, quantity, values, n_samples, data, seeds) -> None:
        of_pixels = quantity in ("grey_distance", "uniform_distance", "neighbour_correlation")
        extractor, preprocessing = None if of_pixels else self.config.judge, None
        if quantity.startswith(("frechet", "precision", "recall")):
            extractor, preprocessing = self.real.extractor, self.real.about
        if quantity.endswith("_stretched"):
            stretching = "each picture from black to white"
            preprocessing = "; ".join(filter(None, (stretching, preprocessing)))
        self.run.row(
            name,
            values,
            n_samples=n_samples,
            unit=(OF_THE_CLASS | OF_THE_OTHERS)[quantity],
            data=data,
            seeds=seeds,
            feature_extractor=extractor,
            preprocessing=preprocessing,
        )


def sample_grid(model: ConditionalDDPM, sampling: Sampling, seed: int = 0) -> np.ndarray:
    """Return samples of every class from one fixed noise, uint8 (n_classes, columns, h, w, ...).

    The last dimension, that of the colours, is missing where there are none.
    """
    device = next(model.parameters()).device
    c = torch.arange(model.n_classes, device=device).repeat_interleave(GRID_COLUMNS)
    images = draw(model, c, sampling, torch.Generator(device).manual_seed(seed))
    grid = images.unflatten(0, (model.n_classes, GRID_COLUMNS)).movedim(2, -1)
    return (grid.squeeze(-1) if grid.shape[-1] == 1 else grid).cpu().numpy()


def first_of_each(digits: Digits, classes: Sequence[int], n: int) -> Tensor:
    """Return the first ``n`` uint8 images of each class."""
    return torch.cat([digits.images[digits.labels == label][:n] for label in classes])
