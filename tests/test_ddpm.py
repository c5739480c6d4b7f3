"""The diffusion model against diffusers' own pieces, on tiny UNets with random weights."""

import math

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import nn

from lib.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from lib.experiments.train_ddpm import load_images
from lib.methods.fisher import diagonal_fisher
from lib.models import ddpm
from lib.models.ddpm import ConditionalDDPM, guide, to_signed, to_uint8
from lib.models.diffusion import variational_bound

T = 1000
TINY = {"image_shape": [1, 8, 8], "n_classes": 3, "channels": [8, 16]}
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


@pytest.fixture(scope="module")
def tiny() -> ConditionalDDPM:
    return randomised(**TINY)


def randomised(**arguments) -> ConditionalDDPM:
    torch.manual_seed(0)
    model = ConditionalDDPM(**arguments)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_loss_is_the_squared_error_at_one_random_step(tiny):
    x0, c = drawn(5, 1, 8, 8).clamp(-1, 1), torch.tensor([0, 1, 2, 0, 1])
    generator = torch.Generator().manual_seed(4)
    t = torch.randint(T, (5,), generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    x_t = DDPMScheduler(T, **LINEAR).add_noise(x0, noise, t)
    with torch.no_grad():
        expected = (tiny.unet(x_t, t, c).sample - noise).square().sum((1, 2, 3))
        summed = tiny.loss(x0, c, torch.Generator().manual_seed(4))
        mean = tiny.loss(x0, c, torch.Generator().manual_seed(4), reduction="mean")
        bound = tiny.elbo(x0, c, torch.Generator().manual_seed(4))
    torch.testing.assert_close(summed, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(mean, expected / 64, rtol=1e-4, atol=0)
    want = variational_bound(x0, t, expected, tiny.schedule)
    torch.testing.assert_close(bound, want, rtol=1e-4, atol=0)


def test_dropped_classes_are_the_null_class(tiny):
    x0, c = drawn(4, 1, 8, 8).clamp(-1, 1), torch.tensor([0, 1, 2, 0])
    generator = torch.Generator().manual_seed(4)
    t, noise = tiny._draw(x0, generator)
    with torch.no_grad():
        dropped = tiny.loss(x0, c, torch.Generator().manual_seed(4), drop=1.0)
        null = tiny.loss_from_noise(x0, torch.full((4,), tiny.null_class), t, noise)
    torch.testing.assert_close(dropped, null)
    assert difference(tiny.loss_from_noise(x0, c, t, noise), null) > 1e-3


def test_per_sample_gradients_under_vmap(tiny):
    x0, noise = drawn(3, 1, 8, 8).clamp(-1, 1), drawn(3, 1, 8, 8, seed=1)
    batch = (x0, torch.tensor([0, 1, 2]), torch.tensor([0, 10, 999]), noise)
    fisher = diagonal_fisher(
        tiny, lambda model, *rows: model.loss_from_noise(*rows), [batch], linear_identity=False
    )
    total = torch.zeros_like(tiny.unet.conv_in.weight)
    for row in range(3):
        loss = tiny.loss_from_noise(*(value[row : row + 1] for value in batch)).sum()
        total += torch.autograd.grad(loss, tiny.unet.conv_in.weight)[0].square() / 3
    torch.testing.assert_close(fisher["unet.conv_in.weight"], total, rtol=1e-3, atol=0)


def test_guidance_is_the_papers(tiny):
    assert guide(torch.tensor(3.0), torch.tensor(1.0), 2.0) == 7.0
    calls = []
    handle = tiny.unet.register_forward_hook(lambda m, inputs, out: calls.append(len(inputs[0])))
    c, x = torch.tensor([0, 2]), drawn(2, 1, 8, 8)
    with torch.no_grad():
        plain, guided = (tiny.guided(c, w)(x, 7) for w in (0.0, 2.0))
        handle.remove()
        step, null = torch.tensor(7), torch.full((2,), tiny.null_class)
        with_class, without = (tiny.predict_noise(x, step, k) for k in (c, null))
    assert calls == [2, 4]
    torch.testing.assert_close(plain, with_class)
    torch.testing.assert_close(guided, 3 * with_class - 2 * without, rtol=1e-4, atol=1e-4)


def test_a_whole_guided_trajectory_equals_diffusers(tiny):
    scheduler = DDIMScheduler(T, **LINEAR, timestep_spacing="trailing", clip_sample=True)
    scheduler.set_timesteps(8)
    c, null = torch.tensor([2, 0]), torch.tensor([3, 3])
    x = drawn(2, 1, 8, 8, seed=5)
    with torch.no_grad():
        for t in scheduler.timesteps:
            with_class, without = (tiny.unet(x, t, k).sample for k in (c, null))
            noise = without + 3.0 * (with_class - without)  # their guidance scale is w + 1
            x = scheduler.step(noise, t, x, use_clipped_model_output=True).prev_sample
    ours = tiny.sample(c, 2.0, 8, torch.Generator().manual_seed(5))
    assert difference(ours, x.clamp(-1, 1)) < 1e-5


def test_a_swapped_guidance_is_noticed(tiny, monkeypatch):
    swapped = lambda with_class, without, w: (1 + w) * without - w * with_class  # noqa: E731
    monkeypatch.setattr(ddpm, "guide", swapped)
    with pytest.raises(AssertionError):
        test_guidance_is_the_papers(tiny)
    with pytest.raises(AssertionError):
        test_a_whole_guided_trajectory_equals_diffusers(tiny)


def test_class_and_step_scale_and_shift_the_features(tiny):
    block = tiny.unet.down_blocks[0].resnets[0]
    assert block.time_embedding_norm == "scale_shift"
    assert block.time_emb_proj.out_features == 2 * block.out_channels
    assert tiny.unet.class_embedding.num_embeddings == 4
    x, t = drawn(2, 1, 8, 8)[:1].expand(2, 1, 8, 8), torch.tensor([3, 3])
    with torch.no_grad():
        noise = tiny.predict_noise(x, t, torch.tensor([0, 1]))
        early = tiny.predict_noise(x, t + 500, torch.tensor([0, 1]))
    assert difference(noise[0], noise[1]) > 1e-3 and difference(noise, early) > 1e-3


def test_patches_are_undone():
    model = randomised(**TINY | {"image_shape": [2, 8, 8], "patch": 2})
    assert model.unet.conv_in.in_channels == 8
    model.unet.forward = lambda x, t, c, return_dict: (x,)
    x = drawn(3, 2, 8, 8)
    assert torch.equal(model.predict_noise(x, torch.tensor(0), torch.tensor([0, 1, 2])), x)


def test_attention_stands_where_it_is_asked_for():
    def count(attention):
        model = ConditionalDDPM(**TINY, attention=attention)
        return [type(b).__name__.startswith("Attn") for b in model.unet.down_blocks], sum(
            type(m).__name__ == "Attention" for m in model.unet.mid_block.modules()
        )

    assert count([]) == ([False, False], 0)
    assert count([4]) == ([False, True], 1)


def test_samples_follow_generator_and_class(tiny):
    c = torch.tensor([0, 1, 2])
    first, again = (tiny.sample(c, 1.0, 3, torch.Generator().manual_seed(2)) for _ in range(2))
    assert first.shape == (3, 1, 8, 8) and first.min() >= -1 and first.max() <= 1
    assert torch.equal(first, again) and not first.requires_grad
    other = tiny.sample(c.flip(0), 1.0, 3, torch.Generator().manual_seed(2))
    assert difference(first[0], other[0]) > 1e-3 and torch.equal(first[1], other[1])
    noisy = tiny.sample(c, 1.0, 3, torch.Generator().manual_seed(2), eta=1.0)
    assert difference(noisy, first) > 1e-3
    few = ConditionalDDPM(**TINY, n_steps=3)
    assert few.sample_ancestral(c, 1.0, torch.Generator()).shape == (3, 1, 8, 8)


def test_images_go_in_and_out():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x = to_signed(levels)
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal(to_uint8(x), levels)
    torch.testing.assert_close(to_signed(levels.float() / 255), x, atol=1e-6, rtol=0)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
    with pytest.raises(ValueError, match=r"from -1 to 1; to_signed wants uint8, or floats"):
        to_signed(x)


def test_shipped_weights_build_the_model_again(tiny, tmp_path):
    save_checkpoint("tiny", tiny, TINY, "test/smoke", "none", tmp_path)
    again = load_checkpoint("tiny", tmp_path)
    x, t, c = drawn(2, 1, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 2])
    with torch.no_grad():
        assert difference(again.predict_noise(x, t, c), tiny.predict_noise(x, t, c)) < 1e-2
    save_checkpoint("other", tiny, TINY | {"channels": [8, 8]}, "test/smoke", "none", tmp_path)
    with pytest.raises(CheckpointError, match=r"do not fit ConditionalDDPM\(.*size mismatch"):
        load_checkpoint("other", tmp_path)


def test_bad_input_is_named(tiny):
    x, c = torch.zeros(2, 1, 8, 8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"guidance is -0.5; it must be at least 0"):
        tiny.sample(c, guidance=-0.5)
    with pytest.raises(ValueError, match=r"Got 1001 sampling steps; the model has 1000: choose"):
        tiny.sample(c, steps=1001)
    with pytest.raises(ValueError, match=r"Got 0 sampling steps"):
        tiny.sample(c, steps=0)
    with pytest.raises(ValueError, match=r"eta is 1.5; it must lie between 0"):
        tiny.sample(c, eta=1.5)
    for classes in ([0, 3], [-1, 0]):
        with pytest.raises(ValueError, match=r"the model knows 0 to 2; choose a class"):
            tiny.sample(torch.tensor(classes))
        with pytest.raises(ValueError, match=r"the model knows 0 to 2; choose a class"):
            tiny.loss(x, torch.tensor(classes))
    with pytest.raises(ValueError, match=r"whole numbers of shape \(2,\)"):
        tiny.loss(x, torch.tensor([0]))
    with pytest.raises(ValueError, match=r"of shape \(2, 64\); the model wants floats"):
        tiny.loss(x.flatten(1), c)
    with pytest.raises(ValueError, match=r"torch.uint8 of shape .*; the model wants floats"):
        tiny.loss(x.byte(), c)
    with pytest.raises(ValueError, match=r"values from 0 to 255; the model wants \[-1, 1\]"):
        tiny.loss(torch.linspace(0, 255, 128).reshape(2, 1, 8, 8), c)
    with pytest.raises(ValueError, match="values from nan"):
        tiny.elbo(x * math.nan, c)
    with pytest.raises(ValueError, match="reduction is 'max'"):
        tiny.loss(x, c, reduction="max")
    with pytest.raises(ValueError, match=r"2 widths and patch 2 want square .* multiple of 4"):
        ConditionalDDPM([1, 6, 6], 3, [8, 8], patch=2)
    with pytest.raises(ValueError, match="not all multiples of the 8 groups"):
        ConditionalDDPM([1, 8, 8], 3, [8, 12])
    with pytest.raises(ValueError, match=r"at \[16\]; the feature maps have sizes \[8, 4\]"):
        ConditionalDDPM(**TINY, attention=[16])
    with pytest.raises(ValueError, match="Got 0 steps with variances"):
        ConditionalDDPM(**TINY, n_steps=0)


def test_classes_are_left_out_of_joined_splits():
    cpu = torch.device("cpu")
    everything, nine = (
        load_images("digits", ("train", "test"), 8, without, cpu) for without in ((), (0,))
    )
    assert len(everything.images) == len(everything.labels) == 1797
    assert nine.labels.unique().tolist() == list(range(1, 10))
    assert len(nine.images) == len(nine.labels) == int((everything.labels != 0).sum())
    assert nine.source.endswith(", without class 0")
