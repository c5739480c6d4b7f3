"""StyleGAN2 as published (Karras et al. 2020), from a checkpoint that the reader brings.

:mod:`lib.models.gan` is the model to read. Here is only what it leaves out: sides are doubled by a
transposed convolution and a blur that sees zeros beyond the edges, and each picture has a bias.

Checkpoints are those of rosinality's PyTorch port (github.com/rosinality/stylegan2-pytorch): a
dict whose ``g_ema`` is the generator. NVIDIA's own files are pickles, which run code when they are
read; the port has a script that converts them, on the reader's machine and at the reader's risk.
No real checkpoint was at hand: the names and shapes are those of the port's source.
"""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from itertools import count, takewhile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.checkpoints import CheckpointError
from lib.models.gan import GAIN, ModulatedConv, StyledLayer, StyleGenerator, demodulation

ONE_MORE_DIMENSION = ("conv.weight", "noise.weight")  # in the port's tensors, of length 1


class BlurredUp(ModulatedConv):
    """Double the sides by a modulated transposed convolution of stride 2, and blur.

    Shapes: ``x`` (batch, n_in, height, width), ``w`` (batch, latent_dim).
    """

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style, weight = self.style(w), self.conv.weight * self.conv.scale
        y = F.conv_transpose2d(x * style[:, :, None, None], weight.transpose(0, 1), stride=2)
        n_out = len(weight)
        y = F.conv2d(y, blur_kernel(y).expand(n_out, 1, 4, 4), padding=1, groups=n_out)
        return y * (GAIN * demodulation(weight, style))[:, :, None, None]


class ToImage(ModulatedConv):
    """Turn maps into what a resolution adds to the picture."""

    def __init__(self, n_in: int, n_out: int, latent_dim: int):
        super().__init__(n_in, n_out, 1, latent_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, n_out, 1, 1))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return super().forward(x, w) + self.bias


class StyleGAN2(StyleGenerator):
    """Draw images from latents z by way of styles w, as StyleGAN2 does.

    For samples and for fine-tuning; arguments and methods are those of :class:`StyleGenerator`,
    and the published models begin at 4×4 pixels. Nothing is truncated. Where resolutions have
    styles of their own, each adds to the picture with its own style; the published code takes that
    of the next one there, which is the same for one style.
    """

    def _level(self, n_in: int, n_out: int, side: int, up: bool) -> nn.ModuleDict:
        layers = [StyledLayer(n_in, n_out, side, self.latent_dim)]
        if up:
            layers[0].conv = BlurredUp(n_in, n_out, 3, self.latent_dim)
            layers.append(StyledLayer(n_out, n_out, side, self.latent_dim))
        to_image = ToImage(n_out, self.image_shape[0], self.latent_dim)
        return nn.ModuleDict({"layers": nn.ModuleList(layers), "to_image": to_image})

    def enlarge(self, image: Tensor) -> Tensor:
        """Double the sides: put zeros between the pixels and beyond the edges, and blur."""
        n = image.shape[1]
        kernel = blur_kernel(image).expand(n, 1, 4, 4)
        return F.conv_transpose2d(image, kernel, stride=2, padding=1, groups=n)


def blur_kernel(like: Tensor) -> Tensor:
    """Return the blur by (1, 3, 3, 1) as (4, 4), of sum 4 since three in four pixels were zero."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device=like.device, dtype=like.dtype) / 4
    return torch.outer(taps, taps)


def load_stylegan2(path: Path) -> StyleGAN2:
    """Load the generator of a checkpoint in the format of rosinality's port.

    The file is the reader's own, not one of the safetensors that this book ships. It is read with
    ``weights_only``, as tensors and plain containers, so that none of its code runs (before torch
    2.6 that could be got round). The one other class allowed is argparse's Namespace, which holds
    the settings of whoever trained the model and nothing that runs.

    Raises: CheckpointError if there is no file, it holds anything else, or its tensors are not
    those of a generator of the port.
    """
    if not path.is_file():
        raise CheckpointError(
            f"There is no StyleGAN2 in {path}; get one in the format of "
            "github.com/rosinality/stylegan2-pytorch, for instance its 256 px model of FFHQ "
            "(550000.pt) or stylegan2-ffhq-config-f.pt of 1024 px, and put it there ($BOOK_DATA)."
        )
    try:
        with torch.serialization.safe_globals([Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"The file {path} does not hold tensors and plain containers alone: it is damaged, or "
            "a pickle that runs code when it is read, such as NVIDIA's own .pkl, and was not "
            "read; take a checkpoint of the port, or convert with its convert_weight.py."
        ) from error
    if not isinstance(found, dict) or not isinstance(found.get("g_ema"), dict):
        raise CheckpointError(f"The file {path} holds no 'g_ema'; take a checkpoint of the port.")
    try:
        return from_port(found["g_ema"])
    except ValueError as error:
        raise CheckpointError(f"The generator in {path} does not fit: {error}") from None


def from_port(state: Mapping[str, Tensor]) -> StyleGAN2:
    """Build the model that a state of the port's ``Generator`` describes.

    Raises: ValueError if a tensor is missing, unknown, or of another shape or blur.
    """
    if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{others[0]} is no tensor; wanted a state of the port's generator.")
    n_mapping = sum(1 for _ in takewhile(lambda i: f"style.{i}.weight" in state, count(1)))
    n_doublings = sum(1 for _ in takewhile(lambda i: f"to_rgbs.{i}.bias" in state, count()))
    last = [f"convs.{2 * i + 1}" for i in range(n_doublings)]
    try:
        channels = [state[f"{name}.activate.bias"].numel() for name in ("conv1", *last)]
        shape = (state["to_rgb1.bias"].numel(), *[4 * 2**n_doublings] * 2)
        latent_dim = state["style.1.bias"].numel()
    except KeyError as error:
        raise ValueError(f"{error} is missing; wanted a state of the port's generator.") from None
    model = StyleGAN2(shape, tuple(channels), latent_dim, n_mapping)
    wanted, ours = to_port(model), model.state_dict()
    if names := sorted(wanted.keys() ^ state.keys()):
        raise ValueError(
            f"{', '.join(names[:3])} and so on, {len(names)} in all, are missing or unknown in a "
            f"generator of {shape[1]} px; wanted that of the port, of configuration F or E."
        )
    for name, like in wanted.items():
        if state[name].shape != like.shape:
            raise ValueError(
                f"{name} has shape {tuple(state[name].shape)}, wanted {tuple(like.shape)}."
            )
        if name.endswith("kernel") and not torch.allclose(state[name].float(), like):
            raise ValueError(f"{name} is another blur than the published one, (1, 3, 3, 1).")
    model.load_state_dict(
        {
            our: (factor * state[name].float()).reshape(ours[our].shape)
            for our, name, factor in port_names(n_mapping, len(channels))
        }
    )
    return model.eval()


def to_port(model: StyleGAN2) -> dict[str, Tensor]:
    """Return a model's state as the port's ``Generator`` does; :func:`from_port` undoes it."""
    state, found = model.state_dict(), {}
    for our, name, factor in port_names(len(model.mapping_layers), model.n_levels):
        value = state[our] / factor
        found[name] = value[None] if name.endswith(ONE_MORE_DIMENSION) else value
    kernel = blur_kernel(model.constant.detach())
    for i in range(model.n_levels - 1):
        found[f"convs.{2 * i}.conv.blur.kernel"] = found[f"to_rgbs.{i}.upsample.kernel"] = kernel
    return found


def port_names(n_mapping: int, n_levels: int) -> Iterator[tuple[str, str, float]]:
    """Yield our name of each tensor, the port's, and ours over theirs.

    The port multiplies by ``GAIN`` behind a leaky unit. Our layers do so before biases and noise
    are added, which are therefore stored the larger.
    """
    for i in range(n_mapping):
        yield f"mapping_layers.{i}.weight", f"style.{i + 1}.weight", 1.0
        yield f"mapping_layers.{i}.bias", f"style.{i + 1}.bias", GAIN
    yield "constant", "input.input", 1.0
    layer = 0
    for level in range(n_levels):
        for i in range(1 if level == 0 else 2):
            our, their = f"levels.{level}.layers.{i}", f"convs.{layer - 1}" if layer else "conv1"
            yield from _modulated(f"{our}.conv", f"{their}.conv")
            yield f"{our}.bias", f"{their}.activate.bias", GAIN
            yield f"{our}.noise_strength", f"{their}.noise.weight", GAIN
            yield f"{our}.noise", f"noises.noise_{layer}", 1.0
            layer += 1
        our, their = f"levels.{level}.to_image", f"to_rgbs.{level - 1}" if level else "to_rgb1"
        yield from _modulated(our, f"{their}.conv")
        yield f"{our}.bias", f"{their}.bias", 1.0


def _modulated(our: str, their: str) -> Iterator[tuple[str, str, float]]:
    yield f"{our}.conv.weight", f"{their}.weight", 1.0
    yield f"{our}.style.weight", f"{their}.modulation.weight", 1.0
    yield f"{our}.style.bias", f"{their}.modulation.bias", 1.0
