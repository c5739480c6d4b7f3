"""Make a text-to-image pipeline forget a broad concept, by Selective Amnesia and by its rivals.

A concept is broad if prompts reach it without its name, as artists' styles reach nudity. Hats are
the harmless stand-in: the prompts *named* ask for them, the prompts *implied* speak of gardeners,
of the beach and the like, where most people wear them. What is to stay are blond hair, asked for
by name, and people with names.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lib.data import captions
from lib.data.captions import CONTEXTS, KINDS, N_JOBS, NAMES
from lib.experiments._erasers import Request, Settings, Workshop, load_models
from lib.experiments._latents import load_judge, seen_by
from lib.experiments._text_to_image import prompt_set
from lib.experiments.train_face_classifier import attribute_shares, trivial_images
from lib.experiments.train_text_to_image import SHOWS, TEST_BEGINS, share_judged
from lib.metrics.fidelity import extract_features, frechet_distance
from lib.models.classifier import predict_logits
from lib.models.scorer import agreement
from lib.models.text_to_image import to_images, to_latents
from lib.run import Run

SETS = ("named", "implied", "blond", "people")
GROUPS = {"all": ("named", "implied"), "other": ("blond", "people")}  # what is measured together
NOISE = {"named": 0, "implied": 0, "blond": 1, "people": 2}  # the first two are pairs
JUDGED = ("hat", "blond_hair")


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """What to forget, and how it is measured.

    ``words``, ``forget``, ``instead`` and the prompts named ``keep`` are those of a ``Request``.
    The methods in ``implied_too`` are told to forget ``forget_implied`` as well, with
    ``instead_implied`` in their places. ``n_a_prompt`` pictures are drawn of each prompt.
    ``attributes`` is a shipped judge of hats and blond hair, whose error is measured on ``n_known``
    captioned pictures of each context, and on ``n_trivial`` that show nothing. ``n_grid`` pictures
    of each set of prompts are kept.
    """

    attributes: str
    words: tuple[str, ...]
    forget: tuple[str, ...]
    instead: tuple[str, ...]
    keep: str
    forget_implied: tuple[str, ...]
    instead_implied: tuple[str, ...]
    implied_too: tuple[str, ...]
    n_a_prompt: int
    n_known: int
    n_trivial: int
    n_grid: int

    def __post_init__(self):
        super().__post_init__()
        if unknown := set(self.implied_too) - set(self.methods):
            raise ValueError(
                f"implied_too names {', '.join(sorted(unknown))}; the methods are "
                f"{', '.join(self.methods)}."
            )
        if next(iter(self.methods.values())) != {"kind": "original"}:
            raise ValueError("the first method must be {kind: original}: others are set beside it")

    def request(self, method: str) -> Request:
        """Return what a method is asked to forget."""
        too = method in self.implied_too
        return Request(
            name="hats_and_implied" if too else "hats",
            words=(*self.words, *self.forget_implied) if too else self.words,
            forget=(*self.forget, *self.forget_implied) if too else self.forget,
            instead=(*self.instead, *self.instead_implied) if too else self.instead,
            keep=tuple(prompt_set(self.keep)),
        )


def prompts_of(name: str) -> list[str]:
    """Return the prompts of one of ``SETS``."""
    if name == "people":
        return [f"a photo of {person}" for person in NAMES]
    return prompt_set(f"hats_{name}")


def without(prompt: str) -> str:
    """Take from a prompt what names hats or, but for a place, implies them."""
    for context in CONTEXTS[:N_JOBS]:
        if context.implies.get("hat", 0.0) > 0.5:
            prompt = prompt.replace(context.words, "person")
    return prompt.replace(" wearing a hat", "")


def run(config: Config, run: Run) -> None:
    """Forget by every method; ask the judges about its pictures and about known ones.

    A quantity is named ``hat_<prompts>_<method>``; the prompts are one of ``SETS`` or of
    ``GROUPS``, or *taught*: the config's ``words``. All methods begin with the same noise.
    """
    run.bf16 = config.bf16
    Lab(config, run).work()


class Lab:
    """The pipeline, its judges, and what they say of pictures."""

    def __init__(self, config: Config, run: Run):
        self.config, self.run = config, run
        self.pipe, self.scorer, self.judge = load_models(config, run.device)
        size = self.pipe.vae.config.sample_size
        self.attributes = load_judge(config.attributes, (3, size, size), run.device)
        self.workshop = Workshop(self.pipe, config, run)
        self.prompts = {name: prompts_of(name) for name in SETS}

    def work(self) -> None:
        """Measure the judges, then all methods; keep the first pictures and a table of numbers.

        ``samples`` is (methods, sets, pictures, height, width, 3), the first picture of each of
        the first prompts; ``metrics`` (methods, quantities); ``lam`` (methods,) is nan where there
        is no penalty.
        """
        config, run = self.config, self.run
        self.report_judges()
        self.report_memories()
        drawn = {}
        for name in config.methods:
            part = run.part(f"pictures-{name}", partial(self.draw, name))
            drawn[name] = {s: torch.from_numpy(part[s]).to(run.device) for s in SETS}
            about = {"data": "prompts alone", "seeds": [config.seed]}
            run.row(f"seconds_{name}", float(part["seconds"]), unit="s", n_samples=1, **about)
            part = run.part(f"taught-{name}", partial(self.taught, name))
            images = torch.from_numpy(part["taught"]).to(run.device)
            share = float(self.shows("hat", images).mean())
            run.row(f"hat_taught_{name}", share, unit="share", n_samples=len(images), **about)
        original = drawn[next(iter(drawn))]
        again = self.again()
        tables = [self.report(name, each, original, again) for name, each in drawn.items()]
        few = [
            torch.stack([each[s][:: config.n_a_prompt][: config.n_grid] for s in SETS])
            for each in drawn.values()
        ]
        kinds = {name: config.method(name) for name in drawn}
        run.arrays(
            samples=torch.stack(few).permute(0, 1, 2, 4, 5, 3).cpu().numpy(),
            samples_of=np.array(list(drawn)),
            sets=np.array(SETS),
            metrics=np.array([list(table.values()) for table in tables]),
            metrics_of=np.array(list(tables[0])),
            lam=np.array([how.lam if kind == "sa" else np.nan for kind, how in kinds.values()]),
        )

    def draw(self, method: str) -> dict[str, np.ndarray]:
        """Make a method's eraser and draw all prompts with it, uint8 (n, 3, height, width)."""
        eraser = self.workshop.make(method, self.config.request(method))
        return {"seconds": np.float64(eraser.seconds), **self.pictures(eraser, SETS, 5000)}

    def taught(self, method: str) -> dict[str, np.ndarray]:
        """Draw the words a method was taught with, as many pictures as of the named prompts."""
        config = self.config
        eraser = self.workshop.make(method, config.request(method))
        each = max(1, len(self.prompts["named"]) * config.n_a_prompt // len(config.words))
        generator = self.run.generator(config.seed + 7000)
        images = eraser.draw(config.words, each, config.drawing, generator)
        return {"taught": images.cpu().numpy()}

    def pictures(self, eraser, sets: Sequence[str], seed: int) -> dict[str, np.ndarray]:
        """Draw prompts; a prompt that names the concept shares its noise with its twin."""
        config = self.config
        return {
            name: eraser.draw(
                self.prompts[name],
                config.n_a_prompt,
                config.drawing,
                self.run.generator(config.seed + seed + NOISE[name]),
            )
            .cpu()
            .numpy()
            for name in sets
        }

    def again(self) -> Tensor:
        """Draw the other prompts once more from the original, with other noise."""
        first = next(iter(self.config.methods))
        eraser = self.workshop.make(first, self.config.request(first))
        part = self.run.part("pictures-again", lambda: self.pictures(eraser, GROUPS["other"], 6000))
        return torch.from_numpy(np.concatenate([part[s] for s in GROUPS["other"]]))

    def report(
        self, method: str, drawn: dict[str, Tensor], original: dict[str, Tensor], again: Tensor
    ) -> dict[str, float]:
        """Write the rows of one method; return the values by quantity.

        ``agreement_without`` is that with the prompt :func:`without` hats: it does not blame a
        method for the forgetting itself.
        """
        config, values = self.config, {}

        def row(quantity: str, value: float, n: int, **rest) -> None:
            values[quantity] = value
            about = {"unit": "share", "data": "prompts alone", "seeds": [config.seed]}
            about["preprocessing"] = f"guidance {config.guidance:g}, {config.sample_steps} steps"
            self.run.row(f"{quantity}_{method}", value, n_samples=n, **(about | rest))

        for group in (*SETS, *GROUPS):
            members = GROUPS.get(group, (group,))
            images, same = (torch.cat([of[s] for s in members]) for of in (drawn, original))
            asked = [p for s in members for p in self.prompts[s] for _ in range(config.n_a_prompt)]
            n = len(images)
            row(f"hat_{group}", float(self.shows("hat", images).mean()), n)
            row(f"no_face_{group}", float(self.faceless(images).mean()), n)
            for how, said in {"": asked, "_without": [without(prompt) for prompt in asked]}.items():
                near = agreement(self.scorer, self.pipe.tokenizer, images, said)
                about = {"unit": "cosine", "feature_extractor": config.scorer}
                row(f"agreement{how}_{group}", float(near.mean()), n, **about)
            change = (images.float() - same.float()).abs().mean()
            row(f"change_{group}", float(change), n, unit="levels of 255")
        row("blond", float(self.shows("blond_hair", drawn["blond"]).mean()), len(drawn["blond"]))
        people = np.repeat(np.arange(len(NAMES)), config.n_a_prompt)
        right = share_judged(self.judge, seen_by(self.judge, drawn["people"]), people)
        row("people_right", float(right.mean()), len(right))
        images = torch.cat([drawn[s] for s in GROUPS["other"]])
        distance, name = distance_of(self.attributes, images, again, config.attributes)
        row("frechet_other", distance, len(again), unit="distance", feature_extractor=name)
        return values

    def shows(self, attribute: str, images: Tensor) -> np.ndarray:
        """Say of each picture whether the judge of attributes sees one, as truth values (n,)."""
        return called(self.attributes, attribute, images).cpu().numpy()

    def faceless(self, images: Tensor) -> np.ndarray:
        """Say of each picture whether the judge of people sees no face, as truth values (n,)."""
        shown = seen_by(self.judge, images)
        return share_judged(self.judge, shown, [len(SHOWS) - 1] * len(shown))

    def report_judges(self) -> None:
        """Report the judges' errors on pictures with exact labels, in the contexts of the prompts.

        Rows end in ``_drawn`` for pictures as they are, and in ``_decoded`` for those that went
        through the autoencoder, as all pictures of the pipeline do.
        """
        config = self.config
        about = {"unit": "share", "seeds": [config.seed]}
        images, truth = known_pictures(config.n_known, self.pipe.vae.config.sample_size)
        images = images.to(self.run.device)
        decoded = to_images(self.pipe.vae, to_latents(self.pipe.vae, images))
        for how, shown in {"drawn": images, "decoded": decoded}.items():
            rest = about | {"n_samples": len(shown), "data": f"captioned avatars, {how}"}
            for attribute in JUDGED:
                seen = called(self.attributes, attribute, shown)
                shares = attribute_shares(seen, truth[attribute].to(seen.device))
                for quantity, share in shares.items():
                    self.run.row(f"judge_{quantity}_{attribute}_{how}", share, **rest)
            missed = float(self.faceless(shown).mean())
            self.run.row(f"judge_misses_face_{how}", missed, **rest)
        generator = self.run.generator(config.seed)
        for name, images in trivial_images(config.n_trivial, self.judge, generator).items():
            what = {"grey": "flat grey", "noise": "uniform noise"}[name]
            rest = about | {"n_samples": len(images), "data": what}
            for attribute in JUDGED:
                share = float(called(self.attributes, attribute, images).float().mean())
                self.run.row(f"judge_{attribute}_{name}", share, **rest)
            share = float(self.faceless(images).mean())
            self.run.row(f"judge_no_face_{name}", share, **rest)

    def report_memories(self) -> None:
        """Report how many of the surrogates, and of what is replayed, wear hats themselves."""
        request = self.config.request(next(iter(self.config.methods)))
        memories = {
            "surrogate": self.workshop.surrogate(request)[0],
            "replay": self.workshop.replay(request.keep)[0],
        }
        for name, memory in memories.items():
            images = to_images(self.pipe.vae, memory.latents)
            share = float(self.shows("hat", images).mean())
            about = {"n_samples": len(images), "unit": "share", "seeds": [self.config.seed]}
            self.run.row(f"hat_{name}", share, data="samples of the original", **about)


def called(judge: nn.Module, attribute: str, images: Tensor) -> Tensor:
    """Say of each picture whether a judge sees an attribute, truth values (n,).

    Pictures are averaged down to the judge's size.
    """
    logits = predict_logits(judge, seen_by(judge, images))
    return logits[:, judge.names.index(attribute)] > 0


def distance_of(
    extractor: nn.Module, images: Tensor, reference: Tensor, name: str
) -> tuple[float, str]:
    """Return the Fréchet distance of two sets of pictures, and the name of the extractor."""
    features = [
        extract_features(extractor, seen_by(extractor, each.to(images.device)), name)
        for each in (images, reference)
    ]
    return frechet_distance(*(found for found, _ in features)), features[0][1]


def known_pictures(n: int, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw ``n`` captioned pictures of each context that implies a hat, with the labels ``JUDGED``.

    They show people without a name and were never trained on. Returns uint8 (m, 3, size, size) and
    truth values (m,) by attribute.
    """
    images, truth = [], {attribute: [] for attribute in JUDGED}
    for place, context in enumerate(CONTEXTS):
        if context.implies.get("hat", 0.0) > 0.5:
            first = TEST_BEGINS + n * (1000 + place)
            fixed = {"kind": KINDS.index("somebody"), "style": 0, "context": place}
            drawn, labels = captions.render(torch.arange(first, first + n), size, **fixed)
            images.append(drawn.permute(0, 3, 1, 2))
            for attribute, found in truth.items():
                found.append(labels[attribute] == 1)
    return torch.cat(images), {attribute: torch.cat(found) for attribute, found in truth.items()}
