"""Where samples fall in a 2D toy with known clusters."""

import torch
from torch import Tensor


def cluster_shares(x: Tensor, centres: Tensor, radius: float) -> Tensor:
    """Count the share of points near each centre, and the share near none.

    A point belongs to its nearest centre if that is closer than ``radius``.

    Shapes: ``x`` (n, dim), ``centres`` (k, dim); returns (k + 1,), summing to 1, "none" last.
    Raises: ValueError if ``x`` is empty.
    """
    if len(x) == 0:
        raise ValueError("Shares of an empty set are not defined; draw at least one sample.")
    distance, nearest = torch.cdist(x, centres).min(dim=1)
    label = torch.where(distance < radius, nearest, len(centres))
    return torch.bincount(label, minlength=len(centres) + 1) / len(x)
