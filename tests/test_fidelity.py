"""Fréchet distance, precision and recall against closed forms and sets with known answers."""

import importlib.util
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from lib.metrics.fidelity import (
    Inception,
    extract_features,
    frechet_distance,
    inception,
    precision_recall,
)
from lib.models.classifier import FaceCNN


def normal(n: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(mean: list[float], sd: list[float], seed: int) -> torch.Tensor:
    """Return points whose mean and covariance (n - 1) are exactly these, diagonal ones."""
    x = normal(200, len(mean), seed)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (len(x) - 1))).T
    return x * torch.tensor(sd, dtype=x.dtype) + torch.tensor(mean, dtype=x.dtype)


def test_frechet_distance_of_two_diagonal_gaussians():
    mean_a, sd_a, mean_b, sd_b = [0.0, 1.0, -3.0], [1.0, 2.0, 0.5], [2.0, 1.0, 0.0], [3.0, 2.0, 1.0]
    a, b = with_moments(mean_a, sd_a, 0), with_moments(mean_b, sd_b, 1)
    means, sds = (np.subtract(x, y) for x, y in ((mean_a, mean_b), (sd_a, sd_b)))
    expected = float(means @ means + sds @ sds)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a.float(), b.float()) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_of_correlated_features_against_a_matrix_root():
    a, b = normal(60, 5) @ normal(5, 5, 1), normal(80, 5, 2) @ normal(5, 5, 3) + 1
    sigma_a, sigma_b = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(sigma_a @ sigma_b).real
    expected = (a.mean(0) - b.mean(0)).square().sum() + np.trace(sigma_a + sigma_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(float(expected), rel=1e-8)


def test_frechet_distance_of_a_set_to_itself_is_zero_even_with_few_samples():
    for n in (3, 200):  # with 3 of 8 dimensions the covariance is singular
        features = normal(n, 8)
        assert frechet_distance(features, features) == pytest.approx(0, abs=1e-5)


def test_fewer_samples_give_a_larger_frechet_distance():
    real = normal(5000, 16, 100)
    means = [
        np.mean([frechet_distance(real, normal(n, 16, seed)) for seed in range(5)])
        for n in (40, 200, 1000)
    ]
    assert means[0] > 3 * means[1] > 9 * means[2] > 0


def line(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


def test_precision_and_recall_of_known_sets():
    real = line(0, 1, 2, 3, 10, 11, 12, 13)
    half = line(0.1, 1.1, 2.1, 3.1)  # one of two clusters: all good, half is missed
    assert precision_recall(real, half, k=1) == (1.0, 0.5)
    wide = torch.cat([real + 0.1, line(100, 101, 102, 103, 104, 105, 106, 107)])
    assert precision_recall(real, wide, k=1) == (0.5, 1.0)
    assert precision_recall(real, real, k=3) == (1.0, 1.0)
    assert precision_recall(real, real + 1000, k=3) == (0.0, 0.0)


def test_exchanging_the_arguments_exchanges_precision_and_recall():
    real, fake = line(0, 1, 2, 3, 10, 11, 12, 13), line(0.1, 1.1, 2.1, 3.1)
    straight, exchanged = (precision_recall(*sets, k=1) for sets in ((real, fake), (fake, real)))
    assert (straight.precision, straight.recall) == (exchanged.recall, exchanged.precision)
    assert straight.precision != straight.recall


def test_the_balls_are_those_of_the_kth_other_point():
    real, fake = line(0, 1, 3, 7), line(10, 10.5, 11, 11.5, 10.9)
    # The last real point, at 7, has its others at the distances 4, 6 and 7.
    for k, inside in ((1, {10, 10.5, 10.9, 11}), (2, {10, 10.5, 10.9, 11, 11.5})):
        assert precision_recall(real, fake, k).precision == len(inside) / 5
    assert precision_recall(line(0, 1, 3, 7), fake + 3, k=2).precision == 1 / 5
    same = torch.zeros(5, 1)  # of five equal points the balls have no size
    assert precision_recall(same, torch.cat([same, same + 1e-6]), k=3) == (0.5, 1.0)


def test_precision_and_recall_against_a_slow_loop():
    real, fake, k = normal(40, 4), 1.2 * normal(30, 4, 1) + 0.8, 3

    def inside(x, centres):
        for i, centre in enumerate(centres):
            others = sorted(math.dist(centre, c) for j, c in enumerate(centres) if j != i)
            if math.dist(x, centre) <= others[k - 1]:
                return True
        return False

    expected = (
        np.mean([inside(x, real.tolist()) for x in fake.tolist()]),
        np.mean([inside(x, fake.tolist()) for x in real.tolist()]),
    )
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1
    assert precision_recall(real, fake, k, chunk=7) == pytest.approx(expected)


def test_features_are_the_models_and_have_a_name():
    torch.manual_seed(0)
    judge = FaceCNN(2, (3, 16, 16), dropout=0.5)
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    features, name = extract_features(judge, pixels, "untrained", batch=2)
    assert judge.training and not features.requires_grad
    assert name == "untrained (FaceCNN, 128 features of 3×16×16 in [0, 1])"
    torch.testing.assert_close(features, judge.eval().features(pixels / 255))
    assert torch.equal(features, extract_features(judge, pixels / 255, "untrained", batch=2)[0])
    torch.testing.assert_close(judge.head(features), judge(pixels / 255))


def test_inception_sees_levels_from_0_to_255():
    seen = nn.Identity()
    network = Inception(seen, (3, 4, 4))
    pixels = torch.arange(48, dtype=torch.uint8).reshape(1, 3, 4, 4) * 5
    features, name = extract_features(network, pixels, "inception-v3-compat")
    assert features.dtype == torch.uint8 and torch.equal(features, pixels)
    assert name.startswith("inception-v3-compat (Inception, ")


@pytest.mark.skipif(
    importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed"
)
def test_inception_without_its_weights_is_one_sentence():
    with pytest.raises(RuntimeError, match="install torch-fidelity and go online once"):
        inception((3, 32, 32))


GOOD = torch.arange(10.0).reshape(5, 2)


@pytest.mark.parametrize("measure", [frechet_distance, precision_recall])
@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (torch.zeros(0, 2), "with n at least"),
        (torch.zeros(1, 2), "with n at least"),
        (torch.zeros(5), "of shape"),
        (torch.full((5, 2), math.nan), "finite"),
        (torch.zeros(5, 3), "with one extractor"),
    ],
)
def test_bad_sets_are_named(measure, bad, sentence):
    for sets in ((GOOD, bad), (bad, GOOD)):
        with pytest.raises(ValueError, match=sentence):
            measure(*sets)


def test_other_bad_input_is_named():
    with pytest.raises(ValueError, match="n at least 4"):
        precision_recall(GOOD[:3], GOOD, k=3)
    with pytest.raises(ValueError, match="k = 0"):
        precision_recall(GOOD, GOOD, k=0)
    judge = FaceCNN(2, (3, 16, 16))
    for images, sentence in (
        (torch.zeros(0, 3, 16, 16), "at least one"),
        (torch.zeros(2, 3, 8, 8), r"of shape \(n, 3, 16, 16\)"),
        (torch.full((2, 3, 16, 16), 2.0), r"floats in \[0, 1\] or uint8"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.int64), "give uint8"),
    ):
        with pytest.raises(ValueError, match=sentence):
            extract_features(judge, images, "untrained")
