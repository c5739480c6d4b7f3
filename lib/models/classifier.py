"""Small image classifiers: the paper's judge, and two others to compare its opinion with.

Each maps grey images (batch, 1, 28, 28) in [0, 1] to logits (batch, n_classes).
``n_classes`` may hold one class more than the data, for images that show nothing.
"""

import torch
from torch import Tensor, nn


class SmallCNN(nn.Sequential):
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


class LeNet(nn.Sequential):
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


class MLP(nn.Sequential):
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


ARCHITECTURES = {"cnn": SmallCNN, "lenet": LeNet, "mlp": MLP}


@torch.no_grad()
def predict_logits(judge: nn.Module, images: Tensor, batch: int = 1000) -> Tensor:
    """Return a judge's logits (n, n_classes) in evaluation mode, whatever mode it was in.

    Raises: ValueError if the images are not (n, 1, 28, 28) floats in [0, 1].
    """
    if tuple(images.shape[1:]) != (1, 28, 28) or not images.is_floating_point():
        raise ValueError(
            f"The judge got {images.dtype} images of shape {tuple(images.shape)}; it wants floats "
            "of shape (n, 1, 28, 28)."
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


def _check(n_classes: int, dropout: float) -> None:
    if n_classes < 2 or not 0 <= dropout < 1:
        raise ValueError(
            f"Got n_classes {n_classes} and dropout {dropout}; a judge wants at least 2 classes "
            "and a dropout in [0, 1)."
        )
