"""Has a class been forgotten? What a judge says, and what can be measured without one."""

import torch
from torch import Tensor


def class_probability(logits: Tensor, label: int) -> Tensor:
    """Return a judge's probability (n,) that each image shows ``label``.

    Selective Amnesia's "prob" is the mean over samples of the class to forget.

    Shapes: ``logits`` (n, n_classes). Raises: ValueError if ``label`` is no class of the judge.
    """
    _check_logits(logits)
    if not 0 <= label < logits.shape[1]:
        raise ValueError(
            f"The label is {label}; this judge knows the classes 0 to {logits.shape[1] - 1}."
        )
    return logits.softmax(1)[:, label]


def predictive_entropy(logits: Tensor) -> Tensor:
    """Return the entropy (n,) of a judge's answer to each image, in nats.

    It lies between 0 and log(n_classes), which is 2.303 for ten classes.

    Shapes: ``logits`` (n, n_classes).
    """
    _check_logits(logits)
    log_p = logits.log_softmax(1)
    return -(log_p.exp() * log_p).sum(1)


def ensemble_logits(all_logits: list[Tensor]) -> Tensor:
    """Return the logits of the judges' mean probabilities: (n, n_classes) each, and so is it."""
    mean = torch.stack([logits.softmax(1) for logits in all_logits]).mean(0)
    return mean.clamp_min(torch.finfo(mean.dtype).tiny).log()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the share of images whose likeliest class is their label; ``labels`` is (n,)."""
    _check_logits(logits)
    return float((logits.argmax(1) == labels).double().mean())


def nearest_real_distance(samples: Tensor, real: Tensor, chunk: int = 500) -> Tensor:
    """Return each sample's distance (n,) to the nearest real image: root mean square a pixel.

    Shapes: ``samples`` (n, ...) and ``real`` (m, ...) with images of one shape in one range.
    """
    _check_same_shape(samples, real)
    flat, targets = samples.flatten(1), real.flatten(1)
    nearest = [torch.cdist(part, targets).amin(1) for part in flat.split(chunk)]
    return torch.cat(nearest) / flat.shape[1] ** 0.5


def distance_to_image(samples: Tensor, image: Tensor) -> Tensor:
    """Return each sample's distance (n,) to one image, such as the surrogate's mean.

    The unit is the root mean square a pixel, as in :func:`nearest_real_distance`.

    Shapes: ``samples`` (n, ...), ``image`` without the first dimension.
    """
    _check_same_shape(samples, image.unsqueeze(0))
    return (samples - image).flatten(1).square().mean(1).sqrt()


def _check_logits(logits: Tensor) -> None:
    if logits.ndim != 2 or not len(logits) or not torch.isfinite(logits).all():
        raise ValueError(
            f"The logits have shape {tuple(logits.shape)} or are not finite; give a judge's "
            "(n, n_classes) output for at least one image."
        )


def _check_same_shape(samples: Tensor, others: Tensor) -> None:
    if samples.shape[1:] != others.shape[1:]:
        raise ValueError(
            f"The images have shapes {tuple(samples.shape[1:])} and {tuple(others.shape[1:])}; "
            "compare images of one shape."
        )
