import math

import numpy as np
import pytest
import torch

from lib.checkpoints import load_checkpoint, save_checkpoint
from lib.data.images import MISSING
from lib.experiments._faces import Faces
from lib.experiments.train_face_classifier import (
    attribute_loss,
    attribute_shares,
    identity_shares,
)
from lib.metrics import forgetting
from lib.models.classifier import ARCHITECTURES, FaceCNN, predict_logits


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_linear_in_the_features(name):
    torch.manual_seed(0)
    judge, x = ARCHITECTURES[name](10).eval(), torch.rand(3, 1, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(judge[-1](judge.features(x)), judge(x))


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


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 32, 32), (3, 64, 64), (1, 24, 40)])
def test_a_judge_of_faces_learns_by_heart_at_any_size(shape):
    torch.manual_seed(0)
    judge = FaceCNN(2, shape, names=["first", "second"])
    images = torch.nn.functional.interpolate(torch.rand(8, shape[0], 4, 4), shape[1:])
    labels = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]] * 2)
    adam = torch.optim.Adam(judge.parameters(), lr=1e-3)
    for _ in range(40):
        adam.zero_grad()
        attribute_loss(judge(images), labels).backward()
        adam.step()
    with torch.no_grad():
        for _ in range(30):  # batch norm's averages lag behind so few steps
            judge(images)
    assert torch.equal(predict_logits(judge, images, batch=3) > 0, labels == 1)
    assert judge.eval().features(images).shape == (8, judge.N_FEATURES)


def test_the_judges_of_faces_are_small():
    for n_logits, side in ((9, 32), (200, 32), (9, 64)):
        judge = FaceCNN(n_logits, (3, side, side))
        assert sum(p.numel() for p in judge.parameters()) < 400_000


def test_a_judge_of_faces_is_shipped_with_its_names(tmp_path):
    arguments = {"n_logits": 2, "image_shape": [3, 16, 16], "names": ["hat", "beard"]}
    judge = FaceCNN(**arguments)
    save_checkpoint("judge", judge, arguments, "none", "none", tmp_path)
    loaded = load_checkpoint("judge", tmp_path)
    assert loaded.names == ("hat", "beard") and loaded.image_shape == (3, 16, 16)
    images = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(
        predict_logits(loaded, images), predict_logits(judge, images), atol=5e-3, rtol=0
    )


def test_each_judge_asks_for_its_own_images():
    with pytest.raises(ValueError, match=r"of shape \(n, 3, 32, 32\)"):
        predict_logits(FaceCNN(2), torch.rand(2, 3, 64, 64))
    with pytest.raises(ValueError, match="at least one logit"):
        FaceCNN(0)
    with pytest.raises(ValueError, match="1 names"):
        FaceCNN(2, names=["hat"])
    with pytest.raises(ValueError, match="multiples of 8"):
        FaceCNN(2, (3, 36, 36))


def test_missing_labels_cost_nothing_and_attributes_weigh_the_same():
    logits = torch.tensor([[3.0, -1.0], [0.5, 2.0], [-2.0, 7.0]], requires_grad=True)
    targets = torch.tensor([[1, 0], [0, MISSING], [1, MISSING]])
    costs = [[math.log1p(math.exp(-3)), math.log1p(math.exp(0.5)), math.log1p(math.exp(2))]]
    costs.append([math.log1p(math.exp(-1))])
    loss = attribute_loss(logits, targets)
    assert loss.item() == pytest.approx(np.mean([np.mean(each) for each in costs]))
    loss.backward()
    assert (logits.grad == 0).tolist() == [[False, False], [False, True], [False, True]]
    nothing_known = torch.full_like(targets, MISSING)
    assert attribute_loss(logits, nothing_known).item() == 0


def test_a_judge_that_always_says_no_is_seen_through():
    truth = torch.tensor([True] + [False] * 3)
    never = attribute_shares(torch.zeros(4, dtype=torch.bool), truth)
    assert never == {"accuracy": 0.75, "balanced_accuracy": 0.5, "positives": 0.25}
    called = torch.tensor([True, True, False, False])
    shares = attribute_shares(called, truth)
    assert shares["accuracy"] == 0.75
    assert shares["balanced_accuracy"] == pytest.approx((1 + 2 / 3) / 2)
    assert attribute_shares(called, None) == {"called": 0.5}
    one_kind = attribute_shares(called, torch.zeros(4, dtype=torch.bool))
    assert one_kind == {"accuracy": 0.5, "balanced_accuracy": 0.5, "positives": 0.0}


def test_identities_are_counted_beside_chance():
    logits = torch.tensor([[0.0, 9.0, 0.0], [0.0, 9.0, 0.0], [9.0, 0.0, 0.0], [0.0, 9.0, 0.0]])
    shares = identity_shares(logits, torch.tensor([1, 2, 0, 0]))
    sure = math.exp(9) / (math.exp(9) + 2)
    assert shares == pytest.approx(
        {
            "confidence": sure,
            "commonest_answer": 0.75,
            "accuracy_identity": 0.5,
            "chance_identity": 0.5,
        }
    )
    assert identity_shares(logits, None).keys() == {"confidence", "commonest_answer"}


def test_labels_follow_the_pictures_of_faces():
    first, second = np.zeros((3, 2, 2, 3), np.uint8), np.ones((2, 2, 2, 3), np.uint8)
    rows = np.array([[0, 2], [1, 0], [0, 0]])
    tables = ({"hat": np.array([7, 8, 9])}, {"beard": np.array([4, 5])})
    faces = Faces((first, second), rows, "drawn", tables)
    assert faces.labels("hat").tolist() == [9, MISSING, 7]
    assert faces.labels("beard").tolist() == [MISSING, 4, MISSING]
    hats = faces.where(faces.labels("hat") != MISSING)
    assert hats.labels("hat").tolist() == [9, 7] and len(hats) == 2
    with pytest.raises(ValueError, match="no label 'smile'; it has beard, hat"):
        faces.labels("smile")


def test_a_drawn_batch_knows_its_pictures():
    faces = Faces.load("avatars", "train", 16, limit=6)
    generator = torch.Generator().manual_seed(0)
    images, index = faces.drawn(9, generator, flips=False)
    assert len(faces) == 6 and len(set(index)) > 1
    assert torch.equal(images, faces.at(index, torch.device("cpu")))
    assert faces.labels("identity").tolist() == [0, 1, 2, 3, 4, 5]


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
