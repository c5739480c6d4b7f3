"""What the experiments on digits share: data as tensors, and batches of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.data import load


@dataclass(frozen=True)
class Digits:
    """Labelled digits: ``images`` uint8 (n, 1, height, width), ``labels`` int64 (n,)."""

    images: Tensor
    labels: Tensor
    source: str

    @classmethod
    def load(cls, name: str, split: str, size: int, device: torch.device) -> "Digits":
        """Load a split with ``label``; resize it where its pictures are not size×size."""
        data = load(name, split)
        if data.images.shape[1] != size:
            data = load(name, split, size)
        images = torch.tensor(data.images, device=device).permute(0, 3, 1, 2).contiguous()
        return cls(images, torch.tensor(data.labels["label"], device=device), data.source)

    def without(self, classes: Sequence[int]) -> "Digits":
        """Leave out classes, and say so in the source."""
        if not classes:
            return self
        left_out = torch.tensor(classes, dtype=self.labels.dtype, device=self.labels.device)
        keep = ~torch.isin(self.labels, left_out)
        source = f"{self.source}, without class {', '.join(map(str, classes))}"
        return Digits(self.images[keep], self.labels[keep], source)

    def batch(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` images in [0, 1] with their labels, with replacement."""
        index = torch.randint(
            len(self.images), (n,), generator=generator, device=self.images.device
        )
        return unit(self.images[index]), self.labels[index]

    def first(self, n: int, label: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the first ``n`` images in [0, 1] (of one class) with their labels."""
        index = torch.arange(len(self.images), device=self.images.device)
        index = index[:n] if label is None else index[self.labels == label][:n]
        return unit(self.images[index]), self.labels[index]


def mirror_some(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each of the images (n, channels, height, width) with probability 1/2."""
    mirrored = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def unit(images: Tensor) -> Tensor:
    """Turn uint8 levels 0 to 255 into floats in [0, 1], the range of the VAE and the judges."""
    return images.float().div_(255)
