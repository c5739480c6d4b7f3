"""Train a style-based GAN, judge its samples, and ship its generator."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lib.experiments._latents import Pictures, draw, report_fidelity
from lib.models.ddpm import to_signed, to_uint8
from lib.models.gan import GAN, Discriminator, StyleGenerator
from lib.run import Run, seed_everything
from lib.train import fit

N_SHOWN = 100


@dataclass(frozen=True)
class Config:
    """Data, both networks, schedule, and what is measured.

    Both players have ``lr``, and Adam without momentum: ``beta_2`` is its other coefficient.
    ``r1_gamma`` and ``r1_every`` are the weight of the R1 penalty and how often it is computed.
    ``n_samples`` of the averaged generator are compared with pictures of the split ``held_out``
    through the features of ``extractor`` and the answers of ``judge``; see ``report_fidelity``.
    """

    data: str
    size: int
    held_out: str
    flips: bool
    channels: tuple[int, ...]
    discriminator_channels: tuple[int, ...]
    latent_dim: int
    n_mapping: int
    iterations: int
    batch: int
    lr: float
    beta_2: float
    ema_decay: float
    r1_gamma: float
    r1_every: int
    seed: int
    extractor: str | None
    judge: str | None
    n_samples: int


def run(config: Config, run: Run) -> None:
    """Let both players move together, then report on the averaged generator as it is shipped."""
    seed_everything(config.seed)
    train, held_out = (
        Pictures.load(config.data, split, config.size, run.device)
        for split in ("train", config.held_out)
    )
    image_shape = list(train.images.shape[1:])
    arguments = {
        "image_shape": image_shape,
        "channels": list(config.channels),
        "latent_dim": config.latent_dim,
        "n_mapping": config.n_mapping,
    }

    def step_loss(model: GAN, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        real = to_signed(train.batch(config.batch, generator, config.flips))
        real = real.contiguous(memory_format=torch.channels_last)
        return model.loss(real, config.r1_gamma, config.r1_every, generator)

    fitted = fit(
        GAN(
            StyleGenerator(**arguments),
            Discriminator(image_shape, config.discriminator_channels),
        ),
        step_loss,
        steps=config.iterations,
        lr=config.lr,
        generator=run.generator(config.seed),
        device=run.device,
        optimizer=partial(torch.optim.Adam, betas=(0.0, config.beta_2)),
        ema_decay=config.ema_decay,
        checkpoint=run.checkpoint("model"),
        resume=run.resume,
        log_every=10 * config.r1_every,  # steps that have the penalty
    )
    model = run.ship(run.name, fitted.model.generator, arguments)
    about = {"data": train.source, "seeds": [config.seed], "n_samples": len(train.images)}
    run.row("training_iterations", fitted.steps, unit="iterations", **about)
    run.row("training_time", fitted.seconds, unit="s", **about)
    samples = draw(
        lambda n, generator: to_uint8(model.sample(n, generator)),
        config.n_samples,
        run.generator(config.seed + 1),
    )
    report_fidelity(samples, train, held_out, config.extractor, config.judge, config.seed, run)
    run.arrays(
        samples=samples[:N_SHOWN].permute(0, 2, 3, 1).cpu().numpy(),
        loss_step=np.array([line["step"] for line in fitted.history]),
        loss_generator=np.array([line["generator"] for line in fitted.history]),
        loss_discriminator=np.array([line["discriminator"] for line in fitted.history]),
    )
