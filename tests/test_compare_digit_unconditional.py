"""The comparison on an unconditional model: opinions on a digit, the yardstick, ascent, rows."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from lib.config import ConfigError, load_config, resolve
from lib.experiments._attack import Opinions, System
from lib.experiments._unconditional_audit import own_weights
from lib.experiments._unconditional_contenders import (
    Ascent,
    Contender,
    DigitSubject,
    Margin,
    Yardstick,
    ascend,
    margin,
    seeded,
)
from lib.experiments.compare_digit_unconditional import Rows
from lib.methods.feature_unlearning import Feature, projection
from lib.models.classifier import FaceCNN, predict_logits
from lib.models.conv_vae import ConvVAE

CPU = torch.device("cpu")
SHAPE = (1, 8, 8)


def subject() -> DigitSubject:
    torch.manual_seed(0)
    vae, judge = ConvVAE(SHAPE, (8, 8), 4).eval(), FaceCNN(10, SHAPE).eval()
    for model in (vae, judge):
        model.requires_grad_(False)
    found = DigitSubject(vae, "z", judge, "random", {"3": 0.0})
    images = found.pictures(vae, found.draw(100, seeded(CPU, 0)))
    return replace(found, limits={"3": float(found.scores("3", images).median())})


def yardstick(n: int = 60, n_compared: int = 20) -> Yardstick:
    which = subject()
    opinions = Opinions(which, "3", 1.0, 0.0, Margin(which.judge, 3))
    torch.manual_seed(1)
    retrained = ConvVAE(SHAPE, (8, 8), 4).eval()
    real = torch.rand(50, *SHAPE, generator=seeded(CPU, 1))
    return Yardstick(opinions, real, retrained, n, n_compared)


def test_a_margin_is_positive_where_the_digit_is_the_likeliest():
    logits = torch.tensor([[1.0, 3.0, 2.5], [4.0, 1.0, 2.0], [0.0, 5.0, 5.0]])
    assert margin(logits, 1).tolist() == [0.5, -3.0, 0.0]
    assert (logits[:, 1] == torch.tensor([3.0, 1.0, 5.0])).all()  # left as they were
    images, which = torch.rand(30, *SHAPE, generator=seeded(CPU, 0)), subject()
    called = predict_logits(which.judge, images).argmax(1)
    label = int(called.mode().values)
    assert ((Margin(which.judge, label)(images)[:, 0] > 0) == (called == label)).all()
    unshifted = replace(which, limits={str(label): 0.0})
    assert (unshifted.has(str(label), images) == (called == label)).all()


def test_the_original_is_as_it_was_and_pure_noise_is_not():
    measuring = yardstick()
    which = measuring.subject
    original = Contender(System(which, which.model), {})
    images = original.pictures(measuring.latents(original))
    found = measuring.measure("original", original, images)
    assert found["changed"] == 0.0
    assert found["share"] == pytest.approx(float(measuring.forget.float().mean()))
    assert found["share_both"] <= found["share"]
    noise = torch.rand(60, *SHAPE, generator=seeded(CPU, 2))
    far = {name: measuring.distance(noise, name) for name in measuring.references}
    assert far["original"] > 10 * found["frechet_original"] > 0
    assert "changed" not in measuring.measure("retrained", original, images)


def test_too_few_pictures_have_no_distance():
    measuring = yardstick(n_compared=20)
    assert math.isnan(measuring.distance(torch.rand(19, *SHAPE), "real"))
    assert measuring.distance(torch.rand(20, *SHAPE), "real") > 0
    assert len(measuring.references["real"]) == 20


def test_who_refuses_draws_others_and_says_how_many_it_refuses_in_vain():
    measuring = yardstick()
    which, feature = measuring.subject, Feature(torch.tensor([1.0, 0, 0, 0]), torch.tensor(0.0))
    rejected = Contender(System(which, which.model, refuses=(feature,)), {})
    z = measuring.latents(rejected)
    assert len(z) == len(measuring.z) and (projection(z, feature.z_e) < 0).all()
    found = measuring.measure("rejected", rejected, rejected.pictures(z))
    beyond = measuring.z[:, 0] >= 0
    assert found["refused"] == pytest.approx(float(beyond[~measuring.forget].float().mean()))
    assert "changed" not in found


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_ascent_unlearns_the_digit_and_only_a_weight_keeps_the_rest(weight):
    which = subject()
    forget, rest = torch.zeros(8, *SHAPE), torch.ones(8, *SHAPE)

    def elbo(model: nn.Module, images):
        return float(model.elbo(images, seeded(CPU, 0)).mean())

    before = copy.deepcopy(which.model.state_dict())
    after = ascend(which, forget, rest, Ascent(1e-3, 4, 10, weight), seeded(CPU, 0))
    assert all((before[k] == v).all() for k, v in which.model.state_dict().items())
    assert elbo(after, forget) < elbo(which.model, forget) - 1
    if weight:
        pure = ascend(which, forget, rest, Ascent(1e-3, 4, 10, 0.0), seeded(CPU, 0))
        assert elbo(after, rest) > elbo(pure, rest)


def test_services_have_the_weights_of_the_original():
    which = subject()
    named = {name: Contender(System(which, which.model), {}) for name in ("original", "edited")}
    assert list(own_weights(named)) == ["original"]


def test_units_judges_and_data_of_rows():
    config = load_config("compare_vae_mnist_conv", "smoke").config
    rows = Rows(config, "features", "data", None)
    expected = {
        "share_edited": ("share", "random"),
        "share_both_edited": ("share", "random and a second judge"),
        "frechet_real_fine_tune": ("Fréchet distance", "features"),
        "changed_edited": ("share", "random"),
        "refused_rejected": ("share", None),
        "pictures_fine_tune": ("real pictures", None),
        "relearned_10_5_original": ("share", "random"),
        "inversion_error_rest_edited": ("rms a pixel", None),
        "search_distance_free_edited": ("standard deviations", None),
        "search_success_free_edited": ("share", "random and a second judge"),
        "probe_encoder_8_original": ("balanced accuracy", None),
    }
    assert {name: (rows.unit(name), rows.judges(name)) for name in expected} == expected
    sources = {
        "frechet_real_edited": "data, without class 0",
        "inversion_error_forget_edited": "data",
        "probe_encoder_8_original": "data",
        "probe_decoder_4_original": "pictures of the models",
        "share_edited": "pictures of the models",
    }
    assert {name: rows.data(name) for name in sources} == sources


def test_a_retrained_gan_is_refused_in_the_space_of_styles():
    resolved = load_config("compare_gan_mnist", "smoke").resolved
    with pytest.raises(ConfigError, match="retrained must be null"):
        resolve("x", "smoke", resolved | {"retrained": "random_gan"})
