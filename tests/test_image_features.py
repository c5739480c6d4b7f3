"""The width and slant of strokes on drawn shapes with known answers, and on real digits."""

import inspect

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.datasets import load_digits

from lib.metrics import image_features
from lib.metrics.image_features import has_top, ink, slant, stroke_width, top_threshold


def bar(width: float, degrees: float = 0.0, size: int = 64, length: float = 40.0) -> torch.Tensor:
    """Draw an anti-aliased bar, turned clockwise from upright (so it leans right): (1, s, s)."""
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    angle = np.deg2rad(degrees)
    across = np.abs(x * np.cos(angle) + y * np.sin(angle))
    along = np.abs(-x * np.sin(angle) + y * np.cos(angle))
    inside = np.clip(width / 2 - across + 0.5, 0, 1) * np.clip(length / 2 - along + 0.5, 0, 1)
    return torch.tensor(inside, dtype=torch.float32).unsqueeze(0)


def digits(n: int = 100) -> torch.Tensor:
    """Return scikit-learn's digits at 32 px, as (n, 1, 32, 32)."""
    images = torch.tensor(load_digits().images[:n] / 16.0, dtype=torch.float32).unsqueeze(1)
    large = torch.nn.functional.interpolate(images, size=(24, 24), mode="bicubic")
    return torch.nn.functional.pad(large.clamp(0, 1), (4, 4, 4, 4))


def sheared(images: torch.Tensor, s: float) -> torch.Tensor:
    """Move each row of (n, 1, h, w) right by s times its height above the middle."""
    height = images.shape[-2]
    shift = [-s * (row - (height - 1) / 2) for row in range(height)]
    rows = [
        ndimage.shift(images[:, 0, row].numpy(), (0, shift[row]), order=1) for row in range(height)
    ]
    return torch.tensor(np.stack(rows, axis=1)).unsqueeze(1)


def check_width(function):
    for width in (2.0, 3.0, 5.0, 8.0):
        straight = width * 40 / (40 + width)  # the ends are outline too
        assert function(bar(width)).item() == pytest.approx(straight, rel=0.06)


def check_slant(function):
    assert function(bar(3.0, 20.0)).item() == pytest.approx(20.0, abs=0.5)
    assert function(bar(3.0, -35.0)).item() == pytest.approx(-35.0, abs=0.5)


@pytest.mark.parametrize("degrees", [0, 20, 45, 70, 90])
def test_width_is_that_of_the_bar_in_every_direction(degrees):
    check_width(stroke_width)
    upright = stroke_width(bar(4.0)).item()
    assert stroke_width(bar(4.0, degrees)).item() == pytest.approx(upright, rel=0.06)


@pytest.mark.parametrize("degrees", [-40, -10, 0, 5, 30])
def test_slant_is_the_angle_of_the_bar(degrees):
    check_slant(slant)
    assert slant(bar(2.0, degrees)).item() == pytest.approx(degrees, abs=0.5)


PLANTED = [
    (stroke_width, "2.0 * area", "area"),
    (stroke_width, "(b - c).square()", "0"),
    (stroke_width, "(1, 1, 1, 1)", "(-30, -30, 0, 0)"),
    (slant, "-torch.arange", "torch.arange"),
    (slant, "x * y", "x * x"),
    (slant, "(drawn * y * y)", "(drawn * x * x)"),
]


@pytest.mark.parametrize(("function", "right", "wrong"), PLANTED)
def test_a_planted_error_is_noticed(function, right, wrong):
    source = inspect.getsource(function)
    assert right in source
    namespace = dict(vars(image_features))
    exec(source.replace(right, wrong), namespace)
    check = {stroke_width: check_width, slant: check_slant}[function]
    with pytest.raises(AssertionError):
        check(namespace[function.__name__])


def test_a_shear_adds_to_the_tangent_of_the_slant():
    images = digits()
    # Steeper grey levels change under the shear's interpolation, so the law is not quite exact.
    before = torch.tan(torch.deg2rad(slant(images)))
    for s in (-0.4, 0.25):
        after = torch.tan(torch.deg2rad(slant(sheared(images, s))))
        assert (after - before - s).abs().max() < 0.05
        assert (after - before - s).abs().mean() < 0.01


def test_dilated_digits_are_wider_and_eroded_ones_thinner():
    images = digits()
    grey = images[:, 0].numpy()
    wide = torch.tensor(ndimage.grey_dilation(grey, size=(1, 3, 3)))
    thin = torch.tensor(ndimage.grey_erosion(grey, size=(1, 2, 2)))
    width = stroke_width(images)
    assert (stroke_width(wide) > width + 0.8).all()
    assert (stroke_width(thin) < width).double().mean() > 0.98


def test_width_agrees_with_the_distance_transform():
    """Inside a stroke of width w the mean distance to its edge is w / 4."""
    images = digits()
    fine = torch.nn.functional.interpolate(images, scale_factor=8, mode="bilinear")[:, 0]
    drawn = ink(fine).numpy() > 0.5
    inside = [ndimage.distance_transform_edt(picture) for picture in drawn]
    wanted = np.array([4 * d[d > 0].mean() / 8 for d in inside])
    got = stroke_width(images).numpy()
    assert np.corrcoef(got, wanted)[0, 1] > 0.9
    assert np.abs(got / wanted - 1).mean() < 0.15


def test_haze_and_faint_ink_do_not_count():
    images = digits()
    faint = images.clamp(0.2, 0.8)
    assert torch.allclose(stroke_width(faint), stroke_width(images))
    assert torch.allclose(slant(faint), slant(images))
    assert slant(0.2 * torch.rand(3, 28, 28)).isnan().all()  # no ink at all


def test_both_ignore_where_the_digit_stands_and_mirror():
    images = digits()
    moved = images.roll((2, -3), dims=(2, 3))
    assert torch.allclose(stroke_width(moved), stroke_width(images), rtol=1e-4)
    assert torch.allclose(slant(moved), slant(images), atol=1e-3)
    assert torch.allclose(slant(images.flip(3)), -slant(images), atol=1e-3)


def test_empty_pictures_have_no_width_and_are_never_at_the_top():
    width = stroke_width(torch.stack((torch.zeros(1, 28, 28), digits(1)[0, :, 2:30, 2:30])))
    assert width.isnan().tolist() == [True, False]
    assert has_top(width, 0.0).tolist() == [False, True]


@pytest.mark.parametrize("share", [0.1, 0.25])
def test_the_top_share_is_a_share_of_the_data(share):
    values = stroke_width(digits(200))
    values[7] = torch.nan
    top = has_top(values, top_threshold(values, share))
    assert top.sum() == round(share * 199)
    assert values[top].min() > values[~top].nan_to_num(0).max()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ink(torch.zeros(2, 3, 8, 8)), r"shape \(2, 3, 8, 8\); wanted grey"),
        (lambda: ink(torch.zeros(0, 1, 8, 8)), "wanted grey"),
        (lambda: slant(-torch.ones(2, 8, 8)), "from -1 to -1; wanted ink 1"),
        (lambda: stroke_width(torch.full((2, 8, 8), 255.0)), "to 255; wanted ink 1"),
        (lambda: stroke_width(torch.full((2, 8, 8), torch.nan)), "wanted ink 1"),
        (lambda: top_threshold(torch.ones(3), 10), "share is 10"),
        (lambda: top_threshold(torch.full((3,), torch.nan)), "None of 3 pictures"),
    ],
)
def test_bad_input_is_named_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
