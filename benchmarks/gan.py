"""Time a training step of the GANs of configs/gan_mnist.yaml and configs/gan_avatars.yaml.

``python benchmarks/gan.py``. No installed library has a style-based GAN to compare with, so the
reference is our own with modulated convolutions as they are usually written: weights for each
image, and one grouped convolution with as many groups as images. Everything else is the same; the
images drawn are compared first. That step is one without the R1 penalty. With it, the reference
computes the penalty on every step, and ours on every eighth, as the configs say; timed are eight
steps, whence the images a second of training. The table shows medians in CPU milliseconds of one
thread.
"""

from types import MethodType

import torch
import torch.nn.functional as F
from _compare import compare, record
from torch import Tensor

from lib.config import load_config
from lib.experiments.train_gan import Config
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


def build(config: Config, shape: tuple[int, ...]) -> GAN:
    torch.manual_seed(0)
    generator = StyleGenerator(shape, config.channels, config.latent_dim, config.n_mapping)
    gan = GAN(generator, Discriminator(shape, config.discriminator_channels))
    return gan.to(memory_format=torch.channels_last)


def training_steps(gan: GAN, batch: int, n: int = 1, gamma: float = 0.0, every: int = 1):
    """Return a function that makes ``n`` steps, with the R1 penalty on every so many of them."""
    adam = FUSED_ADAM(gan.parameters(), lr=1e-4, betas=(0.0, 0.99))
    real = torch.rand(batch, *gan.generator.image_shape) * 2 - 1
    real = real.contiguous(memory_format=torch.channels_last)

    def make() -> None:
        for _ in range(n):
            adam.zero_grad(set_to_none=True)
            gan.loss(real, gamma, every)[0].backward()
            adam.step()

    return make


def main() -> None:
    torch.set_num_threads(1)
    for name, shape in SHAPES.items():
        config = load_config(name, "cpu").config
        batch, gamma, every = config.batch, config.r1_gamma, config.r1_every
        reference, ours = build(config, shape), build(config, shape)
        for layer in reference.modules():
            if isinstance(layer, ModulatedConv):
                layer.forward = MethodType(grouped, layer)
        z = ours.generator.draw_latents(4)
        torch.testing.assert_close(reference.generator(z), ours.generator(z), rtol=1e-3, atol=1e-3)
        compare(
            f"{name}, one training step on {batch} images, 1 CPU thread",
            {
                "grouped convolutions": training_steps(reference, batch),
                "ours": training_steps(ours, batch),
            },
        )
        what = f"{name}, {every} training steps on {batch} images with R1, 1 CPU thread"
        medians = compare(
            what,
            {
                "penalty on every step": training_steps(ours, batch, every, gamma),
                "ours": training_steps(ours, batch, every, gamma, every),
            },
            rounds=3,
        )
        record(what, "ours", 1e3 * every * batch / medians["ours"], "images/s")


if __name__ == "__main__":
    main()
