"""Train a convolutional VAE without classes, score it in nats, judge its samples, and ship it."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lib.experiments._digits import unit
from lib.experiments._latents import Pictures, draw, report_fidelity
from lib.models.conv_vae import ConvVAE, kl_to_prior
from lib.run import Run, seed_everything
from lib.train import cosine, fit

N_SHOWN, SCORE_BATCH = 100, 500


@dataclass(frozen=True)
class Config:
    """Data, model, schedule, and what is measured.

    ``warmup`` is the share of the steps in which the learning rate rises, before it falls along a
    cosine. ``n_test`` pictures of the split ``held_out`` are scored; ``n_samples`` of the model are
    compared with that split through ``extractor`` and ``judge``; see ``report_fidelity``. The
    classes ``without`` (of digits) are left out of both splits.
    """

    data: str
    size: int
    held_out: str
    flips: bool
    channels: tuple[int, ...]
    latent_dim: int
    iterations: int
    batch: int
    lr: float
    warmup: float
    ema_decay: float | None
    grad_clip: float | None
    seed: int
    extractor: str | None
    judge: str | None
    n_test: int
    n_samples: int
    without: tuple[int, ...] = ()


def run(config: Config, run: Run) -> None:
    """Maximise the mean ELBO; report it on held-out pictures with its parts, and ship the model."""
    seed_everything(config.seed)
    train, held_out = (
        Pictures.load(config.data, split, config.size, run.device, config.without)
        for split in ("train", config.held_out)
    )
    arguments = {
        "image_shape": list(train.images.shape[1:]),
        "channels": list(config.channels),
        "latent_dim": config.latent_dim,
    }

    def step_loss(model: ConvVAE, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        images = unit(train.batch(config.batch, generator, config.flips))
        images = images.contiguous(memory_format=torch.channels_last)
        loss = -model.elbo(images, generator).mean()
        return loss, {"negative_elbo": loss.detach(), "sigma": model.log_sigma.detach().exp()}

    fitted = fit(
        ConvVAE(**arguments),
        step_loss,
        steps=config.iterations,
        lr=config.lr,
        generator=run.generator(config.seed),
        device=run.device,
        schedule=partial(cosine, warmup=config.warmup),
        ema_decay=config.ema_decay,
        grad_clip=config.grad_clip,
        checkpoint=run.checkpoint("model"),
        resume=run.resume,
    )
    model = run.ship(run.name, fitted.model, arguments)
    about = {"data": train.source, "seeds": [config.seed], "n_samples": len(train.images)}
    run.row("training_iterations", fitted.steps, unit="iterations", **about)
    run.row("training_time", fitted.seconds, unit="s", **about)
    score(model, held_out, config, run)
    samples = draw(
        lambda n, generator: (model.sample(n, generator) * 255).round().to(torch.uint8),
        config.n_samples,
        run.generator(config.seed + 1),
    )
    report_fidelity(samples, train, held_out, config.extractor, config.judge, config.seed, run)
    run.arrays(
        samples=samples[:N_SHOWN].permute(0, 2, 3, 1).cpu().numpy(),
        loss_step=np.array([line["step"] for line in fitted.history]),
        loss=np.array([line["negative_elbo"] for line in fitted.history]),
    )


@torch.no_grad()
def score(model: ConvVAE, held_out: Pictures, config: Config, run: Run) -> None:
    """Report the ELBO of held-out pictures, its KL, the reconstructions' error, and σ."""
    images, generator = unit(held_out.some(config.n_test)), run.generator(config.seed + 2)
    bounds, kls, squares = [], [], []
    for x in images.split(SCORE_BATCH):
        mean, log_var = model.encode(x)
        bounds.append(model.elbo(x, generator))
        kls.append(kl_to_prior(mean, log_var))
        squares.append((model.decode(mean) - x).square().flatten(1).mean(1))
    about = {"n_samples": len(images), "data": held_out.source, "seeds": [config.seed]}
    about["preprocessing"] = "pixels / 255"
    density = about | {"preprocessing": "density over pixels / 255, without dequantisation"}
    run.row("test_elbo", float(torch.cat(bounds).mean()), unit="nats", **density)
    run.row("test_kl", float(torch.cat(kls).mean()), unit="nats", **about)
    error = float(torch.cat(squares).mean().sqrt())
    run.row("test_reconstruction_error", error, unit="root mean square a pixel", **about)
    run.row("sigma", float(model.log_sigma.exp()), unit="of pixels / 255", **about)
