"""A denoising diffusion model of images by class, around diffusers' UNet.

The authors of Selective Amnesia ADD the embedding of class and step to the features of a block;
here it scales and shifts them (FiLM), which is what their paper says.

Images are float in [-1, 1] inside: :func:`to_signed` is the one way in and :func:`to_uint8` the
one way out.
"""

import torch
from torch import Tensor, nn

from lib.models._images import check_images
from lib.models.diffusion import (
    NoiseSchedule,
    PredictNoise,
    ancestral_path,
    ddim_path,
    last,
    q_sample,
    variational_bound,
)


class ConditionalDDPM(nn.Module):
    """Predict the noise in images of a class, and so draw images (Ho et al. 2020).

    One class more than ``n_classes`` stands for "no class", for guidance (Ho & Salimans 2022).

    ``channels`` are the widths from the finest feature map to the coarsest, each half the size of
    the one before. ``attention`` lists the sizes of the maps with self-attention (one head); if
    it is empty, the coarsest map has none either. ``groups`` belong to the group norms and divide
    all widths. With ``patch`` p, blocks of p×p pixels become channels before the first
    convolution and pixels after the last, which makes a model 2 to 4 times as fast at p = 2.

    Raises: ValueError if these do not fit the image.
    """

    def __init__(
        self,
        image_shape: tuple[int, ...],
        n_classes: int,
        channels: tuple[int, ...] = (32, 64),
        layers_per_block: int = 1,
        attention: tuple[int, ...] = (),
        groups: int = 8,
        dropout: float = 0.0,
        patch: int = 1,
        n_steps: int = 1000,
    ):
        super().__init__()
        # diffusers takes seconds to import; whoever builds no model does not pay for it.
        from diffusers.models.unets.unet_2d import UNet2DModel

        depth, size = image_shape[0], image_shape[-1]
        smallest = patch * 2 ** (len(channels) - 1)
        if image_shape[1] != size or size % smallest:
            raise ValueError(
                f"The image shape is {tuple(image_shape)}; {len(channels)} widths and patch "
                f"{patch} want square images whose side is a multiple of {smallest}."
            )
        if any(width % groups for width in channels):
            raise ValueError(
                f"The widths {tuple(channels)} are not all multiples of the {groups} groups; "
                "choose a divisor."
            )
        sizes = [size // patch // 2**level for level in range(len(channels))]
        if strangers := set(attention) - set(sizes):
            raise ValueError(
                f"Attention is asked for at {sorted(strangers)}; the feature maps have sizes "
                f"{sizes}."
            )
        self.image_shape, self.n_classes, self.patch = tuple(image_shape), n_classes, patch
        self.schedule = NoiseSchedule(n_steps)
        self.unet = UNet2DModel(
            sample_size=size // patch,
            in_channels=depth * patch**2,
            out_channels=depth * patch**2,
            block_out_channels=tuple(channels),
            layers_per_block=layers_per_block,
            down_block_types=[
                "AttnDownBlock2D" if s in attention else "DownBlock2D" for s in sizes
            ],
            up_block_types=[
                "AttnUpBlock2D" if s in attention else "UpBlock2D" for s in reversed(sizes)
            ],
            add_attention=bool(attention),
            attention_head_dim=None,
            norm_num_groups=groups,
            dropout=dropout,
            resnet_time_scale_shift="scale_shift",
            num_class_embeds=n_classes + 1,
        ).to(memory_format=torch.channels_last)

    @property
    def null_class(self) -> int:
        """Return the class that stands for "no class"."""
        return self.n_classes

    def predict_noise(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        """Estimate the noise in ``x`` at step ``t`` for class ``c``, which may be the null class.

        Nothing is checked. Shapes: ``x`` (batch, *image_shape), ``t`` (batch,) or one step, ``c``
        (batch,); returns the shape of ``x``.
        """
        if self.patch == 1:
            return self.unet(x, t, c, return_dict=False)[0]
        blocks = nn.functional.pixel_unshuffle(x, self.patch)
        noise = self.unet(blocks, t, c, return_dict=False)[0]
        return nn.functional.pixel_shuffle(noise, self.patch)

    def loss_from_noise(self, x0: Tensor, c: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return each image's squared error of the noise (batch,), SUMMED over its pixels.

        Nothing is checked and nothing is drawn; ``noise`` has the shape of ``x0``, ``t`` and ``c``
        are (batch,).
        """
        estimate = self.predict_noise(q_sample(x0, t, noise, self.schedule), t, c)
        return (estimate - noise).square().flatten(1).sum(1)

    def loss(
        self,
        x0: Tensor,
        c: Tensor,
        generator: torch.Generator | None = None,
        drop: float = 0.0,
        reduction: str = "sum",
    ) -> Tensor:
        """Return the simple loss (Ho et al. 2020, Eq. 14) at one random step for each image.

        It is the squared error of the noise, summed over pixels as in the authors' code, or
        divided by their number with ``reduction="mean"``. ``-loss`` is a bound on log p(x | c) up
        to weights of the steps, and may stand where a method asks for one.
        A class becomes the null class with probability ``drop``: 0.1 when a model is trained for
        guidance.

        Shapes: ``x0`` (batch, *image_shape) in [-1, 1], ``c`` (batch,); returns (batch,).
        Raises: ValueError if images, classes or ``reduction`` are wrong.
        """
        self.check_images(x0)
        self.check_classes(c, len(x0))
        if reduction not in ("sum", "mean"):
            raise ValueError(f"The reduction is {reduction!r}; choose 'sum' or 'mean'.")
        t, noise = self._draw(x0, generator)
        if drop > 0:
            dropped = torch.rand(len(c), generator=generator, device=c.device) < drop
            c = c.masked_fill(dropped, self.null_class)
        values = self.loss_from_noise(x0, c, t, noise)
        return values / x0[0].numel() if reduction == "mean" else values

    def elbo(self, x0: Tensor, c: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Bound the log-density of each image from below, estimated at one random step, in nats.

        The density is over images in [-1, 1]. One step makes a noisy estimate: take the mean over
        many images or draws. Shapes and errors as in :meth:`loss`.
        """
        self.check_images(x0)
        self.check_classes(c, len(x0))
        t, noise = self._draw(x0, generator)
        return variational_bound(x0, t, self.loss_from_noise(x0, c, t, noise), self.schedule)

    @torch.no_grad()
    def sample(
        self,
        c: Tensor,
        guidance: float = 2.0,
        steps: int = 25,
        generator: torch.Generator | None = None,
        eta: float = 0.0,
        clip: bool = True,
    ) -> Tensor:
        """Draw an image of each class with DDIM; :func:`to_uint8` makes pictures of them.

        ``guidance`` is the paper's w, see :func:`guide`; 0 is the plain conditional model.
        ``clip`` holds the predicted clean image in [-1, 1] at every step, which the authors do
        not; strong guidance drives it out. The paper samples with w = 2, all 1000 steps, eta 1.

        Shapes: ``c`` (batch,); returns (batch, *image_shape) in [-1, 1].
        Raises: ValueError if ``guidance`` < 0, ``steps`` is not in 1..T, ``eta`` is not in [0, 1],
        or a class is out of range.
        """
        predict, x = self._start(c, guidance, generator)
        return last(ddim_path(predict, x, self.schedule, steps, eta, generator, clip)).clamp(-1, 1)

    @torch.no_grad()
    def sample_ancestral(
        self,
        c: Tensor,
        guidance: float = 2.0,
        generator: torch.Generator | None = None,
        clip: bool = True,
    ) -> Tensor:
        """Draw an image of each class through all T steps; arguments as in :meth:`sample`."""
        predict, x = self._start(c, guidance, generator)
        return last(ancestral_path(predict, x, self.schedule, generator, clip)).clamp(-1, 1)

    def guided(self, c: Tensor, guidance: float) -> PredictNoise:
        """Return the noise predictor of classes ``c`` (batch,) with guidance, for the samplers.

        With and without class are one batch to the network. Errors as in :meth:`sample`.
        """
        if not guidance >= 0:
            raise ValueError(
                f"The guidance is {guidance}; it must be at least 0, where 0 is the plain "
                "conditional model."
            )
        self.check_classes(c, len(c))
        both = torch.cat([c, torch.full_like(c, self.null_class)])

        def predict(x: Tensor, t: int) -> Tensor:
            step = torch.tensor(t, device=x.device)
            if guidance == 0:
                return self.predict_noise(x, step, c)
            return guide(*self.predict_noise(torch.cat([x, x]), step, both).chunk(2), guidance)

        return predict

    def check_images(self, x0: Tensor) -> None:
        """Raise ValueError unless ``x0`` is a float batch of this model's images in [-1, 1]."""
        wanted = "the model wants [-1, 1]: convert them with to_signed"
        check_images(x0, self.image_shape, -1, 1, wanted)

    def check_classes(self, c: Tensor, batch: int) -> None:
        """Raise ValueError unless ``c`` holds ``batch`` of this model's classes."""
        if c.is_floating_point() or tuple(c.shape) != (batch,):
            raise ValueError(
                f"The classes are {c.dtype} of shape {tuple(c.shape)}; the model wants whole "
                f"numbers of shape ({batch},)."
            )
        if batch and not 0 <= c.min() <= c.max() < self.n_classes:
            raise ValueError(
                f"The classes run from {c.min()} to {c.max()}, the model knows 0 to "
                f"{self.n_classes - 1}; choose a class in that range."
            )

    def _draw(self, x0: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draw a step (batch,) for each image and noise of the images' shape."""
        options = {"generator": generator, "device": x0.device}
        t = torch.randint(self.schedule.n_steps, (len(x0),), **options)
        return t, torch.randn(x0.shape, dtype=x0.dtype, **options)

    def _start(
        self, c: Tensor, guidance: float, generator: torch.Generator | None
    ) -> tuple[PredictNoise, Tensor]:
        weight = self.unet.conv_in.weight
        shape, options = (len(c), *self.image_shape), {"generator": generator}
        x = torch.randn(shape, device=weight.device, dtype=weight.dtype, **options)
        return self.guided(c.to(weight.device), guidance), x


def guide(conditional: Tensor, unconditional: Tensor, w: float) -> Tensor:
    """Push the predicted noise away from that of no class: (1 + w) eps_c - w eps_null.

    This w is the paper's; diffusers' ``guidance_scale`` is w + 1.
    """
    return (1 + w) * conditional - w * unconditional


def to_signed(images: Tensor) -> Tensor:
    """Turn uint8 images, or floats in [0, 1], into the model's floats in [-1, 1].

    Raises: ValueError if floats lie outside [0, 1], as they do where this was applied before.
    """
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    if not images.is_floating_point() or not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(
            f"Got {images.dtype} images with values from {images.min():g} to {images.max():g}; "
            "to_signed wants uint8, or floats in [0, 1]."
        )
    return 2 * images - 1


def to_uint8(x: Tensor) -> Tensor:
    """Turn the model's images into uint8, the inverse of :func:`to_signed`; outliers are cut."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
