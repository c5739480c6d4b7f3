"""Real snapshots against their known counts and moments; skipped by name without BOOK_DATA."""

import os
from pathlib import Path

import numpy as np
import pytest

from lib.data import load

BOOK_DATA = os.environ.get("BOOK_DATA")


@pytest.mark.skipif(not BOOK_DATA, reason="real snapshots: BOOK_DATA is not set")
@pytest.mark.parametrize(
    ("name", "split", "shape"),
    [
        ("mnist", "train", (60_000, 28, 28, 1)),
        ("mnist", "test", (10_000, 28, 28, 1)),
        ("cifar10", "train", (50_000, 32, 32, 3)),
        ("cifar10", "test", (10_000, 32, 32, 3)),
        ("lfw64", "train", (13_233, 64, 64, 3)),
        ("att_faces64", "train", (400, 64, 64, 1)),
    ],
)
def test_real_snapshots_have_their_known_counts(name, split, shape):
    if not list(Path(BOOK_DATA, name).glob(f"{split}*.parquet")):
        pytest.skip(f"real snapshot {name}/{split} is not in BOOK_DATA")
    loaded = load(name, split)
    assert loaded.images.shape == shape
    assert loaded.source == f"{name}, snapshot"
    labels = loaded.labels
    if name == "mnist":
        first = {"train": [5, 0, 4, 1, 9, 2], "test": [7, 2, 1, 0, 4, 1]}[split]
        assert labels["label"][:6].tolist() == first
    if (name, split) == ("cifar10", "train"):
        assert np.bincount(labels["label"]).tolist() == [5000] * 10
        # From a histogram, since float32 sums over 50 million pixels are off by a tenth.
        counts = [np.bincount(loaded.images[..., c].ravel(), minlength=256) for c in range(3)]
        shares, levels = np.array(counts) / np.sum(counts[0]), np.arange(256) / 255
        mean = shares @ levels
        deviation = np.sqrt(shares @ levels**2 - mean**2)
        np.testing.assert_allclose(mean, [0.49140, 0.48216, 0.44653], atol=1e-5)
        np.testing.assert_allclose(deviation, [0.24703, 0.24349, 0.26159], atol=1e-5)
    if name == "lfw64":
        assert len(np.unique(labels["identity"])) == 5749
        assert (labels["gender"] == 0).sum() == 10_263 and (labels["gender"] == 1).sum() == 2_962
        assert (labels["smile"] != -1).sum() == 1_203
        per_identity = np.bincount(labels["identity"])
        assert [(per_identity >= k).sum() for k in (15, 30, 70)] == [96, 34, 7]
    if name == "att_faces64":
        assert np.bincount(labels["identity"]).tolist() == [10] * 40
