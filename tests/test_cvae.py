import math

import pytest
import torch

from lib.models.cvae import ConditionalVAE


def tiny(latent_dim=1, image_shape=(1, 2, 2), **kwargs):
    torch.manual_seed(0)
    model = ConditionalVAE(image_shape, 3, hidden=(8, 6), latent_dim=latent_dim, **kwargs)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return model.double()


def test_has_the_layers_of_the_paper():
    model = ConditionalVAE((1, 28, 28), 10)
    shapes = [tuple(p.shape) for n, p in model.named_parameters() if n.endswith("weight")]
    assert shapes == [(512, 794), (256, 512), (16, 256), (256, 18), (512, 256), (784, 512)]


def grid_log_likelihood(model, x, c):
    """Integrate p(x | z, c) p(z) over a fine grid of one-dimensional z."""
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    log_prior = -0.5 * (z**2 + math.log(2 * math.pi))
    values = []
    for image, label in zip(x, c, strict=True):
        images = image.expand(len(z), *image.shape)
        log_p = model.log_prob_given_latent(images, z[:, None], label.expand(len(z)))
        values.append((log_p + log_prior).logsumexp(0) + math.log(18 / 4000))
    return torch.stack(values)


def test_bounds_against_a_grid_integral():
    model = tiny()
    x = torch.randint(0, 2, (3, 1, 2, 2)).double()
    c = torch.tensor([0, 1, 2])
    exact = grid_log_likelihood(model, x, c)
    generator = torch.Generator().manual_seed(1)
    many = x.repeat(3000, 1, 1, 1), c.repeat(3000)
    elbo = model.elbo(*many, generator).reshape(3000, 3).mean(0)
    one = model.log_likelihood(*many, 1, generator).reshape(3000, 3).mean(0)
    tight = model.log_likelihood(x, c, 1000, generator)
    assert (elbo < exact).all()
    torch.testing.assert_close(tight, exact, atol=0.05, rtol=0)
    # One draw is another estimate of the ELBO; its log-weight is heavy-tailed.
    torch.testing.assert_close(one, elbo, atol=0.3, rtol=0)


def test_elbo_is_tight_where_the_posterior_is_the_prior():
    model = tiny()
    with torch.no_grad():
        model.encoder[-1].weight.zero_()
        model.encoder[-1].bias.zero_()  # q(z | x) = N(0, 1)
        model.decoder[0].weight[:, :1] = 0  # the decoder ignores z
    x, c = torch.randint(0, 2, (3, 1, 2, 2)).double(), torch.tensor([0, 1, 2])
    torch.testing.assert_close(model.elbo(x, c), grid_log_likelihood(model, x, c))


def test_a_searched_posterior_does_not_trust_the_encoder():
    model = tiny()
    with torch.no_grad():
        mean, log_var = model.encoder[-1].bias.chunk(2)
        mean += 6  # sure of a place far from where the decoder draws x
        log_var -= 6
    x, c = torch.randint(0, 2, (5, 1, 2, 2)).double(), torch.tensor([0, 1, 2, 0, 1])
    exact = grid_log_likelihood(model, x, c)
    generator = torch.Generator().manual_seed(0)
    own = model.log_likelihood(x, c, 100, generator)
    searched = model.fit_posterior(x, c, generator=generator)
    refined = model.log_likelihood(x, c, 1000, generator, searched)
    assert (own < exact - 1).all()
    torch.testing.assert_close(refined, exact, atol=0.05, rtol=0)


def test_probabilities_of_all_binary_images_sum_to_one():
    model = tiny()
    x = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4).double().reshape(16, 1, 2, 2)
    total = grid_log_likelihood(model, x, torch.full((16,), 2)).exp().sum()
    torch.testing.assert_close(total, torch.tensor(1.0, dtype=torch.float64), atol=1e-9, rtol=0)


def test_samples_are_decoder_means_and_repeatable():
    model = tiny(latent_dim=2, image_shape=(3, 2, 4))
    c = torch.tensor([0, 2, 1])
    first = model.sample(c, torch.Generator().manual_seed(3))
    assert first.shape == (3, 3, 2, 4)
    assert first.min() > 0 and first.max() < 1 and len(first.unique()) == first.numel()
    assert torch.equal(first, model.sample(c, torch.Generator().manual_seed(3)))
    z = torch.randn(3, 2, dtype=torch.float64)
    soft = torch.nn.functional.one_hot(c, 3).double()
    torch.testing.assert_close(model.decode(z, c), model.decode(z, soft))


def test_bad_input_is_named():
    model = ConditionalVAE((1, 4, 4), 3, hidden=(4,), latent_dim=2)
    x, c = torch.rand(2, 1, 4, 4), torch.tensor([0, 1])
    model.elbo(x, c)
    with pytest.raises(ValueError, match=r"shape \(2, 16\); the model wants floats"):
        model.elbo(x.flatten(1), c)
    with pytest.raises(ValueError, match=r"values from 0 to 255.*\[0, 1\]: divide"):
        model.elbo(torch.tensor([0.0, 255.0]).expand(2, 1, 4, 2).repeat(1, 1, 1, 2), c)
    with pytest.raises(ValueError, match="values from nan"):
        model.elbo(x * math.nan, c)
    with pytest.raises(ValueError, match="classes run from 0 to 3, the model knows 0 to 2"):
        model.sample(torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="classes run from -1"):
        model.elbo(x, torch.tensor([-1, 0]))
    with pytest.raises(ValueError, match=r"wants integer classes \(2,\) or float weights \(2, 3\)"):
        model.elbo(x, torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"z has shape \(2, 3\)"):
        model.decode(torch.zeros(2, 3), c)
    with pytest.raises(ValueError, match="n_importance is 0"):
        model.log_likelihood(x, c, 0)
    with pytest.raises(ValueError, match="starts is 0 and steps 150"):
        model.fit_posterior(x, c, 0)
