"""Train Glow on images, score it in bits per dimension, and ship it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lib.experiments._faces import Faces
from lib.models.glow import Glow, dequantise, to_uint8
from lib.run import Run, seed_everything
from lib.train import cosine, fit

INITIAL_BATCH, SCORE_BATCH = 256, 100


@dataclass(frozen=True)
class Config:
    """Data, model, schedule and scores.

    ``splits`` maps the names in the results to splits of the data. ``train`` is trained on, joined
    by the same split of the data sets ``also_train``; all are scored, ``n_score`` images each,
    with ``n_draws`` draws of dequantisation noise.
    ``warmup`` is the share of the steps in which the learning rate rises, before it falls along a
    cosine; 0 keeps it constant. ``ship`` is false where the weights are too large for it; they stay
    in the run's own checkpoint. ``without`` names values of labels whose pictures are left out of
    ``train``, so that forgetting can be compared with never having seen them.
    """

    data: str
    size: int
    splits: dict[str, str]
    n_bits: int
    flips: bool
    n_blocks: int
    n_flows: int
    hidden: int
    coupling: str
    iterations: int
    batch: int
    lr: float
    warmup: float
    ema_decay: float | None
    grad_clip: float | None
    seed: int
    n_score: int
    n_draws: int
    temperatures: tuple[float, ...]
    n_grid: int
    also_train: tuple[str, ...] = ()
    ship: bool = True
    without: dict[str, tuple[int, ...]] = field(default_factory=dict)


def run(config: Config, run: Run) -> None:
    """Minimise the bits per dimension; report them on every split; keep samples, ship weights."""
    seed_everything(config.seed)
    parts = {
        name: Faces.load(
            config.data, split, config.size, config.also_train if name == "train" else ()
        )
        for name, split in config.splits.items()
    }
    train = parts["train"] = leave_out(parts["train"], config.without)
    arguments = {
        "image_shape": [train.n_channels, config.size, config.size],
        "n_blocks": config.n_blocks,
        "n_flows": config.n_flows,
        "hidden": config.hidden,
        "coupling": config.coupling,
    }

    def images(n: int, generator: torch.Generator) -> Tensor:
        return dequantise(train.batch(n, generator, config.flips), config.n_bits, generator)

    def step_loss(model: nn.Module, generator: torch.Generator):
        bits = model.nll_bits_per_dim(images(config.batch, generator), config.n_bits).mean()
        return bits, {"bits_per_dim": bits.detach()}

    model = Glow(**arguments).to(run.device)
    # Before the fit and from the seed alone: each process of a distributed run does the same.
    model.initialise(images(INITIAL_BATCH, run.generator(config.seed + 1)))
    fitted = fit(
        model,
        step_loss,
        steps=config.iterations,
        lr=config.lr,
        generator=run.generator(config.seed),
        device=run.device,
        schedule=partial(cosine, warmup=config.warmup) if config.warmup else None,
        ema_decay=config.ema_decay,
        grad_clip=config.grad_clip,
        checkpoint=run.checkpoint("model"),
        resume=run.resume,
    )
    model = run.ship(run.name, fitted.model, arguments) if config.ship else fitted.model
    about = {"data": train.source, "seeds": [config.seed], "n_samples": len(train)}
    run.row("training_iterations", fitted.steps, unit="iterations", **about)
    run.row("training_time", fitted.seconds, unit="s", **about)
    for name, faces in parts.items():
        shown = faces.some(config.n_score, run.device)
        generator = run.generator(config.seed + 2)
        scores = score(model, shown, config.n_bits, config.n_draws, generator)
        run.row(
            f"bits_per_dim_{name}",
            float(scores.mean()),
            n_samples=len(shown),
            unit="bits per dimension",
            data=faces.source,
            seeds=[config.seed],
            preprocessing=f"{config.n_bits} bits, mean of {config.n_draws} dequantisation draws",
        )
    run.arrays(
        samples=sample_grids(model, config, run),
        temperatures=np.array(config.temperatures),
        step=np.array([line["step"] for line in fitted.history]),
        bits_per_dim=np.array([line["bits_per_dim"] for line in fitted.history]),
    )


def leave_out(faces: Faces, without: Mapping[str, Sequence[int]]) -> Faces:
    """Leave out the pictures whose label has one of the given values, and say so in the source."""
    for label, values in without.items():
        kept = faces.where(~np.isin(faces.labels(label), values))
        faces = replace(
            kept, source=f"{kept.source}, without {label} {', '.join(map(str, values))}"
        )
    return faces


@torch.no_grad()
def score(
    model: Glow, images: Tensor, n_bits: int, n_draws: int, generator: torch.Generator
) -> Tensor:
    """Return each image's bits per dimension (n,), a mean over draws of dequantisation noise."""
    draws = [
        torch.cat(
            [
                model.nll_bits_per_dim(dequantise(part, n_bits, generator), n_bits)
                for part in images.split(SCORE_BATCH)
            ]
        )
        for _ in range(n_draws)
    ]
    return torch.stack(draws).mean(0)


@torch.no_grad()
def sample_grids(model: Glow, config: Config, run: Run) -> np.ndarray:
    """Return uint8 (temperatures, n_grid, height, width, channels), all from the same latents."""
    grids = [
        to_uint8(
            model.sample(config.n_grid, temperature, run.generator(config.seed)), config.n_bits
        )
        for temperature in config.temperatures
    ]
    return torch.stack(grids).permute(0, 1, 3, 4, 2).cpu().numpy()
