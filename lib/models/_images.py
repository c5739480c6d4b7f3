"""The check that image models make of what they are given."""

from torch import Tensor


def check_images(
    x: Tensor, image_shape: tuple[int, ...], low: float, high: float, wanted: str
) -> None:
    """Raise ValueError unless ``x`` is a float batch of ``image_shape`` in [low, high].

    ``wanted`` ends the sentence about the range: what the model wants, and what to do.
    """
    if tuple(x.shape[1:]) != image_shape or not x.is_floating_point():
        raise ValueError(
            f"The images are {x.dtype} of shape {tuple(x.shape)}; the model wants floats of "
            f"shape (batch, {', '.join(map(str, image_shape))})."
        )
    least, most = (value.item() for value in x.aminmax()) if x.numel() else (0.0, 0.0)
    if not (least >= low and most <= high):  # also catches NaN
        raise ValueError(f"The images hold values from {least:g} to {most:g}; {wanted}.")
