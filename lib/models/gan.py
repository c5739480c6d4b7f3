"""A small style-based GAN for images of 28 to 64 pixels (Karras et al. 2019 and 2020).

A mapping network bends the prior z into styles w; the styles scale the feature maps of a synthesis
network that starts from a learned constant. It is the second StyleGAN with narrow layers, without
path length regularisation, style mixing and augmentation.

Images are float in [-1, 1] inside: ``to_signed`` is the one way in and ``to_uint8`` the one way
out, both from :mod:`lib.models.ddpm`.
"""

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Noise = Literal["fixed", "random"]
EPSILON = 1e-8
GAIN = 2**0.5  # what a leaky ReLU takes from the scale of its input, or nearly
GROUP = 4  # images that the discriminator compares with each other


class EqualLinear(nn.Module):
    """Multiply by weights that are stored with variance 1 / ``speed``² and scaled when used.

    Adam's steps have one size whatever a weight's own. Stored like this and scaled by
    ``speed`` · ``gain`` / √fan-in at run time, layers of every width learn equally fast, and a
    layer of ``speed`` 0.01 at a hundredth of the rate (Karras et al. 2018, Sec. 4.1). White input
    has the variance ``gain``² behind the layer; ``GAIN`` is for layers before :func:`activate`.
    """

    def __init__(
        self, n_in: int, n_out: int, gain: float = 1.0, speed: float = 1.0, bias: float = 0.0
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) / speed)
        self.bias = nn.Parameter(torch.full((n_out,), bias / speed))
        self.scale, self.speed = speed * gain * n_in**-0.5, speed

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias * self.speed)


class EqualConv(nn.Module):
    """Convolve, at the same size, with weights stored as in :class:`EqualLinear`."""

    def __init__(self, n_in: int, n_out: int, kernel: int, gain: float = 1.0, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(n_out)) if bias else None
        self.scale, self.padding = gain * (n_in * kernel**2) ** -0.5, kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.padding)


class ModulatedConv(nn.Module):
    """Convolve each image with weights that its style has scaled, one factor an input channel.

    Scaling the weights is scaling the input maps, and normalising the scaled weights is dividing
    the output maps by one number each; so one convolution serves the whole batch (Karras et al.
    2020, Sec. 2.2 and Eqs. 1 to 3). Normalised outputs have the variance that :func:`activate`
    wants, ``GAIN``².

    Shapes: ``x`` (batch, n_in, height, width), ``w`` (batch, latent_dim).
    """

    def __init__(
        self, n_in: int, n_out: int, kernel: int, latent_dim: int, demodulate: bool = True
    ):
        super().__init__()
        self.style = EqualLinear(latent_dim, n_in, bias=1.0)  # about 1 at first
        self.conv = EqualConv(n_in, n_out, kernel, bias=False)
        self.demodulate = demodulate

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.style(w)
        y = self.conv(x * style[:, :, None, None])
        if self.demodulate:
            factor = GAIN * demodulation(self.conv.weight * self.conv.scale, style)
            y = y * factor[:, :, None, None]
        return y


def demodulation(weight: Tensor, style: Tensor) -> Tensor:
    """Return the factors (batch, n_out) that give output maps of white input unit variance.

    Each is 1 / √(Σ (style · weight)²), over an output channel's weights.

    Shapes: ``weight`` (n_out, n_in, height, width), ``style`` (batch, n_in).
    Source: Karras et al. (2020), Eq. 3.
    """
    return (style.square() @ weight.square().sum((2, 3)).T + EPSILON).rsqrt()


class StyledLayer(nn.Module):
    """Modulated convolution, noise, bias and leaky ReLU; with ``up`` the sides are doubled.

    The convolution comes before the doubling, where it costs a quarter.
    """

    def __init__(self, n_in: int, n_out: int, side: int, latent_dim: int, up: bool = False):
        super().__init__()
        self.conv = ModulatedConv(n_in, n_out, 3, latent_dim)
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        # Saved with the weights, so that equal latents give equal pictures everywhere.
        self.register_buffer("noise", torch.randn(1, 1, side, side))
        self.up = up

    def forward(
        self, x: Tensor, w: Tensor, noise: Noise, generator: torch.Generator | None
    ) -> Tensor:
        x = self.conv(x, w)
        if self.up:
            x = double(x)
        fields = self.noise
        if noise == "random":
            shape = (len(x), *fields.shape[1:])
            fields = torch.randn(shape, generator=generator, device=x.device, dtype=x.dtype)
        return activate(x + self.noise_strength * fields + self.bias[:, None, None])


class StyleGenerator(nn.Module):
    """Draw images from latents z by way of styles w (Karras et al. 2019; skips as of 2020).

    ``channels`` are the widths from the coarsest feature map to the finest, each twice the size of
    the one before; the last has the size of the images. Every resolution adds to the picture.

    Raises: ValueError if the image shape does not fit the number of widths.
    """

    def __init__(
        self,
        image_shape: tuple[int, ...],
        channels: tuple[int, ...] = (128, 64, 32),
        latent_dim: int = 64,
        n_mapping: int = 4,
    ):
        super().__init__()
        base = coarsest_side(image_shape, channels)
        self.image_shape, self.latent_dim = tuple(image_shape), latent_dim
        self.mapping_layers = nn.ModuleList(
            EqualLinear(latent_dim, latent_dim, GAIN, speed=0.01) for _ in range(n_mapping)
        )
        self.constant = nn.Parameter(torch.randn(1, channels[0], base, base))
        self.levels = nn.ModuleList([self._level(channels[0], channels[0], base, up=False)])
        for level, (n_in, n_out) in enumerate(pairwise(channels), start=1):
            self.levels.append(self._level(n_in, n_out, base * 2**level, up=True))

    def _level(self, n_in: int, n_out: int, side: int, up: bool) -> nn.ModuleDict:
        layers = [StyledLayer(n_in, n_out, side, self.latent_dim, up)]
        if up:
            layers.append(StyledLayer(n_out, n_out, side, self.latent_dim))
        to_image = ModulatedConv(n_out, self.image_shape[0], 1, self.latent_dim, demodulate=False)
        return nn.ModuleDict({"layers": nn.ModuleList(layers), "to_image": to_image})

    @property
    def n_levels(self) -> int:
        """Return the number of resolutions, each of which may have a style of its own."""
        return len(self.levels)

    def forward(
        self, z: Tensor, noise: Noise = "fixed", generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the images of latents; see :meth:`mapping` and :meth:`synthesis`."""
        return self.synthesis(self.mapping(z), noise, generator)

    def mapping(self, z: Tensor) -> Tensor:
        """Return the styles w of latents z, of whose length nothing depends: they are normalised.

        Shapes: ``z`` and the styles (batch, latent_dim).
        Raises: ValueError if ``z`` has another shape or is not float.
        """
        if z.ndim != 2 or z.shape[1] != self.latent_dim or not z.is_floating_point():
            raise ValueError(
                f"z is {z.dtype} of shape {tuple(z.shape)}, the model wants floats of shape "
                f"(batch, {self.latent_dim}); draw it with draw_latents."
            )
        w = z * (z.square().mean(1, keepdim=True) + EPSILON).rsqrt()
        for layer in self.mapping_layers:
            w = activate(layer(w))
        return w

    def synthesis(
        self, w: Tensor, noise: Noise = "fixed", generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the images of styles: around [-1, 1], but nothing is cut off.

        ``noise`` is ``fixed``, part of the weights, so that equal styles give equal images, or
        ``random``, drawn with ``generator``.

        Shapes: ``w`` (batch, latent_dim), or (batch, n_levels, latent_dim) with one style a
        resolution, the coarsest first; returns (batch, *image_shape).
        Raises: ValueError if ``w`` or ``noise`` is none of these.
        """
        if w.shape[1:] not in ((self.latent_dim,), (self.n_levels, self.latent_dim)):
            raise ValueError(
                f"w has shape {tuple(w.shape)}, the model wants (batch, {self.latent_dim}) or "
                f"(batch, {self.n_levels}, {self.latent_dim}); get it from mapping."
            )
        if noise not in ("fixed", "random"):
            raise ValueError(f"The noise is {noise!r}; choose 'fixed' or 'random'.")
        styles = w.unbind(1) if w.ndim == 3 else [w] * self.n_levels
        x, image = self.constant.expand(len(w), -1, -1, -1), None
        for level, style in zip(self.levels, styles, strict=True):
            for layer in level["layers"]:
                x = layer(x, style, noise, generator)
            added = level["to_image"](x, style)
            image = added if image is None else self.enlarge(image) + added
        return image

    def enlarge(self, image: Tensor) -> Tensor:
        """Double the sides of the picture so far, to which a resolution adds."""
        return double(image)

    def draw_latents(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw latents (n, latent_dim) from the prior, a standard normal."""
        like = self.constant
        shape, options = (n, self.latent_dim), {"device": like.device, "dtype": like.dtype}
        return torch.randn(shape, generator=generator, **options)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` images (n, *image_shape), cut off to [-1, 1], with the fixed noise."""
        return self(self.draw_latents(n, generator)).clamp(-1, 1)


class Discriminator(nn.Module):
    """Tell real images from drawn ones by one logit each, above 0 for real.

    A residual network that halves the sides until the coarsest map, where the spread within
    groups of images enters as one more channel. ``channels`` are as in the generator.

    Shapes: (batch, *image_shape) in [-1, 1], ``batch`` a multiple of 4; returns (batch,).
    Raises: ValueError if the images' shape is wrong, or the widths do not fit it.
    """

    def __init__(self, image_shape: tuple[int, ...], channels: tuple[int, ...] = (128, 64, 32)):
        super().__init__()
        base, top = coarsest_side(image_shape, channels), channels[0]
        self.image_shape = tuple(image_shape)
        self.from_image = EqualConv(image_shape[0], channels[-1], 1, GAIN)
        self.blocks = nn.ModuleList(
            ResidualBlock(n_in, n_out) for n_in, n_out in pairwise(reversed(channels))
        )
        self.compare = EqualConv(top + 1, top, 3, GAIN)
        self.hidden = EqualLinear(top * base**2, top, GAIN)
        self.logit = EqualLinear(top, 1)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != self.image_shape or len(x) % GROUP:
            wanted = ", ".join(map(str, self.image_shape))
            raise ValueError(
                f"The images have shape {tuple(x.shape)}; the discriminator wants (batch, "
                f"{wanted}) with a batch that is a multiple of {GROUP}."
            )
        x = activate(self.from_image(x))
        for block in self.blocks:
            x = block(x)
        x = activate(self.compare(torch.cat([x, spread_in_groups(x)], 1)))
        return self.logit(activate(self.hidden(x.flatten(1)))).squeeze(1)


class ResidualBlock(nn.Module):
    """Halve the sides, beside a linear short cut (Karras et al. 2020, Sec. 4.1)."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.first = EqualConv(n_in, n_in, 3, GAIN)
        self.second = EqualConv(n_in, n_out, 3, GAIN)
        self.short_cut = EqualConv(n_in, n_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.avg_pool2d(activate(self.first(x)), 2)
        return (activate(self.second(y)) + self.short_cut(F.avg_pool2d(x, 2))) / 2**0.5


def spread_in_groups(x: Tensor) -> Tensor:
    """Return one map an image: the standard deviation in its group of 4, averaged over everything.

    A generator that draws the same picture again and again gives itself away by a small one.

    Shapes: ``x`` (batch, channels, height, width); returns (batch, 1, height, width).
    Source: Karras et al. (2018), Sec. 3, in groups as in their later code.
    """
    groups = x.unflatten(0, (GROUP, -1))
    variance = (groups - groups.mean(0)).square().mean(0)  # .var(0) is slow in channels_last
    spread = (variance + EPSILON).sqrt().mean((1, 2, 3)).repeat(GROUP)
    return spread[:, None, None, None].expand(-1, 1, *x.shape[2:])


def generator_loss(fake_logits: Tensor) -> Tensor:
    """Return the non-saturating loss -log D(G(z)) of each drawn image, in nats.

    Source: Goodfellow et al. (2014), Sec. 3. Shapes: (batch,) both.
    """
    return F.softplus(-fake_logits)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the cross-entropy -log D(x) - log(1 - D(G(z))) of each pair of images, in nats.

    Source: Goodfellow et al. (2014), Eq. 1. Shapes: (batch,) all.
    """
    return F.softplus(-real_logits) + F.softplus(fake_logits)


def r1_penalty(real_logits: Tensor, real: Tensor) -> Tensor:
    """Return |∇ D(x)|², the squared length of the logit's gradient at each real image.

    It can be differentiated again. Source: Mescheder et al. (2018), Eq. 9, without the factor γ/2.

    Shapes: ``real_logits`` (batch,), computed from ``real`` (batch, *image_shape), which requires
    gradients; returns (batch,).
    """
    (gradient,) = torch.autograd.grad(real_logits.sum(), real, create_graph=True)
    return gradient.square().flatten(1).sum(1)


class GAN(nn.Module):
    """A generator and the discriminator it learns from, trained by one optimiser in one step.

    ``step`` counts the losses computed in training: the R1 penalty joins every so many of them.
    """

    def __init__(self, generator: StyleGenerator, discriminator: Discriminator):
        super().__init__()
        self.generator, self.discriminator = generator, discriminator
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def loss(
        self,
        real: Tensor,
        gamma: float,
        every: int = 16,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of both players' losses, of which each player feels only its own.

        The generator's passes through a discriminator of constants, the discriminator's sees
        drawn images as constants; so one backward pass gives both gradients. The players move at
        once, where most code moves them in turn, and the images are drawn only once.
        With ``every`` k the penalty γ/2 |∇ D|² enters every k-th step, k times as large (lazy
        regularisation, Karras et al. 2020, Sec. 3.1).

        Shapes: ``real`` (batch, *image_shape) in [-1, 1], ``batch`` a multiple of 4.
        Raises: ValueError if ``gamma`` is negative, ``every`` below 1, or the images do not fit.
        """
        if gamma < 0 or every < 1:
            raise ValueError(
                f"gamma is {gamma} and every {every}; give a penalty of at least 0 and a whole "
                "number of steps of at least 1."
            )
        latents = self.generator.draw_latents(len(real), generator)
        fake = self.generator(latents, "random", generator)
        constants = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        of_generator = generator_loss(functional_call(self.discriminator, constants, fake)).mean()

        penalised = gamma > 0 and int(self.step) % every == 0
        real = real.detach().requires_grad_(penalised)
        real_logits, fake_logits = self.discriminator(real), self.discriminator(fake.detach())
        of_discriminator = discriminator_loss(real_logits, fake_logits).mean()
        total = of_generator + of_discriminator
        terms = {"generator": of_generator.detach(), "discriminator": of_discriminator.detach()}
        if penalised:
            penalty = r1_penalty(real_logits, real).mean()
            total = total + every * gamma / 2 * penalty
            terms["r1"] = penalty.detach()
        self.step += 1
        return total, terms


def activate(x: Tensor) -> Tensor:
    """Apply the leaky ReLU of slope 0.2."""
    return F.leaky_relu(x, 0.2)


def double(x: Tensor) -> Tensor:
    """Double the sides bilinearly, which is the usual blur by (1, 3, 3, 1) away from the edges."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def coarsest_side(image_shape: tuple[int, ...], channels: tuple[int, ...]) -> int:
    """Return the side of the coarsest of the feature maps, one a width.

    Raises: ValueError unless the images are square with sides of 2 to 8 pixels there.
    """
    _, height, width = image_shape
    side, rest = divmod(height, 2 ** (len(channels) - 1))
    if height != width or rest or not 2 <= side <= 8:
        raise ValueError(
            f"The image shape is {tuple(image_shape)} and there are {len(channels)} widths; the "
            "model wants square images that halve to 2 to 8 pixels a side, once between widths."
        )
    return side
