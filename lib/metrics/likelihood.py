"""Likelihoods: their unit, and whether they are normally distributed."""

import math

import numpy as np
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


def normality(nll: Tensor) -> dict[str, float]:
    """Return p-values for the hypothesis that scores are normal; small ones speak against it.

    ``ks`` is the Kolmogorov-Smirnov test against a normal with the scores' own mean and standard
    deviation, as in the taming paper. Fitting them makes its p-values too large; ``lilliefors`` is
    the same statistic with the fit allowed for, by 999 simulations (so 0.001 at least).

    Shapes: ``nll`` (n,) of at least 3 different scores.
    """
    from scipy import stats  # a second to import, and every flow needs this module's units

    scores = nll.double().cpu().numpy()
    standard = (scores - scores.mean()) / scores.std(ddof=1)
    lilliefors = stats.goodness_of_fit(
        stats.norm, scores, statistic="ks", n_mc_samples=999, rng=np.random.default_rng(0)
    )
    return {
        "ks": float(stats.kstest(standard, "norm").pvalue),
        "lilliefors": float(lilliefors.pvalue),
    }
