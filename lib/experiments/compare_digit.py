"""One request, "forget this digit", to every method that can serve a conditional model."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lib.experiments._conditional_audit import Audit, Auditor, Found, as_levels
from lib.experiments._conditional_contenders import BASELINES, Baselines, Contender, Workshop
from lib.experiments._conditional_kinds import KINDS
from lib.experiments._diffusion import Sampling, first_of_each, in_turn, load_judge
from lib.experiments._digits import Digits, unit
from lib.metrics import forgetting as metrics
from lib.metrics.fidelity import extract_features, frechet_distance
from lib.models.classifier import predict_logits
from lib.run import Run

GRID_COLUMNS = 8
REFERENCE_SEED = 5000  # of the samples that others are compared with


@dataclass(frozen=True)
class Config(Sampling):
    """The request, the contenders, and how they are measured.

    ``kind`` is ``vae`` or ``ddpm``; the sampling is the latter's. ``base`` is a shipped checkpoint;
    ``amnesia`` and ``retrained`` are runs whose checkpoints are taken as they are, and of which
    ``timed_steps`` are made again to say what they cost; ``retrained`` may be null.
    Beside ``random`` all three are untrained.
    Measured are ``n_samples`` of the digit and ``n_remember`` of each other, the latter beside
    ``n_real`` real pictures a class. The baselines are made and measured with all ``seeds``.
    """

    kind: str
    base: str
    retrained: str | None
    amnesia: str
    judge: str
    data: str
    forget: int
    baselines: Baselines
    audit: Audit
    timed_steps: int
    n_samples: int
    n_remember: int
    n_real: int
    seeds: tuple[int, ...]

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"the kind {self.kind!r} is unknown, choose from {', '.join(KINDS)}")
        if self.n_remember < GRID_COLUMNS or self.n_samples < GRID_COLUMNS:
            raise ValueError(f"n_samples and n_remember must be at least {GRID_COLUMNS}")
        if self.audit.redrawing and self.kind != "ddpm":
            raise ValueError(f"the kind {self.kind!r} draws at once, leave out audit.redrawing")


def run(config: Config, run: Run) -> None:
    """Make every contender, measure it, audit it; write rows ``quantity_contender`` and arrays."""
    Contest(config, run).work()


COSTS = {
    "steps": "steps",
    "seconds": "s",
    "forget_pictures": "pictures",
    "rest_pictures": "pictures",
    "stopped": "0 or 1",
}
JUDGED = {"prob": "probability", "entropy": "nats", "share": "share"}
MEASURED = {"remember_accuracy": "share"}
DISTANCES = ("frechet_real", "frechet_original", "frechet_retrained", "frechet_forgotten")


class Contest:
    """The models, the judge and the references of one run."""

    def __init__(self, config: Config, run: Run):
        self.config, self.run, self.label = config, run, config.forget
        self.kind = KINDS[config.kind](config, run.device)
        self.judge = load_judge(config.judge, run.device)
        self.train, self.test = (
            Digits.load(config.data, split, 28, run.device) for split in ("train", "test")
        )
        self.workshop = Workshop(config, self.kind, self.train, run)
        self.others = [c for c in range(10) if c != config.forget]
        self.auditor = Auditor(
            config.audit, self.kind, self.label, self.train, self.test, self.right, run
        )
        self.names = ["original", "retrained", "amnesia", *BASELINES]
        if config.retrained is None:
            self.names.remove("retrained")
        real = unit(first_of_each(self.train, self.others, config.n_real))
        features, self.extractor = extract_features(self.judge, real, config.judge)
        self.references = {"frechet_real": features}

    def work(self) -> None:
        """Go through all contenders, then write."""
        self.draw_references()
        parts = {name: self.parts_of(name) for name in self.names}
        self.report_trivial()
        for name, found in parts.items():
            self.report(name, found)
        self.keep(parts)

    def parts_of(self, name: str) -> list[Found]:
        """Return what is found of a contender, one dictionary a seed; there may be one model."""
        seeds = self.seeds_of(name)
        return [self.run.part(f"{name}-{seed}", partial(self.one, name, seed)) for seed in seeds]

    def seeds_of(self, name: str) -> Sequence[int]:
        """Return the seeds a contender was made with."""
        return self.config.seeds if name in BASELINES else self.config.seeds[:1]

    def one(self, name: str, seed: int) -> Found:
        """Make a contender, measure it and audit it."""
        if name in BASELINES:
            made: Contender = self.workshop.make(name, self.shows, seed)
        else:
            made = self.workshop.ready(name)
        costs = {quantity: getattr(made, quantity) for quantity in COSTS}
        return costs | self.measure(made.model, seed) | self.auditor.of(made.model, seed)

    def right(self, images: Tensor, c: Tensor) -> float:
        """Return the share of pictures in which the judge sees their class."""
        return metrics.accuracy(predict_logits(self.judge, images), c)

    def shows(self, images: Tensor) -> float:
        """Return the share of pictures in which the judge sees the digit."""
        return self.auditor.shows(images)

    def features(self, images: Tensor) -> Tensor:
        """Return what the judge's logits are linear in."""
        return extract_features(self.judge, images, self.config.judge)[0]

    def drawn(self, model: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw the digit, and the others in turn with their classes."""
        asked = torch.full((self.config.n_samples,), self.label, device=self.run.device)
        own = self.kind.draw(model, asked, generator)
        c = in_turn(self.others, self.config.n_remember, self.run.device)
        return own, self.kind.draw(model, c, generator), c

    def draw_references(self) -> None:
        """Draw from the original and the retrained model once, for others to be compared with."""
        sources = {"original": self.workshop.base}
        if self.config.retrained is not None:
            sources["retrained"] = self.workshop.shipped(self.config.retrained, 1)
        for name, model in sources.items():
            own, others, _ = self.drawn(model, self.run.generator(REFERENCE_SEED))
            self.references[f"frechet_{name}"] = self.features(others)
            if name == "retrained":
                self.references["frechet_forgotten"] = self.features(own)

    def judged(self, images: Tensor) -> dict[str, float]:
        """Return what the judge says of pictures: is it the digit, and how sure is it?"""
        logits = predict_logits(self.judge, images)
        return {
            "prob": float(metrics.class_probability(logits, self.label).mean()),
            "entropy": float(metrics.predictive_entropy(logits).mean()),
            "share": self.shows(images),
        }

    def measure(self, model: nn.Module, seed: int) -> Found:
        """Judge what a model draws for the digit and for the others.

        Distances are those of the others' pictures; ``frechet_forgotten`` is that of the digit's
        pictures to the retrained model's for the same condition, which that one never learned.
        """
        own, others, c = self.drawn(model, self.run.generator(1000 + seed))
        found = self.judged(own)
        found["remember_accuracy"] = self.right(others, c)
        if self.config.kind == "ddpm":
            asked = torch.full((self.config.n_samples,), self.label, device=self.run.device)
            unguided = self.kind.draw_unguided(model, asked, self.run.generator(1000 + seed))
            found |= {"share_unguided": self.shows(unguided)}
            found |= {"grid_unguided": as_levels(unguided[:GRID_COLUMNS])}
        features = self.features(others)
        for name, reference in self.references.items():
            shown = self.features(own) if name == "frechet_forgotten" else features
            found[name] = frechet_distance(reference, shown)
        classes = others.unflatten(0, (-1, len(self.others)))[:GRID_COLUMNS].transpose(0, 1)
        grid = torch.cat([classes[: self.label], own[None, :GRID_COLUMNS], classes[self.label :]])
        return found | {"grid": as_levels(grid)}

    def report_trivial(self) -> None:
        """Write what the judge says of pictures that no model drew."""
        n, device = self.config.n_samples, self.run.device
        generator = self.run.generator(0)
        shape = (n, 1, 28, 28)
        shown = {
            "grey": (torch.full((1, 1, 28, 28), 0.5, device=device), "one flat image of 0.5"),
            "noise": (torch.rand(shape, generator=generator, device=device), "uniform noise"),
            "test": (self.test.first(n, self.label)[0], f"test images of {self.test.source}"),
        }
        for name, (images, data) in shown.items():
            for quantity, value in self.judged(images).items():
                self.row(f"{quantity}_{name}", quantity, [value], [0], len(images), data)
        test = unit(first_of_each(self.test, self.others, self.config.n_remember))
        for quantity in ("frechet_real", "frechet_original", "frechet_retrained"):
            if quantity in self.references:
                distance = frechet_distance(self.references[quantity], self.features(test))
                data = f"test images of {self.test.source}"
                self.row(f"{quantity}_test", quantity, [distance], [0], len(test), data)

    def report(self, name: str, found: list[Found]) -> None:
        """Write the rows of one contender."""
        for quantity, value in found[0].items():
            if np.ndim(value) == 0:
                values = [float(each[quantity]) for each in found]
                n, data = self.about(quantity)
                self.row(f"{quantity}_{name}", quantity, values, self.seeds_of(name), n, data)

    def about(self, quantity: str) -> tuple[int, str]:
        """Return the number of pictures that a quantity is the mean of, and whose they are."""
        config, audit = self.config, self.config.audit
        kept = config.n_remember * len(self.others)
        sizes = {
            ("relearn_",): (audit.relearning.n_samples, self.train.source),
            ("error_", "share_z", "norm_"): (audit.inversion.n_targets, self.test.source),
            ("probe_",): (audit.n_probed, self.test.source),
            ("member_", "bound_"): (audit.n_members, self.train.source),
            ("redraw_",): (getattr(audit.redrawing, "n_targets", 0), self.test.source),
            tuple(COSTS): (1, self.train.source),
            ("remember", "frechet_r", "frechet_o"): (kept, "samples of the model"),
        }
        for start, answer in sizes.items():
            if quantity.startswith(start):
                return answer
        return config.n_samples, "samples of the model"

    def row(
        self, name: str, quantity: str, values: list[float], seeds: Sequence[int], n: int, data: str
    ) -> None:
        """Write one row, with its unit and with who says so."""
        by_judge = "prob", "entropy", "share", "remember", "relearn", "redraw"
        judged = quantity.startswith(by_judge)
        judged = judged and not quantity.startswith("probe")
        distance = quantity.startswith("frechet")
        self.run.row(
            name,
            values,
            n_samples=n,
            unit=self.unit_of(quantity),
            data=data,
            seeds=seeds,
            feature_extractor=self.extractor if distance else self.config.judge if judged else None,
            preprocessing=self.details(quantity),
        )

    def unit_of(self, quantity: str) -> str:
        """Return the unit of a quantity."""
        named = COSTS | JUDGED | MEASURED
        named |= {"member_gap": self.kind.unit, "bound_members": self.kind.unit}
        named |= {"member_auc": "probability", "norm_z": "standard deviations"}
        if quantity in named:
            return named[quantity]
        starts = {
            "frechet": "Fréchet distance",
            "error": "rms a pixel",
            "probe": "balanced accuracy",
        }
        return next((unit for start, unit in starts.items() if quantity.startswith(start)), "share")

    def details(self, quantity: str) -> str | None:
        """Return what a row has to say about how its pictures were made or chosen."""
        config, audit = self.config, self.config.audit
        if quantity == "frechet_real":
            return f"against {config.n_real} training images a class"
        if quantity in DISTANCES:
            return "against as many samples of the model it is named after"
        if quantity == "seconds":
            steps = config.timed_steps
            return f"selective amnesia, retraining: extrapolated from {steps} of their steps"
        if quantity.startswith("redraw_"):
            return f"noise up to the step, off by DDIM of {config.sample_steps} for the whole way"
        if quantity.startswith("relearn_"):
            return f"after {audit.relearning.report} steps on real pictures of the digit"
        if quantity.startswith(("error_", "share_z", "norm_")):
            return f"{audit.inversion.steps} steps of Adam, best of {audit.inversion.rounds} starts"
        return None

    def keep(self, parts: dict[str, list[Found]]) -> None:
        """Keep pictures of the first seed, and curves: (contenders, pictures to learn from, k)."""
        plan = self.config.audit.relearning
        curves = [np.stack([each["curves"] for each in found]) for found in parts.values()]
        targets, _ = self.test.first(len(parts["original"][0]["found_z"]), self.label)
        steps = {}
        if redrawing := self.config.audit.redrawing:
            steps["redraw_at"] = np.array(redrawing.at)
        for kept in ("redrawn", "grid_unguided"):
            if kept in parts["original"][0]:
                steps[kept] = np.stack([found[0][kept] for found in parts.values()])
        self.run.arrays(
            contenders=np.array(self.names),
            samples=np.stack([found[0]["grid"] for found in parts.values()]),
            relearn_at=np.array(plan.at),
            relearn_pictures=np.array(plan.n_pictures),
            relearn_share=np.stack([curve.mean(0) for curve in curves]),
            relearn_low=np.stack([curve.min(0) for curve in curves]),
            relearn_high=np.stack([curve.max(0) for curve in curves]),
            inverted_targets=as_levels(targets),
            inverted_z=np.stack([found[0]["found_z"] for found in parts.values()]),
            inverted_zc=np.stack([found[0]["found_zc"] for found in parts.values()]),
            **steps,
        )
