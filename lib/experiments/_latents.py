"""What the experiments that train GANs and VAEs share: pictures, and what judges say of samples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.checkpoints import load_checkpoint
from lib.experiments._digits import Digits, mirror_some, unit
from lib.experiments._faces import Faces
from lib.metrics.fidelity import (
    extract_features,
    frechet_distance,
    inception_score,
    precision_recall,
)
from lib.models.classifier import FaceCNN, predict_logits
from lib.run import Run

DIGITS = ("digits", "mnist")
SAMPLE_BATCH = 100


@dataclass(frozen=True)
class Pictures:
    """Pictures without labels on one device: ``images`` uint8 (n, channels, height, width)."""

    images: Tensor
    source: str

    @classmethod
    def load(
        cls,
        name: str,
        split: str,
        size: int,
        device: torch.device,
        without: Sequence[int] = (),
    ) -> "Pictures":
        """Load a split of digits, some classes left out, or of faces; ``held_out`` is of lfw64.

        Raises: ValueError if classes of faces are to be left out, which have none.
        """
        if name in DIGITS:
            digits = Digits.load(name, split, size, device).without(without)
            return cls(digits.images, digits.source)
        if without:
            raise ValueError(
                f"The pictures {name!r} have no classes, but {list(without)} are to be left out; "
                f"leave out classes of {' or '.join(DIGITS)} only."
            )
        faces = Faces.load(name, split, size)
        return cls(faces.at(np.arange(len(faces)), device), faces.source)

    def batch(self, n: int, generator: torch.Generator, flips: bool = False) -> Tensor:
        """Draw ``n`` pictures with replacement, each mirrored with probability 1/2 if ``flips``."""
        device = self.images.device
        index = torch.randint(len(self.images), (n,), generator=generator, device=device)
        return mirror_some(self.images[index], generator) if flips else self.images[index]

    def some(self, n: int) -> Tensor:
        """Return ``n`` pictures, or all if there are fewer, always the same random choice."""
        # numpy promises to keep this legacy stream of random numbers as it is.
        order = np.random.RandomState(0).permutation(len(self.images))[:n]
        return self.images[torch.from_numpy(order).to(self.images.device)]


@torch.no_grad()
def draw(
    sample: Callable[[int, torch.Generator], Tensor], n: int, generator: torch.Generator
) -> Tensor:
    """Draw ``n`` images with ``sample(n, generator)``, which returns uint8, by the batch."""
    sizes = [min(SAMPLE_BATCH, n - start) for start in range(0, n, SAMPLE_BATCH)]
    return torch.cat([sample(size, generator) for size in sizes])


def report_fidelity(
    samples: Tensor,
    train: Pictures,
    held_out: Pictures,
    extractor: str | None,
    judge: str | None,
    seed: int,
    run: Run,
) -> None:
    """Compare samples with as many held-out pictures, and training pictures with the same.

    The rows ``..._train`` are what a perfect model would get. ``extractor`` and ``judge`` are
    shipped classifiers: one for the features of Fréchet distance, precision and recall, one for
    the inception score. ``random`` takes an untrained one, and None none.
    """
    n = min(len(samples), len(train.images), len(held_out.images))
    sets = {"": samples[:n], "_train": train.some(n)}
    about = {"n_samples": n, "data": held_out.source, "seeds": [seed]}
    if extractor is not None:
        network = load_judge(extractor, samples.shape[1:], run.device)
        real, name = extract_features(network, seen_by(network, held_out.some(n)), extractor)
        for suffix, images in sets.items():
            fake, _ = extract_features(network, seen_by(network, images), extractor)
            shares = precision_recall(real, fake)
            found = {
                "frechet_distance": (frechet_distance(real, fake), "distance"),
                "precision": (shares.precision, "share"),
                "recall": (shares.recall, "share"),
            }
            for quantity, (value, unit_) in found.items():
                run.row(quantity + suffix, value, unit=unit_, feature_extractor=name, **about)
    if judge is not None:
        network = load_judge(judge, samples.shape[1:], run.device)
        for suffix, images in sets.items():
            score = inception_score(predict_logits(network, seen_by(network, images)))
            about_judge = {"unit": "classes", "feature_extractor": judge}
            run.row(f"inception_score{suffix}", score, **about_judge, **about)


def load_judge(name: str, image_shape: torch.Size, device: torch.device) -> nn.Module:
    """Load a shipped classifier, or build an untrained one, ``random``."""
    judge = FaceCNN(10, image_shape) if name == "random" else load_checkpoint(name)
    return judge.to(device).eval()


def seen_by(judge: nn.Module, images: Tensor) -> Tensor:
    """Turn images into floats in [0, 1] of the judge's size, averaging over areas.

    They may be uint8, or floats in [0, 1] already, whose gradients flow.
    """
    floats, size = as_floats(images), tuple(judge.image_shape[1:])
    return floats if floats.shape[2:] == size else F.interpolate(floats, size, mode="area")


def as_floats(images: Tensor) -> Tensor:
    """Return images as floats in [0, 1], which they are unless they are uint8."""
    return unit(images) if images.dtype == torch.uint8 else images
