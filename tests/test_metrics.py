"""Units of likelihood, and the shares of samples near clusters."""

import math

import pytest
import torch

from lib.data.toy import CENTRES, five_gaussians
from lib.metrics.clusters import cluster_shares
from lib.metrics.likelihood import bits_per_dim


def test_uniform_noise_costs_log2_of_the_levels():
    # A uniform density on the unit cube has NLL 0; 256 levels are 8 bits, whatever the dimension.
    assert bits_per_dim(torch.zeros(2), dim=3, n_levels=256).tolist() == [8.0, 8.0]


def test_one_nat_per_dimension_in_bits():
    assert bits_per_dim(torch.tensor(5.0), dim=5).item() == pytest.approx(1 / math.log(2))


def test_shares_of_known_points():
    centres = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    x = torch.tensor([[0.1, 0.0], [0.0, 0.0], [0.9, 0.0], [0.5, 0.3]])
    assert cluster_shares(x, centres, radius=0.2).tolist() == [0.5, 0.25, 0.25]


def test_shares_of_the_toy_are_a_fifth_each():
    x, _ = five_gaussians(20_000, torch.Generator().manual_seed(0))
    shares = cluster_shares(x, CENTRES, radius=4 * 0.08)
    assert shares.sum() == pytest.approx(1.0)
    # Outside four standard deviations of a 2D normal lies a share exp(-8).
    assert shares[-1] < 0.002
    assert (shares[:5] - 0.2).abs().max() < 0.01


def test_an_empty_set_has_no_shares():
    with pytest.raises(ValueError, match="Shares of an empty set are not defined"):
        cluster_shares(torch.zeros(0, 2), CENTRES, 0.1)
