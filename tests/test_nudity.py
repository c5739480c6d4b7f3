"""The detector of exposed parts and judges in files: our side of them, and NudeNet as it is."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.data import captions
from lib.metrics.nudity import ExposedParts, share_exposed
from lib.metrics.onnx_judge import OnnxJudge

GREY = torch.full((2, 3, 6, 4), 128, dtype=torch.uint8)


@pytest.fixture
def asked(monkeypatch):
    """NudeNet with fixed answers; returns the pictures that it was given."""
    pictures, answers = [], iter([[("FEET_EXPOSED", 0.7), ("FEET_EXPOSED", 0.9)], ANSWER])

    class NudeDetector:
        def detect(self, picture):
            pictures.append(picture)
            return [
                {"class": part, "score": score, "box": [0] * 4} for part, score in next(answers)
            ]

    monkeypatch.setitem(sys.modules, "nudenet", SimpleNamespace(NudeDetector=NudeDetector))
    return pictures


ANSWER = [("BELLY_COVERED", 0.9), ("BUTTOCKS_EXPOSED", 0.59), ("FACE_MALE", 0.8)]


def test_exposed_parts_above_the_threshold_count(asked):
    images = GREY.clone()
    images[:, 0] = 10  # red
    assert ExposedParts()(images) == [{"FEET_EXPOSED"}, set()]
    assert all(picture.shape == (6, 4, 3) and picture.dtype == np.uint8 for picture in asked)
    assert asked[0][0, 0].tolist() == [128, 128, 10]  # blue first, as OpenCV reads files


def test_everything_has_its_best_score(asked):
    found = ExposedParts(0.5).everything(GREY)
    assert found[0] == {"FEET_EXPOSED": 0.9} and found[1] == dict(ANSWER)


def test_the_share_may_leave_harmless_parts_out():
    found = [
        {"FEET_EXPOSED"},
        set(),
        {"BUTTOCKS_EXPOSED", "BELLY_EXPOSED"},
        {"MALE_BREAST_EXPOSED"},
    ]
    assert share_exposed(found) == 0.75 and share_exposed(found, harmless=False) == 0.25
    with pytest.raises(ValueError, match="no pictures to look for exposed parts in"):
        share_exposed([])


def test_missing_packages_and_files_are_explained(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(ImportError, match=r"needs NudeNet, which is not installed; run 'pip"):
        ExposedParts()
    with pytest.raises(FileNotFoundError, match=r"no judge in .*; export a classifier of people"):
        OnnxJudge(tmp_path / "people.onnx", 0)
    (tmp_path / "people.onnx").touch()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"ONNX Runtime, which is not installed; run 'pip"):
        OnnxJudge(tmp_path / "people.onnx", 0)


def test_a_judge_in_a_file_sees_crops_in_its_own_size(monkeypatch, tmp_path):
    class InferenceSession:
        def __init__(self, path):
            assert path.endswith("people.onnx")

        def get_inputs(self):
            return [SimpleNamespace(name="pictures", shape=["n", 3, 8, 8])]

        def run(self, outputs, inputs):
            pictures = inputs["pictures"]
            assert pictures.shape == (2, 3, 8, 8) and pictures.dtype == np.float32
            return [np.stack([0 * pictures.mean((1, 2, 3)), pictures.mean((1, 2, 3))], 1)]

    fake = SimpleNamespace(InferenceSession=InferenceSession)
    monkeypatch.setitem(sys.modules, "onnxruntime", fake)
    (tmp_path / "people.onnx").touch()
    crops = [torch.zeros(3, 5, 4, dtype=torch.uint8), torch.full((3, 9, 9), 255, dtype=torch.uint8)]
    found = OnnxJudge(tmp_path / "people.onnx", 1)(crops)
    assert found.tolist() == pytest.approx([0.5, torch.sigmoid(torch.tensor(1.0)).item()])


def test_nudenet_finds_nothing_exposed_where_nothing_is():
    pytest.importorskip("nudenet", reason="NudeNet is optional and not installed here")
    numbers = torch.arange(2**31, 2**31 + 8)
    portraits = captions.render(numbers, 128, kind=captions.KINDS.index("somebody"))[0]
    noise = torch.randint(256, (4, 3, 128, 128), dtype=torch.uint8)
    grey = torch.full((1, 3, 128, 128), 128, dtype=torch.uint8)
    images = torch.cat([portraits.permute(0, 3, 1, 2), noise, grey])
    assert ExposedParts()(images) == [set()] * len(images)
