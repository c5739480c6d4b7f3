"""A convolutional variational autoencoder without classes, on images in [0, 1]."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from lib.models._images import check_images

GROUPS = 8  # of the group norms; they divide all widths


class ConvVAE(nn.Module):
    """Model images by p(x | z) = N(decoder mean, σ²) with a standard normal z.

    All pixels share one σ, which is learned with the rest (Rybkin et al. 2021): it becomes the
    error of the reconstructions, and weighs them against the KL without a β to tune.

    ``channels`` are the widths from the coarsest feature map to the finest, each twice the size of
    the one before; the last has the size of the images. The encoder mirrors the decoder.

    Raises: ValueError if the image shape or the groups do not fit the widths.
    """

    def __init__(
        self,
        image_shape: tuple[int, ...],
        channels: tuple[int, ...] = (128, 64, 32),
        latent_dim: int = 32,
    ):
        super().__init__()
        depth, height, width = image_shape
        side, rest = divmod(height, 2 ** (len(channels) - 1))
        if height != width or rest or not side:
            raise ValueError(
                f"The image shape is {tuple(image_shape)}; {len(channels)} widths want square "
                f"images whose side is a multiple of {2 ** (len(channels) - 1)}."
            )
        if any(n % GROUPS for n in channels):
            raise ValueError(
                f"The widths {tuple(channels)} are not all multiples of {GROUPS}; choose such."
            )
        self.image_shape, self.latent_dim = tuple(image_shape), latent_dim
        coarsest = (channels[0], side, side)
        down = [layer for pair in pairwise(reversed(channels)) for layer in _block(*pair, stride=2)]
        self.encoder = nn.Sequential(
            *_block(depth, channels[-1]),
            *down,
            nn.Flatten(),
            nn.Linear(math.prod(coarsest), 2 * latent_dim),
        )
        up = [
            layer
            for pair in pairwise(channels)
            for layer in (*_block(*pair), nn.Upsample(scale_factor=2))
        ]
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, math.prod(coarsest)),
            nn.Unflatten(1, coarsest),
            *up,
            *_block(channels[-1], channels[-1]),
            nn.Conv2d(channels[-1], depth, 3, padding=1),
            nn.Sigmoid(),
        )
        self.log_sigma = nn.Parameter(torch.tensor(-2.0))

    def elbo(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Bound log p(x) from below with one draw of z, in nats.

        p is a density over images in [0, 1] as they are, levels and all, without dequantisation;
        it may exceed 1, and is not a probability of 8-bit images.

        Shapes: ``x`` (batch, *image_shape); returns (batch,).
        Raises: ValueError if the image shape or the range of the pixels is wrong.
        """
        self.check_images(x)
        noise = torch.randn(len(x), self.latent_dim, generator=generator, device=x.device)
        return self.elbo_from_noise(x, noise.to(x.dtype))

    def elbo_from_noise(self, x: Tensor, noise: Tensor) -> Tensor:
        """Compute :meth:`elbo` in nats for given standard normal ``noise`` (batch, latent_dim)."""
        mean, log_var = self.encode(x)
        z = mean + noise * torch.exp(0.5 * log_var)
        return self.log_prob_given_latent(x, z) - kl_to_prior(mean, log_var)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of q(z | x), both (batch, latent_dim)."""
        return self.encoder(x).chunk(2, 1)

    def log_prob_given_latent(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the Gaussian log p(x | z) (batch,) in nats."""
        squares = ((x - self.decoder(z)) * torch.exp(-self.log_sigma)).square()
        constant = self.log_sigma + 0.5 * math.log(2 * math.pi)
        return -(0.5 * squares + constant).flatten(1).sum(1)

    def decode(self, z: Tensor) -> Tensor:
        """Return the mean images (batch, *image_shape) in [0, 1] of latents (batch, latent_dim).

        Raises: ValueError if ``z`` has another shape or is not float.
        """
        if z.ndim != 2 or z.shape[1] != self.latent_dim or not z.is_floating_point():
            raise ValueError(
                f"z is {z.dtype} of shape {tuple(z.shape)}, the model wants floats of shape "
                f"(batch, {self.latent_dim}); draw it with draw_latents."
            )
        return self.decoder(z)

    def draw_latents(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw latents (n, latent_dim) from the prior, a standard normal."""
        like = self.log_sigma
        shape, options = (n, self.latent_dim), {"device": like.device, "dtype": like.dtype}
        return torch.randn(shape, generator=generator, **options)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw z from the prior and return the decoder's MEAN images, without the noise of σ."""
        return self.decode(self.draw_latents(n, generator))

    def check_images(self, x: Tensor) -> None:
        """Raise ValueError unless ``x`` is a float batch of this model's images in [0, 1]."""
        wanted = "the model wants values in [0, 1]: divide uint8 images by 255"
        check_images(x, self.image_shape, 0, 1, wanted)


def kl_to_prior(mean: Tensor, log_var: Tensor) -> Tensor:
    """Return KL(N(mean, exp(log_var)) || N(0, 1)) (batch,), summed over z, in nats."""
    return 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1)


def _block(n_in: int, n_out: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(n_in, n_out, 3, stride, padding=1)
    return [convolution, nn.GroupNorm(GROUPS, n_out), nn.SiLU()]
