"""Every formula of Feature Unlearning by hand and with planted errors, and what they do."""

import inspect
import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from lib.methods import feature_unlearning
from lib.methods.feature_unlearning import (
    BETAS,
    Feature,
    UnlearningSettings,
    edited_latent,
    erased_latent,
    find_feature,
    indicator,
    join_layers,
    ms_ssim_options,
    perceptual_loss,
    projection,
    reconstruction_loss,
    split_layers,
    target_vector,
    threshold,
    unlearn_loss,
    unlearning_loss,
)
from lib.methods.selection import Marks, marks_of

Z_E = torch.tensor([3.0, 4.0])  # length 5
Z = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, -2.0]])  # projections 5, 0.6, -1.6
POSITIVE = torch.tensor([[4.0, 1.0], [2.0, 3.0]])
NEGATIVE = torch.tensor([[0.0, -2.0]])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(seed: int, n: int = 4, size: int = 28, channels: int = 1) -> torch.Tensor:
    """Draw smooth pictures in [-1, 1], in which every scale has structure."""
    noise = torch.rand(n, channels, size, size, generator=seeded(seed))
    smooth = ndimage.gaussian_filter(noise.numpy(), (0, 0, 2, 2))
    low, high = smooth.min(), smooth.max()
    return torch.tensor(2 * (smooth - low) / (high - low) - 1)


# The formulas


def check_target_vector(function):
    assert function(POSITIVE, NEGATIVE, normalise=False).tolist() == [3.0, 4.0]
    unit = function(POSITIVE, NEGATIVE, normalise=True)
    assert unit.tolist() == pytest.approx([0.6, 0.8])


def check_projection(function):
    assert function(Z, Z_E).tolist() == pytest.approx([5.0, 0.6, -1.6])
    assert function(Z, 10 * Z_E).tolist() == pytest.approx([5.0, 0.6, -1.6])


def check_threshold(function):
    # (4 * 3 + 1 * 4) / 5 = 3.2, then 3.6 and -1.6
    assert function(POSITIVE, NEGATIVE, Z_E).item() == pytest.approx((3.2 + 3.6 - 1.6) / 3)
    assert function(POSITIVE, NEGATIVE, Z_E, percentile=50).item() == pytest.approx(3.2)


def check_indicator(function):
    assert function(Z, Z_E, 0.5).tolist() == [1.0, 1.0, 0.0]
    assert function(Z[:1], Z_E, 5.0).tolist() == [1.0]  # from the threshold ON


def check_erased_latent(function):
    unit = Z_E / 5
    erased = function(Z, unit, 1.0)
    assert (erased @ unit).tolist() == pytest.approx([1.0, 1.0, 1.0], abs=1e-6)
    across = torch.tensor([-0.8, 0.6])
    assert (erased @ across).tolist() == pytest.approx((Z @ across).tolist(), abs=1e-6)
    # As written, without a unit vector: proj - (proj - t) * 5.
    wrong = function(Z, Z_E, 1.0) @ Z_E / 5
    assert wrong.tolist() == pytest.approx([5 - 4 * 5, 0.6 + 0.4 * 5, -1.6 + 2.6 * 5])


SIM = torch.tensor([1.0, 0.0, 0.0, 1.0])
G_IMAGES, F_IMAGES, F_ERASED = (pictures(seed) for seed in (0, 1, 2))


def slow_l1(a, b, chosen):
    total = sum(np.abs((a[i] - b[i]).numpy()).mean() for i in chosen)
    return pytest.approx(total / 4, rel=1e-5)


def check_reconstruction_loss(function):
    assert function(G_IMAGES, F_IMAGES, SIM).item() == slow_l1(G_IMAGES, F_IMAGES, (1, 2))


def check_unlearn_loss(function):
    assert function(G_IMAGES, F_ERASED, SIM).item() == slow_l1(G_IMAGES, F_ERASED, (0, 3))


def slow_ms_ssim(x: np.ndarray, y: np.ndarray) -> float:
    """Compute MS-SSIM of two grey pictures in [0, 1], 3 scales, window 7, sigma 0.8."""
    c1, c2, product = 0.01**2, 0.03**2, 1.0

    def blur(image):
        return ndimage.gaussian_filter(image, 0.8, mode="mirror", truncate=3.75)

    for scale in range(3):
        mean_x, mean_y = blur(x), blur(y)
        var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
        structure = (2 * (blur(x * y) - mean_x * mean_y) + c2) / (var_x + var_y + c2)
        value = structure[3:-3, 3:-3].mean()
        if scale == 2:
            brightness = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
            value = (brightness * structure).mean()
        product *= max(value, 0.0) ** (BETAS[scale] / sum(BETAS[:3]))
        x, y = (
            (a.reshape(len(a) // 2, 2, -1, 2).mean((1, 3)) for a in (x, y)) if scale < 2 else (x, y)
        )
    return product


def check_perceptual_loss(function):
    similar = (0.7 * F_ERASED + 0.3 * G_IMAGES).double()
    wanted = F_ERASED.double()
    as_grey = [((x + 1) / 2).numpy()[:, 0] for x in (similar, wanted)]
    losses = [1 - slow_ms_ssim(x, y) for x, y in zip(*as_grey, strict=True)]
    assert 0.02 < losses[0] < 0.5
    got = function(similar, wanted, SIM).item()
    assert got == pytest.approx((losses[0] + losses[3]) / 4, rel=1e-4)
    shifted = [(x + 1) / 2 for x in (similar, wanted)]
    assert function(*shifted, SIM, (0.0, 1.0)).item() == pytest.approx(got, rel=1e-4)


def check_unlearning_loss(function):
    total, terms = function(G_IMAGES, F_IMAGES, F_ERASED, SIM, alpha=0.3)
    assert terms.keys() == {"recon", "unlearn", "percep"}
    assert terms["recon"] == reconstruction_loss(G_IMAGES, F_IMAGES, SIM)
    assert terms["unlearn"] == unlearn_loss(G_IMAGES, F_ERASED, SIM)
    assert terms["percep"] == perceptual_loss(G_IMAGES, F_ERASED, SIM)
    recon, forget = terms["recon"].item(), terms["unlearn"].item() + terms["percep"].item()
    assert total.item() == pytest.approx(recon + 0.3 * forget)


CHECKS = {
    target_vector: check_target_vector,
    projection: check_projection,
    threshold: check_threshold,
    indicator: check_indicator,
    erased_latent: check_erased_latent,
    reconstruction_loss: check_reconstruction_loss,
    unlearn_loss: check_unlearn_loss,
    perceptual_loss: check_perceptual_loss,
    unlearning_loss: check_unlearning_loss,
}
PLANTED = [
    (target_vector, "z_positive.mean(0) - z_negative", "z_negative.mean(0) - z_positive"),
    (target_vector, "if normalise", "if not normalise"),
    (projection, " / _check_length(z_e)", ""),
    (threshold, "torch.cat((z_positive, z_negative))", "z_positive"),
    (threshold, "torch.cat((z_positive, z_negative))", "z_negative"),
    (threshold, "shown.mean()", "shown.median()"),
    (indicator, ">= t", "> t"),
    (indicator, ">= t", "< t"),
    (erased_latent, "- (projection", "+ (projection"),
    (erased_latent, " - t)", ")"),
    (reconstruction_loss, "1.0 - sim", "sim"),
    (reconstruction_loss, ").mean()", ").sum()"),
    (unlearn_loss, "sim *", "(1 - sim) *"),
    (unlearn_loss, ".mean()", ".sum() / sim.sum()"),
    (perceptual_loss, "(1.0 - similarity)", "similarity"),
    (perceptual_loss, "/ len(sim)", "/ sim.sum()"),
    (perceptual_loss, "(x[has_feature].float() - low) / (high - low)", "x[has_feature]"),
    (perceptual_loss, "sim > 0", "sim < 1"),
    (unlearning_loss, 'alpha * (kept["unlearn"] + kept["percep"])', 'alpha * kept["unlearn"]'),
    (unlearning_loss, '+ kept["recon"]', '+ (1 - alpha) * kept["recon"]'),
]


@pytest.mark.parametrize("function", CHECKS)
def test_formula(function):
    CHECKS[function](function)


@pytest.mark.parametrize(("function", "right", "wrong"), PLANTED)
def test_a_planted_error_is_noticed(function, right, wrong):
    source = inspect.getsource(function)
    assert right in source
    namespace = dict(vars(feature_unlearning))
    exec(source.replace(right, wrong), namespace)
    with pytest.raises(AssertionError):
        CHECKS[function](namespace[function.__name__])


@pytest.mark.parametrize("length", [0.5, 1.0, 1.5, 2.0, 3.0])
def test_only_a_vector_of_length_one_lands_on_the_threshold(length):
    z_e, t = length * Z_E / 5, 0.25
    z = torch.randn(50, 2, generator=seeded())
    before, after = projection(z, z_e) - t, projection(erased_latent(z, z_e, t), z_e) - t
    assert torch.allclose(after, (1 - length) * before, atol=1e-6)
    assert (after.abs() > before.abs() + 1e-6).any() == (length > 2)


def test_the_mean_threshold_selects_half_of_the_prior_where_a_tenth_is_marked():
    """The paper's threshold moves with the balance of the marks, a percentile does not need to."""
    z = torch.randn(4000, 8, generator=seeded())
    marks = marks_of(z[:, 0] > z[:, 0].quantile(0.9))
    mean = find_feature(*marks.split(z), normalise=True)
    percentile = find_feature(*marks.split(z), normalise=True, percentile=90)
    fresh = torch.randn(4000, 8, generator=seeded(1))
    assert indicator(fresh, *mean).mean().item() == pytest.approx(0.5, abs=0.03)
    assert indicator(fresh, *percentile).mean().item() == pytest.approx(0.1, abs=0.02)
    balanced = Marks(marks.positives, marks.negatives[: len(marks.positives)])
    higher = find_feature(*balanced.split(z), normalise=True)
    assert indicator(fresh, *higher).mean().item() < 0.3
    assert mean.z_e[0] > 0.99


def test_only_latents_with_a_feature_are_edited_and_two_features_both_go():
    first = Feature(torch.tensor([1.0, 0.0, 0.0]), torch.tensor(0.5))
    second = Feature(torch.tensor([0.0, 1.0, 0.0]), torch.tensor(-0.5))
    z = torch.randn(200, 3, generator=seeded())
    edited, changed = edited_latent(z, [first, second])
    assert torch.allclose(
        edited, torch.stack((z[:, 0].clamp(max=0.5), z[:, 1].clamp(max=-0.5), z[:, 2]), 1)
    )
    assert (changed == ((z[:, 0] >= 0.5) | (z[:, 1] >= -0.5))).all()
    assert (edited[changed == 0] == z[changed == 0]).all()


def test_layers_are_joined_and_split():
    layers = (torch.rand(5, 2), torch.rand(5, 3))
    joined = join_layers(layers)
    assert joined.shape == (5, 5)
    for found, wanted in zip(split_layers(joined, (2, 3)), layers, strict=True):
        assert (found == wanted).all()


# MS-SSIM at the sizes of this book


@pytest.mark.parametrize(
    ("size", "scales", "window"),
    [(8, 2, 7), (28, 3, 7), (32, 3, 7), (44, 3, 11), (64, 3, 11), (99, 4, 11), (176, 5, 11)],
)
def test_ms_ssim_has_the_scales_that_fit(size, scales, window):
    options = ms_ssim_options(size, size + 1)
    assert (len(options["betas"]), options["kernel_size"]) == (scales, window)
    assert sum(options["betas"]) == pytest.approx(1.0, abs=2e-4)
    assert int(3.5 * options["sigma"] + 0.5) * 2 + 1 == window  # what torchmetrics makes of sigma
    a, b = (pictures(seed, 2, size, channels=3) for seed in (0, 1))
    sim = torch.ones(2)
    assert perceptual_loss(a, a, sim).item() == pytest.approx(0.0, abs=1e-5)
    assert 0.1 < perceptual_loss(a, b, sim).item() <= 1.0


def test_a_negative_print_counts_as_wholly_different_and_leaves_the_gradient_finite():
    wanted = pictures(0)
    drawn = (-wanted).requires_grad_()
    loss = perceptual_loss(drawn, wanted, torch.ones(4))
    loss.backward()
    assert loss.item() == 1.0
    assert torch.isfinite(drawn.grad).all()


@pytest.mark.parametrize("without", [(), ("recon",)])
def test_a_batch_without_the_feature_can_be_differentiated(without):
    drawn = pictures(0).requires_grad_()
    total, terms = unlearning_loss(drawn, pictures(1), pictures(1), torch.zeros(4), 1.0, without)
    total.backward()
    assert terms["percep"] == 0.0 and torch.isfinite(drawn.grad).all()


ONES, NONE = torch.ones(3, 2), torch.ones(0, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: target_vector(NONE, ONES, True), "no positive latents, all pictures are unmarked"),
        (lambda: target_vector(ONES, NONE, True), "no negative latents, all pictures are marked"),
        (lambda: threshold(NONE, ONES, Z_E), "no positive latents"),
        (lambda: target_vector(ONES, torch.ones(3, 4), True), r"shapes \(3, 2\) and \(3, 4\)"),
        (lambda: target_vector(ONES, ONES, True), "length 0, so it points nowhere"),
        (lambda: target_vector(ONES * torch.nan, ONES, True), "length nan"),
        (lambda: projection(ONES, torch.ones(3)), r"shape \(3, 2\) and the target vector \(3,\)"),
        (lambda: erased_latent(ONES[0], Z_E, 0.0), "wanted \\(n, dim\\) and \\(dim,\\)"),
        (lambda: projection(ONES, torch.zeros(2)), "points nowhere"),
        (lambda: threshold(ONES, ONES, Z_E, percentile=100), "percentile is 100"),
        (lambda: split_layers(ONES, (1, 2)), "add up to 3, but the latents have 2"),
        (lambda: ms_ssim_options(28, 7), "images of 28×7, wanted at least 8×8"),
        (lambda: UnlearningSettings(alpha=-0.1), "alpha is -0.1; it must be at least 0"),
        (lambda: UnlearningSettings(alpha=math.nan), "alpha is nan"),
        (lambda: UnlearningSettings(without=("l1",)), "no loss l1; there are recon"),
        (
            lambda: unlearning_loss(G_IMAGES, F_IMAGES, F_ERASED, SIM, -1.0),
            "alpha is -1.0; it must be at least 0",
        ),
        (lambda: unlearning_loss(G_IMAGES, F_IMAGES[:2], F_ERASED, SIM, 1.0), "one sim for each"),
    ],
)
def test_bad_input_is_named_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
