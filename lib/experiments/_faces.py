"""What the experiments on faces share: pictures by the batch, and who is held out."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from lib.data import avatars, load
from lib.data.images import MISSING, ImageSet
from lib.experiments._digits import mirror_some

HELD_OUT_EVERY = 10


@dataclass(frozen=True)
class Faces:
    """Pictures that stay uint8, where they are, until a batch of them is asked for.

    ``arrays`` are (n, height, width, channels) each; ``rows`` (n, 2) holds array and row of every
    picture. ``tables`` hold the labels of each array, (n,) each.
    """

    arrays: tuple[np.ndarray, ...]
    rows: np.ndarray
    source: str
    tables: tuple[Mapping[str, np.ndarray], ...] = ()

    @classmethod
    def load(
        cls,
        name: str,
        split: str,
        size: int,
        also: tuple[str, ...] = (),
        limit: int | None = None,
    ) -> "Faces":
        """Load a split, joined by the same split of the data sets ``also``.

        With ``limit`` only the first pictures of each are used; avatars beyond are not drawn.
        ``lfw64`` has one split only; see :func:`is_held_out` for its ``train`` and ``held_out``.
        """
        one_split = name == "lfw64"
        sets = [_load(name, "train" if one_split else split, size, limit)]
        sets += [_load(other, split, size, limit) for other in also]
        chosen = [np.arange(len(data.images[:limit])) for data in sets]
        if one_split:
            held_out = is_held_out(sets[0].labels["identity"][:limit])
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
            tables=tuple(data.labels for data in sets),
        )

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def n_channels(self) -> int:
        """Return the channels of a picture."""
        return self.arrays[0].shape[3]

    def labels(self, name: str) -> np.ndarray:
        """Return a label of every picture, int64 (n,) in the order of ``rows``.

        It is ``MISSING`` in a data set that does not have the label.
        Raises: ValueError if none of them has it.
        """
        if not any(name in table for table in self.tables):
            known = sorted({label for table in self.tables for label in table})
            raise ValueError(
                f"{self.source} has no label {name!r}; it has {', '.join(known) or 'none'}."
            )
        found = np.full(len(self), MISSING, dtype=np.int64)
        for number, table in enumerate(self.tables):
            here = self.rows[:, 0] == number
            if name in table:
                found[here] = table[name][self.rows[here, 1]]
        return found

    def where(self, keep: np.ndarray) -> "Faces":
        """Return the pictures for which ``keep`` (n,) holds, with their labels."""
        return replace(self, rows=self.rows[keep])

    def at(self, index: np.ndarray, device: torch.device) -> Tensor:
        """Return the pictures at ``index`` as uint8 (n, channels, height, width)."""
        images = np.stack([self.arrays[number][row] for number, row in self.rows[index]])
        return torch.from_numpy(images).to(device).permute(0, 3, 1, 2)

    def batch(self, n: int, generator: torch.Generator, flips: bool) -> Tensor:
        """Draw ``n`` pictures with replacement, each mirrored with probability 1/2 if ``flips``."""
        return self.drawn(n, generator, flips)[0]

    def drawn(self, n: int, generator: torch.Generator, flips: bool) -> tuple[Tensor, np.ndarray]:
        """Draw a :meth:`batch`, and say which pictures (n,) it holds."""
        device = generator.device
        index = torch.randint(len(self), (n,), generator=generator, device=device).cpu().numpy()
        images = self.at(index, device)
        return (mirror_some(images, generator) if flips else images), index

    def some(self, n: int, device: torch.device) -> Tensor:
        """Return ``n`` pictures, or all if there are fewer, always the same random choice."""
        # numpy promises to keep this legacy stream of random numbers as it is.
        order = np.random.RandomState(0).permutation(len(self))
        return self.at(order[:n], device)


def _load(name: str, split: str, size: int, limit: int | None) -> ImageSet:
    """Load a data set; avatars that a limit leaves out are not even drawn."""
    if name == "avatars" and limit is not None:
        return avatars.load(split, size, limit)
    return load(name, split, size)


def is_held_out(identity: np.ndarray) -> np.ndarray:
    """Say which pictures of lfw64 no base model is trained on: those of every tenth identity.

    Whole identities are held out, by their number alone, so that a score on them is one on
    people that the model has never seen.
    """
    return identity % HELD_OUT_EVERY == 0
