"""Tame a RealNVP on five Gaussians: the taming paper's Figure 2, with numbers.

For every seed a base flow is trained and tamed once for each delta and alpha. ``ship`` keeps the
first base flow as the checkpoint ``toy_base``. With one delta and
one alpha the rows are means over seeds; with several, the arrays of the sliders are kept.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from lib.data.toy import CENTRES, five_gaussians
from lib.methods.taming import (
    TamingSettings,
    mean_likelihood_quantile,
    nll_statistics,
    tame,
)
from lib.metrics.clusters import cluster_shares
from lib.metrics.likelihood import bits_per_dim
from lib.models.realnvp import RealNVP
from lib.run import Run
from lib.train import cosine, fit

FORGOTTEN = 4  # the cluster in the middle
SIDE = 1.0  # the plane is shown from -SIDE to SIDE


@dataclass(frozen=True)
class Config:
    """What a YAML file may set; ``taming`` values go to :class:`TamingSettings`."""

    deltas: tuple[float, ...] = (4.0,)
    alphas: tuple[float, ...] = (0.6,)
    seeds: tuple[int, ...] = (0,)
    gamma: float = 0.6
    epsilon: float = 0.3
    lr: float = 5e-5
    batch_forget: int = 8
    batch_remember: int = 8
    refresh_every: int = 10
    max_steps: int = 300
    forget_points: int = 1000
    std: float = 0.08
    train_points: int = 20_000
    base_steps: int = 2500
    base_lr: float = 2e-3
    base_batch: int = 256
    n_layers: int = 8
    hidden: int = 64
    n_samples: int = 20_000
    ship: bool = False
    grid: int = 64
    bins: int = 60


def settings(config: Config, delta: float, alpha: float) -> TamingSettings:
    """Collect the taming settings of one position of the sliders."""
    shared = set(asdict(TamingSettings())) & set(asdict(config))
    return TamingSettings(
        delta=delta, alpha=alpha, **{name: getattr(config, name) for name in shared}
    )


def nll(flow: RealNVP, x: Tensor) -> Tensor:
    """Return the negative log-likelihood in bits per dimension, the unit of the authors' code."""
    return bits_per_dim(-flow.log_prob(x), flow.dim)


def train_base(config: Config, seed: int, run: Run | None = None) -> tuple[RealNVP, Tensor, Tensor]:
    """Train the base flow; return it with its training points and their clusters."""
    device = run.device if run else torch.device("cpu")
    torch.manual_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    x, cluster = five_gaussians(config.train_points, generator, config.std)

    def step_loss(flow, generator):
        rows = torch.randint(
            len(x), (config.base_batch,), generator=generator, device=generator.device
        )
        return -flow.log_prob(x[rows]).mean(), {}

    flow = RealNVP(2, config.n_layers, config.hidden)
    result = fit(
        flow,
        step_loss,
        steps=config.base_steps,
        lr=config.base_lr,
        schedule=cosine,
        grad_clip=1.0,
        generator=generator,
        device=device,
        checkpoint=run.checkpoint(f"base{seed}") if run else None,
        resume=bool(run and run.resume),
        progress=run is not None,
    )
    return result.model, x, cluster


@torch.no_grad()
def measure(flow: RealNVP, config: Config, forget: Tensor, seed: int) -> dict[str, float]:
    """Measure shares of fresh samples, and likelihood quantiles against a fresh crowd.

    ``forget`` are the tamed points; ``forget_held_out`` are fresh points of their cluster.
    """
    generator = torch.Generator(forget.device).manual_seed(10_000 + seed)
    held_out, cluster = five_gaussians(config.n_samples, generator, config.std)
    remember = nll(flow, held_out[cluster != FORGOTTEN])
    mu_r, sigma_r = nll_statistics(remember)
    samples = flow.sample(config.n_samples, generator=generator)
    shares = cluster_shares(samples, CENTRES.to(samples), radius=4 * config.std)
    quantiles = {
        "forget": nll(flow, forget),
        "forget_held_out": nll(flow, held_out[cluster == FORGOTTEN]),
        "remember_held_out": remember,
    }
    found = {
        "share_centre": shares[FORGOTTEN].item(),
        "share_none": shares[-1].item(),
        "share_corner_min": shares[:FORGOTTEN].min().item(),
        "share_corner_max": shares[:FORGOTTEN].max().item(),
        "mu_r": mu_r.item(),
        "sigma_r": sigma_r.item(),
    }
    return found | {
        f"quantile_{name}": mean_likelihood_quantile(values, mu_r, sigma_r).item()
        for name, values in quantiles.items()
    }


@torch.no_grad()
def frame(flow: RealNVP, config: Config, forget: Tensor, edges: np.ndarray) -> dict:
    """Draw what one position of the sliders shows: the density and the NLL histograms."""
    side = torch.linspace(-SIDE, SIDE, config.grid, device=forget.device)
    y, x = torch.meshgrid(side, side, indexing="ij")
    plane = torch.stack((x.flatten(), y.flatten()), dim=1)
    generator = torch.Generator(forget.device).manual_seed(77)
    held_out, cluster = five_gaussians(config.n_samples, generator, config.std)
    remember = nll(flow, held_out[cluster != FORGOTTEN])

    def histogram(values: Tensor) -> np.ndarray:
        clipped = values.cpu().numpy().clip(edges[0], edges[-1])
        return np.histogram(clipped, edges, density=True)[0].astype(np.float32)

    return {
        "density": flow.log_prob(plane).exp().reshape(config.grid, config.grid).cpu().numpy(),
        "remember": histogram(remember),
        "forget": histogram(nll(flow, forget)),
    }


def slider_panels(found: Mapping[str, np.ndarray]) -> dict[str, dict]:
    """Arrange frames and numbers, of one position or of all, as panels of an ``Explorer``."""
    edges, mu, sigma = found["edges"], found["mu_r"], found["sigma_r"]
    delta = np.asarray(found["delta"])
    threshold = mu + (delta[:, None] if np.ndim(mu) == 2 else delta) * sigma
    return {
        "density": {
            "Density of x": {
                "array": np.asarray(found["density"], dtype=np.float32),
                "extent": (-SIDE, SIDE, -SIDE, SIDE),
                "vmax": 6.0,
                "xlabel": "x₁",
                "ylabel": "x₂",
                "alt": "Density of the tamed flow in the plane; the four corners are bright.",
            }
        },
        "curves": {
            "NLL": {
                "x": (edges[1:] + edges[:-1]) / 2,
                "lines": {"remember": found["remember"], "forget": found["forget"]},
                "markers": {"μ_R + δσ_R": threshold},
                "ylim": (0.0, 2.0),
                "xlabel": "NLL (bits per dimension)",
                "ylabel": "density",
                "alt": "Histograms of the NLL of remembered and forgotten points.",
            }
        },
        "values": {
            "in the middle": {"array": found["share_centre"], "format": ".1%"},
            "in no cluster": {"array": found["share_none"], "format": ".1%"},
            "fewest in a corner": {"array": found["share_corner_min"], "format": ".1%"},
            "most in a corner": {"array": found["share_corner_max"], "format": ".1%"},
            "quantile, forget": {"array": found["quantile_forget"], "format": ".1e"},
            "quantile, remember": {
                "array": found["quantile_remember_held_out"],
                "format": ".2f",
            },
            "steps": {"array": found["steps"], "format": ".0f"},
        },
    }


def run(config: Config, run: Run) -> None:
    """Train, tame at every delta and alpha, measure, and keep rows or slider arrays."""
    shape = (len(config.deltas), len(config.alphas))
    edges = np.linspace(-2.5, 7.5, config.bins + 1)
    keep_frames = shape != (1, 1)
    base_values: list[dict[str, float]] = []
    tamed_values = np.empty((*shape, len(config.seeds)), dtype=object)
    frames = np.empty(shape, dtype=object)
    for number, seed in enumerate(config.seeds):
        base, x, cluster = train_base(config, seed, run)
        if config.ship and number == 0:
            architecture = {"dim": 2, "n_layers": config.n_layers, "hidden": config.hidden}
            run.ship("toy_base", base, architecture)
        forget = x[cluster == FORGOTTEN][: config.forget_points]
        remember = x[cluster != FORGOTTEN]
        base_values.append(measure(base, config, forget, seed))
        for position in np.ndindex(*shape):
            chosen = settings(config, config.deltas[position[0]], config.alphas[position[1]])
            generator = run.generator(1000 + seed)
            started = run.seconds
            *_, (tamed, terms) = tame(base, forget, remember, nll, chosen, generator)
            tamed_values[(*position, number)] = measure(tamed, config, forget, seed) | {
                "steps": terms["step"],
                "stopped": terms["stopped"],
                "seconds": run.seconds - started,
            }
            if keep_frames and number == 0:
                frames[position] = frame(tamed, config, forget, edges)

    about = {
        "data": f"five_gaussians, std {config.std}, {config.train_points} points",
        "n_samples": config.n_samples,
    }
    units = {"steps": "steps", "seconds": "s"}
    units |= dict.fromkeys(("mu_r", "sigma_r"), "bits per dimension")
    for name in base_values[0]:
        unit = units.get(name, "share")
        values = [found[name] for found in base_values]
        run.row(f"{name}_base", values, unit=unit, seeds=config.seeds, **about)
    if not keep_frames:
        for name in tamed_values[0, 0, 0]:
            values = [found[name] for found in tamed_values[0, 0]]
            unit = units.get(name, "share")
            run.row(f"{name}_tamed", values, unit=unit, seeds=config.seeds, **about)
        return
    names = list(tamed_values[0, 0, 0])
    arrays = {
        name: np.array(
            [[np.mean([v[name] for v in cell]) for cell in row] for row in tamed_values],
            dtype=np.float32,
        )
        for name in names
    }
    for name in ("density", "remember", "forget"):
        arrays[name] = np.array([[cell[name] for cell in row] for row in frames])
    arrays["density"] = arrays["density"].astype(np.float16)
    run.arrays(delta=np.array(config.deltas), alpha=np.array(config.alphas), edges=edges, **arrays)
    best = arrays["share_centre"].min()
    run.row("share_centre_tamed_min", [float(best)], unit="share", seeds=config.seeds[:1], **about)
