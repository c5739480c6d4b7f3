"""Small image classifiers: three judges of digits and one of faces.

The judge of Selective Amnesia and two others to compare its opinion with map grey images
(batch, 1, 28, 28) in [0, 1] to logits (batch, n_classes); ``n_classes`` may hold one class more
than the data, for images that show nothing. :class:`FaceCNN` maps colour images to one logit an
attribute or an identity. Each declares the images it wants as ``image_shape``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class DigitJudge(nn.Sequential):
    """A judge of digits: a plain sequence of layers, the last of which is linear."""

    image_shape = (1, 28, 28)

    def features(self, x: Tensor) -> Tensor:
        """Return what the logits are linear in (batch, n), of images in [0, 1]."""
        for layer in list(self)[:-1]:
            x = layer(x)
        return x


class SmallCNN(DigitJudge):
    """Judge a digit as Heng & Soh (2023) do: two convolutions (10, 20), batch norm and dropout."""

    def __init__(self, n_classes: int = 10, dropout: float = 0.5):
        _check(n_classes, dropout)
        super().__init__(
            nn.Conv2d(1, 10, 5),
            nn.BatchNorm2d(10),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(10, 20, 5),
            nn.BatchNorm2d(20),
            nn.Dropout2d(dropout),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(320, 50),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(50, n_classes),
        )


class LeNet(DigitJudge):
    """Judge a digit with LeNet-5 (LeCun et al. 1998), with ReLU units and max pooling."""

    def __init__(self, n_classes: int = 10, dropout: float = 0.0):
        _check(n_classes, dropout)
        super().__init__(
            nn.Conv2d(1, 6, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(400, 120),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, n_classes),
        )


class MLP(DigitJudge):
    """Judge a digit without convolutions: 784 -> 256 -> 128 -> classes."""

    def __init__(self, n_classes: int = 10, dropout: float = 0.0):
        _check(n_classes, dropout)
        super().__init__(
            nn.Flatten(),
            nn.Linear(784, 256),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(256, 128),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(128, n_classes),
        )


class FaceCNN(nn.Module):
    """Judge a face: one logit an attribute, each for itself (sigmoid), or an identity (softmax).

    Three stages of convolutions, each of which halves the sides, then ``N_FEATURES`` features of
    which the logits are linear. ``names`` says what the logits stand for, in their order.

    Shapes: floats (batch, *image_shape) in [0, 1]; returns logits (batch, n_logits).
    Raises: ValueError if there is no logit, the names are not as many as the logits, the dropout is
    not in [0, 1), or the sides are not multiples of 8.
    """

    N_FEATURES = 128

    def __init__(
        self,
        n_logits: int,
        image_shape: Sequence[int] = (3, 32, 32),
        names: Sequence[str] = (),
        dropout: float = 0.0,
    ):
        super().__init__()
        channels, height, width = image_shape
        if n_logits < 1 or (names and len(names) != n_logits) or not 0 <= dropout < 1:
            raise ValueError(
                f"Got n_logits {n_logits}, {len(names)} names and dropout {dropout}; a judge of "
                "faces wants at least one logit, no names or one a logit, and a dropout in [0, 1)."
            )
        if not height or not width or height % 8 or width % 8:
            raise ValueError(f"Got images of {height}×{width}; the sides must be multiples of 8.")
        self.image_shape, self.names = (channels, height, width), tuple(names)
        exact = (height, width) == (32, 32)
        self.body = nn.Sequential(
            *_convolution(channels, 16, halve=True),
            *_convolution(16, 32),
            *_convolution(32, 32, halve=True),
            *_convolution(32, 64),
            *_convolution(64, 64, halve=True),
            nn.Identity() if exact else nn.AdaptiveAvgPool2d(4),  # from 32×32 it is 4×4 already
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(64 * 4 * 4, self.N_FEATURES, bias=False),
            nn.BatchNorm1d(self.N_FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(self.N_FEATURES, n_logits)

    def features(self, x: Tensor) -> Tensor:
        """Return the penultimate layer (batch, N_FEATURES), which is never negative."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (batch, n_logits)."""
        return self.head(self.features(x))


ARCHITECTURES = {"cnn": SmallCNN, "lenet": LeNet, "mlp": MLP}


@torch.no_grad()
def predict_logits(judge: nn.Module, images: Tensor, batch: int = 1000) -> Tensor:
    """Return a judge's logits (n, n_logits) in evaluation mode, whatever mode it was in.

    Raises: ValueError if the images are not floats in [0, 1] of the judge's ``image_shape``.
    """
    shape = tuple(judge.image_shape)
    if tuple(images.shape[1:]) != shape or not images.is_floating_point():
        wanted = ", ".join(["n", *map(str, shape)])
        raise ValueError(
            f"The judge got {images.dtype} images of shape {tuple(images.shape)}; it wants floats "
            f"of shape ({wanted})."
        )
    if not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"The judge got values from {images.min():g} to {images.max():g}; it was trained on "
            "values in [0, 1]: divide uint8 images by 255."
        )
    was_training = judge.training
    judge.eval()
    logits = torch.cat([judge(part) for part in images.split(batch)])
    judge.train(was_training)
    return logits


def _convolution(n_in: int, n_out: int, halve: bool = False) -> list[nn.Module]:
    # Pooled before it is normalised: nearly the same, and a third faster to train.
    pool = [nn.MaxPool2d(2)] if halve else []
    convolution = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)
    return [convolution, *pool, nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]


def _check(n_classes: int, dropout: float) -> None:
    if n_classes < 2 or not 0 <= dropout < 1:
        raise ValueError(
            f"Got n_classes {n_classes} and dropout {dropout}; a judge wants at least 2 classes "
            "and a dropout in [0, 1)."
        )
