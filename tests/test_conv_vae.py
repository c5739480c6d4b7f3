"""The convolutional VAE against a grid integral, torch's distributions and a search by hand."""

import math

import pytest
import torch
from torch import distributions

from lib.checkpoints import load_checkpoint, save_checkpoint
from lib.models.conv_vae import ConvVAE, kl_to_prior
from lib.train import fit

TINY = {"image_shape": [2, 4, 4], "channels": [8, 8], "latent_dim": 1}


def tiny(**options) -> ConvVAE:
    torch.manual_seed(0)
    model = ConvVAE(**TINY | options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.double().eval()


def images(n: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, *shape, generator=generator, dtype=torch.float64)


@torch.no_grad()
def grid_log_likelihood(model: ConvVAE, x: torch.Tensor) -> torch.Tensor:
    """Integrate p(x | z) p(z) over a fine grid of one-dimensional z."""
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    noise = distributions.Normal(model.decode(z[:, None]), model.log_sigma.exp())
    prior = distributions.Normal(0, 1).log_prob(z)
    each = [(noise.log_prob(image).flatten(1).sum(1) + prior).logsumexp(0) for image in x]
    return torch.stack(each) + math.log(18 / 4000)


def test_elbo_is_below_a_grid_integral_by_the_kl_to_the_posterior():
    model, x = tiny(), images(3, 2, 4, 4)
    exact = grid_log_likelihood(model, x)
    with torch.no_grad():
        many = model.elbo(x.repeat(4000, 1, 1, 1), torch.Generator().manual_seed(1))
        mean, log_var = model.encode(x)
        z = torch.linspace(-9, 9, 4001, dtype=torch.float64)
        gaps = []
        for image, m, v in zip(x, mean, log_var, strict=True):
            q = distributions.Normal(m, torch.exp(0.5 * v)).log_prob(z)
            joint = model.log_prob_given_latent(image.expand(len(z), -1, -1, -1), z[:, None])
            joint = joint + distributions.Normal(0, 1).log_prob(z)
            gaps.append((q.exp() * (q - (joint - joint.logsumexp(0)))).sum() * 18 / 4000)
            gaps[-1] += math.log(18 / 4000)
    gap = exact - many.reshape(4000, 3).mean(0)
    assert (gap > 0).all()
    torch.testing.assert_close(gap, torch.stack(gaps), rtol=0.1, atol=0.05)


def test_elbo_is_exact_where_the_posterior_is_the_prior():
    model, x = tiny(), images(3, 2, 4, 4)
    with torch.no_grad():
        model.encoder[-1].weight.zero_()
        model.encoder[-1].bias.zero_()  # q(z | x) = N(0, 1)
        model.decoder[0].weight.zero_()  # the decoder ignores z
    torch.testing.assert_close(model.elbo(x), grid_log_likelihood(model, x))


def test_kl_is_torchs():
    mean, log_var = images(5, 3) - 0.5, images(5, 3)
    q = distributions.Normal(mean, torch.exp(0.5 * log_var))
    expected = distributions.kl_divergence(q, distributions.Normal(0, 1)).sum(1)
    torch.testing.assert_close(kl_to_prior(mean, log_var), expected.double())


def test_the_best_sigma_is_the_error_of_the_reconstructions():
    model, x, z = tiny(), images(6, 2, 4, 4), torch.zeros(6, 1, dtype=torch.float64)
    error = (model.decode(z) - x).square().mean().sqrt().item()
    values = {}
    for factor in (0.9, 1.0, 1.1):
        model.log_sigma.data.fill_(math.log(factor * error))
        values[factor] = model.log_prob_given_latent(x, z).sum().item()
    assert values[1.0] > max(values[0.9], values[1.1])
    model.log_sigma.data.fill_(math.log(error))
    (slope,) = torch.autograd.grad(model.log_prob_given_latent(x, z).sum(), model.log_sigma)
    assert slope.item() == pytest.approx(0, abs=1e-8)


def test_shapes_at_the_sizes_of_the_book():
    for shape, channels in (((1, 28, 28), (16, 8, 8)), ((3, 32, 32), (16, 16, 8, 8))):
        model = ConvVAE(shape, channels, latent_dim=5)
        x = model.sample(3)
        assert x.shape == (3, *shape) and model.elbo(x).shape == (3,)
        assert [part.shape for part in model.encode(x)] == [(3, 5), (3, 5)]


def test_samples_are_decoder_means_and_repeatable():
    model = tiny(latent_dim=3)
    first, again, other = (
        model.sample(4, torch.Generator().manual_seed(seed)) for seed in (2, 2, 3)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.min() > 0 and first.max() < 1 and not first.requires_grad
    z = model.draw_latents(4, torch.Generator().manual_seed(2))
    assert z.shape == (4, model.latent_dim) and torch.equal(first, model.decode(z))
    x = images(4, 2, 4, 4)
    one, two = (model.elbo(x, torch.Generator().manual_seed(seed)) for seed in (1, 1))
    assert torch.equal(one, two)


def trained(steps: int, path=None, **options) -> ConvVAE:
    x = images(16, 2, 4, 4).float()

    def step_loss(model, generator):
        index = torch.randint(16, (8,), generator=generator)
        return -model.elbo(x[index], generator).mean(), {}

    torch.manual_seed(0)
    model = ConvVAE(**TINY)
    return fit(
        model,
        step_loss,
        steps=steps,
        lr=1e-2,
        generator=torch.Generator().manual_seed(1),
        checkpoint=path,
        progress=False,
        **options,
    ).model


def test_a_resumed_training_is_bit_for_bit_the_whole_one(tmp_path):
    whole = trained(8)
    trained(5, tmp_path / "part.safetensors")
    resumed = trained(8, tmp_path / "part.safetensors", resume=True)
    start = trained(0)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
        assert not torch.equal(value, start.state_dict()[name]), name


def test_shipped_weights_build_the_model_again(tmp_path):
    model = tiny()
    save_checkpoint("tiny", model, TINY, "test/smoke", "none", tmp_path)
    again, z = load_checkpoint("tiny", tmp_path), images(4, 1)
    with torch.no_grad():
        difference = again.decode(z.float()) - model.decode(z)
        assert difference.abs().max() < 5e-3
        assert again.log_sigma.item() == pytest.approx(model.log_sigma.item(), rel=1e-3)


def test_bad_input_is_named():
    model, x = ConvVAE([1, 4, 4], [8, 8], 2), torch.rand(2, 1, 4, 4)
    model.elbo(x)
    with pytest.raises(ValueError, match=r"shape \(2, 16\); the model wants floats"):
        model.elbo(x.flatten(1))
    with pytest.raises(ValueError, match=r"torch\.uint8 of shape"):
        model.elbo(x.byte())
    with pytest.raises(ValueError, match=r"values from 0 to 255.*\[0, 1\]: divide"):
        model.elbo(torch.tensor([0.0, 255.0]).repeat(16).reshape(2, 1, 4, 4))
    with pytest.raises(ValueError, match="values from nan"):
        model.elbo(x * math.nan)
    with pytest.raises(ValueError, match=r"z is torch\.float32 of shape \(2, 3\).*draw_latents"):
        model.decode(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"z is torch\.int64"):
        model.decode(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="3 widths want square images whose side is a multiple"):
        ConvVAE([1, 6, 6], [8, 8, 8])
    with pytest.raises(ValueError, match="not all multiples of 8"):
        ConvVAE([1, 4, 4], [8, 12])
