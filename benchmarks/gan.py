"""Time a training step of the GANs of configs/gan_mnist.yaml and configs/gan_avatars.yaml.

``python benchmarks/gan.py``. No installed library has a style-based GAN to compare with, so the
reference is our own with modulated convolutions as they are usually written: weights for each
image, and one grouped convolution with as many groups as images. Everything else is the same; the
images drawn are compared first. The step is one without the R1 penalty. The table shows medians
in CPU milliseconds of one thread.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from _compare import compare, record
from torch import Tensor

from lib.config import load_config
from lib.models.gan import GAIN, GAN, Discriminator, ModulatedConv, StyleGenerator
from lib.train import FUSED_ADAM

SHAPES = {"gan_mnist": (1, 28, 28), "gan_avatars": (3, 32, 32)}


def grouped(layer: ModulatedConv, x: Tensor, w: Tensor) -> Tensor:
    """Convolve as :class:`ModulatedConv` does, with weights of its own for every image."""
    weight = layer.conv.weight * layer.conv.scale * layer.style(w)[:, None, :, None, None]
    if layer.demodulate:
        squares = weight.square().sum((2, 3, 4), keepdim=True)
        weight = GAIN * weight * (squares + 1e-8).rsqrt()
    y = F.conv2d(
        x.reshape(1, -1, *x.shape[2:]),
        weight.flatten(0, 1),
        padding=layer.conv.padding,
        groups=len(x),
    )
    return y.reshape(len(x), -1, *y.shape[2:])


def build(name: str) -> tuple[GAN, int]:
    config, shape = load_config(name, "cpu").config, SHAPES[name]
    torch.manual_seed(0)
    generator = StyleGenerator(shape, config.channels, config.latent_dim, config.n_mapping)
    gan = GAN(generator, Discriminator(shape, config.discriminator_channels))
    return gan.to(memory_format=torch.channels_last), config.batch


def training_step(gan: GAN, batch: int):
    adam = FUSED_ADAM(gan.parameters(), lr=1e-4, betas=(0.0, 0.99))
    real = torch.rand(batch, *gan.generator.image_shape) * 2 - 1
    real = real.contiguous(memory_format=torch.channels_last)

    def once() -> None:
        adam.zero_grad(set_to_none=True)
        gan.loss(real, gamma=0.0)[0].backward()
        adam.step()

    return once


def main() -> None:
    torch.set_num_threads(1)
    for name in SHAPES:
        (reference, batch), (ours, _) = build(name), build(name)
        for layer in reference.modules():
            if isinstance(layer, ModulatedConv):
                layer.forward = MethodType(grouped, layer)
        z = ours.generator.draw_latents(4)
        torch.testing.assert_close(reference.generator(z), ours.generator(z), rtol=1e-3, atol=1e-3)
        what = f"{name}, one training step on {batch} images, 1 CPU thread"
        medians = compare(
            what,
            {
                "grouped convolutions": training_step(reference, batch),
                "ours": training_step(ours, batch),
            },
        )
        record(what, "ours", 1e3 * batch / medians["ours"], "images/s")


if __name__ == "__main__":
    main()
