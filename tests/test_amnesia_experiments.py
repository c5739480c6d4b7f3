from dataclasses import replace

import pytest
import torch

from lib.config import load_config
from lib.experiments import _amnesia, amnesia_recovery
from lib.experiments._digits import Digits
from lib.experiments._judges import Judge, train_judge
from lib.models.classifier import predict_logits
from lib.models.cvae import ConditionalVAE
from lib.run import seed_everything


def digits(split):
    return Digits.load("digits", split, 28, torch.device("cpu"))


def sharp_vae():
    """A VAE whose decoder answers strongly to z and to the class."""
    torch.manual_seed(0)
    model = ConditionalVAE((1, 28, 28), 10, hidden=(32,), latent_dim=2)
    with torch.no_grad():
        model.decoder[0].weight.mul_(4)
        model.decoder[2].weight.mul_(4)
    return model.eval()


def test_a_judge_learns_digits_and_the_class_of_nothing():
    recipe = Judge("mlp", 0.0, True, epochs=6, batch=64, lr=1e-3, decay_every=5)
    seed_everything(0)
    judge = train_judge(recipe, digits("train"), torch.Generator().manual_seed(0))
    images, labels = digits("test").first(360)
    assert (predict_logits(judge, images).argmax(1) == labels).float().mean() > 0.9
    nothing = torch.cat([torch.rand(20, 1, 28, 28), torch.full((1, 1, 28, 28), 0.5)])
    assert (predict_logits(judge, nothing).argmax(1) == 10).all()
    with pytest.raises(ValueError, match="architecture 'vit' is unknown; choose from cnn"):
        train_judge(replace(recipe, architecture="vit"), digits("train"), torch.Generator())


def test_the_search_finds_what_the_model_can_draw():
    model = sharp_vae()
    config = load_config("amnesia_vae_mnist_recovery", "cpu").config
    config = replace(config, forget=3, restarts=6, search_steps=150)
    z = torch.randn(4, 2, generator=torch.Generator().manual_seed(5))
    targets = model.decode(z, torch.full((4,), 3)).detach()

    def error(way):
        found = amnesia_recovery.search(model, targets, config, way, torch.Generator())
        return (found - targets).square().mean().sqrt()

    assert error("z") < 0.02
    assert error("zc") < 0.02
    assert error("other") > 2 * error("z")
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_grids_share_their_latents_and_keep_their_order():
    model = sharp_vae()
    grid = _amnesia.sample_grid(model, 3)
    assert grid.shape == (10, 3, 28, 28) and grid.dtype == torch.uint8
    z = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    expected = model.decode(z[2:], torch.tensor([7]))[0, 0] * 255
    torch.testing.assert_close(grid[7, 2].float(), expected.round(), atol=1.0, rtol=0)
    assert _amnesia.arguments_of(model)["hidden"] == [32]
    copy = _amnesia.copy_of(model)
    with torch.no_grad():
        copy.decoder[0].weight.zero_()
    assert model.decoder[0].weight.any()


def test_real_images_are_scored_under_their_own_class():
    model = sharp_vae()
    real = _amnesia.RealDigits(digits("train"), digits("test"), n=20, n_importance=5)
    found = real.measure(model, 4, 10, torch.Generator().manual_seed(0))
    assert found.keys() == {
        "log_p_forget",
        "log_p_forget_binarised",
        "log_p_forget_refined",
        "log_p_remember",
        "log_p_remember_binarised",
        "nearest_real",
    }
    x, c = digits("test").first(20, 4)
    assert (c == 4).all() and len(x) == 20
    expected = model.log_likelihood(x, c, 5, torch.Generator().manual_seed(0)).mean()
    assert found["log_p_forget"] == pytest.approx(float(expected), rel=1e-5)


def test_unknown_names_are_refused():
    model = sharp_vae()
    loaded = load_config("amnesia_vae_mnist", "smoke")
    fields = _amnesia.Task.__dataclass_fields__
    task = _amnesia.Task(**{name: getattr(loaded.config, name) for name in fields})
    with pytest.raises(ValueError, match="objective 'ascent' is unknown"):
        _amnesia.forget(model, replace(task, objective="ascent"), torch.Generator())
    with pytest.raises(ValueError, match="surrogate 'black' is unknown; choose noise, grey"):
        _amnesia.forget(model, replace(task, surrogate="black"), torch.Generator())
