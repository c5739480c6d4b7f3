"""Tame a Glow without its training data: the taming paper's Figs. 5, 6, A.2 and C.4.

The remember set comes from elsewhere: ``far`` is a group that the training data hardly holds,
``near`` are people like those of the training data, ``own`` are samples of the base itself;
``trained``, the training data, is there to compare. In ``far`` and ``near`` the forget pictures are
of the same kind as the remember set, as in the paper; those of ``own`` are those of ``near``, and
those of ``trained`` are those of ``far``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lib.experiments._faces import Faces
from lib.experiments._taming import BaseConfig, Bench, Judge, as_grid
from lib.methods.taming import likelihood_quantile, nll_statistics
from lib.run import Run

SEED = 0
SHOWN = ("far", "near", "own")  # whose samples are kept
KEPT = (*SHOWN, "trained", "control")  # whose likelihoods are kept, after those of the base


@dataclass(frozen=True)
class Config(BaseConfig):
    """Where the remember sets come from, how much is forgotten, and what is kept for the figures.

    ``far`` are pictures of a split of a data set for which every label of ``far_group`` has the
    value it gives. ``n_main`` pictures are forgotten with each remember set, and with the far one
    any number of ``n_forget``, of which ``n_main`` is one. Samples are kept ``shown_at`` steps.
    """

    judge: str
    far_data: str
    far_split: str
    far_group: dict[str, int]
    own_temperature: float
    n_remember: int
    n_forget: tuple[int, ...]
    n_main: int
    n_judged: int
    temperature: float
    shown_at: tuple[int, ...]
    n_shown: int

    def __post_init__(self):
        if self.n_main not in self.n_forget or max(self.shown_at) > self.taming.max_steps:
            raise ValueError(
                f"n_main = {self.n_main} must be one of n_forget, and no step of shown_at beyond "
                f"max_steps = {self.taming.max_steps}"
            )


@dataclass(frozen=True)
class Sets:
    """What may be forgotten and what is remembered, as uint8 images in a random order."""

    forget: Tensor
    remember: Tensor


def run(config: Config, run: Run) -> None:
    """Tame with each remember set and number of pictures; report quantiles and distances."""
    bench = Bench(config, run)
    judge = Judge(config.judge, bench, ("any",))
    real = judge.features(bench.as_sampled(bench.crowd))
    sets = remember_sets(bench)
    sizes = {n: "far" if n == config.n_main else f"far_{n}" for n in config.n_forget}
    plan = {name: ("far", n, {}) for n, name in sizes.items()}
    plan |= {name: (name, config.n_main, {}) for name in ("near", "own", "trained")}
    plan["control"] = ("far", config.n_main, {"alpha": 0.0})
    bases = {
        name: run.part(f"base_{name}", partial(measure, bench, judge, real, bench.base, one))
        for name, one in sets.items()
    }
    tamed = {
        name: run.part(name, partial(one_taming, bench, judge, real, sets[source], n, **changes))
        for name, (source, n, changes) in plan.items()
    }
    report = partial(report_row, bench, judge, run)
    report("frechet_base", float(bases["far"]["frechet"]), config.n_judged)
    for name in SHOWN:
        remembered = bases[name]["nll_remember"]
        report(f"shift_remember_{name}", shift(bases[name], remembered), len(remembered))
    for name, (source, n, _) in plan.items():
        before, after = bases[source], tamed[name]
        of = n if name in sizes.values() else name
        for crowd, suffix in (("remember", ""), ("train", "_train")):
            report(f"quantile_base{suffix}_{of}", quantile(before, crowd, n), n)
            report(f"quantile_forget{suffix}_{of}", quantile(after, crowd, n), n)
        report(f"shift_train_{name}", shift(before, after["nll_train"]), len(after["nll_train"]))
        report(f"frechet_{name}", float(after["frechet"]), config.n_judged)
    curves = {
        "quantile_base": [quantile(bases["far"], "remember", n) for n in sizes],
        "quantile": [quantile(tamed[name], "remember", n) for n, name in sizes.items()],
        "quantile_train": [quantile(tamed[name], "train", n) for n, name in sizes.items()],
    }
    shown = [bases["far"], *(tamed[name] for name in KEPT)]
    run.arrays(
        n_forget=np.array(config.n_forget),
        **{name: np.array(curve) for name, curve in curves.items()},
        **{
            f"nll_{what}": np.stack([part[f"nll_{what}"][:n] for part in shown]).astype(np.float16)
            for what, n in (("train", None), ("remember", None), ("forget", config.n_main))
        },
        **{f"samples_{name}": tamed[name]["samples"] for name in SHOWN},
    )


def quantile(nll: Mapping[str, np.ndarray], crowd: str, n: int) -> float:
    """Return the mean likelihood quantile of the first ``n`` forget pictures in a crowd."""
    forget, crowd = (torch.from_numpy(nll[f"nll_{name}"]) for name in ("forget", crowd))
    return float(likelihood_quantile(forget[:n], *nll_statistics(crowd)).mean())


def shift(base: Mapping[str, np.ndarray], nll: np.ndarray) -> float:
    """Return how far a mean is from that of training pictures under the base, in their sigmas."""
    return float((nll.mean() - base["nll_train"].mean()) / base["nll_train"].std())


def report_row(bench: Bench, judge: Judge, run: Run, quantity: str, value: float, n: int) -> None:
    """Add a row, with the unit that its quantity begins with."""
    config: Config = bench.config
    about = {"data": bench.train.source, "seeds": [SEED], "n_samples": n}
    preprocessing = f"{config.n_bits} bits, {config.size} px"
    if quantity.startswith("frechet"):
        preprocessing += f", temperature {config.temperature:g}"
        about |= {"feature_extractor": judge.extractor}
    units = {"frechet": "Fréchet distance", "shift": "standard deviations", "quantile": "share"}
    unit = units[quantity.split("_")[0]]
    run.row(quantity, value, unit=unit, preprocessing=preprocessing, **about)


def remember_sets(bench: Bench) -> dict[str, Sets]:
    """Collect the sets to forget and to remember, by the name of what is remembered."""
    config: Config = bench.config
    far = Faces.load(config.far_data, config.far_split, config.size)
    far = two_sets(bench, group(far, config.far_group))
    near = two_sets(bench, bench.validation)
    own = bench.samples(bench.base, config.n_remember, config.own_temperature, SEED)
    trained = bench.train.some(len(bench.train), bench.device)
    return {
        "far": far,
        "near": near,
        "own": Sets(near.forget, own),
        "trained": Sets(far.forget, trained),
    }


def group(faces: Faces, wanted: Mapping[str, int]) -> Faces:
    """Return the pictures whose labels all have the wanted values."""
    keep = np.ones(len(faces), dtype=bool)
    for name, value in wanted.items():
        keep &= faces.labels(name) == value
    return faces.where(keep)


def two_sets(bench: Bench, faces: Faces) -> Sets:
    """Split pictures at random into what is forgotten and what is remembered.

    Raises: ValueError if there are too few.
    """
    config: Config = bench.config
    n_forget, n_remember = max(config.n_forget), config.n_remember
    if len(faces) < n_forget + n_remember:
        raise ValueError(
            f"{faces.source} has {len(faces)} such pictures, and {n_forget} to forget and "
            f"{n_remember} to remember are wanted; choose a larger group, or fewer pictures."
        )
    chosen = faces.some(n_forget + n_remember, bench.device)
    return Sets(chosen[:n_forget], chosen[n_forget:])


def one_taming(
    bench: Bench, judge: Judge, real: Tensor, sets: Sets, n_forget: int, **changes
) -> dict[str, float | np.ndarray]:
    """Forget the first pictures; return :func:`measure` and samples of equal latents.

    Shapes: ``samples`` uint8 (steps shown, n_shown, height, width, channels).
    """
    config: Config = bench.config
    sets, shown = Sets(sets.forget[:n_forget], sets.remember), []
    for tamed, terms in bench.steps(sets.forget, sets.remember, SEED, **changes):
        if terms["step"] in config.shown_at:
            shown.append(bench.samples(tamed, config.n_shown, config.temperature, SEED))
    return measure(bench, judge, real, tamed, sets) | {"samples": as_grid(torch.stack(shown))}


def measure(
    bench: Bench, judge: Judge, real: Tensor, model: nn.Module, sets: Sets
) -> dict[str, float | np.ndarray]:
    """Return bits per dimension (n,) of three sets, and how far samples are from real pictures.

    ``real`` are the judge's features of real pictures. The noise in the pictures, and the latents
    of the samples, are the same for every model.
    """
    config: Config = bench.config
    generator = torch.Generator(bench.device).manual_seed(77)
    scored = {
        "train": (bench.train.some(config.n_crowd, bench.device), 1),
        "remember": (sets.remember[: config.n_crowd], 1),
        "forget": (sets.forget, config.n_draws),
    }
    found = {
        f"nll_{name}": bench.score(model, images, generator, draws).cpu().numpy()
        for name, (images, draws) in scored.items()
    }
    samples = bench.samples(model, config.n_judged, config.temperature, SEED)
    return found | {"frechet": judge.distance(samples, real)}
