"""Is a person still drawn, is it still a face, and does the picture fit its prompt?

Pictures are uint8 tensors (n, 3, height, width). A face detector is anything that returns, for
each picture, the boxes of its faces.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

Probability = Callable[[list[Tensor]], Tensor]


class FaceDetector(Protocol):
    """Find faces: one tensor (faces, 4) of whole numbers a picture, left, top, right, bottom.

    Right and bottom lie outside of the face, as in slices; a picture without a face has (0, 4).
    """

    def __call__(self, images: Tensor) -> list[Tensor]: ...


class CascadeFaces:
    """Find frontal faces with OpenCV's cascade, which comes with the package and needs no weights.

    ``neighbours`` is how many of its overlapping hits make a face: more are stricter.
    Raises: ImportError if OpenCV is not installed, or a version from 5 on.
    """

    def __init__(self, neighbours: int = 5, smallest: int = 24):
        try:
            import cv2
        except ImportError:
            raise ImportError(
                "The face detector needs OpenCV, which is not installed; run 'pip install "
                "opencv-python-headless==4.14.0.94', or pass another detector."
            ) from None
        if not hasattr(cv2, "CascadeClassifier"):
            raise ImportError(
                f"OpenCV {cv2.__version__} has no cascades, which ended with version 4; run 'pip "
                "install opencv-python-headless==4.14.0.94', or pass another detector."
            )
        name = cv2.data.haarcascades + "haarcascade_frontalface_default.xml"
        self.cascade = cv2.CascadeClassifier(name)
        self.neighbours, self.smallest = neighbours, smallest

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Return the boxes of each picture's faces, (faces, 4)."""
        _check_images(images)
        weights = torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)
        grey = (images.cpu() * weights).sum(1).round().to(torch.uint8).numpy()
        found = []
        for picture in grey:
            hits = self.cascade.detectMultiScale(
                picture, minNeighbors=self.neighbours, minSize=(self.smallest, self.smallest)
            )
            boxes = torch.as_tensor(hits, dtype=torch.long).reshape(-1, 4)
            found.append(torch.cat((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), 1))
        return found


class JudgedFaces:
    """Call the whole picture a face where a judge says so: for portraits that fill the picture.

    ``probability(images)`` returns (n,) in [0, 1]; measure it with :func:`detection_errors`.
    """

    def __init__(self, probability: Callable[[Tensor], Tensor], threshold: float = 0.5):
        self.probability, self.threshold = probability, threshold

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Return one box for a picture with a face and none for another, (1, 4) or (0, 4)."""
        _check_images(images)
        height, width = images.shape[-2:]
        whole = torch.tensor([[0, 0, width, height]])
        sure = (self.probability(images) >= self.threshold).tolist()
        return [whole if face else whole[:0] for face in sure]


def share_without_face(boxes: list[Tensor]) -> float:
    """Return the share of pictures in which a detector found no face."""
    return 1.0 - float(_has_face(boxes).double().mean())


def identity_given_face(images: Tensor, boxes: list[Tensor], probability: Probability) -> float:
    """Return the mean probability of a person over the pictures with a face.

    The score of Selective Amnesia for celebrities. ``probability`` maps a list of crops (3, ...)
    to the judge's probabilities (n,) of the person; of several faces in a picture the one most
    like the person counts. Pictures without a face do not count at all, so that a model that
    draws none may score well: give :func:`share_without_face` beside it.

    Returns nan if no picture has a face. Raises: ValueError if there is not one list of boxes a
    picture.
    """
    _check_images(images)
    if len(boxes) != len(images):
        raise ValueError(
            f"Got boxes for {len(boxes)} pictures and {len(images)} pictures; detect the faces of "
            "all of them."
        )
    best = [
        probability([image[:, top:bottom, left:right] for left, top, right, bottom in faces]).max()
        for image, faces in zip(images, (b.tolist() for b in boxes), strict=True)
        if faces
    ]
    return float(torch.stack(best).double().mean()) if best else float("nan")


def detection_errors(detector: FaceDetector, faces: Tensor, others: Tensor) -> tuple[float, float]:
    """Return the shares of known faces that a detector misses, and of others it takes for faces."""
    missed = share_without_face(detector(faces))
    return missed, 1.0 - share_without_face(detector(others))


def prompt_agreement(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Return the cosine (n,) of each picture's and its prompt's features, in [-1, 1].

    The features come from any scorer that puts pictures and texts into one space, as CLIP does.

    Shapes: (n, dim) both. Raises: ValueError if they differ, or one has no length.
    """
    if image_features.ndim != 2 or image_features.shape != text_features.shape:
        raise ValueError(
            f"The features have shapes {tuple(image_features.shape)} and "
            f"{tuple(text_features.shape)}; wanted (n, dim) of one scorer for both."
        )
    for features in (image_features, text_features):
        lengths = features.norm(dim=1)
        if not ((lengths > 0) & lengths.isfinite()).all():
            raise ValueError(
                "Some features are zero or not finite, and so have no direction; check the scorer."
            )
    return F.cosine_similarity(image_features.double(), text_features.double())


def _has_face(boxes: list[Tensor]) -> Tensor:
    if not boxes:
        raise ValueError("There are no pictures to look for faces in; give at least one.")
    return torch.tensor([len(each) > 0 for each in boxes])


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8 or not len(images):
        raise ValueError(
            f"The pictures have shape {tuple(images.shape)} and type {images.dtype}; wanted uint8 "
            "(n, 3, height, width) with at least one."
        )
