"""Fine-tune a base on pictures without a feature: the rival of unlearning that needs its old loss.

A VAE has minus its ELBO. A GAN has the adversarial loss, with a new discriminator, since that of
the base is not shipped; it first learns alone. Only what unlearning may change is tuned: of a GAN
whose latents are styles, the synthesis.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.experiments._unlearning import Subject
from lib.methods.feature_baselines import finetune_on_negatives
from lib.models.gan import Discriminator, discriminator_loss, generator_loss, r1_penalty


@dataclass(frozen=True)
class Tuning:
    """The schedule of fine-tuning; a GAN's new discriminator first learns alone for ``warmup``."""

    lr: float
    batch: int
    max_steps: int
    warmup: int = 0
    r1_gamma: float = 1.0


def tune(
    subject: Subject, negatives: Tensor, settings: Tuning, generator: torch.Generator
) -> nn.Module:
    """Train a copy of the base on with its own loss on ``negatives``, pictures in [0, 1]."""
    base, loss = copy.deepcopy(subject.model).requires_grad_(True), negative_elbo
    if subject.is_gan:
        loss = Adversary(subject, negatives, settings, generator).loss
    schedule = {"lr": settings.lr, "batch": settings.batch, "max_steps": settings.max_steps}
    *_, (tuned, _) = finetune_on_negatives(base, loss, negatives, generator, **schedule)
    return tuned.eval().requires_grad_(False)


def negative_elbo(model: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
    """Return minus the mean ELBO of images in nats, the loss that trained the VAE."""
    return -model.elbo(images, generator).mean()


class Adversary:
    """A new discriminator for a generator that goes on training.

    It moves inside :meth:`loss`, once a step, after ``warmup`` steps in which it moved alone. As in
    the base's training the generator draws with random noise.
    """

    def __init__(
        self, subject: Subject, negatives: Tensor, settings: Tuning, generator: torch.Generator
    ):
        self.subject, self.settings = subject, settings
        channels = [level["to_image"].conv.weight.shape[1] for level in subject.model.levels]
        torch.manual_seed(0)
        network = Discriminator(subject.model.image_shape, channels)
        self.discriminator = network.to(subject.device)
        self.adam = torch.optim.Adam(network.parameters(), lr=settings.lr, betas=(0.0, 0.99))
        for _ in range(settings.warmup):
            index = torch.randint(
                len(negatives), (settings.batch,), generator=generator, device=subject.device
            )
            with torch.no_grad():
                fake = self.fake(subject.model, generator)
            self.step(2 * negatives[index] - 1, fake)

    def fake(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """Draw a batch; where latents are styles, the mapping stays as it is."""
        z = model.draw_latents(self.settings.batch, generator)
        if self.subject.space == "z":
            return model(z, "random", generator)
        with torch.no_grad():
            w = model.mapping(z)
        return model.synthesis(w, "random", generator)

    def step(self, real: Tensor, fake: Tensor) -> None:
        """Move the discriminator by its own loss and the R1 penalty."""
        real = real.detach().requires_grad_(True)
        logits = self.discriminator(real)
        loss = discriminator_loss(logits, self.discriminator(fake.detach())).mean()
        loss = loss + self.settings.r1_gamma / 2 * r1_penalty(logits, real).mean()
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        self.adam.step()

    def loss(self, model: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
        """Move the discriminator, then return the loss of the generator in nats."""
        fake = self.fake(model, generator)
        self.step(2 * images - 1, fake)
        return generator_loss(self.discriminator(fake)).mean()
