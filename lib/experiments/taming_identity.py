"""Tame a Glow to forget people: the taming paper's Tables 1 and A.1, Figs. 3, A.1 and B.1."""

import re
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lib.experiments._taming import (
    BaseConfig,
    Bench,
    Judge,
    Person,
    as_grid,
    people,
    training_seconds,
)
from lib.metrics.likelihood import normality
from lib.models.glow import Glow
from lib.run import Run

AS_RUN = 0.3  # the quantiles in the paper's tables were made with a target that far beyond delta
SEED = 0
KEPT = ("nll", "pairs")


@dataclass(frozen=True)
class Config(BaseConfig):
    """Who is forgotten, with how many pictures, and what is kept for the figures.

    ``source`` is ``train`` or ``validation``, the split the people are from; ``label`` numbers
    them. ``n_remember`` pictures of the training set stand for the remember set in the table.
    ``n_as_run`` are the numbers of pictures that are also tamed with the authors' target.
    ``n_samples`` drawn at ``judged_temperature`` are compared with validation pictures in the
    features of ``judge``.
    """

    source: str
    label: str
    n_people: int
    n_forget: tuple[int, ...]
    n_as_run: tuple[int, ...]
    n_reference: int
    n_remember: int
    temperature: float
    n_pairs: int
    judge: str
    n_samples: int
    judged_temperature: float


def run(config: Config, run: Run) -> None:
    """Tame the base for every person, number of pictures and rule; report means over people."""
    bench = Bench(config, run)
    source = {"train": bench.train, "validation": bench.validation}[config.source]
    about = {"data": source.source, "preprocessing": f"{config.n_bits} bits, {config.size} px"}
    judge = Judge(config.judge, bench, ("any",))
    real = judge.features(bench.as_sampled(bench.validation.some(config.n_samples, run.device)))
    group = people(
        bench, source, config.label, config.n_people, max(config.n_forget), config.n_reference
    )
    parts = [
        run.part(
            f"person{index}",
            partial(one_person, bench, person, run, None if index else (judge, real)),
        )
        for index, person in enumerate(group)
    ]
    run.arrays(n_forget=np.array(config.n_forget), **{name: parts[0].pop(name) for name in KEPT})
    for quantity in parts[0]:
        run.row(
            quantity,
            values := [float(part[quantity]) for part in parts if quantity in part],
            unit=unit_of(quantity),
            seeds=range(len(values)),
            n_samples=n_samples(quantity, config),
            feature_extractor=judge.extractor if quantity.startswith("frechet") else None,
            **about,
        )
    for name, faces in (("train", bench.train), ("validation", bench.validation)):
        shown = faces.some(config.n_crowd, run.device)
        nll = bench.score(bench.base, shown, run.generator(SEED), 1)
        for test, p_value in normality(nll).items():
            row = {"unit": "p-value", "seeds": [SEED], "n_samples": len(shown), **about}
            run.row(f"{test}_{name}", p_value, **row | {"data": faces.source})


def unit_of(quantity: str) -> str:
    """Return the unit of a quantity by the beginning of its name."""
    units = {
        "steps": "iterations",
        "seconds": "s",
        "T_pct": "percent",
        "crowd_shift": "standard deviations",
        "crowd_spread": "times",
        "frechet": "",
    }
    return next((unit for start, unit in units.items() if quantity.startswith(start)), "share")


def n_samples(quantity: str, config: Config) -> int:
    """Return the number of pictures that a quantity is the mean of."""
    pictures = {"DFref": config.n_reference, "DR": config.n_remember, "crowd": config.n_crowd}
    pictures["frechet"] = config.n_samples
    name, _, rest = quantity.partition("_")
    return pictures.get(name) or int(re.search(r"\d+", rest)[0])


def one_person(
    bench: Bench, person: Person, run: Run, judged: tuple[Judge, Tensor] | None
) -> dict[str, float | np.ndarray]:
    """Tame the base for one person.

    ``judged``, a judge with its features of real pictures, adds how far samples are from them, and
    the arrays that the figures show.
    """
    config: Config = bench.config
    remember = bench.train.some(config.n_remember, run.device)
    found, histograms = {}, []
    for n in config.n_forget:
        forget = person.forget[:n]
        sets = {"DF": forget, "DFref": person.reference, "DR": remember}
        before = bench.quantiles(bench.base, sets)
        found |= {f"{name}_base_{n}": before[name] for name in sets}
        rules = {"_as_run": AS_RUN, "": 0.0} if n in config.n_as_run else {"": 0.0}
        for suffix, offset in rules.items():
            start = run.seconds
            tamed, terms = bench.tame(forget, person.remember, SEED, offset=offset)
            seconds = run.seconds - start
            after = bench.quantiles(tamed, sets)
            found |= {f"{name}_tamed_{n}{suffix}": after[name] for name in sets}
            found |= {
                f"steps_{n}{suffix}": terms["step"],
                f"stopped_{n}{suffix}": terms["stopped"],
                f"seconds_{n}{suffix}": seconds,
                f"T_pct_{n}{suffix}": 100 * seconds / training_seconds(config.base),
                f"crowd_shift_{n}{suffix}": (after["mu"] - before["mu"]) / before["sigma"],
                f"crowd_spread_{n}{suffix}": after["sigma"] / before["sigma"],
            }
            if judged and not suffix:
                histograms.append(crowds(bench, tamed))
    control, _ = bench.tame(
        person.forget, person.remember, SEED, alpha=0.0, epsilon=None, max_steps=terms["step"]
    )
    after = bench.quantiles(control, sets)
    found |= {f"{name}_control_{n}": after[name] for name in sets}
    if judged:
        judge, real = judged
        pairs = [
            bench.samples(model, config.n_pairs, config.temperature, SEED)
            for model in (bench.base, tamed)
        ]
        for name, model in (("base", bench.base), ("tamed", tamed)):
            drawn = bench.samples(model, config.n_samples, config.judged_temperature, SEED)
            found[f"frechet_{name}"] = judge.distance(drawn, real)
        found["nll"] = np.stack([crowds(bench, bench.base), *histograms])
        found["pairs"] = as_grid(torch.stack(pairs))
    return found


def crowds(bench: Bench, model: Glow) -> np.ndarray:
    """Return the bits per dimension of training and validation pictures (2, n_crowd), float16."""
    generator = torch.Generator(bench.device).manual_seed(77)
    shown = bench.train.some(bench.config.n_crowd, bench.device), bench.crowd
    scores = [bench.score(model, images, generator, 1) for images in shown]
    return torch.stack(scores).cpu().numpy().astype(np.float16)
