"""Tame a Glow with a term of the loss left out: the taming paper's Table 2, Figs. 7 and A.3.

Without one of its KL terms the paper's model has a wide or a narrow distribution of likelihoods.
The authors' KL has no gradient through its logarithm, which cancels as long as both terms are
there; so the variants with a KL are run with the true one and with theirs.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import Tensor

from lib.experiments._taming import BaseConfig, Bench, Judge, as_grid, people
from lib.methods.taming import (
    draw,
    gaussian_kl,
    gaussian_kl_detached_log,
    likelihood_quantile,
    nll_statistics,
)
from lib.models.glow import Glow
from lib.run import Run

# What each variant changes in the settings. All but "control", which has no forget loss, are the
# rows of the paper's Table 2.
VARIANTS = {
    "full": {},
    "no_L_R": {"alpha": 1.0},
    "no_KL_reverse": {"without": ("kl_reverse",)},
    "no_KL_forward": {"without": ("kl_forward",)},
    "no_A": {"without": ("average_nll",)},
    "no_KLs": {"without": ("kl_forward", "kl_reverse")},
    "control": {"alpha": 0.0},
}
WITH_KL = ("full", "no_KL_reverse", "no_KL_forward", "no_A")
# With both KLs the gradients of the logarithms cancel, so one person shows enough.
CANCELLED = ("full_detached", "no_A_detached")
TRACED = ("mu_r", "sigma_r", "distance", "forget", "average_nll", "kl_forward", "kl_reverse")
SEED = 0
UNITS = {
    "bits": "bits per dimension",
    "sigma": "bits per dimension",
    "steps": "iterations",
    "frechet": "Fréchet distance",
    "change": "grey levels",
}
OF_SAMPLES = ("frechet", "change")


@dataclass(frozen=True)
class Config(BaseConfig):
    """Whom to forget, and how samples are judged.

    ``label`` numbers people of the training set; ``n_people`` of them are forgotten, each with
    ``n_forget`` pictures, and ``n_remember`` of the other pictures are the remember set. The
    Fréchet distance is that of ``n_samples`` samples to the crowd of validation pictures in the
    features of ``judge``, a checkpoint or ``random``. ``n_latents`` of them are kept for a figure.
    """

    label: str
    n_people: int
    n_forget: int
    n_remember: int
    judge: str
    n_samples: int
    temperature: float
    n_latents: int


def variants() -> dict[str, dict]:
    """Return what ``Bench.steps`` is to change by the name of each variant, ``full`` first."""
    true = {name: {**changes, "kl": gaussian_kl} for name, changes in VARIANTS.items()}
    detached = {
        f"{name}_detached": {**VARIANTS[name], "kl": gaussian_kl_detached_log} for name in WITH_KL
    }
    return true | detached


class Measures:
    """What is measured of every model: likelihoods, and samples of the same latents.

    Raises: ValueError if there are too few pictures or samples for a Fréchet distance.
    """

    def __init__(self, bench: Bench):
        config: Config = bench.config
        self.bench, self.judge = bench, Judge(config.judge, bench, ("any",))
        self.real = self.judge.features(bench.as_sampled(bench.crowd))
        self.base_samples = self.samples(bench.base)

    def samples(self, model: Glow) -> Tensor:
        """Draw uint8 samples (n_samples, channels, height, width), always of the same latents."""
        config: Config = self.bench.config
        return self.bench.samples(model, config.n_samples, config.temperature, SEED)

    def __call__(self, model: Glow, forget: Tensor) -> dict[str, float | np.ndarray]:
        """Return numbers by quantity, and for the figures the crowd's ``nll`` and ``samples``."""
        config: Config = self.bench.config
        nll = self.bench.scores(model, {"forget": forget})
        mu, sigma = nll_statistics(nll["crowd"])
        samples = self.samples(model)
        change = (samples.float() - self.base_samples.float()).abs().mean()
        return {
            "bits_per_dim": float(mu),
            "sigma": float(sigma),
            "quantile": float(likelihood_quantile(nll["forget"], mu, sigma).mean()),
            "frechet": self.judge.distance(samples, self.real),
            "change": float(change),
            "nll": nll["crowd"].cpu().numpy().astype(np.float16),
            "samples": as_grid(samples[: config.n_latents]),
        }


def one_variant(
    measure: Measures, forget: Tensor, remember: Tensor, changes: dict
) -> dict[str, float | np.ndarray]:
    """Tame to the stop rule or the last step, and measure the last model.

    Not the model nearest to the threshold: the question is where a loss leads. All variants draw
    the same batches. ``trace`` (quantities, steps + 1) holds the terms of every step.
    """
    trace = []
    for tamed, terms in measure.bench.steps(forget, remember, SEED, **changes):
        last = tamed
        trace.append([terms.get(name, np.nan) for name in TRACED])
    ended = {"steps": terms["step"], "stopped": terms["stopped"]}
    return measure(last, forget) | ended | {"trace": np.array(trace, dtype=np.float32).T}


def at_equal_steps(part: Mapping[str, np.ndarray], n_steps: int) -> dict[str, float]:
    """Return mu and sigma of the remember set after ``n_steps`` or at the end, if that was earlier.

    They are as old as the last refresh, and of other pictures than those of the crowd.
    """
    trace = part["trace"]
    values = dict(zip(TRACED, trace[:, min(n_steps, trace.shape[1] - 1)], strict=True))
    return {"bits_remember": float(values["mu_r"]), "sigma_remember": float(values["sigma_r"])}


def run(config: Config, run: Run) -> None:
    """Tame every variant for every person; report means over people."""
    bench = Bench(config, run)
    measure = Measures(bench)
    found: dict[str, list[float]] = defaultdict(list)
    group = people(bench, bench.train, config.label, config.n_people, config.n_forget, 1)
    for index, person in enumerate(group):
        remember = draw(person.remember, config.n_remember, run.generator(SEED))
        base = run.part(f"base_{index}", partial(measure, bench.base, person.forget))
        parts = {
            name: run.part(
                f"{name}_{index}", partial(one_variant, measure, person.forget, remember, changes)
            )
            for name, changes in variants().items()
            if index == 0 or name not in CANCELLED
        }
        if index == 0:
            run.arrays(**for_figures({"base": base} | parts))
        n_steps = int(parts["full"]["steps"])
        for name, part in ({"base": base} | parts).items():
            numbers = {k: v for k, v in part.items() if v.ndim == 0}
            if name != "base":
                numbers |= at_equal_steps(part, n_steps)
            for quantity, value in numbers.items():
                found[f"{quantity}_{name}"].append(float(value))
    del found["change_base"]  # the base against itself
    for quantity, values in found.items():
        start = quantity.split("_")[0]
        run.row(
            quantity,
            values,
            unit=UNITS.get(start, "share"),
            seeds=range(len(values)),
            n_samples=config.n_samples if start in OF_SAMPLES else len(bench.crowd),
            data=bench.validation.source,
            feature_extractor=measure.judge.extractor if start == "frechet" else None,
            preprocessing=f"{config.n_bits} bits, {config.size} px"
            + (f", samples at temperature {config.temperature}" if start in OF_SAMPLES else ""),
        )


def for_figures(parts: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Collect the arrays of one person: the base first, then the variants, as in ``names``.

    ``nll`` is (1 + variants, crowd), ``samples`` (1 + variants, n, height, width, channels) and
    ``traces`` (variants, quantities, steps + 1), nan after the end of a variant.
    """
    traces = [part["trace"] for part in parts.values() if "trace" in part]
    longest = max(trace.shape[1] for trace in traces)
    padding = [((0, 0), (0, longest - trace.shape[1])) for trace in traces]
    padded = [np.pad(t, p, constant_values=np.nan) for t, p in zip(traces, padding, strict=True)]
    return {
        "names": np.array(list(parts)),
        "nll": np.stack([part["nll"] for part in parts.values()]),
        "samples": np.stack([part["samples"] for part in parts.values()]),
        "traced": np.array(TRACED),
        "traces": np.stack(padded),
    }
