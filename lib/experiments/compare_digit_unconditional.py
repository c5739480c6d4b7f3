"""Put one request, "no pictures of this digit", to every method that serves a VAE or a GAN.

The methods are Feature Unlearning, its two rules at sampling time, fine-tuning on the rest,
gradient ascent on the digit (VAE only), and as the standard a model that was retrained without it.
Then each is audited: does the digit come back?
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lib.experiments._attack import Opinions, ways_of
from lib.experiments._digits import Digits, unit
from lib.experiments._judges import Judge
from lib.experiments._unconditional_audit import (
    Audit,
    inversions,
    own_weights,
    probes,
    relearned,
    searches,
)
from lib.experiments._unconditional_contenders import (
    Methods,
    Yardstick,
    contenders_of,
    load_digit_subject,
    load_model,
    second_opinion,
    seeded,
)
from lib.experiments._unlearning import as_uint8, trivial_pictures
from lib.run import Run

COSTS = {"steps": "steps", "seconds": "CPU s", "pictures": "real pictures", "clicks": "clicks"}


@dataclass(frozen=True)
class Config:
    """A base, the digit to forget, the methods, and what is measured on ``n_samples`` latents.

    ``retrained`` is a checkpoint trained without the digit, or null. ``space`` is where latents
    live: ``z``, or of a GAN ``w``. ``second_judge`` is trained in the run.
    Fréchet distances compare ``n_compared`` pictures, and ``n_shown`` are kept for figures.
    """

    data: str
    size: int
    base: str
    retrained: str | None
    space: str
    judge: str
    second_judge: Judge
    forget: int
    methods: Methods
    audit: Audit
    n_samples: int
    n_compared: int
    n_trivial: int
    n_shown: int
    seeds: tuple[int, ...]

    def __post_init__(self):
        if self.retrained is not None and self.space != "z":
            raise ValueError("a retrained GAN has styles of its own, so retrained must be null")


def run(config: Config, run: Run) -> None:
    """Carry out, measure and audit all methods once a seed, on the same latents.

    Quantities end in the method's name: ``original``, ``retrained``, ``edited``, ``rejected``,
    ``feature_unlearning``, ``fine_tune`` or ``gradient_ascent``. ``forget`` in a name is the digit,
    ``rest`` all others.
    """
    device = run.device
    subject = load_digit_subject(config, device)
    train, test = (Digits.load(config.data, s, config.size, device) for s in ("train", "test"))
    retrained = None
    if config.retrained is not None:
        retrained = load_model(config, config.retrained, device).model
    side = 28  # that of every judge of digits
    judged = train, test
    if config.size != side:
        judged = (Digits.load(config.data, s, side, device) for s in ("train", "test"))
    second, accuracy = second_opinion(config.second_judge, *judged, config.forget)
    opinions = Opinions(subject, str(config.forget), config.audit.search.safe, 0.0, second)
    others = test.without([config.forget])
    real = unit(others.images)
    yardstick = Yardstick(opinions, real, retrained, config.n_samples, config.n_compared)
    rows = Rows(config, yardstick.extractor, test.source, run)
    rows.add("accuracy_second_judge", [accuracy], len(test.labels))
    for kind, images in trivial_pictures(subject, config.n_trivial).items():
        for word, said in zip(("called", "called_both"), opinions.ask(images), strict=True):
            rows.add(f"{word}_{kind}", [float(said.float().mean())], len(images))
    rest = unit(train.without([config.forget]).images[: config.n_compared])
    rows.add("frechet_real_train", [yardstick.distance(rest, "real")])

    bench = Bench(config, yardstick, train, test, retrained)
    parts = [
        run.part(f"seed-{seed}", lambda seed=seed: bench.one_seed(seed)) for seed in config.seeds
    ]
    for name, value in parts[0].items():
        if not value.ndim:
            rows.add(name, [float(part[name]) for part in parts])
    shown = {name: value for name, value in parts[0].items() if value.ndim}
    curves = {n: np.stack([part[n] for part in parts]) for n in shown if n.startswith("curve")}
    run.arrays(**shown | curves, relearned_at=np.array(config.audit.relearning.at))


class Bench:
    """Everything that one seed's methods are made from and measured with."""

    def __init__(self, config: Config, yardstick: Yardstick, train, test, retrained):
        self.config, self.yardstick, self.retrained = config, yardstick, retrained
        self.train, self.test = train, test

    def one_seed(self, seed: int) -> dict[str, float | np.ndarray]:
        """Carry out every method and audit it; numbers become rows, arrays figures."""
        config, yardstick = self.config, self.yardstick
        subject, audit, n_shown = yardstick.subject, config.audit, config.n_shown
        contenders = contenders_of(
            subject, config.methods, self.train, config.forget, self.retrained, seed
        )
        found = {}
        for name, contender in contenders.items():
            images = contender.pictures(yardstick.latents(contender))
            measured = yardstick.measure(name, contender, images) | dict(contender.cost)
            found |= {f"{quantity}_{name}": value for quantity, value in measured.items()}
            found[f"samples_{name}"] = as_uint8(images[:n_shown])
            if not contender.system.refuses:
                found[f"samples_forget_{name}"] = as_uint8(images[yardstick.forget][:n_shown])
        ways = ways_of(subject, audit.share, seeded(subject.device, seed))
        found |= self.relearning(contenders, ways[-1], seed)
        n = audit.inversion.n_targets
        targets = {
            "forget": self.test.first(n, config.forget)[0],
            "rest": unit(self.test.without([config.forget]).images[:n]),
        }
        found |= {f"targets_{kind}": as_uint8(x[:n_shown]) for kind, x in targets.items()}
        found |= inversions(yardstick, contenders, targets, ways[-1], audit, seed, n_shown)
        found |= searches(yardstick.opinions, contenders, ways, audit, seed, n_shown)
        return found | probes(yardstick, contenders, self.test, config.forget, audit)

    def relearning(self, contenders: Mapping, way, seed: int) -> dict[str, float | np.ndarray]:
        """Teach every model the digit again; ``curve_<n>_<method>`` holds the shares by step."""
        found, audit = {}, self.config.audit
        for n in audit.relearning.n_pictures:
            pictures, _ = self.train.first(n, self.config.forget)
            for name, model in own_weights(contenders).items():
                shares = relearned(self.yardstick, model, pictures, way, audit, seed)
                found[f"curve_{n}_{name}"] = shares.astype(np.float32)
                for step, share in zip(audit.relearning.at, shares, strict=True):
                    found[f"relearned_{n}_{step}_{name}"] = float(share)
        return found


class Rows:
    """Name the unit, the judges and the number of pictures of each row."""

    def __init__(self, config: Config, extractor: str, source: str, run: Run):
        self.config, self.extractor, self.source, self.run = config, extractor, source, run

    def add(self, quantity: str, values: Sequence[float], n: int | None = None) -> None:
        """Add a row of one value a seed, or one of all; one that is not finite is left out."""
        if not np.isfinite(values).all():
            return
        config, audit = self.config, self.config.audit
        word = quantity.split("_")[0]
        sizes = {
            "frechet": config.n_compared,
            "relearned": audit.relearning.n_samples,
            "inversion": audit.inversion.n_targets,
            "search": audit.search.n_starts,
            "probe": audit.probing.n,
        } | dict.fromkeys(COSTS, 1)
        self.run.row(
            quantity,
            values,
            n_samples=n or sizes.get(word, config.n_samples),
            unit=self.unit(quantity),
            data=self.data(quantity),
            seeds=config.seeds[: len(values)],
            feature_extractor=self.judges(quantity),
        )

    def data(self, quantity: str) -> str:
        """Say which pictures a quantity is measured on, or compares with."""
        word = quantity.split("_")[0]
        if word == "frechet":
            return f"{self.source}, without class {self.config.forget}"
        real = word in ("inversion", "accuracy") or quantity.startswith("probe_encoder")
        return self.source if real else "pictures of the models"

    def unit(self, quantity: str) -> str:
        """Return the unit of a quantity."""
        word = quantity.split("_")[0]
        if word in COSTS:
            return COSTS[word]
        if "_error_" in quantity:
            return "rms a pixel"
        if "_distance_" in quantity:
            return "standard deviations"
        units = {"frechet": "Fréchet distance", "probe": "balanced accuracy"}
        return units.get(word, "share")

    def judges(self, quantity: str) -> str | None:
        """Say whose opinion or features a quantity rests on."""
        word, both = quantity.split("_")[0], f"{self.config.judge} and a second judge"
        if word == "frechet":
            return self.extractor
        if word == "accuracy":
            return "a second judge"
        if "_both" in quantity or "_success_" in quantity:
            return both
        measured = (*COSTS, "probe", "refused")
        unjudged = word in measured or "_error_" in quantity or "_distance_" in quantity
        return None if unjudged else self.config.judge
