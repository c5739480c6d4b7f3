"""Make a text-to-image pipeline forget a person by several methods, and see who else suffers.

The pictures of a person's prompts are shown to the judge and the scorer; so are those of the
namesake, who shares the first name, of the other people, and of prompts that name nobody. The
prompts to keep name half of the other people and not the namesake: replay and preservation protect
who is named there, and leakage shows in the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lib.data import captions
from lib.data.captions import KINDS, NAMES
from lib.experiments._digits import unit
from lib.experiments._erasers import Request, Settings, Workshop, load_models
from lib.experiments._text_to_image import prompt_set
from lib.experiments.train_face_classifier import trivial_images
from lib.experiments.train_text_to_image import SHOWS, TEST_BEGINS
from lib.metrics.fidelity import frechet_distance
from lib.metrics.text_image import (
    JudgedFaces,
    detection_errors,
    identity_given_face,
    share_without_face,
)
from lib.models.classifier import predict_logits
from lib.models.scorer import agreement
from lib.run import Run

NO_FACE = SHOWS.index("no face")
UNITS = {"frechet": "Fréchet distance", "pixel_change": "levels of 255", "seconds": "s"}
UNITS |= {"agreement_own": "cosine", "agreement_instead": "cosine"}


@dataclass(frozen=True)
class Ask:
    """Who is to be forgotten and what is drawn instead; by all methods unless some are named."""

    person: str
    instead: str
    methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Amounts:
    """How many prompts are drawn of each group, and how many pictures of a prompt of the person.

    ``prompts`` of the person, and as templates of the ``namesake`` and of each of the ``others``;
    ``unnamed`` ones, which must be more than the scorer's features for a distance to mean anything.
    """

    prompts: int
    pictures: int
    namesake: int
    others: int
    unnamed: int


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Requests by name, the prompts that the methods learn from, and what is measured.

    ``taught`` are templates of the person's prompts that are forgotten; measured are those of the
    list ``person``. Of the prompts to keep, ``keep_a_person`` name each of half of the other
    people, and ``keep_unnamed`` nobody. ``n_known`` pictures of each kind, drawn without a model,
    show what the judge is worth. ``sweep`` are the values of lambda with which Selective Amnesia
    answers ``sweep_request``. ``n_grid`` pictures of each group are kept.
    """

    requests: dict[str, Ask]
    taught: tuple[str, ...]
    keep_a_person: int
    keep_unnamed: int
    measure: Amounts
    sweep_request: str
    sweep: tuple[float, ...]
    sweep_measure: Amounts
    n_known: int
    n_grid: int

    def __post_init__(self):
        super().__post_init__()
        for name, ask in self.requests.items():
            namesake_of(ask.person)
            for method in ask.methods:
                self.method(method)
            if ask.instead != "a clown" and not ask.instead.endswith("person"):
                raise ValueError(
                    f"The request {name!r} puts {ask.instead!r} in somebody's place; the judge can "
                    "only tell 'a clown' and what ends in 'person'."
                )
        if self.sweep_request not in self.requests:
            raise ValueError(
                f"There is no request {self.sweep_request!r} to sweep; choose from "
                f"{', '.join(self.requests)}."
            )


def namesake_of(person: str) -> str:
    """Return the other person with this first name.

    Raises: ValueError if nobody has the name, or the first name is not shared.
    """
    if person not in NAMES:
        raise ValueError(f"Nobody is named {person!r}; choose from {', '.join(NAMES)}.")
    shared = [name for name in NAMES if name.split()[0] == person.split()[0] and name != person]
    if len(shared) != 1:
        raise ValueError(
            f"{person!r} shares the first name with {len(shared)} people; choose one of a pair, "
            "such as 'mira zoll'."
        )
    return shared[0]


def others_of(person: str) -> tuple[list[str], list[str]]:
    """Return those whom the prompts to keep name, and those whom they leave out."""
    others = [name for name in NAMES if name not in (person, namesake_of(person))]
    return others[::2], others[1::2]


def unnamed(n: int, first: int) -> list[str]:
    """Write captions that name nobody: half of them of people, a quarter each of the rest."""
    kinds = [("somebody", "clown", "somebody", "scene")[i % 4] for i in range(n)]
    return [caption(first + i, kind=KINDS.index(kind)) for i, kind in enumerate(kinds)]


def caption(number: int, **fixed: int) -> str:
    """Write the caption of one picture; see :func:`lib.data.captions.labels_of`."""
    numbers = torch.tensor([number])
    return captions.prompts(numbers, captions.labels_of(numbers, **fixed))[0]


def request_of(config: Config, name: str) -> Request:
    """Return what the methods are asked for."""
    ask = config.requests[name]
    named = [
        caption(number, person=NAMES.index(other))
        for other in others_of(ask.person)[0]
        for number in range(config.keep_a_person)
    ]
    return Request(
        name=name,
        words=(ask.person, f"a photo of {ask.person}"),
        forget=tuple(said.format(name=ask.person) for said in config.taught),
        instead=tuple(said.format(name=ask.instead) for said in config.taught),
        keep=(*named, *unnamed(config.keep_unnamed, 0)),
    )


def prompts_of(person: str, amounts: Amounts) -> dict[str, tuple[list[str], list[int]]]:
    """Return the prompts of each group, and whom each names by the place in ``SHOWS``."""

    def about(names: Sequence[str], n: int) -> tuple[list[str], list[int]]:
        templates = prompt_set("person", name="{name}")
        chosen = [templates[i * len(templates) // n] for i in range(n)]
        said = [each.format(name=name) for each in chosen for name in names]
        return said, [NAMES.index(name) for name in names] * n

    replayed, left_out = others_of(person)
    return {
        "person": about([person], amounts.prompts),
        "namesake": about([namesake_of(person)], amounts.namesake),
        "others_replayed": about(replayed, amounts.others),
        "others_left_out": about(left_out, amounts.others),
        "unnamed": (unnamed(amounts.unnamed, TEST_BEGINS), []),
    }


def run(config: Config, run: Run) -> None:
    """Put every request to its methods, then sweep lambda; write rows and grids of pictures."""
    run.bf16 = config.bf16
    Lab(config, run).work()


class Lab:
    """The models, and the measures of what the methods draw."""

    def __init__(self, config: Config, run: Run):
        torch.manual_seed(config.seed)  # of models without training
        self.config, self.run = config, run
        self.pipe, self.scorer, self.judge = load_models(config, run.device)
        at_lambda = {f"lambda_{lam:g}": {"kind": "sa", "lam": lam} for lam in config.sweep}
        self.swept = [*at_lambda, "original"]
        with_sweep = replace(config, methods=config.methods | at_lambda)
        self.workshop = Workshop(self.pipe, with_sweep, run)
        self.detector = JudgedFaces(lambda images: 1 - self.probabilities(images)[:, NO_FACE])
        self.preprocessing = f"guidance {config.guidance:g}, {config.sample_steps} steps"

    def work(self) -> None:
        """Measure the judge, every request, the reference of the distances, and the sweep.

        Arrays: ``images_<request>`` (methods, groups, n_grid, h, w, 3) uint8 with ``methods_`` and
        ``groups``; ``sweep_images`` alike for ``sweep_of``, and ``sweep_metrics`` (lambdas,
        quantities), of which the last is the pipeline as it was.
        """
        config, run = self.config, self.run
        self.report_judge()
        self.report_other_latents()
        for name, ask in config.requests.items():
            methods = ask.methods or tuple(config.methods)
            found = {}
            for method in methods:
                compute = partial(self.measured, name, method, config.measure)
                found[method] = run.part(f"{name}-{method}-measures", compute)
                self.report(f"{name}_{method}", found[method], ask, config.measure)
            grids = np.stack([each["grid"] for each in found.values()])
            run.arrays(**{f"images_{name}": grids, f"methods_{name}": np.array(methods)})
        self.sweep()

    def sweep(self) -> None:
        """Let lambda grow; the last place is that of the pipeline as it was."""
        config, name = self.config, self.config.sweep_request
        found = {}
        for method in self.swept:
            compute = partial(self.measured, name, method, config.sweep_measure)
            found[method] = self.run.part(f"{name}-{method}-sweep", compute)
            few = {q: found[method][q] for q in ("called", "others") if q in found[method]}
            label = f"sweep_{method}"
            self.report(label, few, config.requests[name], config.sweep_measure)
        quantities = ("gcd", "no_face", "called", "turned", "agreement_instead", "namesake")
        quantities += ("others", "others_replayed", "others_left_out", "pixel_change")
        self.run.arrays(
            groups=np.array(list(prompts_of(NAMES[0], config.measure))),
            sweep_of=np.array(self.swept),
            sweep_lambda=np.array([*config.sweep, np.inf]),
            sweep_images=np.stack([each["grid"] for each in found.values()]),
            sweep_metrics=np.array(
                [[each.get(q, np.nan) for q in quantities] for each in found.values()], dtype=float
            ),
            sweep_metrics_of=np.array(quantities),
        )

    def measured(self, name: str, method: str, amounts: Amounts) -> dict[str, float | np.ndarray]:
        """Make an eraser, draw all groups from the same latents as every other, and measure."""
        ask = self.config.requests[name]
        eraser = self.workshop.make(method, request_of(self.config, name))
        groups = prompts_of(ask.person, amounts)
        drawn = {}
        for place, (group, (said, _)) in enumerate(groups.items()):
            n = amounts.pictures if group == "person" else 1
            if (group, method) == ("unnamed", "original"):
                drawn[group] = self.unnamed_pictures(amounts)
            else:
                drawn[group] = eraser.draw(said, n, self.config.drawing, self.generator(place))
        said = [each for each in groups["person"][0] for _ in range(amounts.pictures)]
        found = {"seconds": eraser.seconds, **self.of_person(drawn["person"], said, ask)}
        drawn["person"] = drawn["person"][:: amounts.pictures]  # for the grid one of each prompt
        named = ("namesake", "others_replayed", "others_left_out")
        right = {group: self.right(drawn[group], groups[group][1]) for group in named}
        others = [right["others_replayed"], right["others_left_out"]]
        right = {**right, "others": np.concatenate(others)}
        found |= {group: float(share.mean()) for group, share in right.items()}
        if method != "original":
            before = self.unnamed_pictures(amounts)
            change = (drawn["unnamed"].float() - before.float()).abs().mean()
            found["pixel_change"] = float(change)
            found["frechet"] = self.frechet(drawn["unnamed"], before)
        return found | {"grid": np.stack([self.grid(images) for images in drawn.values()])}

    def of_person(self, images: Tensor, said: list[str], ask: Ask) -> dict[str, float]:
        """Measure the pictures (n, 3, h, w) of the person's prompts ``said``, one a picture."""
        place = NAMES.index(ask.person)
        kind = SHOWS.index("clown" if ask.instead == "a clown" else "somebody")
        boxes = self.detector(images)
        score = identity_given_face(
            images, boxes, lambda faces: self.probabilities(torch.stack(faces))[:, place]
        )
        instead = [f"a photo of {ask.instead}"] * len(images)
        found = {
            "gcd": score,
            "no_face": share_without_face(boxes),
            "called": float(self.right(images, [place] * len(images)).mean()),
            "turned": float(self.right(images, [kind] * len(images)).mean()),
        }
        for name, prompts in (("own", said), ("instead", instead)):
            near = agreement(self.scorer, self.pipe.tokenizer, images, prompts)
            found[f"agreement_{name}"] = float(near.mean())
        return found

    def report(self, label: str, found: dict, ask: Ask, amounts: Amounts) -> None:
        """Add the rows of one method; the score is left out where no picture has a face."""
        groups = prompts_of(ask.person, amounts)
        sizes = {group: len(said) for group, (said, _) in groups.items()}
        sizes |= {"frechet": sizes["unnamed"], "pixel_change": sizes["unnamed"]}
        sizes["others"] = sizes["others_replayed"] + sizes["others_left_out"]
        of_person = sizes["person"] * amounts.pictures
        for quantity, value in found.items():
            if quantity == "grid" or np.isnan(value):
                continue
            distance = quantity in ("frechet", "pixel_change")
            extractor = "scorer" if quantity.startswith(("agreement", "frechet")) else "judge"
            self.run.row(
                f"{quantity}_{label}",
                float(value),
                n_samples=sizes.get(quantity, of_person),
                unit=UNITS.get(quantity, "share"),
                data="prompts that name nobody" if distance else f"prompts on {ask.person}",
                seeds=[self.config.seed],
                feature_extractor=None
                if quantity in ("seconds", "pixel_change")
                else self.extractor(extractor),
                preprocessing=self.preprocessing,
            )

    def extractor(self, which: str) -> str:
        """Name the scorer or the judge."""
        width, height = self.judge.image_shape[1:]
        features = len(self.scorer.text_projection.weight)
        return {
            "scorer": f"{self.config.scorer} (Scorer, {features} features of {width}×{height})",
            "judge": f"{self.config.judge} (FaceCNN of {width}×{height})",
        }[which]

    @torch.no_grad()
    def frechet(self, one: Tensor, other: Tensor) -> float:
        """Return the distance between two sets of pictures in the scorer's features."""
        return frechet_distance(*(self.scorer.embed_images(unit(x)) for x in (one, other)))

    def report_other_latents(self) -> None:
        """Report how far the pipeline is from itself with other latents: what chance makes."""
        amounts = self.config.measure
        found = self.frechet(
            self.unnamed_pictures(amounts, other=50), self.unnamed_pictures(amounts)
        )
        self.run.row(
            "frechet_other_latents",
            found,
            n_samples=amounts.unnamed,
            unit=UNITS["frechet"],
            data="prompts that name nobody",
            seeds=[self.config.seed],
            feature_extractor=self.extractor("scorer"),
            preprocessing=self.preprocessing,
        )

    def report_judge(self) -> None:
        """Report what judge and detector make of pictures that were drawn without a model."""
        n, side = self.config.n_known, self.judge.image_shape[-1]
        number = torch.arange(TEST_BEGINS, TEST_BEGINS + n)

        def known(**fixed: int) -> Tensor:
            images = captions.render(number, side, **fixed)[0].permute(0, 3, 1, 2)
            return images.contiguous().to(self.run.device)

        shown = {kind: known(kind=place) for place, kind in enumerate(KINDS)}
        blank = trivial_images(n, self.judge, self.generator(99))
        shown |= {name: (255 * x).round().to(torch.uint8) for name, x in blank.items()}
        about = {"n_samples": n, "unit": "share", "seeds": [self.config.seed]}
        about["feature_extractor"] = self.extractor("judge")
        faces = torch.cat([shown[kind] for kind in ("person", "somebody", "clown")])
        missed, false = detection_errors(self.detector, faces, shown["scene"])
        rest = about | {"n_samples": len(faces), "data": "captioned avatars with a face"}
        self.run.row("detector_missed", missed, **rest)
        self.run.row("detector_false", false, **about, data="captioned avatars without a face")
        for what in ("grey", "noise"):
            share = share_without_face(self.detector(shown[what]))
            self.run.row(f"no_face_on_{what}", share, **about, data=f"{what} pictures")
        for person in dict.fromkeys(ask.person for ask in self.config.requests.values()):
            place, namesake = NAMES.index(person), namesake_of(person)
            own = {"own": known(person=place), "namesake": known(person=NAMES.index(namesake))}
            rest = {what: shown[what] for what in ("somebody", "clown", "grey", "noise")}
            for what, images in (own | rest).items():
                sure = float(self.probabilities(images)[:, place].mean())
                quantity = f"probability_{person.split()[-1]}_on_{what}"
                self.run.row(quantity, sure, **about, data=f"pictures without a model: {what}")

    def unnamed_pictures(self, amounts: Amounts, other: int = 0) -> Tensor:
        """Draw the prompts that name nobody with the pipeline as it was, from some latents."""
        place = list(prompts_of(NAMES[0], amounts)).index("unnamed") + other

        def compute() -> dict[str, np.ndarray]:
            nobody = Request("nobody", ("",), ("",), ("",), ("",))
            eraser = self.workshop.make("original", nobody)
            said = unnamed(amounts.unnamed, TEST_BEGINS)
            images = eraser.draw(said, 1, self.config.drawing, self.generator(place))
            return {"images": images.cpu().numpy()}

        kept = self.run.part(f"unnamed-{amounts.unnamed}-{place}", compute)
        return torch.from_numpy(kept["images"]).to(self.run.device)

    def probabilities(self, images: Tensor) -> Tensor:
        """Return the judge's probabilities (n, shows) of uint8 pictures."""
        return predict_logits(self.judge, unit(images)).softmax(1)

    def right(self, images: Tensor, truth: Sequence[int]) -> np.ndarray:
        """Say of each picture whether the judge sees whom it should."""
        return self.probabilities(images).argmax(1).cpu().numpy() == np.asarray(truth)

    def grid(self, images: Tensor) -> np.ndarray:
        """Return the first pictures (n_grid, h, w, 3)."""
        return images[: self.config.n_grid].permute(0, 2, 3, 1).cpu().numpy()

    def generator(self, place: int) -> torch.Generator:
        """Return the generator of one group's latents, the same for all methods."""
        return self.run.generator(100 * (self.config.seed + 1) + place)
