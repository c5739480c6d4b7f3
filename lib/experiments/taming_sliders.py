"""Tame a Glow at every delta and alpha to forget one person: what the chapter's sliders show."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from lib.experiments._taming import BaseConfig, Bench, as_grid, people
from lib.methods.taming import Step, draw, likelihood_quantile, nll_statistics
from lib.models.glow import Glow
from lib.run import Run

SEED = 0
ROW_OF_SAMPLES = 4  # pictures side by side


@dataclass(frozen=True)
class Config(BaseConfig):
    """The grid, whom to forget, and what is shown.

    ``label`` numbers people of the training set; the first with enough pictures is forgotten by
    ``n_forget`` of them, and ``n_reference`` others show what becomes of the rest. The remember
    set is ``n_remember`` pictures of other people.
    """

    deltas: tuple[float, ...]
    alphas: tuple[float, ...]
    label: str
    n_forget: int
    n_reference: int
    n_remember: int
    n_samples: int
    temperature: float
    bins: int


class OnePerson:
    """One person to forget, measured at any position of the sliders."""

    def __init__(self, bench: Bench):
        config: Config = bench.config
        self.bench = bench
        person = next(
            people(bench, bench.train, config.label, 1, config.n_forget, config.n_reference)
        )
        generator = torch.Generator(bench.device).manual_seed(SEED)
        self.remember = draw(person.remember, config.n_remember, generator)
        self.sets = {
            "forget": person.forget,
            "reference": person.reference,
            "remember": bench.train.some(100, bench.device),
        }
        mu, sigma = nll_statistics(bench.scores(bench.base, {})["crowd"])
        self.edges = np.linspace(
            float(mu - 4 * sigma), float(mu + 10 * sigma), config.bins + 1, dtype=np.float32
        )
        self.base = self.show(bench.base, 1.0)
        self.about = {"edges": self.edges, "base_crowd": self.base["crowd"]}

    @cached_property
    def control(self) -> Step:
        """Tame without the forget loss; nothing depends on delta, and there is no rule to stop."""
        return self.bench.tame(self.sets["forget"], self.remember, SEED, alpha=0.0, epsilon=None)

    def tame(self, delta: float, alpha: float) -> dict[str, np.ndarray]:
        """Tame the base, for alpha > 0 with the stop rule; return what the sliders show of it."""
        if alpha == 0:
            model, terms = self.control
        else:
            model, terms = self.bench.tame(
                self.sets["forget"], self.remember, SEED, delta=delta, alpha=alpha
            )
        found = self.show(model, delta)
        return found | {"steps": np.float32(terms["step"]), "stopped": np.float32(terms["stopped"])}

    def show(self, model: Glow, delta: float) -> dict[str, np.ndarray]:
        """Measure one model: the crowd's histogram, forget pictures, threshold and samples."""
        config: Config = self.bench.config
        nll = self.bench.scores(model, self.sets)
        mu, sigma = nll_statistics(nll["crowd"])
        samples = self.bench.samples(model, config.n_samples, config.temperature, SEED)
        quantiles = {
            f"quantile_{name}": likelihood_quantile(nll[name], mu, sigma).mean()
            for name in self.sets
        }
        numbers = {"bits_per_dim": mu, "threshold": mu + delta * sigma} | quantiles
        return {name: np.float32(value.item()) for name, value in numbers.items()} | {
            "crowd": histogram(nll["crowd"], self.edges),
            "forget": nll["forget"].cpu().numpy(),
            "samples": as_grid(samples),
        }


def histogram(nll: Tensor, edges: np.ndarray) -> np.ndarray:
    """Return the density of each bin, float32; values beyond the edges count at the edge."""
    clipped = nll.cpu().numpy().clip(edges[0], edges[-1])
    return np.histogram(clipped, edges, density=True)[0].astype(np.float32)


def slider_panels(found: Mapping[str, np.ndarray]) -> dict[str, dict]:
    """Arrange the arrays, of one position or of all, as panels of an ``Explorer``."""
    edges = found["edges"]
    return {
        "images": {
            "Samples of the same latents": {
                "array": tiled(found["samples"]),
                "alt": "Faces drawn by the tamed model, from the same latents at every position.",
            }
        },
        "curves": {
            "NLL": {
                "x": (edges[1:] + edges[:-1]) / 2,
                "lines": {"new people, base": found["base_crowd"], "tamed": found["crowd"]},
                "markers": {"threshold μ_R + δσ_R": found["threshold"]},
                "dots": {"forget pictures, tamed": found["forget"]},
                "xlim": (float(edges[0]), float(edges[-1])),
                "xlabel": "NLL (bits per dimension)",
                "ylabel": "density",
                "step": True,
                "alt": "Histograms of the NLL of new people before and after taming; triangles on "
                "the axis are the forget pictures.",
            }
        },
        "values": {
            "quantile, forget": {"array": found["quantile_forget"], "format": ".1e"},
            "quantile, same person": {"array": found["quantile_reference"], "format": ".2f"},
            "quantile, remember": {"array": found["quantile_remember"], "format": ".2f"},
            "bits per dimension": {"array": found["bits_per_dim"], "format": ".3f"},
            "steps": {"array": found["steps"], "format": ".0f"},
            "stop rule": {"array": np.where(np.asarray(found["stopped"]) > 0, "met", "not met")},
        },
    }


def tiled(samples: np.ndarray) -> np.ndarray:
    """Lay samples (..., n, height, width, channels) out in rows, as one picture a position."""
    *axes, n, height, width, channels = samples.shape
    columns = min(n, ROW_OF_SAMPLES)
    grid = samples.reshape(*axes, n // columns, columns, height, width, channels)
    return grid.swapaxes(-4, -3).reshape(*axes, n // columns * height, columns * width, channels)


def run(config: Config, run: Run) -> None:
    """Tame at every position; keep the arrays of the sliders, and rows about their extremes."""
    bench = Bench(config, run)
    person = OnePerson(bench)
    base = person.base
    grid = [
        [
            run.part(f"delta{delta:g}_alpha{alpha:g}", partial(person.tame, delta, alpha))
            for alpha in config.alphas
        ]
        for delta in config.deltas
    ]
    arrays = {name: np.array([[cell[name] for cell in row] for row in grid]) for name in grid[0][0]}
    run.arrays(
        delta=np.array(config.deltas), alpha=np.array(config.alphas), **person.about, **arrays
    )
    bits = "bits per dimension"
    for quantity, value, unit in (
        ("bits_per_dim_base", base["bits_per_dim"], bits),
        ("bits_per_dim_highest", arrays["bits_per_dim"].max(), bits),
        ("quantile_forget_base", base["quantile_forget"], "share"),
        ("quantile_forget_lowest", arrays["quantile_forget"].min(), "share"),
        ("quantile_remember_base", base["quantile_remember"], "share"),
        ("stopped", arrays["stopped"].mean(), "share"),
    ):
        run.row(
            quantity,
            float(value),
            unit=unit,
            seeds=[SEED],
            n_samples=len(bench.crowd),
            data=bench.train.source,
            preprocessing=f"{config.n_bits} bits, {config.size} px",
        )
