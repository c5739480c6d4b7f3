"""Train a conditional VAE on labelled digits and ship it."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lib.experiments._digits import Digits
from lib.models.cvae import ConditionalVAE
from lib.run import Run, seed_everything
from lib.train import fit


@dataclass(frozen=True)
class Config:
    """Data, model and schedule; ``n_test`` images are scored with ``n_importance`` draws of z.

    The classes ``without`` are left out of the training and of the measurements.
    """

    data: str
    size: int
    iterations: int
    batch: int
    lr: float
    hidden: tuple[int, ...]
    latent_dim: int
    seed: int
    n_test: int
    n_importance: int
    without: tuple[int, ...] = ()


def run(config: Config, run: Run) -> None:
    """Maximise the mean ELBO; report the bounds on log p of test images, and ship the weights."""
    seed_everything(config.seed)
    train, test = (
        Digits.load(config.data, split, config.size, run.device).without(config.without)
        for split in ("train", "test")
    )
    arguments = {
        "image_shape": [1, config.size, config.size],
        "n_classes": 10,
        "hidden": list(config.hidden),
        "latent_dim": config.latent_dim,
    }

    def step_loss(model: nn.Module, generator) -> tuple[Tensor, dict[str, Tensor]]:
        loss = -model.elbo(*train.batch(config.batch, generator), generator).mean()
        return loss, {"negative_elbo": loss.detach()}

    trained = fit(
        ConditionalVAE(**arguments),
        step_loss,
        steps=config.iterations,
        lr=config.lr,
        generator=run.generator(config.seed),
        device=run.device,
        checkpoint=run.checkpoint("model"),
        resume=run.resume,
        log_every=1000,
    ).model
    model = run.ship(run.name, trained, arguments)
    images, labels = test.first(config.n_test)
    scores = {
        "test_elbo": lambda x, generator: model.elbo(x, labels, generator),
        "test_log_likelihood": lambda x, generator: model.log_likelihood(
            x, labels, config.n_importance, generator
        ),
    }
    for name, score in scores.items():
        for kind, x in (("", images), ("_binarised", (images > 0.5).float())):
            with torch.no_grad():
                values = score(x, run.generator(config.seed + 1))
            run.row(
                name + kind,
                float(values.mean()),
                n_samples=len(images),
                unit="nats",
                data=test.source,
                seeds=[config.seed],
                preprocessing="pixels above 0.5 are 1" if kind else "pixels / 255",
            )
