"""What the comparison asks of conditional models, on models small enough to check by hand."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from lib.config import ConfigError, load_config, resolve
from lib.experiments import _conditional_kinds as kinds
from lib.experiments._conditional_contenders import BASELINES, Workshop
from lib.experiments._conditional_kinds import Ddpm, Vae, embedded, extrapolated
from lib.experiments._diffusion import Sampling
from lib.experiments._digits import Digits
from lib.models.cvae import ConditionalVAE
from lib.models.ddpm import ConditionalDDPM
from lib.run import Run

CPU = torch.device("cpu")
SAMPLING = Sampling(guidance=0.0, sample_steps=5, eta=0.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_ddpm() -> ConditionalDDPM:
    torch.manual_seed(0)
    model = ConditionalDDPM((1, 8, 8), 10, (8, 8))
    for parameter in model.parameters():  # diffusers starts some at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("kind", [Vae(SAMPLING, CPU), Ddpm(SAMPLING, CPU)])
def test_a_condition_stands_for_its_class(kind):
    torch.manual_seed(0)
    vae = isinstance(kind, Vae)
    model = ConditionalVAE((1, 8, 8), 10, (16,), 3).eval() if vae else small_ddpm()
    c, z = torch.tensor([0, 4, 7]), kind.latents(model, 3, seeded())
    pictures = kind.decode(model, z, kind.condition(model, c))
    if vae:
        expected = model.decode(z, c)
    else:
        x = z
        times = kinds.ddim_steps(1000, kind.COARSE)
        for t, t_next in zip(times, [*times[1:], -1], strict=True):
            x = kinds.ddim_step(
                x, model.predict_noise(x, torch.tensor(t), c), t, t_next, model.schedule
            )
        expected = (x + 1) / 2
    assert torch.allclose(pictures, expected, rtol=1e-4)
    moved = kind.decode(model, z, kind.condition(model, c) + 0.5)
    assert not torch.allclose(pictures, moved, rtol=1e-4)
    condition = kind.condition(model, c).requires_grad_()
    kind.decode(model, z, condition).sum().backward()
    assert (condition.grad != 0).any()


def test_pictures_with_little_noise_are_given_back_and_classes_count_under_much():
    kind, model = Ddpm(SAMPLING, CPU), small_ddpm()
    x, noise = torch.rand(2, 3, 1, 8, 8, generator=seeded())
    c = torch.tensor([0, 4, 7])
    same = kind.redraw(model, x, c, 0, torch.zeros_like(x))
    assert torch.allclose(same, x, atol=0.02)
    far, other = (kind.redraw(model, x, k, 150, noise) for k in (c, c.flip(0)))
    assert not torch.allclose(far, x, atol=0.1)
    assert torch.equal(far[1], other[1]) and not torch.equal(far[0], other[0])


def test_drawing_without_guidance_is_the_conditional_model():
    model, c = small_ddpm(), torch.tensor([0, 4])
    guided = Ddpm(replace(SAMPLING, guidance=3.0), CPU)
    plain = guided.draw_unguided(model, c, seeded(1))
    assert torch.equal(plain, Ddpm(SAMPLING, CPU).draw(model, c, seeded(1)))
    assert not torch.equal(plain, guided.draw(model, c, seeded(1)))


def test_only_a_model_that_draws_in_steps_redraws():
    resolved = load_config("compare_vae_mnist", "smoke").resolved
    wrong = resolved["audit"] | {"redrawing": {"at": [1], "n_targets": 1}}
    with pytest.raises(ConfigError, match="the kind 'vae' draws at once, leave out"):
        resolve("compare_vae_mnist", "smoke", resolved | {"audit": wrong})


def test_a_model_sees_its_own_classes_again_after_other_conditions():
    model = small_ddpm()
    with embedded(model, torch.zeros(1, 1)):
        assert model.unet.class_embedding._forward_hooks
    assert not model.unet.class_embedding._forward_hooks


def test_the_bound_of_a_ddpm_never_drops_the_digit():
    class Heard:
        schedule, null_class = small_ddpm().schedule, 10

        def loss_from_noise(self, x0, c, t, noise):
            assert x0.min() == -1 and x0.max() == 1
            self.classes = c
            return x0.new_zeros(len(x0))

    model, x = Heard(), torch.rand(2000, 1, 2, 2).round()
    kind = Ddpm(SAMPLING, CPU)
    kind.bound(model, 3, seeded())(x, torch.full((2000,), 3))
    assert (model.classes == 3).all()
    kind.bound(model, 3, seeded())(x, torch.full((2000,), 4))
    assert set(model.classes.tolist()) == {4, 10}
    assert (model.classes == 10).float().mean() == pytest.approx(0.1, abs=0.03)


def test_what_a_vae_reads_is_told_no_class():
    torch.manual_seed(0)
    model, heard = ConditionalVAE((1, 8, 8), 10, (16,), 3), []
    model.encoder.register_forward_pre_hook(lambda module, given: heard.append(given[0][:, -10:]))
    Vae(SAMPLING, CPU).read(model, torch.rand(4, 1, 8, 8), torch.zeros(4, 1, 8, 8))
    assert torch.equal(heard[0], torch.full((4, 10), 0.1))


def test_seconds_are_extrapolated_from_the_steps_alone(monkeypatch):
    monkeypatch.setattr(kinds, "seconds", lambda work: 10 + 0.5 * work.args[0])
    assert extrapolated(partial, 4, 1001) == pytest.approx(10.5 + 0.5 * 1000)


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_stops_where_it_should_and_counts_its_pictures(name, tmp_path):
    loaded = load_config("compare_vae_mnist", "smoke")
    config = replace(loaded.config, base="random")
    run = Run(loaded, runs=tmp_path)
    digits = Digits.load("digits", "train", 28, CPU)
    workshop = Workshop(config, Vae(config, CPU), digits, run)
    before = {key: value.clone() for key, value in workshop.base.state_dict().items()}
    to_the_end = workshop.make(name, lambda images: 1.0, 0)
    assert (to_the_end.steps, to_the_end.stopped) == (2, 0.0)
    at_once = workshop.make(name, lambda images: 0.0, 0)
    assert (at_once.steps, at_once.stopped) == (2, 1.0)  # checked every second step
    n_forget = {"gradient_ascent": 8, "saliency": 4}.get(name, 0)
    n_rest = 8 if name in ("fine_tune", "gradient_ascent") else 16
    assert (to_the_end.forget_pictures, to_the_end.rest_pictures) == (n_forget, n_rest)
    after = to_the_end.model.state_dict()
    moved = torch.cat([(after[key] != before[key]).flatten() for key in before]).float().mean()
    assert 0 < moved <= (0.5 if name == "saliency" else 1)
    for key, value in workshop.base.state_dict().items():
        assert torch.equal(value, before[key])
