"""How close samples are to real images, seen through a named feature extractor.

A Fréchet distance means nothing without its extractor, the number of samples and the preprocessing:
other preprocessing alone changes it by a factor, and fewer samples make it larger. So features come
with a name, which goes into the ``feature_extractor`` of the rows, and the distance is never called
FID unless :func:`inception` is the extractor.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class PrecisionRecall(NamedTuple):
    """The share of samples that look real, and the share of real images that are covered."""

    precision: float
    recall: float


@torch.no_grad()
def extract_features(
    model: nn.Module, images: Tensor, weights: str, batch: int = 500
) -> tuple[Tensor, str]:
    """Return the features (n, d) of images in evaluation mode, and the name of their extractor.

    ``model`` has a method ``features`` for floats in [0, 1] of its ``image_shape``; ``weights``
    names the weights it holds, such as ``classifier_avatars``, and begins the extractor's name.

    Shapes: ``images`` (n, *image_shape), uint8 or floats in [0, 1].
    Raises: ValueError if there are no images, or they have another shape or range.
    """
    shape = tuple(model.image_shape)
    if not len(images) or tuple(images.shape[1:]) != shape:
        wanted = ", ".join(["n", *map(str, shape)])
        raise ValueError(
            f"The extractor {weights} got images of shape {tuple(images.shape)}; it wants at least "
            f"one, of shape ({wanted})."
        )
    is_float = images.is_floating_point()
    if not is_float and images.dtype != torch.uint8:
        raise ValueError(f"Got {images.dtype} images; give uint8, or floats in [0, 1].")
    if is_float and not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"Got values from {images.min():g} to {images.max():g}; give floats in [0, 1] or uint8."
        )
    was_training = model.training
    model.eval()
    parts = (part if is_float else part.float() / 255 for part in images.split(batch))
    features = torch.cat([model.features(part) for part in parts])
    model.train(was_training)
    size = "×".join(map(str, shape))
    kind = type(model).__name__
    return features, f"{weights} ({kind}, {features.shape[1]} features of {size} in [0, 1])"


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Return the squared Fréchet distance between Gaussians fitted to two sets of features.

    It is |μ_a - μ_b|² + tr(Σ_a + Σ_b - 2(Σ_a Σ_b)^½) (Heusel et al. 2017), symmetric, and biased:
    the fewer samples, the larger. Compare only distances of one extractor at one number of samples,
    larger than the number of features.

    Shapes: (n, d) and (m, d) with n, m ≥ 2. Computed by torchmetrics in float64.
    Raises: ValueError if a set is too small, not finite, or the features are not the same.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance  # takes seconds to import

    _check(features_a, features_b, at_least=2)
    given = nn.Identity()
    given.num_features = features_a.shape[1]
    distance = FrechetInceptionDistance(given).to(features_a.device)
    distance.update(features_a.double(), real=True)
    distance.update(features_b.double(), real=False)
    return float(distance.compute())


def precision_recall(
    real_features: Tensor, fake_features: Tensor, k: int = 3, chunk: int = 1000
) -> PrecisionRecall:
    """Return precision and recall with nearest-neighbour manifolds (Kynkäänniemi et al. 2019).

    A set's manifold is the union of balls around its points, each as large as the distance to the
    ``k``-th nearest other point of the set. Precision is the share of the FAKE set in the manifold
    of the REAL one, recall the share of the REAL set in the manifold of the FAKE one; exchanging
    the arguments exchanges the two (as the code of Selective Amnesia does).

    Shapes: (n, d) and (m, d) with n, m > k.
    Raises: ValueError if a set is too small, not finite, or the features are not the same.
    """
    if k < 1:
        raise ValueError(f"Got k = {k}; the nearest neighbour is the first, k = 1.")
    _check(real_features, fake_features, at_least=k + 1)
    real, fake = real_features.double(), fake_features.double()
    return PrecisionRecall(
        precision=_share_inside(fake, real, k, chunk), recall=_share_inside(real, fake, k, chunk)
    )


def inception_score(logits: Tensor) -> float:
    """Return how sure a judge is of each image and how varied its answers are, as one number.

    It is exp(E KL(p(y|x) || p(y))) (Salimans et al. 2016), between 1 and the number of classes. The
    published score has the classes of ImageNet; name the judge with any other.

    Shapes: ``logits`` (n, n_classes).
    Raises: ValueError if there are no logits, fewer than two classes, or they are not finite.
    """
    if logits.ndim != 2 or not len(logits) or logits.shape[1] < 2 or not logits.isfinite().all():
        raise ValueError(
            f"Got logits of shape {tuple(logits.shape)}; give finite ones of shape (n, n_classes) "
            "of a judge that tells at least two classes."
        )
    log_p = logits.double().log_softmax(1)
    log_marginal = log_p.logsumexp(0) - math.log(len(log_p))
    return float((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())


class Inception(nn.Module):
    """Give torchmetrics' Inception network the interface that :func:`extract_features` wants."""

    def __init__(self, network: nn.Module, image_shape: tuple[int, int, int]):
        super().__init__()
        self.network, self.image_shape = network, tuple(image_shape)

    def features(self, x: Tensor) -> Tensor:
        """Return the 2048 features of images in [0, 1], which the network takes as uint8."""
        return self.network((x * 255).round().to(torch.uint8))


def inception(image_shape: tuple[int, int, int]) -> Inception:
    """Return the Inception network of the published FID, an extractor for images of one shape.

    Its ``weights`` are ``inception-v3-compat``; it resizes to 299×299 with the antialiased bilinear
    filter of torchmetrics.

    Raises: RuntimeError if its weights cannot be had.
    """
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"])
    except (ModuleNotFoundError, OSError) as error:
        raise RuntimeError(
            "Inception's weights cannot be had here; install torch-fidelity and go online once so "
            "that it downloads them, or take the features of a shipped judge and name it."
        ) from error
    return Inception(network, image_shape)


def _share_inside(points: Tensor, centres: Tensor, k: int, chunk: int) -> float:
    """Return the share of ``points`` in the manifold of ``centres``."""
    # Its own nearest is the point itself, at exactly 0 by this way of computing distances.
    radii = torch.cat(
        [_distances(part, centres).kthvalue(k + 1, dim=1).values for part in centres.split(chunk)]
    )
    inside = [(_distances(part, centres) <= radii).any(1) for part in points.split(chunk)]
    return float(torch.cat(inside).double().mean())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _check(first: Tensor, second: Tensor, at_least: int) -> None:
    for features in (first, second):
        if features.ndim != 2 or len(features) < at_least or not torch.isfinite(features).all():
            raise ValueError(
                f"Got features of shape {tuple(features.shape)}; give finite ones of shape (n, d) "
                f"with n at least {at_least}."
            )
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"Got {first.shape[1]} and {second.shape[1]} features; extract both sets with one "
            "extractor."
        )
