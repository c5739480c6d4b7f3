"""What the experiments that tame Glow on faces share: the base, its crowds, and the measures."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lib.checkpoints import load_checkpoint
from lib.experiments._faces import Faces
from lib.experiments._latents import seen_by
from lib.methods.taming import (
    KL,
    Step,
    TamingSettings,
    best_of,
    gaussian_kl,
    likelihood_quantile,
    nll_statistics,
    tame,
)
from lib.metrics.fidelity import extract_features, frechet_distance
from lib.models.classifier import FaceCNN, predict_logits
from lib.models.glow import Glow, dequantise, to_uint8
from lib.results import read_results
from lib.run import Run

CHUNK = 128  # images scored at a time


@dataclass(frozen=True)
class BaseConfig:
    """A base model, the data it knows, and how likelihoods are measured.

    ``base`` is a checkpoint, or ``random`` for an untrained one. It was trained on the split
    ``train``; ``validation`` is a split of people it has never seen, of which the first
    ``n_crowd`` pictures give mu and sigma of every likelihood quantile. Other sets are scored
    with ``n_draws`` draws of dequantisation noise.
    """

    data: str
    base: str
    size: int
    n_bits: int
    validation: str
    n_crowd: int
    n_draws: int
    taming: TamingSettings


class Bench:
    """A base model on its device, with the pictures it is tamed and measured on."""

    def __init__(self, config: BaseConfig, run: Run):
        self.config, self.device = config, run.device
        self.train = Faces.load(config.data, "train", config.size)
        self.validation = Faces.load(config.data, config.validation, config.size)
        self.crowd = self.validation.some(config.n_crowd, self.device)
        if config.base == "random":
            self.base = Glow((self.train.n_channels, config.size, config.size), 2, 2, 8)
            self.base.initialise(self.prepare(self.crowd.cpu(), torch.Generator().manual_seed(0)))
            self.base.to(self.device)
        else:
            self.base = load_checkpoint(config.base).to(self.device)
        self.base.eval()

    def prepare(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Turn uint8 images into the model's input, with fresh dequantisation noise."""
        return dequantise(images, self.config.n_bits, generator)

    def nll(self, model: Glow, x: Tensor) -> Tensor:
        """Return bits per dimension (n,), the unit of the authors' code, a chunk at a time."""
        bits = [model.nll_bits_per_dim(part, self.config.n_bits) for part in x.split(CHUNK)]
        return torch.cat(bits)

    @torch.no_grad()
    def score(self, model: Glow, images: Tensor, generator: torch.Generator, draws: int) -> Tensor:
        """Return the bits per dimension (n,) of uint8 images, a mean over draws of noise."""
        scores = [self.nll(model, self.prepare(images, generator)) for _ in range(draws)]
        return torch.stack(scores).mean(0)

    def steps(
        self, forget: Tensor, remember: Tensor, seed: int, kl: KL = gaussian_kl, **changes
    ) -> Iterator[Step]:
        """Iterate over the steps of taming the base; ``changes`` are to the config's settings."""
        settings = replace(self.config.taming, **changes)
        generator = torch.Generator(self.device).manual_seed(seed)
        return tame(self.base, forget, remember, self.nll, settings, generator, kl, self.prepare)

    def tame(self, forget: Tensor, remember: Tensor, seed: int, **changes) -> Step:
        """Tame the base to the end; return the model to keep and its terms."""
        return best_of(self.steps(forget, remember, seed, **changes))

    def scores(self, model: Glow, sets: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the bits per dimension of the ``crowd`` and of each set, with the same noise."""
        generator = torch.Generator(self.device).manual_seed(77)
        found = {"crowd": self.score(model, self.crowd, generator, 1)}
        for name, images in sets.items():
            found[name] = self.score(model, images, generator, self.config.n_draws)
        return found

    def quantiles(self, model: Glow, sets: dict[str, Tensor]) -> dict[str, float]:
        """Return each set's mean likelihood quantile, and mu, sigma and bits of the crowd."""
        nll = self.scores(model, sets)
        mu, sigma = nll_statistics(nll["crowd"])
        found = {"mu": float(mu), "sigma": float(sigma)}
        for name in sets:
            found[name] = float(likelihood_quantile(nll[name], mu, sigma).mean())
        return found

    def samples(self, model: Glow, n: int, temperature: float, seed: int) -> Tensor:
        """Draw uint8 samples (n, channels, height, width); equal seeds have equal latents."""
        generator = torch.Generator(self.device).manual_seed(seed)
        parts = [CHUNK] * (n // CHUNK) + [n % CHUNK] * (n % CHUNK > 0)
        with torch.no_grad():
            drawn = [model.sample(part, temperature, generator) for part in parts]
        return to_uint8(torch.cat(drawn), self.config.n_bits)

    def as_sampled(self, images: Tensor) -> Tensor:
        """Return uint8 images with the few levels that samples have, to compare like with like."""
        generator = torch.Generator(images.device).manual_seed(0)
        return to_uint8(self.prepare(images, generator), self.config.n_bits)


class Judge:
    """A judge of faces; what it sees also says how close samples are to real pictures.

    ``name`` is a checkpoint, or ``random`` for an untrained one that has the ``labels``. Images
    larger than the judge's are averaged down over areas.
    """

    def __init__(self, name: str, bench: Bench, labels: Sequence[str]):
        if name == "random":
            shape = (bench.train.n_channels, bench.config.size, bench.config.size)
            self.model = FaceCNN(len(labels), shape, labels)
        else:
            self.model = load_checkpoint(name)
        self.model.to(bench.device).eval()
        self.name, self.extractor = name, ""

    def share(self, images: Tensor, label: str) -> float:
        """Return the share of uint8 images that is called positive.

        Raises: ValueError if the judge knows no such label.
        """
        if label not in self.model.names:
            raise ValueError(
                f"The judge {self.name} does not know {label!r}; it knows "
                f"{', '.join(self.model.names) or 'no attributes'}."
            )
        logits = predict_logits(self.model, seen_by(self.model, images))
        return float((logits[:, self.model.names.index(label)] > 0).double().mean())

    def features(self, images: Tensor) -> Tensor:
        """Return the features (n, d) of uint8 images, and note their extractor's name."""
        features, self.extractor = extract_features(
            self.model, seen_by(self.model, images), self.name
        )
        return features

    def distance(self, samples: Tensor, real: Tensor) -> float:
        """Return the Fréchet distance of uint8 samples to the :meth:`features` of real images."""
        return frechet_distance(real, self.features(samples))


@dataclass(frozen=True)
class Person:
    """One identity: pictures to forget, others of the same person, and everybody else's."""

    number: int
    forget: Tensor
    reference: Tensor
    remember: Tensor


def people(
    bench: Bench, source: Faces, label: str, n_people: int, n_forget: int, n_reference: int
) -> Iterator[Person]:
    """Yield the first ``n_people`` with pictures enough, in the order of their numbers.

    ``label`` is the one that numbers people. The remember set is all of the base's training set
    but for the pictures of that person.

    Raises: ValueError if there are too few.
    """
    identity, trained = source.labels(label), bench.train.labels(label)
    numbers, counts = np.unique(identity, return_counts=True)
    numbers = numbers[counts >= n_forget + n_reference]
    if len(numbers) < n_people:
        raise ValueError(
            f"Only {len(numbers)} people have {n_forget + n_reference} pictures and {n_people} are "
            "wanted; lower the numbers of pictures."
        )
    for number in numbers[:n_people]:
        own = np.flatnonzero(identity == number)
        yield Person(
            int(number),
            source.at(own[:n_forget], bench.device),
            source.at(own[n_forget : n_forget + n_reference], bench.device),
            bench.train.at(np.flatnonzero(trained != number), bench.device),
        )


def training_seconds(base: str) -> float:
    """Return the time that training a shipped base took; 1 for the untrained one of ``smoke``."""
    return 1.0 if base == "random" else read_results(base).value("training_time")


def as_grid(samples: Tensor) -> np.ndarray:
    """Return uint8 samples (..., channels, height, width) with the channels last, for figures."""
    return samples.movedim(-3, -1).cpu().numpy()
