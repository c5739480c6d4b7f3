"""Glow against autograd's Jacobian and closed forms, and with planted errors.

All flows are randomised: at its start a flow hardly does anything, and everything passes.
"""

import copy
import math

import pytest
import torch
from torch import nn

from lib.checkpoints import load_checkpoint, save_checkpoint
from lib.models.glow import COUPLINGS, Glow, dequantise, to_uint8
from lib.models.glow_layers import FlowStep, ZeroConv

SMALL = {"image_shape": [3, 16, 16], "n_blocks": 3, "n_flows": 3, "hidden": 16}
TINY = {"image_shape": [1, 4, 4], "n_blocks": 2, "n_flows": 2, "hidden": 4}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomised(arguments: dict = SMALL, coupling: str = "additive", seed: int = 0) -> Glow:
    """Build a flow away from its initialisation, in evaluation mode."""
    torch.manual_seed(seed)
    flow = Glow(**arguments, coupling=coupling)
    with torch.no_grad():
        generator = seeded(seed)
        for name, parameter in flow.named_parameters():
            size = 0.06 if ".steps." in name and ".net." in name else 0.03
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return flow.eval()


def pictures(n: int, shape: list[int] = SMALL["image_shape"], seed: int = 1) -> torch.Tensor:
    images = torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=seeded(seed))
    return dequantise(images, 5, seeded(seed))


def gap(flow: Glow, x: torch.Tensor) -> float:
    """Return how far ``decode(encode(x))`` is from ``x``."""
    with torch.no_grad():
        z, _ = flow.encode(x)
        assert max(part.abs().max() for part in z) > 1.0
        return (flow.decode(z) - x).abs().max().item()


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_decode_undoes_encode(coupling):
    flow, x = randomised(coupling=coupling), pictures(8)
    assert gap(flow, x) < 1e-4
    assert gap(flow.double(), x.double()) < 1e-12


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_encode_undoes_decode(coupling):
    flow = randomised(coupling=coupling)
    z = tuple(torch.randn(5, *shape, generator=seeded(2)) for shape in flow.latent_shapes)
    with torch.no_grad():
        again, _ = flow.encode(flow.decode(z))
    for one, other in zip(z, again, strict=True):
        assert (one - other).abs().max() < 1e-3


def jacobian_gaps(flow: Glow, x: torch.Tensor) -> torch.Tensor:
    """Return how far ``log_det`` is from autograd's Jacobian, for each image."""

    def flat(row):
        return torch.cat([part.flatten() for part in flow.encode(row[None])[0]])

    _, log_det = flow.encode(x)
    exact = [
        torch.linalg.slogdet(
            torch.autograd.functional.jacobian(flat, row).reshape(flow.dim, flow.dim)
        )[1]
        for row in x
    ]
    return (log_det - torch.stack(exact)).abs()


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_log_det_equals_autograd(coupling):
    flow = randomised(TINY, coupling).double()
    x = pictures(3, TINY["image_shape"]).double()
    assert jacobian_gaps(flow, x).max() < 1e-9
    with torch.no_grad():
        z, log_det = flow.encode(x)
    assert log_det.abs().min() > 0.1 and log_det.std() > 1e-3
    z = torch.cat([part.flatten(1) for part in z], dim=1)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1) + log_det
    torch.testing.assert_close(flow.log_prob(x), expected)


def no_affine_scale(step, x):
    """Encode, but forget the coupling's part of the log-determinant."""
    z, log_det = ENCODE(step, x)
    return z, log_det.mean() * 0 + log_det[:1]


ENCODE = FlowStep.encode


def half_log_det(step, x):
    z, log_det = ENCODE(step, x)
    return z, 0.5 * log_det


@pytest.mark.parametrize("fault", [no_affine_scale, half_log_det])
def test_planted_errors_of_the_log_det_are_found(fault, monkeypatch):
    flow = randomised(TINY, "affine").double()
    x = pictures(3, TINY["image_shape"]).double()
    monkeypatch.setattr(FlowStep, "encode", fault)
    assert jacobian_gaps(flow, x).max() > 1e-3


def test_planted_error_of_the_inverse_is_found(monkeypatch):
    flow, x = randomised(), pictures(2)
    monkeypatch.setattr(FlowStep, "inverse_matrix", lambda step: step.conv.matrix().T)
    assert gap(flow, x) > 1e-2


def permuting(arguments: dict) -> Glow:
    """Build a flow that does nothing but reorder pixels, under N(0.2, exp(-0.7)) on each."""
    flow = Glow(**arguments).double().eval()
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            if "conv" in name:
                parameter.zero_()
            if name.endswith(("prior.net.bias", "prior.constant")):
                mean, log_std = parameter.chunk(2)
                mean.fill_(0.2)
                log_std.fill_(-0.7)
        for name, buffer in flow.named_buffers():
            if name.endswith("sign"):
                buffer.fill_(1.0)
    return flow


@pytest.mark.parametrize("n_bits", [1, 5, 8])
def test_bits_per_dim_equals_its_closed_form(n_bits):
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=seeded(3))
    noise = dequantise(images, n_bits, seeded(4), torch.float64)
    with torch.no_grad():
        bits = permuting(SMALL).nll_bits_per_dim(noise, n_bits)
    normal = torch.distributions.Normal(0.2, math.exp(-0.7))
    expected = n_bits - normal.log_prob(noise).mean((1, 2, 3)) / math.log(2)
    torch.testing.assert_close(bits, expected)


def test_a_density_of_one_costs_the_bits_of_uniform_noise(monkeypatch):
    flow, noise = randomised(), pictures(5)
    monkeypatch.setattr(flow, "log_prob", lambda x: torch.zeros(len(x)))
    assert torch.equal(flow.nll_bits_per_dim(noise, 5), torch.full((5,), 5.0))


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("seed", range(3))
def test_no_model_codes_uniform_noise_in_fewer_bits(coupling, seed):
    """The cross-entropy of the uniform density, whose entropy is 0, is never negative."""
    flow = randomised(coupling=coupling, seed=seed)
    noise = torch.rand(50, *SMALL["image_shape"], generator=seeded(seed)) - 0.5
    with torch.no_grad():
        flow.initialise(noise)
        assert flow.nll_bits_per_dim(noise, 5).mean() > 5.0


@pytest.mark.parametrize("n_bits", range(1, 9))
def test_images_survive_the_way_into_the_model_and_back(n_bits):
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = dequantise(images, n_bits, seeded(0))
    assert -0.5 <= x.min() and x.max() < 0.5
    level = (images.double() / 2 ** (8 - n_bits)).floor()
    inside = (x.double() + 0.5) * 2**n_bits - level
    assert 0 <= inside.min() and inside.max() < 1 and abs(inside.mean() - 0.5) < 0.1
    back = to_uint8(x, n_bits)
    assert (back.min(), back.max()) == (0, 255)
    assert torch.equal(to_uint8(dequantise(back, n_bits, seeded(1)), n_bits), back)
    assert (back.int() - images.int()).abs().max() < 2 ** (8 - n_bits)
    assert not torch.equal(x, dequantise(images, n_bits, seeded(1))) or n_bits > 8


def test_actnorm_starts_with_mean_zero_and_variance_one(monkeypatch):
    flow, seen = randomised().train(), []
    x = 3.0 * pictures(32) + 1.0
    assert not flow.initialised
    flow.log_prob(x)
    assert flow.initialised
    for block in flow.blocks:
        for step in block.steps:
            rotate = step.conv
            rotate.matrix = lambda conv=rotate: torch.eye(len(conv.sign))
            step.net.register_forward_hook(lambda net, inputs, output: seen.append(inputs[0]))
    step = flow.blocks[0].steps[0]
    with torch.no_grad():
        y, _ = step.encode(torch.nn.functional.pixel_unshuffle(x, 2))
    kept = seen[0]
    assert kept.mean((0, 2, 3)).abs().max() < 1e-5
    assert (kept.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-4
    assert y.shape == (32, 12, 8, 8)


def test_every_actnorm_sees_normalised_channels():
    flow, x = randomised().train(), 3.0 * pictures(32) + 1.0
    flow.initialise(x)
    with torch.no_grad():
        for block in flow.blocks:
            x = torch.nn.functional.pixel_unshuffle(x, 2)
            for step in block.steps:
                norm = step.actnorm
                y = norm.log_scale.exp()[:, None, None] * (x + norm.shift[:, None, None])
                assert y.mean((0, 2, 3)).abs().max() < 1e-4
                assert (y.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-3
                x, _ = step.encode(x)
            x = x.chunk(2, dim=1)[0]


def test_initialisation_happens_once_and_only_in_training():
    flow, first, second = randomised(), pictures(8), 0.1 * pictures(8, seed=5)
    shift = flow.blocks[0].steps[0].actnorm.shift
    before = shift.clone()
    flow.eval().log_prob(first)
    assert torch.equal(shift, before) and not flow.initialised
    flow.train().log_prob(first)
    after = shift.clone()
    assert not torch.equal(after, before)
    flow.log_prob(second)
    assert torch.equal(shift, after)
    loaded = Glow(**SMALL).train()
    loaded.load_state_dict(flow.state_dict())
    loaded.log_prob(second)
    assert torch.equal(loaded.blocks[0].steps[0].actnorm.shift, after)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_shipped_weights_still_invert(coupling, tmp_path):
    flow, x = randomised(coupling=coupling).train(), pictures(8)
    flow.log_prob(x)
    save_checkpoint("glow", flow, SMALL | {"coupling": coupling}, "test/smoke", "none", tmp_path)
    shipped = load_checkpoint("glow", tmp_path).train()
    assert gap(shipped, x) < 1e-4
    with torch.no_grad():
        shipped.log_prob(0.1 * x)
        close = shipped.nll_bits_per_dim(x, 5) - flow.nll_bits_per_dim(x, 5)
    assert shipped.initialised and close.abs().max() < 0.05
    norms = (f.blocks[0].steps[0].actnorm.shift for f in (flow, shipped))
    torch.testing.assert_close(*norms, rtol=1e-3, atol=1e-4)


def count_inversions(monkeypatch) -> list[int]:
    calls, inverse_matrix = [], FlowStep.inverse_matrix
    monkeypatch.setattr(
        FlowStep, "inverse_matrix", lambda step: calls.append(1) or inverse_matrix(step)
    )
    return calls


@torch.no_grad()
def test_inverse_matrices_are_reused_until_a_weight_changes(monkeypatch):
    flow, x = randomised(), pictures(2)
    calls, n_steps = count_inversions(monkeypatch), 9
    expected = 0

    def check(changed: bool) -> None:
        nonlocal expected
        expected += n_steps * changed
        assert gap(flow, x) < 1e-4
        assert len(calls) == expected

    check(changed=True)
    check(changed=False)
    flow.sample(2)
    check(changed=False)
    step = flow.blocks[1].steps[0]
    step.conv.upper.add_(0.1)
    check(changed=True)
    step.conv.log_diagonal.data.mul_(1.1)  # leaves the version counter as it is
    check(changed=True)
    step.actnorm.log_scale[0] += 0.5
    check(changed=True)
    flow.blocks[2].steps[1].net[0].weight.add_(0.1)  # no part of the matrices
    check(changed=False)
    flow.load_state_dict(randomised(seed=7).state_dict())
    check(changed=True)
    flow.train()
    flow.initialise(x)
    check(changed=True)
    assert gap(copy.deepcopy(flow), x) < 1e-4
    assert gap(flow.double(), x.double()) < 1e-12
    assert gap(flow.float(), x) < 1e-4


def test_training_reaches_the_weights_through_decode(monkeypatch):
    flow, calls = randomised(), count_inversions(monkeypatch)
    with torch.inference_mode():
        flow.sample(1)
    for _ in range(2):
        flow.zero_grad()
        flow.sample(2, generator=seeded(0)).square().sum().backward()
        assert all(p.grad is not None for p in flow.parameters() if p.requires_grad)
    assert len(calls) == 27
    flow.requires_grad_(False)
    z = tuple(torch.zeros(1, *shape, requires_grad=True) for shape in flow.latent_shapes)
    flow.decode(z).square().sum().backward()
    assert len(calls) == 27 and all(part.grad.abs().max() > 0 for part in z)


def test_a_step_of_training_changes_what_decode_inverts():
    flow, x = randomised().train(), pictures(8)
    adam = torch.optim.Adam(flow.parameters(), lr=1e-2, fused=True)
    bits = []
    for _ in range(5):
        loss = flow.nll_bits_per_dim(x, 5).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        bits.append(loss.item())
        assert gap(flow, x) < 1e-4
    assert bits[-1] < bits[0]


@torch.no_grad()
def test_samples_follow_the_generator_and_temperature():
    flow = randomised()
    first, again, other = (flow.sample(20, generator=seeded(s)) for s in (3, 3, 4))
    assert first.shape == (20, 3, 16, 16)
    assert torch.equal(first, again) and not torch.equal(first, other)
    frozen = flow.sample(5, temperature=0.0)
    assert (frozen - frozen[0]).abs().max() < 1e-6
    z, _ = flow.encode(flow.sample(20, temperature=0.7, generator=seeded(3)))
    full, _ = flow.encode(first)
    for cool, warm in zip(z, full, strict=True):
        torch.testing.assert_close(cool, 0.7 * warm, rtol=1e-3, atol=1e-3)
    values = torch.cat([part.flatten() for part in full])
    assert abs(values.mean()) < 0.02 and abs(values.std() - 1) < 0.02


def test_zero_conv_scales_its_output():
    conv = ZeroConv(2, 3)
    x = torch.randn(1, 2, 4, 4, generator=seeded(0))
    assert conv(x).abs().max() == 0
    with torch.no_grad():
        conv.weight.normal_(generator=seeded(1))
        conv.bias.normal_(generator=seeded(2))
        conv.log_scale.copy_(torch.tensor([0.0, 0.1, -0.5]))
        plain = nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
        expected = plain * (3 * conv.log_scale).exp()[:, None, None]
    torch.testing.assert_close(conv(x), expected)


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        (lambda: Glow([3, 12, 16], 3, 1, 4), "12×16 pixels .* divisible by 8"),
        (lambda: Glow([3, 8, 8], 2, 1, 4, "cubic"), "coupling 'cubic' is unknown; choose one"),
        (lambda: Glow([3, 8, 8], 0, 1, 4), "at least 1, got n_blocks=0"),
        (lambda: Glow([3, 8, 8], 1, 1, 0), "at least 1, got .* hidden=0"),
        (lambda: randomised().log_prob(torch.zeros(2, 3, 8, 8)), r"\(2, 3, 8, 8\) and wants"),
        (lambda: randomised().log_prob(torch.zeros(3, 16, 16)), r"\(batch, 3, 16, 16\)"),
        (lambda: randomised().log_prob(pictures(1).byte()), "torch.uint8 .* dequantise makes"),
        (lambda: randomised().initialise(pictures(1).byte()), "torch.uint8 .* dequantise makes"),
        (lambda: randomised().decode((torch.zeros(1, 6, 8, 8),)), r"latents of the shapes \[\(6,"),
        (lambda: randomised().sample(1, temperature=-0.1), "standard deviation, got -0.1"),
        (lambda: dequantise(pictures(1), 5), "torch.float32 and wanted torch.uint8"),
        (lambda: to_uint8(pictures(1), 9), "got n_bits=9"),
    ],
)
def test_mistakes_are_sentences(mistake, sentence):
    with pytest.raises(ValueError, match=sentence):
        mistake()
