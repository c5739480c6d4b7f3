"""The style-based GAN against slow loops, autograd and finite differences by hand."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from lib.config import load_config
from lib.experiments import _latents
from lib.experiments._latents import Pictures, draw, load_judge, seen_by
from lib.metrics.fidelity import inception_score
from lib.models import gan as gan_module
from lib.models.ddpm import to_uint8
from lib.models.gan import (
    GAIN,
    GAN,
    Discriminator,
    EqualConv,
    EqualLinear,
    ModulatedConv,
    StyleGenerator,
    activate,
    demodulation,
    discriminator_loss,
    generator_loss,
    r1_penalty,
    spread_in_groups,
)
from lib.run import Run
from lib.train import fit

TINY = {"image_shape": [2, 8, 8], "channels": [12, 8], "latent_dim": 6, "n_mapping": 2}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny() -> StyleGenerator:
    """Build a generator whose noise and biases are not at their initial zeros."""
    torch.manual_seed(0)
    model = StyleGenerator(**TINY)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "noise_strength")):
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return model.eval()


def pair() -> GAN:
    return GAN(tiny(), Discriminator([2, 8, 8], [12, 8]))


def gradients(total: torch.Tensor, module: nn.Module) -> list[torch.Tensor | None]:
    return list(torch.autograd.grad(total, list(module.parameters()), allow_unused=True))


def test_stored_weights_are_of_unit_variance_and_used_ones_scaled():
    torch.manual_seed(0)
    for n_in in (32, 512):
        linear, conv = EqualLinear(n_in, 64), EqualConv(n_in, 64, 3, GAIN)
        for layer in (linear, conv):
            assert layer.weight.std().item() == pytest.approx(1, abs=0.05)
        x = torch.randn(400, n_in)
        assert linear(x).std().item() == pytest.approx(1, abs=0.05)
        identity = torch.eye(n_in)
        used = linear(identity)
        assert used.std().item() == pytest.approx(n_in**-0.5, rel=0.05)
        y = conv(torch.randn(2, n_in, 16, 16))[:, :, 1:-1, 1:-1]  # the border sees zeros
        assert y.std().item() == pytest.approx(GAIN, rel=0.05)


def test_a_slow_layer_computes_the_same_and_moves_less():
    torch.manual_seed(0)
    slow = EqualLinear(16, 8, speed=0.01, bias=0.5)
    assert slow.weight.std().item() == pytest.approx(100, rel=0.2)
    x = torch.randn(1000, 16)
    before_ones = slow(torch.ones(1, 16)).detach()
    assert slow(x).std().item() == pytest.approx(1, abs=0.1)
    assert slow(torch.zeros(1, 16)).tolist() == [pytest.approx([0.5] * 8)]
    adam = torch.optim.Adam(slow.parameters(), lr=0.1)
    slow(torch.ones(1, 16)).sum().backward()
    adam.step()  # every stored number moves by 0.1, a used weight by 0.1 · 0.01 / √16
    moved = slow(torch.ones(1, 16)) - before_ones
    assert moved.flatten().tolist() == pytest.approx([-0.1 * 0.01 * (16 / 4 + 1)] * 8, rel=1e-2)


def test_the_leaky_unit_takes_what_the_gain_gives():
    x = drawn(100_000)
    assert activate(GAIN * x).square().mean().item() == pytest.approx(1.04, abs=0.02)


def test_one_shared_convolution_equals_one_for_each_image():
    torch.manual_seed(0)
    layer = ModulatedConv(5, 7, 3, 4)
    x, w = drawn(3, 5, 6, 6), drawn(3, 4, seed=1)
    slow = []
    for image, style in zip(x, layer.style(w), strict=True):
        weight = layer.conv.weight * layer.conv.scale * style[None, :, None, None]
        weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        slow.append(F.conv2d(image[None], GAIN * weight, padding=1))
    torch.testing.assert_close(layer(x, w), torch.cat(slow), rtol=1e-4, atol=1e-5)


def test_demodulation_gives_unit_variance_whatever_the_style():
    weight, style = 3 * drawn(6, 40, 3, 3), 0.1 + 10 * drawn(2, 40, seed=1).abs()
    scaled = weight[None] * style[:, None, :, None, None]
    white = drawn(64, 40, 18, 18, seed=2)
    for one, factor in zip(scaled, demodulation(weight, style), strict=True):
        y = F.conv2d(white, one * factor[:, None, None, None])
        assert y.var((0, 2, 3)).tolist() == pytest.approx([1.0] * 6, abs=0.1)


def test_shapes_at_the_sizes_of_the_book():
    for shape, channels, levels in (
        ((1, 28, 28), (16, 8, 8), [7, 14, 28]),
        ((3, 32, 32), (16, 8, 8, 8), [4, 8, 16, 32]),
        ((3, 64, 64), (16, 8, 8, 8, 8), [4, 8, 16, 32, 64]),
    ):
        model = StyleGenerator(shape, channels, latent_dim=5)
        sides = [level["layers"][-1].noise.shape[-1] for level in model.levels]
        assert sides == levels and model.n_levels == len(levels)
        z = model.draw_latents(4)
        assert z.shape == (4, model.latent_dim) and model(z).shape == (4, *shape)
        assert Discriminator(shape, channels)(model(z)).shape == (4,)


def test_the_length_of_a_latent_does_not_matter():
    model, z = tiny(), drawn(3, 6)
    with torch.no_grad():
        torch.testing.assert_close(model.mapping(5 * z), model.mapping(z), rtol=1e-4, atol=1e-5)
        assert (model.mapping(-z) - model.mapping(z)).abs().max() > 0.01


def test_equal_latents_give_equal_pictures_unless_noise_is_drawn():
    model, z = tiny(), drawn(4, 6)
    w = model.mapping(z)
    assert torch.equal(model(z), model.synthesis(w))
    torch.testing.assert_close(model(z)[:1], model(z[:1]), rtol=1e-4, atol=1e-4)
    seeds = (2, 2, 3)
    first, again, other = (
        model.synthesis(w, "random", torch.Generator().manual_seed(seed)) for seed in seeds
    )
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.01 and (first - model(z)).abs().max() > 0.01


def test_samples_follow_the_generator():
    model = tiny()
    first, again, other = (
        model.sample(5, torch.Generator().manual_seed(seed)) for seed in (2, 2, 3)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (5, 2, 8, 8) and not first.requires_grad
    assert first.min() >= -1 and first.max() <= 1
    z = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
    assert torch.equal(first, model(z).clamp(-1, 1))


def test_one_style_a_resolution():
    model, w = tiny(), drawn(3, 6)
    both = w[:, None].repeat(1, model.n_levels, 1)
    torch.testing.assert_close(model.synthesis(both), model.synthesis(w))
    both[:, -1] += 1
    fine = (model.synthesis(both) - model.synthesis(w)).detach()
    both = w[:, None].repeat(1, model.n_levels, 1)
    both[:, 0] += 1
    coarse = (model.synthesis(both) - model.synthesis(w)).detach()
    assert fine.abs().max() > 0.01 and coarse.abs().max() > 0.01 and not torch.equal(fine, coarse)


def test_gradients_reach_z_and_w():
    model = tiny()
    z = drawn(2, 6).requires_grad_()
    w = drawn(2, 6, seed=1).requires_grad_()
    (model(z).square().sum() + model.synthesis(w).square().sum()).backward()
    assert z.grad.abs().max() > 0 and w.grad.abs().max() > 0


def test_the_spread_is_that_of_each_group():
    x = drawn(8, 3, 2, 2)
    spread = spread_in_groups(x)
    assert spread.shape == (8, 1, 2, 2)
    for first in range(2):
        members = x[first::2]  # image i belongs to group i modulo the number of groups
        expected = members.var(0, correction=0).sqrt().mean()
        assert spread[first::2].flatten().tolist() == pytest.approx([expected.item()] * 16, 1e-4)
    assert spread_in_groups(x[:1].repeat(4, 1, 1, 1)).max() < 1e-3


def test_losses_are_the_cross_entropies():
    real, fake = drawn(5), drawn(5, seed=1)
    p, q = real.sigmoid(), fake.sigmoid()
    torch.testing.assert_close(generator_loss(fake), -q.log())
    torch.testing.assert_close(discriminator_loss(real, fake), -p.log() - (1 - q).log())
    assert discriminator_loss(*torch.zeros(2, 1)).item() == pytest.approx(2 * math.log(2))


def test_r1_of_a_quadratic_logit_and_its_own_gradient():
    x = drawn(3, 1, 2, 2).requires_grad_()
    a = torch.tensor(1.5, requires_grad=True)
    penalty = r1_penalty(a * x.square().flatten(1).sum(1), x)  # the gradient is 2 a x
    torch.testing.assert_close(penalty, 4 * 1.5**2 * x.square().flatten(1).sum(1))
    (slope,) = torch.autograd.grad(penalty.sum(), a)
    torch.testing.assert_close(slope, 8 * 1.5 * x.square().sum())


def test_r1_of_the_discriminator_against_finite_differences():
    torch.manual_seed(0)
    model, x = Discriminator([1, 8, 8], [8, 8]).double(), drawn(4, 1, 8, 8).double()
    x.requires_grad_()
    penalty = r1_penalty(model(x), x)
    step, slow = 1e-5, torch.zeros(4, dtype=torch.float64)
    with torch.no_grad():
        for image in range(4):
            for row in range(8):
                for column in range(8):
                    values = []
                    for sign in (1, -1):
                        moved = x.clone()
                        moved[image, 0, row, column] += sign * step
                        values.append(model(moved).sum())  # the images of a group are coupled
                    slow[image] += ((values[0] - values[1]) / (2 * step)) ** 2
    torch.testing.assert_close(penalty.detach(), slow, rtol=1e-4, atol=1e-9)


def test_each_player_feels_only_its_own_loss():
    model, real = pair(), drawn(8, 2, 8, 8).clamp(-1, 1)
    total, terms = model.loss(real, 2.0, 1, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    z = model.generator.draw_latents(8, generator)
    fake = model.generator(z, "random", generator)
    of_generator = generator_loss(model.discriminator(fake)).mean()
    real.requires_grad_()
    logits = model.discriminator(real)
    of_discriminator = discriminator_loss(logits, model.discriminator(fake.detach())).mean()
    penalty = r1_penalty(logits, real).mean()
    torch.testing.assert_close(total, of_generator + of_discriminator + penalty)
    torch.testing.assert_close(terms["r1"], penalty.detach())
    for player, loss in (
        (model.generator, of_generator),
        (model.discriminator, of_discriminator + penalty),
    ):
        found = torch.autograd.grad(total, list(player.parameters()), retain_graph=True)
        alone = torch.autograd.grad(loss, list(player.parameters()), retain_graph=True)
        for ours, expected in zip(found, alone, strict=True):
            assert expected.abs().max() > 0
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_a_generator_without_its_frozen_opponent_is_noticed(monkeypatch):
    monkeypatch.setattr(gan_module, "functional_call", lambda module, _, x: module(x))
    with pytest.raises(AssertionError):
        test_each_player_feels_only_its_own_loss()


def test_the_penalty_is_lazy_and_as_large_on_average():
    model, real = pair(), drawn(4, 2, 8, 8).clamp(-1, 1)
    generator = torch.Generator().manual_seed(0)
    steps = [model.loss(real, 3.0, 4, generator) for _ in range(8)]
    assert ["r1" in terms for _, terms in steps] == [True, False, False, False] * 2
    for total, terms in steps:
        penalty = 4 * 3.0 / 2 * terms.get("r1", 0)
        torch.testing.assert_close(total, terms["generator"] + terms["discriminator"] + penalty)
    assert "r1" not in model.loss(real, 0.0, 1, generator)[1]


def trained(steps: int, path=None, **options) -> tuple[GAN, GAN]:
    real = drawn(16, 2, 8, 8, seed=5).clamp(-1, 1)

    def step_loss(model, generator):
        index = torch.randint(16, (8,), generator=generator)
        return model.loss(real[index], 1.0, 3, generator)

    torch.manual_seed(0)
    model = pair()
    result = fit(
        model,
        step_loss,
        steps=steps,
        lr=2e-3,
        generator=torch.Generator().manual_seed(1),
        optimizer=partial(torch.optim.Adam, betas=(0.0, 0.99)),
        ema_decay=0.9,
        checkpoint=path,
        progress=False,
        **options,
    )
    return model, result.model


def test_a_resumed_training_is_bit_for_bit_the_whole_one(tmp_path):
    whole, whole_average = trained(7)
    trained(4, tmp_path / "part.safetensors")  # the next penalty is due at step 6
    resumed, resumed_average = trained(7, tmp_path / "part.safetensors", resume=True)
    assert whole.step == resumed.step == 7
    for one, other in ((whole, resumed), (whole_average, resumed_average)):
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    noise = whole.generator.levels[0]["layers"][0].noise
    assert torch.equal(noise, whole_average.generator.levels[0]["layers"][0].noise)
    start = pair().generator
    assert not torch.equal(start.constant, whole.generator.constant)
    assert not torch.equal(whole.generator.constant, whole_average.generator.constant)


def test_shipped_weights_draw_the_same_pictures(tmp_path):
    model, z = tiny(), drawn(4, 6)
    save_checkpoint("tiny", model, TINY, "test/smoke", "none", tmp_path)
    first, again = (load_checkpoint("tiny", tmp_path) for _ in range(2))
    with torch.no_grad():
        assert torch.equal(first(z), again(z))
        assert (first(z) - model(z)).abs().max() < 2e-2 * model(z).abs().max()
    other = TINY | {"channels": [8, 8]}
    save_checkpoint("other", model, other, "test/smoke", "none", tmp_path)
    with pytest.raises(CheckpointError, match=r"do not fit StyleGenerator\(.*size mismatch"):
        load_checkpoint("other", tmp_path)


def test_bad_input_is_named():
    model, judge = tiny(), Discriminator([2, 8, 8], [12, 8])
    with pytest.raises(ValueError, match=r"z is torch.float32 of shape \(2, 5\).*\(batch, 6\)"):
        model(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"z is torch\.int64"):
        model(torch.zeros(2, 6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"w has shape \(2, 3, 6\).*\(batch, 2, 6\); get it from"):
        model.synthesis(torch.zeros(2, 3, 6))
    with pytest.raises(ValueError, match="noise is 'none'; choose 'fixed' or 'random'"):
        model.synthesis(torch.zeros(2, 6), "none")
    with pytest.raises(ValueError, match="a batch that is a multiple of 4"):
        judge(torch.zeros(6, 2, 8, 8))
    with pytest.raises(ValueError, match=r"have shape \(4, 1, 8, 8\)"):
        judge(torch.zeros(4, 1, 8, 8))
    for gamma, every in ((-1.0, 16), (1.0, 0)):
        with pytest.raises(ValueError, match=f"gamma is {gamma} and every {every}; give"):
            GAN(model, judge).loss(torch.zeros(4, 2, 8, 8), gamma, every)
    for shape, channels in (((1, 30, 30), (8, 8, 8)), ((1, 8, 16), (8, 8)), ((1, 32, 32), (8, 8))):
        for build in (StyleGenerator, Discriminator):
            with pytest.raises(ValueError, match=r"square images that halve to 2 to 8 pixels"):
                build(shape, channels)


def test_inception_score_of_known_answers():
    sure = 200 * torch.eye(5).repeat(3, 1)
    assert inception_score(sure) == pytest.approx(5)
    assert inception_score(sure[:1].repeat(9, 1)) == pytest.approx(1)  # always the same
    assert inception_score(torch.zeros(9, 5)) == pytest.approx(1)  # never sure
    logits = drawn(50, 4)
    p = logits.softmax(1)
    each = [sum(p[i] * (p[i] / p.mean(0)).log()) for i in range(50)]
    assert inception_score(logits) == pytest.approx(torch.stack(each).mean().exp().item(), 1e-5)
    for bad in (torch.zeros(0, 3), torch.zeros(3, 1), torch.zeros(3), torch.full((3, 3), math.nan)):
        with pytest.raises(ValueError, match="give finite ones of shape"):
            inception_score(bad)


def test_larger_images_are_averaged_to_the_judges_size():
    judge = load_judge("random", (1, 8, 8), torch.device("cpu"))
    images = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    expected = images.unflatten(3, (8, 2)).unflatten(2, (8, 2)).float().mean((3, 5)) / 255
    torch.testing.assert_close(seen_by(judge, images), expected)
    torch.testing.assert_close(seen_by(judge, images[:, :, :8, :8]), images[:, :, :8, :8] / 255)


def test_pictures_are_drawn_and_chosen_again():
    pictures = Pictures.load("digits", "train", 8, torch.device("cpu"))
    first, again = (pictures.batch(4, torch.Generator().manual_seed(1)) for _ in range(2))
    assert first.shape == (4, 1, 8, 8) and first.dtype == torch.uint8 and torch.equal(first, again)
    assert torch.equal(pictures.some(7), pictures.some(7)) and len(pictures.some(9999)) == 1437
    sizes = []
    draw(lambda n, generator: sizes.append(n) or torch.zeros(n, 1), 230, torch.Generator())
    assert sizes == [100, 100, 30]


def test_samples_are_compared_with_held_out_pictures(tmp_path):
    run = Run(load_config("gan_mnist", "smoke"), runs=tmp_path)
    train, held_out = (Pictures.load("digits", s, 8, run.device) for s in ("train", "test"))
    torch.manual_seed(0)
    _latents.report_fidelity(
        to_uint8(drawn(300, 1, 8, 8)), train, held_out, "random", "random", 0, run
    )
    rows = {row.quantity: row for row in run.rows}
    assert len(rows) == 8 and all(row.n_samples == 300 for row in rows.values())
    assert rows["frechet_distance"].value > 10 * rows["frechet_distance_train"].value
    assert rows["precision"].value < 0.5 < rows["precision_train"].value
    assert rows["frechet_distance"].feature_extractor.startswith("random (FaceCNN, 128 features")
