"""RealNVP against a numpy re-implementation, autograd's Jacobian and a grid integral."""

import math

import numpy as np
import pytest
import torch

from lib.models.realnvp import RealNVP


def randomised(dim: int = 2, n_layers: int = 4, hidden: int = 8, seed: int = 0) -> RealNVP:
    """Build a flow away from its initialisation, where every coupling is trivial."""
    generator = torch.Generator().manual_seed(seed)
    flow = RealNVP(dim, n_layers, hidden)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return flow


def numpy_log_prob(flow: RealNVP, x: np.ndarray) -> np.ndarray:
    """Compute the log-density again, in float64 and without torch, from the flow's weights."""
    weights = {k: v.double().numpy() for k, v in flow.state_dict().items()}
    x, log_det = x.astype(np.float64), np.zeros(len(x))
    dim = x.shape[1]
    for i in range(len(flow.layers)):
        n_kept = dim // 2 if i % 2 == 0 else dim - dim // 2
        kept, moved = x[:, :n_kept], x[:, n_kept:]
        h = kept
        for j in (0, 2, 4):
            h = h @ weights[f"layers.{i}.net.{j}.weight"].T + weights[f"layers.{i}.net.{j}.bias"]
            if j < 4:
                h = np.maximum(h, 0.0)
        log_scale, shift = 2.0 * np.tanh(h[:, : dim - n_kept]), h[:, dim - n_kept :]
        x = np.concatenate([moved * np.exp(log_scale) + shift, kept], axis=1)
        log_det += log_scale.sum(1)
    return log_det - 0.5 * (x**2 + math.log(2 * math.pi)).sum(1)


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_log_prob_equals_numpy(dim):
    flow = randomised(dim)
    x = torch.randn(50, dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = flow.log_prob(x).numpy()
    np.testing.assert_allclose(ours, numpy_log_prob(flow, x.numpy()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [2, 3, 8])
def test_decode_undoes_encode(dim):
    flow = randomised(dim)
    x = torch.randn(50, dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        z, _ = flow.encode(x)
        assert (z - x).abs().max() > 0.1
        assert (flow.decode(z) - x).abs().max() < 1e-4


@pytest.mark.parametrize("dim", [2, 5])
def test_log_det_equals_autograd(dim):
    flow = randomised(dim)
    x = torch.randn(6, dim, generator=torch.Generator().manual_seed(1))
    _, log_det = flow.encode(x)
    for row, value in zip(x, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v: flow.encode(v[None])[0][0], row)
        assert torch.linalg.slogdet(jacobian)[1].item() == pytest.approx(value.item(), abs=1e-4)


def test_density_integrates_to_one():
    flow = randomised(hidden=4)
    side = torch.linspace(-30, 30, 1201)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        mass = flow.log_prob(grid).exp().sum() * (side[1] - side[0]) ** 2
    assert mass.item() == pytest.approx(1.0, abs=5e-3)


def test_samples_follow_the_generator_and_temperature():
    flow = randomised()
    with torch.no_grad():
        first = flow.sample(100, generator=torch.Generator().manual_seed(3))
        again = flow.sample(100, generator=torch.Generator().manual_seed(3))
        frozen = flow.sample(5, temperature=0.0)
    assert torch.equal(first, again)
    assert (frozen - frozen[0]).abs().max() == 0
    assert first.std() > 0.1


def test_wrong_shape_is_a_sentence():
    with pytest.raises(ValueError, match=r"got a tensor of shape \(4, 3\) and wants \(batch, 2\)"):
        RealNVP(2).log_prob(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="at least 2 coordinates"):
        RealNVP(1)
