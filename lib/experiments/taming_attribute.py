"""Tame a Glow to draw less or more of an attribute: the taming paper's Figs. 1, 4 and C.1 to C.3.

To forget is to tame with all pictures that have the attribute as the forget set and the others as
the remember set; to increase exchanges the two sets; to debias is to increase until half of the
samples have it. As in the authors' code, the sets go by the labels of the pictures, and no stop
rule is tested. A judge says how many samples have the attribute, so what it says of the base's
samples and of real pictures is measured too.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lib.data.images import MISSING
from lib.experiments._taming import BaseConfig, Bench, Judge, as_grid
from lib.metrics.fidelity import frechet_distance
from lib.run import Run

SEED = 0
FRESH = 1  # for the samples that a stopped model is judged by, which are not those that stopped it


@dataclass(frozen=True)
class Config(BaseConfig):
    """Which attributes, and how the samples are judged.

    ``labels`` maps an attribute's name in the results to its label in the data; ``also`` maps it to
    another one that is judged, too, where the first is tamed. Those in ``control`` are forgotten
    with a loss that leaves out forgetting. Every ``judge_every`` steps ``n_judged`` samples are
    judged, with equal latents each time. ``n_crowd`` validation pictures are compared with samples,
    and the first ``n_scored`` of them are scored. Shares of samples at the temperature ``cold``,
    the authors', stand beside those at ``temperature``.
    """

    judge: str
    labels: dict[str, str]
    also: dict[str, str]
    forgotten: tuple[str, ...]
    control: tuple[str, ...]
    increased: tuple[str, ...]
    debiased: tuple[str, ...]
    judge_every: int
    n_judged: int
    n_scored: int
    temperature: float
    cold: float
    n_pairs: int

    def __post_init__(self):
        if self.taming.max_steps < 1 or self.taming.max_steps % self.judge_every:
            raise ValueError(
                f"max_steps must be a multiple of judge_every = {self.judge_every}, so that the "
                f"last model is judged, got {self.taming.max_steps}"
            )


class Check(NamedTuple):
    """The model at one step, its samples, and the share of them that is called positive."""

    step: int
    model: nn.Module
    samples: Tensor
    share: float


def run(config: Config, run: Run) -> None:
    """Forget, control, increase and debias; report shares, likelihoods and distances."""
    bench = Bench(config, run)
    judge = Judge(config.judge, bench, tuple(dict.fromkeys(config.labels.values())))
    yardstick = Yardstick(bench, judge)
    base = bench.samples(bench.base, config.n_judged, config.temperature, SEED)
    report_base(yardstick, base, run)
    n_checks = config.taming.max_steps // config.judge_every
    arrays = {"steps": np.arange(1 + n_checks) * config.judge_every}
    arrays["grid_base"] = as_grid(base[: config.n_pairs])
    for kind in ("forgotten", "control", "increased", "debiased"):
        names = getattr(config, kind)
        found = [run.part(f"{kind}_{name}", partial(one, yardstick, name, kind)) for name in names]
        for name, part in zip(names, found, strict=True):
            start = judge.share(base, config.labels[name])
            part["curve"] = np.concatenate(([start], part["curve"])).astype(np.float32)
            for quantity, value in part.items():
                if value.ndim == 0:
                    about = about_row(yardstick, quantity, config.labels[name])
                    run.row(f"{quantity}_{kind}_{name}", float(value), **about)
        if found:
            arrays[f"share_{kind}"] = np.stack([part["curve"] for part in found])
            arrays[f"grid_{kind}"] = np.stack([part["grid"] for part in found])
    run.arrays(**arrays)


def one(yardstick: "Yardstick", name: str, kind: str) -> dict[str, float | np.ndarray]:
    """Tame the base for one attribute and measure; numbers make rows, arrays are for figures."""
    bench, judge = yardstick.bench, yardstick.judge
    config: Config = bench.config
    label = config.labels[name]
    checks = follow(bench, judge, label, kind)
    seen = list(until_past_half(checks) if kind == "debiased" else checks)
    last, samples = seen[-1], seen[-1].samples
    # A model that was stopped has no share afterwards.
    curve = np.full(config.taming.max_steps // config.judge_every, np.nan)
    curve[: len(seen)] = [check.share for check in seen]
    found = {"curve": curve, "grid": as_grid(samples[: config.n_pairs]), "steps": last.step}
    if kind == "debiased":
        found["share_stopping"] = last.share
        samples = bench.samples(last.model, config.n_judged, config.temperature, FRESH)
    cold = bench.samples(last.model, config.n_judged, config.cold, SEED)
    found |= {"share": judge.share(samples, label), "share_cold": judge.share(cold, label)}
    if name in config.also:
        other = config.also[name]
        found[f"share_{other}"] = judge.share(samples, config.labels[other])
    found |= yardstick.distances(samples, label)
    return found | yardstick.bits_changes(last.model, label)


def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the pictures labelled 1 and of the others; unlabelled are in neither.

    Shapes: ``labels`` (n,) of whole numbers.
    """
    return np.flatnonzero(labels == 1), np.flatnonzero((labels != 1) & (labels != MISSING))


def sets(labels: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the forget and of the remember set, for one kind of taming."""
    with_it, without = split(labels)
    return (without, with_it) if kind in ("increased", "debiased") else (with_it, without)


def follow(bench: Bench, judge: Judge, label: str, kind: str) -> Iterator[Check]:
    """Tame the base for one label; judge samples of the same latents every few steps.

    The model is one object that later steps change.
    """
    config: Config = bench.config
    index = sets(bench.train.labels(label), kind)
    forget, remember = (bench.train.at(part, bench.device) for part in index)
    changes = {"alpha": 0.0} if kind == "control" else {}
    for model, terms in bench.steps(forget, remember, SEED, **changes):
        step = terms["step"]
        if step and step % config.judge_every == 0:
            samples = bench.samples(model, config.n_judged, config.temperature, SEED)
            yield Check(step, model, samples, judge.share(samples, label))


def until_past_half(checks: Iterable[Check]) -> Iterator[Check]:
    """Pass checks on, up to the first that finds more than half of the samples positive."""
    for check in checks:
        yield check
        if check.share > 0.5:
            return


class Yardstick:
    """Real validation pictures with their labels, which models and samples are held against."""

    def __init__(self, bench: Bench, judge: Judge):
        config: Config = bench.config
        order = np.random.RandomState(0).permutation(len(bench.validation))[: config.n_crowd]
        self.bench, self.judge, self.faces = bench, judge, bench.validation.where(order)
        self.images = self.faces.at(np.arange(len(self.faces)), bench.device)
        self.real = bench.as_sampled(self.images)
        self.features = judge.features(self.real)
        self.bits_base = self.bits(bench.base)

    def bits(self, model: nn.Module) -> np.ndarray:
        """Return the bits per dimension (n_scored,), with the same noise for every model."""
        generator = torch.Generator(self.bench.device).manual_seed(77)
        config: Config = self.bench.config
        scored = self.images[: config.n_scored]
        return self.bench.score(model, scored, generator, config.n_draws).cpu().numpy()

    def kinds(self, label: str) -> dict[str, np.ndarray]:
        """Return the indices of the pictures with and without an attribute."""
        return dict(zip(("with", "without"), split(self.faces.labels(label)), strict=True))

    def bits_changes(self, model: nn.Module, label: str) -> dict[str, float]:
        """Return how much the mean bits of scored pictures with and without it have grown.

        A kind that none of them is of is left out.
        """
        change = self.bits(model) - self.bits_base
        parts = {
            kind: change[index[index < len(change)]] for kind, index in self.kinds(label).items()
        }
        return {f"bits_change_{kind}": part.mean() for kind, part in parts.items() if len(part)}

    def distances(self, samples: Tensor, label: str) -> dict[str, float]:
        """Return Fréchet distances to all pictures, to those with and to those without.

        A distance to fewer pictures than features would be of no use, and is left out.
        """
        drawn, every = self.judge.features(samples), self.features
        found = {"frechet": frechet_distance(every, drawn)}
        for kind, index in self.kinds(label).items():
            if len(index) > every.shape[1]:
                real = every[torch.from_numpy(index).to(every.device)]
                found[f"frechet_{kind}"] = frechet_distance(real, drawn)
        return found


def about_row(yardstick: Yardstick, quantity: str, label: str = "") -> dict[str, Any]:
    """Return what a row says beside its value, by the beginning of its quantity."""
    config: Config = yardstick.bench.config
    judge, cold = yardstick.judge, quantity.startswith("share_cold")
    temperature = f"temperature {config.cold if cold else config.temperature:g}"
    preprocessing = f"{config.n_bits} bits, {config.size} px"
    about = {"data": yardstick.bench.train.source, "seeds": [SEED], "preprocessing": preprocessing}
    if quantity.startswith("steps"):
        return about | {"unit": "iterations", "n_samples": 1}
    if quantity.startswith("bits"):
        n = len(yardstick.bits_base)
        if label:
            n = int((yardstick.kinds(label)[quantity.rsplit("_", 1)[1]] < n).sum())
        return about | {"unit": "bits per dimension", "n_samples": n}
    about |= {"n_samples": config.n_judged, "preprocessing": f"{preprocessing}, {temperature}"}
    if quantity.startswith("frechet"):
        return about | {"unit": "Fréchet distance", "feature_extractor": judge.extractor}
    return about | {"unit": f"share, by {judge.name}"}


def report_base(yardstick: Yardstick, base: Tensor, run: Run) -> None:
    """Add the rows on the base, and on what the judge makes of real pictures."""
    bench, judge = yardstick.bench, yardstick.judge
    config: Config = bench.config
    for quantity, value in (
        ("bits_base", yardstick.bits_base.mean()),
        ("bits_base_sigma", yardstick.bits_base.std()),
    ):
        run.row(quantity, value, **about_row(yardstick, quantity))
    trained = bench.as_sampled(bench.train.some(config.n_judged, bench.device))
    distance = judge.distance(trained, yardstick.features)
    run.row("frechet_train_pictures", distance, **about_row(yardstick, "frechet"))
    cold = bench.samples(bench.base, config.n_judged, config.cold, SEED)
    for name, label in config.labels.items():
        about = about_row(yardstick, "share_cold")
        run.row(f"share_cold_base_{name}", judge.share(cold, label), **about)
        about = about_row(yardstick, "share")
        run.row(f"share_base_{name}", judge.share(base, label), **about)
        truth = yardstick.faces.labels(label)
        known = np.flatnonzero(truth != MISSING)
        about |= {"data": yardstick.faces.source, "n_samples": len(known)}
        real = yardstick.real[torch.from_numpy(known).to(bench.device)]
        run.row(f"share_real_{name}", judge.share(real, label), **about)
        run.row(f"share_true_{name}", (truth[known] == 1).mean(), **about | {"unit": "share"})
        distances = yardstick.distances(base, label)
        of_all = distances.pop("frechet")
        for quantity, distance in distances.items():
            run.row(f"{quantity}_base_{name}", distance, **about_row(yardstick, quantity))
    run.row("frechet_base", of_all, **about_row(yardstick, "frechet"))
