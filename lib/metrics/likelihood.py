"""Likelihood as a measure: units, and whether NLL values look normal."""

import math

import numpy as np
from scipy import stats
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


def standard_error(values: np.ndarray) -> float:
    """Return the standard error of a mean, ``sd / sqrt(n)`` with the n - 1 form of the sd."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def skewness(values: np.ndarray) -> float:
    """Return the sample skewness: 0 for a normal, 2 for an exponential distribution."""
    return float(stats.skew(values))


def share_above(values: np.ndarray, threshold: float) -> float:
    """Return the share of values above a threshold: an empirical tail probability."""
    return float(np.mean(np.asarray(values) > threshold))
