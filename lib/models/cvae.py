"""A conditional variational autoencoder on images in [0, 1], built from fully connected layers."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.models._images import check_images


class ConditionalVAE(nn.Module):
    """Model images of a class by p(x | z, c) = Bernoulli(decoder mean) with a standard normal z.

    The class enters encoder and decoder as a one-hot vector beside their input.
    A decoder hidden layer has the size of its mirror image in the encoder.
    The networks have ReLU units.

    Source: the MNIST model of Heng & Soh (2023), 784 -> 512 -> 256 -> 8 and back.
    """

    def __init__(
        self,
        image_shape: tuple[int, ...],
        n_classes: int,
        hidden: tuple[int, ...] = (512, 256),
        latent_dim: int = 8,
    ):
        super().__init__()
        self.image_shape = tuple(image_shape)
        self.n_classes = n_classes
        self.latent_dim = latent_dim
        pixels = math.prod(self.image_shape)
        self.encoder = _mlp((pixels + n_classes, *hidden, 2 * latent_dim))
        self.decoder = _mlp((latent_dim + n_classes, *reversed(hidden), pixels))

    def elbo(self, x: Tensor, c: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Bound log p(x | c) from below with one draw of z, in nats.

        Pixels between 0 and 1 enter the Bernoulli cross-entropy as they are, as in the authors'
        code; the bound is one on a normalised log-probability only where all pixels are 0 or 1.

        Shapes: ``x`` (batch, *image_shape); ``c`` (batch,) classes or (batch, n_classes) weights;
        returns (batch,).
        Raises: ValueError if the image shape, a class or the range of the pixels is wrong.
        """
        self.check_images(x)
        self.check_condition(c, len(x))
        noise = torch.randn(len(x), self.latent_dim, generator=generator, device=x.device)
        return self.elbo_from_noise(x, c, noise.to(x.dtype))

    def elbo_from_noise(self, x: Tensor, c: Tensor, noise: Tensor) -> Tensor:
        """Compute :meth:`elbo` in nats for given standard normal ``noise`` (batch, latent_dim).

        Nothing is checked and nothing is drawn, so that ``torch.func`` can map over it.
        """
        mean, log_var = self.encode(x, c)
        z = mean + noise * torch.exp(0.5 * log_var)
        kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(1)
        return self.log_prob_given_latent(x, z, c) - kl

    def encode(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of q(z | x, c), both (batch, latent_dim)."""
        return self.encoder(torch.cat([x.flatten(1), self._one_hot(c, x)], 1)).chunk(2, 1)

    def log_prob_given_latent(self, x: Tensor, z: Tensor, c: Tensor) -> Tensor:
        """Return log p(x | z, c) (batch,) in nats: minus the Bernoulli cross-entropy."""
        logits = self.decoder(torch.cat([z, self._one_hot(c, z)], 1))
        return -F.binary_cross_entropy_with_logits(logits, x.flatten(1), reduction="none").sum(1)

    def decode(self, z: Tensor, c: Tensor) -> Tensor:
        """Return the decoder's mean images (batch, *image_shape) in [0, 1].

        Shapes: ``z`` (batch, latent_dim); ``c`` as in :meth:`elbo`.
        Raises: ValueError if ``z`` or ``c`` does not fit the model.
        """
        if z.ndim != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(
                f"z has shape {tuple(z.shape)}, the model wants (batch, {self.latent_dim}); "
                "draw it as torch.randn(batch, latent_dim)."
            )
        self.check_condition(c, len(z))
        logits = self.decoder(torch.cat([z, self._one_hot(c, z)], 1))
        return logits.sigmoid().unflatten(1, self.image_shape)

    @torch.no_grad()
    def sample(self, c: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw z from the prior and return the decoder's MEAN images, not Bernoulli draws.

        Shapes: ``c`` as in :meth:`elbo`; returns (batch, *image_shape) in [0, 1].
        Raises: ValueError if a class is out of range.
        """
        weight = self.decoder[0].weight
        z = torch.randn(len(c), self.latent_dim, generator=generator, device=weight.device)
        return self.decode(z.to(weight.dtype), c)

    @torch.no_grad()
    def log_likelihood(
        self,
        x: Tensor,
        c: Tensor,
        n_importance: int = 100,
        generator: torch.Generator | None = None,
        proposal: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Bound log p(x | c) from below with ``n_importance`` weighted draws of z, in nats.

        The bound of Burda et al. (2016) is tighter than the ELBO and exact in the limit.
        The draws come from the encoder's q(z | x, c), or from the ``proposal``, a mean and a
        log-variance (batch, latent_dim) each, such as :meth:`fit_posterior` finds.
        Shapes and errors as in :meth:`elbo`.
        """
        if n_importance < 1:
            raise ValueError(f"n_importance is {n_importance}; it must be at least 1.")
        self.check_images(x)
        self.check_condition(c, len(x))
        mean, log_var = proposal or self.encode(x, c)
        log_weights = []
        for _ in range(n_importance):
            noise = torch.randn(mean.shape, generator=generator, device=x.device).to(x.dtype)
            z = mean + noise * torch.exp(0.5 * log_var)
            log_prior_over_q = 0.5 * (noise**2 + log_var - z**2).sum(1)
            log_weights.append(self.log_prob_given_latent(x, z, c) + log_prior_over_q)
        return torch.stack(log_weights).logsumexp(0) - math.log(n_importance)

    def fit_posterior(
        self,
        x: Tensor,
        c: Tensor,
        starts: int = 4,
        steps: int = 150,
        lr: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Search, for each image by itself, the Gaussian over z with the largest ELBO.

        Only the decoder decides: an encoder that was led astray cannot hide what the decoder can
        still draw. Adam climbs from the encoder's guess and from ``starts`` - 1 draws of the
        prior, and the best of them is kept.

        Shapes: as in :meth:`elbo`; returns mean and log-variance, both (batch, latent_dim).
        Source: the refinement step of Kim et al. (2018), semi-amortised variational inference.
        Raises: ValueError as in :meth:`elbo`, or if ``starts`` or ``steps`` is below 1.
        """
        if starts < 1 or steps < 1:
            raise ValueError(f"starts is {starts} and steps {steps}; both must be at least 1.")
        self.check_images(x)
        self.check_condition(c, len(x))
        shape = (starts - 1, len(x), self.latent_dim)
        options = {"generator": generator, "device": x.device}
        with torch.no_grad():
            guess, guess_log_var = self.encode(x, c)
        means = torch.cat([guess[None], torch.randn(shape, **options)]).requires_grad_()
        log_vars = torch.cat([guess_log_var[None], guess.new_full(shape, -3.0)]).requires_grad_()

        def bound(noise: Tensor) -> Tensor:
            kl = 0.5 * (means**2 + log_vars.exp() - 1 - log_vars).sum(2)
            z = means + noise * torch.exp(0.5 * log_vars)
            fit = self.log_prob_given_latent(
                x.repeat(starts, *[1] * (x.ndim - 1)),
                z.flatten(0, 1),
                c.repeat(starts, *[1] * (c.ndim - 1)),
            )
            return fit.unflatten(0, (starts, -1)) - kl

        adam = torch.optim.Adam([means, log_vars], lr=lr)
        for _ in range(steps):
            loss = -bound(torch.randn(means.shape, **options)).sum()
            means.grad, log_vars.grad = torch.autograd.grad(loss, [means, log_vars])
            adam.step()
        with torch.no_grad():
            draws = [bound(torch.randn(means.shape, **options)) for _ in range(16)]
        best = torch.stack(draws).mean(0).argmax(0)
        index = best, torch.arange(len(x), device=x.device)
        return means.detach()[index], log_vars.detach()[index]

    def check_images(self, x: Tensor) -> None:
        """Raise ValueError unless ``x`` is a float batch of this model's images in [0, 1]."""
        wanted = "the Bernoulli cross-entropy wants values in [0, 1]: divide uint8 images by 255"
        check_images(x, self.image_shape, 0, 1, wanted)

    def check_condition(self, c: Tensor, batch: int) -> None:
        """Raise ValueError unless ``c`` holds ``batch`` classes or ``batch`` class weightings."""
        if c.is_floating_point():
            fits = tuple(c.shape) == (batch, self.n_classes)
        else:
            fits = tuple(c.shape) == (batch,)
        if not fits:
            raise ValueError(
                f"The condition is {c.dtype} of shape {tuple(c.shape)}; the model wants integer "
                f"classes ({batch},) or float weights ({batch}, {self.n_classes})."
            )
        if not c.is_floating_point() and batch and not 0 <= c.min() <= c.max() < self.n_classes:
            raise ValueError(
                f"The classes run from {c.min()} to {c.max()}, the model knows 0 to "
                f"{self.n_classes - 1}; choose a class in that range."
            )

    def _one_hot(self, c: Tensor, like: Tensor) -> Tensor:
        if c.is_floating_point():
            return c.to(like.dtype)
        # torch's one_hot looks at the values of c, which torch.func cannot map over.
        return (c[:, None] == torch.arange(self.n_classes, device=c.device)).to(like.dtype)


def _mlp(sizes: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(sizes):
        layers += [nn.Linear(n_in, n_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
