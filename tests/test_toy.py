"""The five Gaussians."""

import torch

from lib.data import five_gaussians
from lib.data.toy import CENTRES


def test_five_gaussians_have_the_stated_moments():
    x, cluster = five_gaussians(50_000, torch.Generator().manual_seed(0))
    assert x.dtype == torch.float32 and x.shape == (50_000, 2) and cluster.dtype == torch.int64
    expected = [(-0.5, -0.5), (-0.5, 0.5), (0.5, -0.5), (0.5, 0.5), (0.0, 0.0)]
    assert CENTRES.tolist() == [list(centre) for centre in expected]
    for k, centre in enumerate(expected):
        points = x[cluster == k]
        assert abs(len(points) / len(x) - 0.2) < 0.01
        assert torch.allclose(points.mean(0), torch.tensor(centre), atol=0.005)
        assert torch.allclose(points.std(0), torch.tensor(0.08), atol=0.002)
    again, _ = five_gaussians(50_000, torch.Generator().manual_seed(0))
    assert torch.equal(x, again)
    wide, _ = five_gaussians(20_000, torch.Generator().manual_seed(0), std=1.0)
    assert wide.var() > 1
