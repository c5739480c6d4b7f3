"""The metrics of text-to-image models, by hand."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.metrics.text_image import (
    CascadeFaces,
    JudgedFaces,
    detection_errors,
    identity_given_face,
    prompt_agreement,
    share_without_face,
)

# Four pictures whose brightness is 10, 20, 30 and 40; the first has a bright right half.
IMAGES = torch.tensor([10, 20, 30, 40], dtype=torch.uint8).reshape(4, 1, 1, 1).repeat(1, 3, 8, 6)
IMAGES[0, :, :, 3:] = 200
WHOLE, LEFT, RIGHT = [0, 0, 6, 8], [0, 0, 3, 8], [3, 0, 6, 8]


def boxes(*faces):
    return [torch.tensor(each, dtype=torch.long).reshape(-1, 4) for each in faces]


def brightness(crops):
    return torch.stack([crop.float().mean() / 255 for crop in crops])


def test_identity_counts_the_likest_face_of_the_pictures_that_have_one():
    found = boxes([LEFT, RIGHT], [], [WHOLE], [])
    assert identity_given_face(IMAGES, found, brightness) == pytest.approx((200 + 30) / 2 / 255)
    assert share_without_face(found) == 0.5
    tall = boxes([[0, 0, 6, 2]], [], [], [])  # the crop is a matter of rows and columns
    assert identity_given_face(IMAGES, tall, brightness) == pytest.approx(105 / 255)
    assert math.isnan(identity_given_face(IMAGES, boxes([], [], [], []), brightness))


def test_a_judge_may_stand_for_a_detector_and_has_errors():
    detector = JudgedFaces(lambda images: images.flatten(1).float().mean(1) / 100, threshold=0.3)
    found = detector(IMAGES)
    assert [each.tolist() for each in found] == [[WHOLE], [], [WHOLE], [WHOLE]]
    missed, invented = detection_errors(detector, IMAGES[1:], IMAGES[:2])
    assert (missed, invented) == (pytest.approx(1 / 3), 0.5)


def test_agreement_is_the_cosine():
    pictures = torch.tensor([[1.0, 0.0], [1.0, 0.0], [3.0, 4.0]])
    texts = torch.tensor([[5.0, 0.0], [-1.0, 0.0], [4.0, 3.0]])
    assert prompt_agreement(pictures, texts).tolist() == pytest.approx([1.0, -1.0, 0.96])


def test_cascade_gives_boxes_as_left_top_right_bottom(monkeypatch):
    answers = [np.array([[1, 2, 3, 4]]), ()]
    asked = []

    class Cascade:
        def __init__(self, name):
            assert name.endswith("frontalface_default.xml")

        def detectMultiScale(self, picture, minNeighbors, minSize):
            asked.append((picture, minNeighbors, minSize))
            return answers[len(asked) - 1]

    fake = SimpleNamespace(data=SimpleNamespace(haarcascades="here/"), CascadeClassifier=Cascade)
    monkeypatch.setitem(sys.modules, "cv2", fake)
    found = CascadeFaces(neighbours=3, smallest=20)(IMAGES[:2])
    assert [each.tolist() for each in found] == [[[1, 2, 4, 6]], []]
    assert asked[0][1:] == (3, (20, 20)) and asked[0][0].dtype == np.uint8
    assert asked[0][0][0].tolist() == [10, 10, 10, 200, 200, 200]


def test_a_missing_opencv_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match=r"needs OpenCV, .* run 'pip install opencv-python"):
        CascadeFaces()
    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(__version__="5.0.0"))
    with pytest.raises(ImportError, match=r"OpenCV 5.0.0 has no cascades, .*headless==4"):
        CascadeFaces()


BAD = {
    "other range": (
        lambda: identity_given_face(IMAGES / 255, boxes([], [], [], []), brightness),
        r"torch.float32; wanted uint8 \(n, 3",
    ),
    "count": (lambda: identity_given_face(IMAGES, boxes([]), brightness), r"for 1 pictures and 4"),
    "none": (lambda: share_without_face([]), r"no pictures to look for faces in"),
    "features": (
        lambda: prompt_agreement(torch.ones(2, 3), torch.ones(3, 3)),
        r"\(2, 3\) and \(3, 3\); wanted \(n, dim\)",
    ),
    "no direction": (
        lambda: prompt_agreement(torch.zeros(2, 3), torch.ones(2, 3)),
        r"zero or not finite, .* check the scorer",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_inputs_are_refused_in_a_sentence(what):
    call, sentence = BAD[what]
    with pytest.raises(ValueError, match=sentence):
        call()
