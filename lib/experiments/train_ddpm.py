"""Train a conditional diffusion model on labelled images, judge its samples, and ship it."""

import time
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lib.experiments._diffusion import Measures, Sampling, draw, judged_others, load_judge
from lib.experiments._digits import Digits, mirror_some
from lib.models.ddpm import ConditionalDDPM, to_signed
from lib.run import Run, seed_everything
from lib.train import cosine, fit

SCORE_BATCH = 100


@dataclass(frozen=True)
class Config(Sampling):
    """Data, network, schedule, and what is measured.

    ``without`` may name one class that is left out of the training and of the measurements; what
    the model shows for that class is measured too, on ``n_samples`` of it, and how well it knows
    the others, on ``n_remember`` of each beside ``n_real`` real images.
    ``channels`` to ``patch`` are arguments of :class:`ConditionalDDPM`. ``drop`` is the share of
    null classes in training; ``reduction`` is that of the loss over pixels, which matters to
    ``grad_clip`` alone. ``warmup`` is the share of the steps in which the learning rate rises,
    before it falls along a cosine; 0 keeps it constant.
    ``judge`` is a shipped classifier, ``random`` an untrained one, null none. ``n_samples`` are
    drawn for it.
    ``ship`` is false where the weights are too large for it; they stay in the run's own checkpoint.
    """

    data: str
    size: int
    channels: tuple[int, ...]
    layers_per_block: int
    attention: tuple[int, ...]
    groups: int
    dropout: float
    patch: int
    iterations: int
    batch: int
    lr: float
    warmup: float
    ema_decay: float
    grad_clip: float
    drop: float
    reduction: str
    seed: int
    judge: str | None
    n_test: int
    n_samples: int
    n_remember: int = 0
    n_real: int = 0
    splits: tuple[str, ...] = ("train",)
    without: tuple[int, ...] = ()
    flips: bool = False
    bf16: bool = False
    ship: bool = True

    def __post_init__(self):
        if len(self.without) > 1 or (self.without and not (self.n_remember and self.n_real)):
            raise ValueError(
                f"The classes left out are {list(self.without)}, with n_remember "
                f"{self.n_remember} and n_real {self.n_real}; leave out one class at most, and "
                "say how many samples and real images of each other class to compare"
            )


def run(config: Config, run: Run) -> None:
    """Minimise the simple loss, then report losses on test images and what a judge sees."""
    seed_everything(config.seed)
    train, test = (
        load_images(config.data, splits, config.size, config.without, run.device)
        for splits in (config.splits, ["test"])
    )
    arguments = {
        "image_shape": list(train.images.shape[1:]),
        "n_classes": 10,
        "channels": list(config.channels),
        "layers_per_block": config.layers_per_block,
        "attention": list(config.attention),
        "groups": config.groups,
        "dropout": config.dropout,
        "patch": config.patch,
    }

    def step_loss(model: nn.Module, generator) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = train.batch(config.batch, generator)
        if config.flips:
            images = mirror_some(images, generator)
        x0 = to_signed(images)
        loss = model.loss(x0, labels, generator, config.drop, config.reduction).mean()
        return loss, {"simple_loss": loss.detach()}

    run.bf16 = config.bf16
    trained = fit(
        ConditionalDDPM(**arguments),
        step_loss,
        steps=config.iterations,
        lr=config.lr,
        generator=run.generator(config.seed),
        device=run.device,
        schedule=partial(cosine, warmup=config.warmup) if config.warmup else None,
        ema_decay=config.ema_decay,
        grad_clip=config.grad_clip,
        bf16=config.bf16,
        checkpoint=run.checkpoint("model"),
        resume=run.resume,
    )
    model = run.ship(run.name, trained.model, arguments) if config.ship else trained.model
    score(model, test, config, run)
    judge_samples(model, train.labels.unique(), config, run)
    for absent in config.without:
        measures = Measures(config, absent, model.image_shape, model.n_classes, run)
        found = measures.of(model, config.seed)
        run.arrays(samples_of_each=found["grid"])
        measures.report_real()
        measures.report(f"without_{absent}", [found], [config.seed])
    run.arrays(
        loss_step=np.array([line["step"] for line in trained.history]),
        loss=np.array([line["simple_loss"] for line in trained.history]),
    )


def load_images(
    name: str, splits: tuple[str, ...], size: int, without: tuple[int, ...], device: torch.device
) -> Digits:
    """Join splits of labelled images and leave out classes."""
    parts = [Digits.load(name, split, size, device) for split in splits]
    images, labels = (torch.cat([getattr(p, k) for p in parts]) for k in ("images", "labels"))
    return Digits(images, labels, parts[0].source).without(without)


@torch.no_grad()
def score(model: ConditionalDDPM, test: Digits, config: Config, run: Run) -> None:
    """Report the simple loss and the variational bound on test images, at one step each."""
    images, labels = test.first(config.n_test)
    generator = run.generator(config.seed + 1)
    about = {"n_samples": len(images), "data": test.source, "seeds": [config.seed]}
    losses, bounds = [], []
    for x, c in zip(images.split(SCORE_BATCH), labels.split(SCORE_BATCH), strict=True):
        losses.append(model.loss(to_signed(x), c, generator, reduction="mean"))
        bounds.append(model.elbo(to_signed(x), c, generator))
    scaled = "pixels / 127.5 - 1"
    for name, values, unit_ in (
        ("test_simple_loss", losses, "squared error a pixel"),
        ("test_elbo", bounds, "nats"),
    ):
        mean = float(torch.cat(values).mean())
        run.row(name, mean, unit=unit_, preprocessing=scaled, **about)


def judge_samples(model: ConditionalDDPM, classes: Tensor, config: Config, run: Run) -> None:
    """Draw samples of the classes in turn, keep the first hundred, and ask the judge."""
    c = classes.repeat(-(-config.n_samples // len(classes)))[: config.n_samples]
    generator, start = run.generator(config.seed + 2), time.perf_counter()
    samples = draw(model, c, config, generator)
    about = {"n_samples": len(samples), "data": "samples of the model", "seeds": [config.seed]}
    per_hundred = (time.perf_counter() - start) * 100 / len(samples)
    run.row("seconds_per_100_samples", per_hundred, unit="s", **about)
    run.arrays(samples=samples[:100].permute(0, 2, 3, 1).cpu().numpy())
    if config.judge is None:
        return
    judge = load_judge(config.judge, run.device)
    about |= {"unit": "share", "feature_extractor": config.judge}
    for quantity, value in judged_others(judge, samples, c).items():
        run.row(quantity.replace("remember", "sample"), value, **about)
