"""Put one request, "this person" or "this attribute", to several methods on one Glow.

Part 4 asks every method on every model the same; here likelihoods are exact. Afterwards the models
are audited: does a likelihood point to what was forgotten, where are its latents, and how soon does
plain training bring it back? All is compared with the untouched base and, where there is one, with
a Glow that was trained without the person.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lib.data.images import MISSING
from lib.experiments._compare_glow import SEED, Plan, Request, Rival, rivals, tamed
from lib.experiments._faces import Faces
from lib.experiments._glow_audit import (
    Relearning,
    inverted,
    membership,
    places,
    relearned,
    returns,
    typical,
)
from lib.experiments._latents import seen_by
from lib.experiments._taming import BaseConfig, Bench, Judge, Person, as_grid, people
from lib.experiments.train_face_classifier import trivial_images
from lib.methods.audit import Curve
from lib.methods.taming import TamingSettings
from lib.metrics.fidelity import frechet_distance
from lib.models.classifier import predict_logits
from lib.models.glow import Glow
from lib.run import Run

FRESH = 1  # for the samples that others are compared with
LESSONS = {
    "original": ("forget",),
    "taming": ("forget", "stranger", "rest"),
    "gradient_ascent": ("forget", "stranger", "rest"),
    "retrained": ("forget",),
}
COSTS = ("steps", "stopped", "seconds", "forget_pictures", "rest_pictures")
SETS = ("forget", "reference", "held_out", "remember", "strangers")
UNITS = {
    "steps": "iterations",
    "back_steps": "iterations",
    "seconds": "CPU s",
    "forget_pictures": "pictures",
    "rest_pictures": "pictures",
    "bits": "bits per dimension",
    "crowd_shift": "standard deviations",
    "crowd_spread": "times",
    "distance": "standard deviations",
    "frechet": "Fréchet distance",
    "auc": "area under the curve",
    "latent_norm": "times that of a typical draw",
    "latent_z": "standard deviations",
    "energy_rise": "nats",
    "log_det_fall": "nats",
    "redraw_error": "of the range of the input",
}


@dataclass(frozen=True)
class Attribute:
    """The request "this attribute": a label of the data, and each method's settings for it."""

    label: str
    taming: TamingSettings
    fine_tune: Plan
    gradient_ascent: Plan
    n_samples: int
    temperature: float
    n_scored: int


@dataclass(frozen=True)
class Config(BaseConfig):
    """Who and what is forgotten, by which means, and how it is measured.

    The first ``n_people`` of the training set that ``label`` numbers are forgotten one by one, each
    with ``n_forget`` pictures; ``n_reference`` more of the training set and as many of the split
    ``held_out`` show the same person. ``n_remember`` training pictures of others and
    ``n_strangers`` of people never trained on are scored beside. ``identity_judge`` knows people
    by number; ``judge`` gives the features of Fréchet distances between ``n_samples`` drawn at
    ``temperature``.
    ``retrained`` is a checkpoint of a Glow that never saw any of the people, or null.
    """

    retrained: str | None
    held_out: str
    label: str
    n_people: int
    n_forget: int
    n_reference: int
    n_remember: int
    n_strangers: int
    thresholds: tuple[float, ...]
    judge: str
    identity_judge: str
    n_samples: int
    temperature: float
    n_grid: int
    fine_tune: Plan
    gradient_ascent: Plan
    relearning: Relearning
    attribute: Attribute

    def __post_init__(self):
        if not 0 < self.relearning.n_taught < self.n_forget:
            raise ValueError(
                f"n_taught must lie between 0 and n_forget = {self.n_forget}, so that some forget "
                f"pictures are not taught again, got {self.relearning.n_taught}"
            )
        if not self.relearning.at or self.relearning.at[0] != 0:
            raise ValueError(f"relearning is measured from step 0 on, got {self.relearning.at}")


def run(config: Config, run: Run) -> None:
    """Answer both requests with every method; measure, audit, and report means over people."""
    bench = Bench(config, run)
    court = Court(bench)
    group = people(
        bench, bench.train, config.label, config.n_people, config.n_forget, config.n_reference
    )
    unknown = people(
        bench, bench.validation, config.label, config.n_people, config.n_forget, config.n_reference
    )
    parts = [
        run.part(f"person{index}", partial(one_person, court, person, stranger, run, not index))
        for index, (person, stranger) in enumerate(zip(group, unknown, strict=True))
    ]
    for quantity in [name for name, value in parts[0].items() if value.ndim == 0]:
        values = [float(part[quantity]) for part in parts]
        run.row(quantity, values, seeds=range(len(values)), **court.about(quantity))
    attribute = run.part("attribute", partial(one_attribute, court, run))
    for quantity in [name for name, value in attribute.items() if value.ndim == 0]:
        run.row(quantity, float(attribute[quantity]), seeds=[SEED], **court.about(quantity))
    arrays = {name: value for name, value in (parts[0] | attribute).items() if value.ndim}
    run.arrays(relearn_at=np.array(config.relearning.at), **arrays)


class Court:
    """The judges, and the pictures that all models are held against."""

    def __init__(self, bench: Bench):
        config: Config = bench.config
        self.bench, self.config = bench, config
        self.judge = Judge(config.judge, bench, (config.attribute.label,))
        numbers = tuple(map(str, range(1 + int(bench.train.labels(config.label).max()))))
        self.identity = Judge(config.identity_judge, bench, numbers)
        self.held_out = Faces.load(config.data, config.held_out, config.size)
        shown = bench.validation.some(config.n_crowd + config.n_strangers, bench.device)
        self.strangers = shown[config.n_crowd :]  # those before are the crowd
        real = bench.validation.some(config.n_samples, bench.device)
        self.real = self.judge.features(bench.as_sampled(real))

    def sets(self, person: Person) -> dict[str, Tensor]:
        """Return the pictures whose likelihoods are asked for, by the names in ``SETS``."""
        config = self.config
        own = np.flatnonzero(self.held_out.labels(config.label) == person.number)
        return {
            "forget": person.forget,
            "reference": person.reference,
            "held_out": self.held_out.at(own[: config.n_reference], self.bench.device),
            "remember": person.remember[: config.n_remember],
            "strangers": self.strangers,
        }

    def taken_for(self, images: Tensor, number: int) -> float:
        """Return the share of images, uint8 or floats in [0, 1], that are taken for a person.

        The judge must name one of the people it knows, whatever it is shown.
        Raises: ValueError if it does not know the person.
        """
        logits = predict_logits(self.identity.model, seen_by(self.identity.model, images))
        if number >= logits.shape[1]:
            raise ValueError(
                f"The judge {self.identity.name} knows the people 0 to {logits.shape[1] - 1}, not "
                f"{number}; forget one of those."
            )
        return float((logits.argmax(1) == number).double().mean())

    def trivial(self, sets: dict[str, Tensor], number: int) -> dict[str, float]:
        """Return what shares of pictures that are not a model's are taken for the person."""
        bench = self.bench
        generator = torch.Generator(bench.device).manual_seed(SEED)
        shown = trivial_images(self.config.n_samples, self.identity.model, generator)
        shown |= {name: bench.as_sampled(sets[name]) for name in ("held_out", "strangers")}
        return {f"person_{name}": self.taken_for(images, number) for name, images in shown.items()}

    def about(self, quantity: str) -> dict[str, Any]:
        """Return what a row says beside its value, by the words of its quantity."""
        config, attribute = self.config, quantity.startswith("attribute_")
        name = quantity.removeprefix("attribute_")
        temperature = config.attribute.temperature if attribute else config.temperature
        preprocessing = f"{config.n_bits} bits, {config.size} px"
        about = {"data": self.bench.train.source, "preprocessing": preprocessing}
        about["unit"] = next(
            (unit for start, unit in UNITS.items() if name.startswith(start)), "share"
        )
        if name.startswith("frechet"):
            about["feature_extractor"] = self.judge.extractor
        if name.startswith(("frechet", "samples")):
            about["preprocessing"] += f", temperature {temperature:g}"
        return about | {"n_samples": self.count(name, attribute)}

    def count(self, name: str, attribute: bool) -> int:
        """Return how many pictures a quantity is the mean of, by the set it names."""
        config = self.config
        if name.startswith(COSTS):
            return 1
        sizes = {
            "taught": config.relearning.n_taught,
            "others": config.n_forget - config.relearning.n_taught,
            "forget": config.n_forget,
            "typical": config.n_forget,
            "reference": config.n_reference,
            "held": config.n_reference,
            "remember": config.n_remember,
            "strangers": config.n_strangers,
            "crowd": config.n_crowd,
            "with": config.attribute.n_scored,
            "without": config.attribute.n_scored,
        }
        words = name.split("_")
        drawn = config.attribute.n_samples if attribute else config.n_samples
        return next((n for word, n in sizes.items() if word in words), drawn)


def one_person(
    court: Court, person: Person, stranger: Person, run: Run, kept: bool
) -> dict[str, float | np.ndarray]:
    """Answer the request "this person" with every method; ``kept`` adds the arrays for figures."""
    bench, config = court.bench, court.config
    request = Request(
        person.forget, person.remember, config.taming, config.fine_tune, config.gradient_ascent
    )
    found, sets = {}, court.sets(person)
    made = rivals(bench, request, config.retrained)
    base = bench.scores(bench.base, sets)
    fresh = {
        name: court.judge.features(
            bench.samples(made[name].model, config.n_samples, config.temperature, FRESH)
        )
        for name in ("original", "retrained")
        if name in made
    }
    found |= court.trivial(sets, person.number)
    pictures = {"scores": [], "samples": [], "typical": []}
    for name, rival in made.items():
        nll = bench.scores(rival.model, sets)
        samples = bench.samples(rival.model, config.n_samples, config.temperature, SEED)
        scaled = typical(bench, rival.model, sets["forget"])
        features = court.judge.features(samples)
        part = {cost: getattr(rival, cost) for cost in COSTS}
        part |= places(nll, base, SETS) | membership(nll, base, config.thresholds)
        part |= inverted(bench, rival.model, sets)
        part["samples_person"] = court.taken_for(samples, person.number)
        part["typical_person"] = court.taken_for(scaled, person.number)
        for other, real in {"real": court.real, **fresh}.items():
            part[f"frechet_{other}"] = frechet_distance(real, features)
        found |= {f"{quantity}_{name}": value for quantity, value in part.items()}
        pictures["scores"].append(nll)
        pictures["samples"].append(samples[: config.n_grid])
        pictures["typical"].append(scaled[: config.n_grid])
    curves = dict(relearning_curves(court, made, sets, person, stranger, run))
    found |= returns(curves, config.relearning.back)
    if kept:
        found |= kept_arrays(list(made), pictures, curves, sets["forget"][: config.n_grid])
    return found


def relearning_curves(
    court: Court,
    made: dict[str, Rival],
    sets: dict[str, Tensor],
    person: Person,
    stranger: Person,
    run: Run,
) -> Iterator[tuple[str, Curve]]:
    """Yield how taught pictures, the others and the reference return, named ``method_lesson``.

    The lessons are some of the forget pictures, as many of a stranger, or of everybody else's. The
    control ``unknown`` is a model tamed on a stranger whom the base never saw, and then taught his
    pictures: nothing that it knew can come back.
    """
    bench, config = court.bench, court.config
    n, settings = config.relearning.n_taught, config.relearning

    def curve(model: Glow, lesson: Tensor, forget: Tensor, reference: Tensor) -> Curve:
        followed = {"taught": forget[:n], "others": forget[n:], "reference": reference}
        return relearned(bench, model, lesson, followed, settings)

    lessons = {"forget": person.forget[:n], "stranger": stranger.forget[:n]}
    lessons["rest"] = person.remember
    for name in (name for name in LESSONS if name in made):
        for lesson in LESSONS[name]:
            taught = curve(made[name].model, lessons[lesson], person.forget, sets["reference"])
            yield f"{name}_{lesson}", taught
    request = Request(
        stranger.forget, stranger.remember, config.taming, config.fine_tune, config.gradient_ascent
    )
    pictures = stranger.forget[:n], stranger.forget, stranger.reference
    yield "unknown_before", curve(bench.base, *pictures)
    yield "unknown_forget", curve(tamed(bench, request).model, *pictures)


def kept_arrays(
    names: list[str], pictures: dict[str, list], curves: dict[str, Curve], forget: Tensor
) -> dict[str, np.ndarray]:
    """Return what the figures show: scores by set, grids, curves, and the names along each."""
    scores = pictures["scores"]
    found = {
        f"bits_{part}": torch.stack([nll[part] for nll in scores]).cpu().numpy().astype(np.float16)
        for part in scores[0]
    }
    found |= {
        f"grid_{kind}": as_grid(torch.stack(pictures[kind])) for kind in ("samples", "typical")
    }
    found |= {"grid_forget": as_grid(forget), "methods": np.array(names)}
    found["curves"] = np.stack([curve.values for curve in curves.values()]).astype(np.float32)
    return found | {"curve_names": np.array(list(curves))}


def one_attribute(court: Court, run: Run) -> dict[str, float | np.ndarray]:
    """Answer the request "this attribute": taming by label, and the same baselines."""
    bench, config = court.bench, court.config
    asked = config.attribute
    labels = bench.train.labels(asked.label)
    known = [labels == 1, (labels != 1) & (labels != MISSING)]
    forget, remember = (bench.train.at(np.flatnonzero(which), bench.device) for which in known)
    request = Request(forget, remember, asked.taming, asked.fine_tune, asked.gradient_ascent)
    truth = bench.validation.labels(asked.label)
    sets = {
        name: bench.validation.at(np.flatnonzero(which)[: asked.n_scored], bench.device)
        for name, which in (("with", truth == 1), ("without", truth == 0))
    }
    base = bench.scores(bench.base, sets)
    fresh = bench.samples(bench.base, asked.n_samples, asked.temperature, FRESH)
    real = {"original": court.judge.features(fresh), "real": court.real}
    found, grids = {}, []
    for name, rival in rivals(bench, request, None).items():
        samples = bench.samples(rival.model, asked.n_samples, asked.temperature, SEED)
        features = court.judge.features(samples)
        part = {cost: getattr(rival, cost) for cost in COSTS}
        part |= places(bench.scores(rival.model, sets), base, sets)
        part["samples_positive"] = court.judge.share(samples, asked.label)
        part |= {f"frechet_{k}": frechet_distance(v, features) for k, v in real.items()}
        found |= {f"attribute_{quantity}_{name}": value for quantity, value in part.items()}
        grids.append(samples[: config.n_grid])
    for name, images in sets.items():
        share = court.judge.share(bench.as_sampled(images), asked.label)
        found[f"attribute_judged_{name}"] = share
    return found | {"grid_attribute": as_grid(torch.stack(grids))}
