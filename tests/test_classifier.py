import math

import pytest
import torch

from lib.metrics import forgetting
from lib.models.classifier import ARCHITECTURES, predict_logits


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("n_classes", [10, 11])
def test_judges_learn_ten_images_by_heart(name, n_classes):
    torch.manual_seed(0)
    judge = ARCHITECTURES[name](n_classes, dropout=0.0)
    images, labels = torch.rand(10, 1, 28, 28), torch.arange(10)
    adam = torch.optim.Adam(judge.parameters(), lr=3e-3)
    for _ in range(80):
        adam.zero_grad()
        torch.nn.functional.cross_entropy(judge(images), labels).backward()
        adam.step()
    logits = predict_logits(judge, images, batch=3)
    assert logits.shape == (10, n_classes)
    assert judge.training
    assert forgetting.accuracy(judge.eval()(images), labels) == 1.0
    assert torch.equal(logits.argmax(1), labels)


def test_judging_is_deterministic_with_dropout():
    judge = ARCHITECTURES["cnn"]()
    images = torch.rand(4, 1, 28, 28)
    assert torch.equal(predict_logits(judge, images), predict_logits(judge, images))
    assert not torch.equal(judge(images), judge(images))


def test_bad_input_is_named():
    judge = ARCHITECTURES["mlp"]()
    with pytest.raises(ValueError, match="it wants floats of shape"):
        predict_logits(judge, torch.rand(2, 28, 28))
    with pytest.raises(ValueError, match="divide uint8 images by 255"):
        predict_logits(judge, 255 * torch.rand(2, 1, 28, 28))
    for cls in ARCHITECTURES.values():
        with pytest.raises(ValueError, match="at least 2 classes"):
            cls(1)
        with pytest.raises(ValueError, match="dropout in"):
            cls(10, 1.0)


def test_probability_and_entropy_of_known_answers():
    certain = torch.tensor([[50.0] + [0.0] * 9])
    unsure = torch.zeros(1, 10)
    half = torch.tensor([[0.0, 0.0] + [-200.0] * 8])
    logits = torch.cat([certain, unsure, half])
    torch.testing.assert_close(
        forgetting.predictive_entropy(logits),
        torch.tensor([0.0, math.log(10), math.log(2)]),
    )
    torch.testing.assert_close(
        forgetting.class_probability(logits, 0), torch.tensor([1.0, 0.1, 0.5])
    )
    assert forgetting.accuracy(logits, torch.tensor([0, 5, 0])) == pytest.approx(2 / 3)


def test_an_ensemble_averages_probabilities():
    first, second = torch.tensor([[300.0, 0.0]]), torch.tensor([[0.0, 300.0]])
    mixed = forgetting.ensemble_logits([first, second])
    torch.testing.assert_close(mixed.softmax(1), torch.tensor([[0.5, 0.5]]))
    assert torch.isfinite(forgetting.ensemble_logits([first, first])).all()


def test_distances_are_root_mean_squares_a_pixel():
    real = torch.stack([torch.zeros(1, 4, 4), torch.ones(1, 4, 4)])
    samples = torch.stack([torch.full((1, 4, 4), 0.2), torch.full((1, 4, 4), 0.9), real[1]])
    expected = torch.tensor([0.2, 0.1, 0.0])
    torch.testing.assert_close(
        forgetting.nearest_real_distance(samples, real, chunk=2), expected, atol=1e-3, rtol=0
    )
    torch.testing.assert_close(
        forgetting.distance_to_image(samples, torch.full((1, 4, 4), 0.5)),
        torch.tensor([0.3, 0.4, 0.5]),
    )


def test_bad_metric_input_is_named():
    with pytest.raises(ValueError, match="knows the classes 0 to 9"):
        forgetting.class_probability(torch.zeros(1, 10), 10)
    with pytest.raises(ValueError, match="at least one image"):
        forgetting.predictive_entropy(torch.zeros(0, 10))
    with pytest.raises(ValueError, match="not finite"):
        forgetting.predictive_entropy(torch.full((1, 10), math.nan))
    with pytest.raises(ValueError, match="compare images of one shape"):
        forgetting.nearest_real_distance(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 8, 8))
