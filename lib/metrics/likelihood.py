"""Units of likelihood."""

import math

from torch import Tensor


def bits_per_dim(nll: Tensor, dim: int, n_levels: int | None = None) -> Tensor:
    """Convert negative log-likelihoods from nats per sample to bits per dimension.

    With ``n_levels``, ``nll`` is that of data dequantised to intervals of width ``1 / n_levels``
    of a unit range, and the result is the discrete code length: uniform noise costs
    ``log2(n_levels)`` bits.

    Shapes: ``nll`` (batch,) in nats; returns (batch,) in bits per dimension.
    """
    bits = nll / (dim * math.log(2.0))
    return bits if n_levels is None else bits + math.log2(n_levels)
