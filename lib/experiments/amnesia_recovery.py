"""Try to bring a forgotten digit back: by a search over conditions and latents, by fine-tuning."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.checkpoints import load_checkpoint
from lib.experiments._amnesia import copy_of, judge_samples, load_models
from lib.experiments._digits import Digits
from lib.metrics import forgetting as metrics
from lib.models.classifier import predict_logits
from lib.models.cvae import ConditionalVAE
from lib.run import Run
from lib.train import fit


@dataclass(frozen=True)
class Config:
    """The forgetting model, the judge, and how hard to try.

    The searches minimise the squared error to the first ``n_targets`` real test images of the
    digit; ``restarts`` times as many latents are tried and the best of each is kept.
    ``fine_tune_images`` are the numbers of real training images of the digit, each tried for
    every number of ``fine_tune_steps``.
    """

    vae: str
    after: str
    judge: str
    data: str
    forget: int
    n_targets: int
    restarts: int
    search_steps: int
    search_lr: float
    fine_tune_images: tuple[int, ...]
    fine_tune_steps: tuple[int, ...]
    fine_tune_batch: int
    fine_tune_lr: float
    n_samples: int
    seeds: tuple[int, ...]


def run(config: Config, run: Run) -> None:
    """Search and fine-tune on the models before and after forgetting, and on an untrained one.

    Quantities are ``error_*``, the rms error a pixel to the target, and ``prob_*``, the judge's
    probability of the digit. They end in the way and the model: ``z`` searches latents with the
    digit's own condition, ``zc`` latents and condition, ``other`` latents under the best of the
    other nine conditions; the untrained model says what the search alone can draw.
    """
    before, judge = load_models(config.vae, config.judge, run.device)
    after = before if config.after == "random" else load_checkpoint(config.after).to(run.device)
    train, test = (Digits.load(config.data, split, 28, run.device) for split in ("train", "test"))
    targets, _ = test.first(config.n_targets, config.forget)
    torch.manual_seed(0)
    untrained = ConditionalVAE((1, 28, 28), 10).to(run.device).eval()
    models = {"before": before, "after": after, "untrained": untrained}

    def row(name: str, values: list[float], unit: str, n: int, data: str) -> None:
        judged = config.judge if name.startswith("prob") else None
        run.row(
            name,
            values,
            n_samples=n,
            unit=unit,
            data=data,
            seeds=config.seeds,
            feature_extractor=judged,
        )

    pictures = {}
    for model_name, model in models.items():
        for way in ("z", "zc", "other"):
            errors, probabilities = [], []
            for seed in config.seeds:
                found = search(model, targets, config, way, run.generator(seed))
                errors.append(float((found - targets).square().flatten(1).mean(1).sqrt().mean()))
                probabilities.append(_probability(judge, found, config.forget))
                pictures.setdefault(f"{way}_{model_name}", _levels(found[:10]))
            data = test.source
            row(f"error_{way}_{model_name}", errors, "rms a pixel", config.n_targets, data)
            row(f"prob_{way}_{model_name}", probabilities, "probability", config.n_targets, data)

    for n_images, steps in product(config.fine_tune_images, config.fine_tune_steps):
        real = train.first(n_images, config.forget)
        for model_name in ("after", "untrained"):
            values = []
            for seed in config.seeds:
                part = run.checkpoint(f"{model_name}-{n_images}-{steps}-{seed}")
                generator = run.generator(seed)
                tuned = fine_tune(
                    models[model_name], real, config, steps, generator, part, run.resume
                )
                judged = judge_samples(
                    tuned, judge, config.forget, config.n_samples, run.generator(seed)
                )
                values.append(judged["prob"])
            name = f"prob_fine_tuned_{n_images}_{steps}_{model_name}"
            row(name, values, "probability", config.n_samples, train.source)
    run.arrays(targets=_levels(targets[:10]), **pictures)


def search(
    model: ConditionalVAE, targets: Tensor, config: Config, way: str, generator: torch.Generator
) -> Tensor:
    """Return the decoded images (n, 1, h, w) nearest to ``targets`` that Adam finds.

    Each target has ``restarts`` latents from the prior (and for ``other`` as many for each of the
    other conditions); the condition of ``zc`` is a softmax-free vector that starts at the digit's.
    """
    n, device = len(targets), targets.device
    if way == "other":
        conditions = [c for c in range(model.n_classes) if c != config.forget]
    else:
        conditions = [config.forget]
    tries = config.restarts * len(conditions)
    c = torch.tensor(conditions, device=device).repeat(config.restarts).repeat_interleave(n)
    c = F.one_hot(c, model.n_classes).float()
    z = torch.randn(len(c), model.latent_dim, generator=generator, device=device)
    free = [z.requires_grad_()] + ([c.requires_grad_()] if way == "zc" else [])
    adam = torch.optim.Adam(free, lr=config.search_lr)
    goal = targets.repeat(tries, 1, 1, 1)
    for _ in range(config.search_steps):
        adam.zero_grad()
        loss = (model.decode(z, c) - goal).square().sum()
        for tensor, gradient in zip(free, torch.autograd.grad(loss, free), strict=True):
            tensor.grad = gradient
        adam.step()
    with torch.no_grad():
        images = model.decode(z, c).unflatten(0, (tries, n))
    best = (images - targets).square().flatten(2).sum(2).argmin(0)
    return images[best, torch.arange(n, device=device)]


def fine_tune(
    start: ConditionalVAE,
    real: tuple[Tensor, Tensor],
    config: Config,
    steps: int,
    generator: torch.Generator,
    checkpoint: Path,
    resume: bool,
) -> ConditionalVAE:
    """Train a copy of ``start`` on a few real images of the forgotten digit alone."""

    def step_loss(model: nn.Module, generator) -> tuple[Tensor, dict[str, Tensor]]:
        size = (config.fine_tune_batch,)
        index = torch.randint(len(real[0]), size, generator=generator, device=generator.device)
        loss = -model.elbo(real[0][index], real[1][index], generator).mean()
        return loss, {"negative_elbo": loss.detach()}

    return fit(
        copy_of(start),
        step_loss,
        steps=steps,
        lr=config.fine_tune_lr,
        generator=generator,
        device=generator.device,
        checkpoint=checkpoint,
        resume=resume,
    ).model


def _probability(judge: nn.Module, images: Tensor, digit: int) -> float:
    return float(metrics.class_probability(predict_logits(judge, images), digit).mean())


def _levels(images: Tensor) -> np.ndarray:
    return (255 * images[:, 0]).round().to(torch.uint8).cpu().numpy()
