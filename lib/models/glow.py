"""Glow: a normalizing flow on images with invertible 1×1 convolutions (Kingma & Dhariwal, 2018).

An image passes ``n_blocks`` blocks. A block turns every 2×2 patch into channels, makes ``n_flows``
flow steps, and gives half of its channels away as latents; the last block gives all of them. A
learned prior standardises the latents, so that every latent of the model is a standard normal.

This file also holds the one way from uint8 images to the model's input and back:
:func:`dequantise` and :func:`to_uint8`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.metrics.likelihood import bits_per_dim
from lib.models.glow_layers import FlowStep, Prior

COUPLINGS = ("additive", "affine")


def dequantise(
    images: Tensor,
    n_bits: int = 5,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Turn uint8 images into Glow's input: ``n_bits`` levels in [-0.5, 0.5) plus uniform noise.

    The noise fills each level's interval of width 2^-n_bits; it is drawn anew at every call, as in
    the authors' taming code.

    Shapes: ``images`` uint8 (batch, channels, height, width); returns the same shape as floats.
    Raises: ValueError if the images are not uint8 or ``n_bits`` is not from 1 to 8.
    """
    if images.dtype != torch.uint8:
        raise ValueError(
            f"Got images of {images.dtype} and wanted torch.uint8 with values from 0 to 255; "
            "model input goes into the model as it is."
        )
    levels = (images >> (8 - _checked_bits(n_bits))).to(dtype)
    noise = torch.rand(images.shape, generator=generator, device=images.device, dtype=dtype)
    return (levels + noise) / 2**n_bits - 0.5


def to_uint8(x: Tensor, n_bits: int = 5) -> Tensor:
    """Turn model input or samples into uint8 images; the inverse of :func:`dequantise`.

    The levels are spread over 0 to 255, so that white stays white; ``dequantise`` finds the same
    levels again. What lies outside [-0.5, 0.5) is clipped.

    Shapes: any; returns the same shape.
    Raises: ValueError if ``n_bits`` is not from 1 to 8.
    """
    n_levels = 2 ** _checked_bits(n_bits)
    levels = ((x + 0.5) * n_levels).floor().clamp(0, n_levels - 1)
    return (levels * (255 / (n_levels - 1))).round().to(torch.uint8)


def _checked_bits(n_bits: int) -> int:
    if n_bits not in range(1, 9):
        raise ValueError(f"An image has 1 to 8 bits a channel, got n_bits={n_bits}; the paper's 5.")
    return n_bits


class Block(nn.Module):
    """Squeeze, ``n_flows`` flow steps, and (but for the last block) a split."""

    def __init__(self, n_in: int, n_flows: int, hidden: int, affine: bool, split: bool):
        super().__init__()
        n_channels = 4 * n_in
        self.split = split
        self.steps = nn.ModuleList(FlowStep(n_channels, hidden, affine) for _ in range(n_flows))
        n_passed = n_channels // 2 if split else 0
        self.prior = Prior(n_channels - n_passed, n_passed)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Tensor | None:
        """Initialise each ActNorm on what reaches it, and return what the next block will see."""
        x = F.pixel_unshuffle(x, 2)
        for step in self.steps:
            step.actnorm.initialise(x)
            x, _ = step.encode(x)
        return self.halves(x)[0]

    def halves(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return what the block passes on (None in the last one) and its latents."""
        return tuple(x.chunk(2, dim=1)) if self.split else (None, x)

    def encode(self, x: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return what the block passes on, its standardised latents and ``log|det J|`` (batch,)."""
        x = F.pixel_unshuffle(x, 2)
        log_det = x.new_zeros(len(x))
        for step in self.steps:
            x, step_log_det = step.encode(x)
            log_det = log_det + step_log_det
        passed, latent = self.halves(x)
        z, prior_log_det = self.prior.encode(latent, passed)
        return passed, z, log_det + prior_log_det

    def decode(self, passed: Tensor | None, z: Tensor, inverses: list[Tensor]) -> Tensor:
        """Undo :meth:`encode`, given each step's inverse matrix."""
        latent = self.prior.decode(z, passed)
        x = latent if passed is None else torch.cat((passed, latent), dim=1)
        for step, inverse in zip(reversed(self.steps), reversed(inverses), strict=True):
            x = step.decode(x, inverse)
        return F.pixel_shuffle(x, 2)


class Glow(nn.Module):
    """A normalizing flow on images of shape ``(channels, height, width)``, with values near 0.

    ``coupling`` is ``"additive"``, as in the taming paper, or ``"affine"``. The first batch that
    is encoded in training mode initialises the ActNorms, unless :meth:`initialise` was called or
    weights were loaded; the buffer ``initialised`` says so.

    Raises: ValueError if a size is not divisible by 2^n_blocks, the coupling is unknown, or a
    number is below 1.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        n_blocks: int,
        n_flows: int,
        hidden: int,
        coupling: str = "additive",
    ):
        super().__init__()
        channels, height, width = self.image_shape = tuple(image_shape)
        if min(n_blocks, n_flows, hidden) < 1:
            raise ValueError(
                f"Blocks, flows and hidden channels must be at least 1, got {n_blocks=}, "
                f"{n_flows=}, {hidden=}."
            )
        if height % 2**n_blocks or width % 2**n_blocks:
            raise ValueError(
                f"{n_blocks} blocks halve an image {n_blocks} times, which {height}×{width} pixels "
                f"do not allow; choose sizes divisible by {2**n_blocks}, or fewer blocks."
            )
        if coupling not in COUPLINGS:
            raise ValueError(f"The coupling {coupling!r} is unknown; choose one of {COUPLINGS}.")
        self.dim = math.prod(self.image_shape)
        self.blocks = nn.ModuleList(
            Block(channels * 2**i, n_flows, hidden, coupling == "affine", split=i < n_blocks - 1)
            for i in range(n_blocks)
        )
        self.register_buffer("initialised", torch.tensor(False))
        self._inverses_of: Tensor | None = None
        self._inverses: list[list[Tensor]] = []

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """Return the shape of each latent, without the batch."""
        channels, height, width = self.image_shape
        last = len(self.blocks) - 1
        return [
            (channels * 2 ** (i + 1 + (i == last)), height >> (i + 1), width >> (i + 1))
            for i in range(last + 1)
        ]

    def initialise(self, x: Tensor) -> None:
        """Set every ActNorm so that its output has mean 0 and variance 1 on the batch ``x``."""
        self._check_images(x)
        for block in self.blocks:
            x = block.initialise(x)
        self.initialised.fill_(True)

    def encode(self, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Map images to latents, one tensor a block, that follow standard normals.

        The log-determinant includes the priors' scales, and is one number an image. The authors'
        code averages that of the flow steps over the batch, which is the same for additive
        couplings and wrong for affine ones.

        Shapes: ``x`` (batch, channels, height, width), as :func:`dequantise` makes it; returns the
        latents in ``latent_shapes`` and ``log|det dz/dx|`` (batch,) in nats.
        Raises: ValueError if ``x`` has another shape.
        """
        self._check_images(x)
        if self.training and not self.initialised:
            self.initialise(x)
        latents, log_det = [], x.new_zeros(len(x))
        for block in self.blocks:
            x, z, block_log_det = block.encode(x)
            latents.append(z)
            log_det = log_det + block_log_det
        return tuple(latents), log_det

    def decode(self, z: tuple[Tensor, ...]) -> Tensor:
        """Map latents to images; the inverse of :meth:`encode`.

        Without gradients for the weights, the inverse matrices are kept from call to call, for as
        long as no weight they depend on changes.

        Raises: ValueError if the latents have other shapes than ``latent_shapes``.
        """
        self._check_latents(z)
        x = None
        for block, latent, inverses in reversed(
            list(zip(self.blocks, z, self._inverse_matrices(), strict=True))
        ):
            x = block.decode(x, latent, inverses)
        return x

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the exact log-density of each image, in nats.

        Implements TNF Eq. (2).

        Shapes: ``x`` (batch, channels, height, width); returns (batch,).
        """
        z, log_det = self.encode(x)
        energy = sum(latent.square().sum((1, 2, 3)) for latent in z)
        return log_det - 0.5 * (energy + self.dim * math.log(2.0 * math.pi))

    def nll_bits_per_dim(self, x: Tensor, n_bits: int) -> Tensor:
        """Return the negative log-likelihood of dequantised images, in bits per dimension.

        It is that of the images at ``n_bits`` a channel: a density of 1 on the range of the input
        costs ``n_bits``.

        Shapes: ``x`` (batch, channels, height, width); returns (batch,).
        """
        return bits_per_dim(-self.log_prob(x), self.dim, 2**n_bits)

    def sample(
        self, n: int, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw ``n`` images; ``temperature`` scales the latents' standard deviation.

        Shapes: returns (n, channels, height, width) in the range of the input.
        Raises: ValueError if the temperature is negative.
        """
        if temperature < 0:
            raise ValueError(
                f"The temperature scales a standard deviation, got {temperature}; "
                "give 0 for the most likely latents, 0.7 for clear images, 1 for the model itself."
            )
        like = self.blocks[0].steps[0].conv.lower
        z = (
            temperature
            * torch.randn(n, *shape, generator=generator, device=like.device, dtype=like.dtype)
            for shape in self.latent_shapes
        )
        return self.decode(tuple(z))

    def _inverse_matrices(self) -> list[list[Tensor]]:
        """Return each step's inverse matrix, in lists a block, computed only when it must be."""
        steps = [step for block in self.blocks for step in block.steps]
        weights = [weight for step in steps for weight in step.mixing_weights()]
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            return self._inverted()
        # Values are compared, for version counters and addresses miss edits through ``.data``;
        # out of inference mode, for what is kept may later be part of a graph.
        with torch.inference_mode(False), torch.no_grad():
            values, kept = torch.cat([weight.flatten() for weight in weights]), self._inverses_of
            known = kept is not None and (kept.dtype, kept.device) == (values.dtype, values.device)
            if not (known and torch.equal(kept, values)):
                self._inverses, self._inverses_of = self._inverted(), values
        return self._inverses

    def _inverted(self) -> list[list[Tensor]]:
        return [[step.inverse_matrix() for step in block.steps] for block in self.blocks]

    def _check_images(self, x: Tensor) -> None:
        if x.ndim != 4 or tuple(x.shape[1:]) != self.image_shape or not x.is_floating_point():
            raise ValueError(
                f"Glow got a tensor of {x.dtype} of shape {tuple(x.shape)} and wants floats of "
                f"shape (batch, {', '.join(map(str, self.image_shape))}); dequantise makes them "
                "from uint8 images."
            )

    def _check_latents(self, z: tuple[Tensor, ...]) -> None:
        shapes = [tuple(latent.shape[1:]) for latent in z]
        if shapes != self.latent_shapes:
            raise ValueError(
                f"Glow got latents of the shapes {shapes} and wants {self.latent_shapes}, each "
                "with a batch; encode and sample make such tuples."
            )
