"""What the experiments on faces share: pictures by the batch, and who is held out."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lib.data import load
from lib.experiments._digits import mirror_some

HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class Faces:
    """Pictures that stay uint8, where they are, until a batch of them is asked for.

    ``arrays`` are (n, height, width, channels) each; ``rows`` (n, 2) holds array and row of every
    picture.
    """

    arrays: tuple[np.ndarray, ...]
    rows: np.ndarray
    source: str

    @classmethod
    def load(cls, name: str, split: str, size: int, also: tuple[str, ...] = ()) -> "Faces":
        """Load a split, joined by the same split of the data sets ``also``.

        ``lfw64`` has one split only; see :func:`is_held_out` for its ``train`` and ``held_out``.
        """
        one_split = name == "lfw64"
        sets = [load(name, "train" if one_split else split, size)]
        sets += [load(other, split, size) for other in also]
        chosen = [np.arange(len(data.images)) for data in sets]
        if one_split:
            held_out = is_held_out(sets[0].labels["identity"])
            chosen[0] = np.flatnonzero(held_out if split == "held_out" else ~held_out)
        rows = [
            np.stack((np.full(len(rows), number), rows), axis=1)
            for number, rows in enumerate(chosen)
        ]
        return cls(
            arrays=tuple(data.images for data in sets),
            rows=np.concatenate(rows),
            source=" + ".join(data.source for data in sets)
            + (f", identities {split}" if one_split else ""),
        )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def n_channels(self) -> int:
        """Return the channels of a picture."""
        return self.arrays[0].shape[3]

    def at(self, index: np.ndarray, device: torch.device) -> Tensor:
        """Return the pictures at ``index`` as uint8 (n, channels, height, width)."""
        images = np.stack([self.arrays[number][row] for number, row in self.rows[index]])
        return torch.from_numpy(images).to(device).permute(0, 3, 1, 2)

    def batch(self, n: int, generator: torch.Generator, flips: bool) -> Tensor:
        """Draw ``n`` pictures with replacement, each mirrored with probability 1/2 if ``flips``."""
        device = generator.device
        index = torch.randint(len(self), (n,), generator=generator, device=device)
        images = self.at(index.cpu().numpy(), device)
        return mirror_some(images, generator) if flips else images

    def some(self, n: int, device: torch.device) -> Tensor:
        """Return ``n`` pictures, or all if there are fewer, always the same random choice."""
        # numpy promises to keep this legacy stream of random numbers as it is.
        order = np.random.RandomState(0).permutation(len(self))
        return self.at(order[:n], device)


def is_held_out(identity: np.ndarray) -> np.ndarray:
    """Say which pictures of lfw64 no base model is trained on: those of every tenth identity.

    Whole identities are held out, by their number alone, so that a score on them is one on
    people that the model has never seen.
    """
    return identity % HELD_OUT_EVERY == 0
