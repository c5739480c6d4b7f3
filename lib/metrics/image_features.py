"""Features of digits that a ruler measures, no classifier: the width of the pen and the slant.

Both follow the idea of Morpho-MNIST (Castro et al. 2019), thickness and slant of the strokes; the
slant is its formula from image moments, the width is ours, from area and outline. Pictures are
ink (1) on paper (0).
"""

import torch
from torch import Tensor


def ink(images: Tensor) -> Tensor:
    """Separate ink from paper: grey levels below a quarter are paper, above three quarters ink.

    So the grey haze of a decoder does not count, and the half-way outline stays where it is.

    Shapes: ``images`` (n, height, width) or (n, 1, height, width), floats in [0, 1]; returns
    (n, height, width) in [0, 1].
    Raises: ValueError for another shape or range.
    """
    if images.ndim == 4 and images.shape[1] == 1:
        images = images[:, 0]
    if images.ndim != 3 or not len(images):
        raise ValueError(
            f"Got images of shape {tuple(images.shape)}; wanted grey ones, (n, 1, height, width)."
        )
    if not (images.min() >= -1e-3 and images.max() <= 1 + 1e-3):
        raise ValueError(
            f"Got values from {images.min():g} to {images.max():g}; wanted ink 1 on paper 0, so "
            "scale the images to [0, 1]."
        )
    return (2.0 * images.float() - 0.5).clamp(0.0, 1.0)


def stroke_width(images: Tensor) -> Tensor:
    """Measure the mean width of the strokes, in pixels: twice the area over the outline.

    A stroke of length L and width w has the area L w and, with both its sides, an outline of 2 L.
    Area is the sum of ink; the outline is its total variation, which needs no skeleton and no
    threshold. The ends of strokes count as outline, so the width comes out a little small.

    Shapes: as in :func:`ink`; returns (n,), nan for an empty picture.
    """
    drawn = torch.nn.functional.pad(ink(images), (1, 1, 1, 1))
    area = drawn.sum((1, 2))
    # Differences at the corners between four pixels: the same for all directions to a few percent.
    a, b = drawn[:, :-1, :-1], drawn[:, :-1, 1:]
    c, d = drawn[:, 1:, :-1], drawn[:, 1:, 1:]
    outline = (((a - d).square() + (b - c).square()) / 2).sqrt().sum((1, 2))
    return 2.0 * area / outline  # 0 / 0 is nan


def slant(images: Tensor) -> Tensor:
    """Measure how far a digit leans to the right, in degrees; negative to the left.

    It is the angle of the horizontal shear that would set the digit upright: the arc tangent of
    mu_xy / mu_yy, second central moments with y upwards. Shearing a digit by s adds s to its
    tangent, exactly.

    Shapes: as in :func:`ink`; returns (n,), nan for an empty picture and for one of a single row.
    """
    drawn = ink(images).double()
    mass = drawn.sum((1, 2))
    height, width = drawn.shape[1:]
    y = -torch.arange(height, device=drawn.device, dtype=drawn.dtype).view(1, -1, 1)
    x = torch.arange(width, device=drawn.device, dtype=drawn.dtype).view(1, 1, -1)
    y = y - ((drawn * y).sum((1, 2)) / mass).view(-1, 1, 1)
    x = x - ((drawn * x).sum((1, 2)) / mass).view(-1, 1, 1)
    tangent = (drawn * x * y).sum((1, 2)) / (drawn * y * y).sum((1, 2))
    return torch.rad2deg(torch.atan(tangent)).float()


def top_threshold(values: Tensor, share: float = 0.1) -> float:
    """Return the value from which on a picture belongs to the top ``share`` of the data.

    The paper calls the top 10% of a feature that is not binary positive. Take it from the training
    data once, then apply it to samples with :func:`has_top`; for a slant to the left give -slant.

    Shapes: ``values`` (n,); nan (empty pictures) are left out.
    Raises: ValueError if ``share`` is not between 0 and 1 or all values are nan.
    """
    if not 0 < share < 1:
        raise ValueError(f"The share is {share}; it must lie between 0 and 1, the paper has 0.1.")
    measured = values[~values.isnan()]
    if not len(measured):
        raise ValueError(f"None of {len(values)} pictures could be measured; are they empty?")
    n_top = max(1, round(share * len(measured)))
    return float(measured.sort(descending=True).values[n_top - 1])


def has_top(values: Tensor, threshold: float) -> Tensor:
    """Say for each picture whether its feature reaches the threshold; nan never does.

    Shapes: ``values`` (n,); returns booleans (n,).
    """
    return values >= threshold
