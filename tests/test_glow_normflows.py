"""Glow's log-likelihood against the same flow built from the pieces of normflows."""

import normflows
import pytest
import torch
from test_glow import pictures, randomised
from torch import nn

from lib.models.glow import COUPLINGS, Glow


def reference(flow: Glow) -> normflows.MultiscaleFlow:
    """Rebuild an additive or affine flow from normflows' pieces.

    normflows has no prior that depends on what is passed on; so the flow's must not.
    """
    blocks, priors, merges = [], [], []
    for block in reversed(flow.blocks):
        layers = []
        for step in reversed(block.steps):
            n_channels = len(step.actnorm.shift)
            glow = normflows.flows.GlowBlock(n_channels, 16, scale=step.affine)
            coupling, conv, actnorm = glow.flows
            net = coupling.flows[1].param_map.net
            for ours, theirs in zip(step.net, net, strict=True):
                if isinstance(ours, nn.Conv2d):
                    theirs.load_state_dict(
                        {k: v for k, v in ours.state_dict().items() if k != "log_scale"}
                    )
            scale = (3 * step.net[-1].log_scale).exp()
            weight, bias = scale[:, None, None, None] * net[-1].weight, scale * net[-1].bias
            if step.affine:  # theirs takes turns: shift, scale, shift, scale...
                half = len(scale) // 2
                turns = torch.arange(2 * half).view(2, half).T.flatten()
                weight, bias = weight[turns], bias[turns]
            net[-1].weight.data, net[-1].bias.data = weight, -bias
            if step.affine:
                net[-1].weight.data[0::2] *= -1
                net[-1].bias.data[1::2] *= -1
            else:
                net[-1].weight.data *= -1
            conv.P, conv.sign_S = step.conv.permutation, step.conv.sign
            conv.L.data, conv.U.data = step.conv.lower.data, step.conv.upper.data
            conv.log_S.data = step.conv.log_diagonal.data
            actnorm.s.data = -step.actnorm.log_scale.data.view(1, -1, 1, 1)
            actnorm.t.data = -step.actnorm.shift.data.view(1, -1, 1, 1)
            actnorm.data_dep_init_done = torch.tensor(1.0)
            layers.append(glow)
        blocks.append([*layers, normflows.flows.Squeeze()])
        priors.append(constant_prior(block.prior))
        merges.append(normflows.flows.Merge())
    shapes = reversed(flow.latent_shapes)
    bases = [diagonal(shape, *prior) for shape, prior in zip(shapes, priors, strict=True)]
    return normflows.MultiscaleFlow(bases, blocks, merges[1:], class_cond=False)


def constant_prior(prior: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    if hasattr(prior, "constant"):
        return prior.constant.data.chunk(2)
    return (prior.net.bias * (3 * prior.net.log_scale).exp()).data.chunk(2)


def diagonal(shape, mean, log_std) -> nn.Module:
    base = normflows.distributions.DiagGaussian(shape)
    base.loc.data = mean.view(1, -1, 1, 1).expand(1, *shape).clone()
    base.log_scale.data = log_std.view(1, -1, 1, 1).expand(1, *shape).clone()
    return base


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_log_prob_equals_normflows(coupling):
    flow, x = randomised(coupling=coupling).double(), pictures(4).double()
    with torch.no_grad():
        conditional = flow.log_prob(x)
        for block in flow.blocks[:-1]:
            block.prior.net.weight.zero_()
        ours, theirs = flow.log_prob(x), reference(flow).double().log_prob(x, None)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-8)
    assert (conditional - ours).abs().min() > 0.1
