"""Make Stable Diffusion v1.4 forget a person or a broad concept, as the authors' code does it.

The weights come from the Hugging Face hub, with the reader's own login. Its pictures are never
kept: they are measured where they are drawn, and what stays are numbers and mosaics of a few
blocks, in which nobody can be told. Prompts that this book does not print are read from the
reader's own files.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib import ROOT
from lib.config import ConfigError
from lib.data import captions
from lib.data.captions import KINDS
from lib.experiments._erasers import Eraser, Request, Settings, Workshop
from lib.experiments._everyday import everyday
from lib.experiments._text_to_image import check_pipeline, prompt_set
from lib.experiments.train_text_to_image import TEST_BEGINS
from lib.metrics.nudity import ExposedParts, share_exposed
from lib.metrics.onnx_judge import OnnxJudge
from lib.metrics.text_image import (
    CascadeFaces,
    JudgedFaces,
    identity_given_face,
    share_without_face,
)
from lib.models.text_to_image import MiniSD, load_pipeline
from lib.run import Run

KNOWN = ("somebody", "clown", "scene")  # pictures with and without a face, drawn without a model
SEEN_AT = 512  # pixels, the size at which Stable Diffusion's pictures are looked at
MOST_BLOCKS = 16  # of a mosaic's side; more would show faces
BATCH = 20  # pictures that are decoded together


@dataclass(frozen=True)
class Ask:
    """What to forget, in names of lists of prompts; a gap {name} in them is filled.

    ``words`` name it, ``forget`` is put in the place of ``instead``, which is repeated if it is
    shorter; their gaps are filled by ``name`` and ``instead_name``. ``measured`` are lists by the
    name of their rows, and ``pictures`` are drawn of each prompt. ``place`` is the person's number
    with the judge. The ``methods`` are all of the config, or those that are named.
    """

    words: str
    forget: str
    instead: str
    measured: dict[str, str]
    pictures: int
    name: str = ""
    instead_name: str = ""
    place: int = 0
    methods: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """Requests by name, and how pictures are looked at.

    ``judge`` is ``none`` or a file in ``$BOOK_DATA``, see :class:`OnnxJudge`; there is no
    ``scorer``. Of everyday prompts ``n_keep`` are kept and ``n_other`` others measured.
    ``detectors`` are ``real``, or ``stand_in`` where nothing is to be found. ``n_known`` pictures
    of each kind show what they are worth. ``blocks`` is the side of a mosaic.
    """

    requests: dict[str, Ask]
    n_keep: int
    n_other: int
    detectors: str
    threshold: float
    n_known: int
    n_grid: int
    blocks: int

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.blocks <= MOST_BLOCKS:
            raise ValueError(
                f"blocks is {self.blocks}; a mosaic of 1 to {MOST_BLOCKS} is wanted, since the "
                "pictures of this model are not to be recognised"
            )
        if self.detectors not in ("real", "stand_in"):
            raise ValueError(f"detectors is {self.detectors!r}; choose real or stand_in")
        for name in self.requests:
            if self.methods_of(name)[:1] != ("original",):
                raise ValueError(
                    f"the first method of {name!r} must be original: others are set beside it"
                )

    def methods_of(self, request: str) -> tuple[str, ...]:
        """Return the names of the methods that a request is put to.

        Raises: ValueError if one is unknown.
        """
        names = self.requests[request].methods or tuple(self.methods)
        for name in names:
            self.method(name)
        return names


def listed(name: str, /, **words: str) -> list[str]:
    """Read a list of prompts from ``configs/prompts`` or from ``$BOOK_DATA/prompts``.

    Raises: ConfigError if it is in neither.
    """
    own = Path(os.environ.get("BOOK_DATA", "no BOOK_DATA")) / "prompts"
    for folder in (ROOT / "configs/prompts", own):
        if (folder / f"{name}.yaml").is_file():
            return prompt_set(name, folder, **words)
    raise ConfigError(
        f"The prompts {name!r} are not printed in this book; write them into "
        f"$BOOK_DATA/prompts/{name}.yaml, one a line after '- ': those of I2P are the column "
        "'prompt' of the data set AIML-TUDA/i2p on the Hugging Face hub, the others are in the "
        "papers."
    )


def request_of(config: Config, name: str) -> Request:
    """Return what the methods are asked for."""
    ask = config.requests[name]
    forget = listed(ask.forget, name=ask.name)
    instead = listed(ask.instead, name=ask.instead_name)
    return Request(
        name=name,
        words=tuple(listed(ask.words, name=ask.name)),
        forget=tuple(forget),
        instead=tuple(instead[i % len(instead)] for i in range(len(forget))),
        keep=tuple(everyday(config.n_keep)),
    )


def mosaic(images: Tensor, blocks: int) -> Tensor:
    """Return the mean colours of ``blocks`` × ``blocks`` parts, uint8 (n, 3, blocks, blocks)."""
    return F.adaptive_avg_pool2d(images.float(), blocks).round().to(torch.uint8)


def tiny_pipeline():
    """Build an untrained pipeline of the shape of v1.4: its classes, latents and prompt length."""
    from diffusers import PNDMScheduler

    sizes = MiniSD(
        words=("a", "of", "person", "photo"),
        size=64,
        max_length=77,
        latent_channels=4,
        vae_channels=(4, 4, 8, 8),
        unet_channels=(4, 4, 8, 8),
        unet_layers=2,
        unet_heads=2,
        text_width=16,
        text_layers=1,
        groups=2,
    )
    pipe = sizes.pipeline()
    pipe.scheduler = PNDMScheduler.from_config({**pipe.scheduler.config, "skip_prk_steps": True})
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.eval()
    return pipe


def run(config: Config, run: Run) -> None:
    """Put every request to all methods; write rows and mosaics.

    A quantity is named ``<quantity>_<request>_<prompts>_<method>``; the prompts are those of a list
    or ``other``, everyday ones that no method was told of. All methods begin with the same noise.
    Raises: ConfigError if something is missing that the weights would have to wait for.
    """
    if run.profile == "cpu":
        raise ConfigError(
            f"{run.name} has no results on a CPU, where v1.4 takes minutes for a picture; run it "
            "with --profile gpu or paper on a GPU, or read the same experiment with MiniSD, "
            "amnesia_sd_person and amnesia_sd_concept."
        )
    run.bf16 = config.bf16
    Lab(config, run).work()


class Lab:
    """The pipeline, and the detectors that look at its pictures."""

    def __init__(self, config: Config, run: Run):
        torch.manual_seed(config.seed)  # of a pipeline without training
        self.config, self.run = config, run
        self.asked = {name: request_of(config, name) for name in config.requests}
        self.prompts = {name: self.measured_prompts(name) for name in config.requests}
        try:  # whatever may be missing, before the weights are waited for
            self.look_for_detectors()
        except (ImportError, FileNotFoundError) as error:
            raise ConfigError(str(error)) from None
        self.pipe = tiny_pipeline() if config.pipeline == "random" else None
        self.pipe = self.pipe or load_pipeline(config.pipeline)
        check_pipeline(self.pipe)
        self.pipe.to(run.device)
        self.workshop = Workshop(self.pipe, config, run)

    def look_for_detectors(self) -> None:
        config, judge = self.config, self.config.judge
        real = config.detectors == "real"
        self.faces = CascadeFaces(smallest=64) if real else JudgedFaces(_brightness, 0.4)
        self.parts = ExposedParts(config.threshold) if real else _nothing_exposed
        folder = Path(os.environ.get("BOOK_DATA", "no BOOK_DATA"))
        self.judges = {
            name: (lambda crops: torch.stack([_brightness(c[None])[0] for c in crops]))
            if judge == "stand_in"
            else OnnxJudge(folder / judge, ask.place)
            for name, ask in config.requests.items()
            if judge != "none"
        }

    def measured_prompts(self, request: str) -> dict[str, tuple[list[str], int]]:
        """Return the prompts of each group with the number of pictures of each prompt."""
        ask, config = self.config.requests[request], self.config
        groups = {
            group: (listed(name, name=ask.name), ask.pictures)
            for group, name in ask.measured.items()
        }
        return groups | {"other": (everyday(config.n_other, config.n_keep), 1)}

    def work(self) -> None:
        """Measure the detectors, then every request with every method.

        ``mosaics_<request>`` is (methods, groups, n_grid, blocks, blocks, 3), with
        ``methods_<request>`` and ``groups_<request>``.
        """
        config, run = self.config, self.run
        self.report_detectors()
        for request in config.requests:
            found = {}
            for method in config.methods_of(request):
                compute = partial(self.measured, request, method)
                found[method] = run.part(f"{request}-{method}", compute)
                self.report(request, method, found[method], found[next(iter(found))])
            grids = [
                np.stack(
                    [_first(each[f"mosaics_{g}"], config.n_grid) for g in self.prompts[request]]
                )
                for each in found.values()
            ]
            axes = {"methods": list(found), "groups": list(self.prompts[request])}
            run.arrays(**{f"{axis}_{request}": np.array(names) for axis, names in axes.items()})
            run.arrays(**{f"mosaics_{request}": np.stack(grids)})

    def measured(self, request: str, method: str) -> dict[str, np.ndarray]:
        """Make an eraser, draw all groups, and keep what the detectors say of each picture."""
        eraser = self.workshop.make(method, self.asked[request])
        found = {"seconds": np.float64(eraser.seconds)}
        for place, (group, (said, n)) in enumerate(self.prompts[request].items()):
            seen = self.looked_at(eraser, said, n, place, self.judges.get(request))
            found |= {f"{quantity}_{group}": values for quantity, values in seen.items()}
        return found

    def looked_at(
        self, eraser: Eraser, prompts: Sequence[str], n: int, place: int, judge
    ) -> dict[str, np.ndarray]:
        """Draw and judge a few pictures at a time, and let go of them.

        ``gcd`` is nan where no face is found, or nobody judges.
        """
        generator = self.run.generator(100 * (self.config.seed + 1) + place)
        step, parts = max(1, BATCH // n), []
        for start in range(0, len(prompts), step):
            chosen = prompts[start : start + step]
            images = eraser.draw(chosen, n, self.config.drawing, generator).cpu()
            parts.append(self.seen(images, judge))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def seen(self, images: Tensor, judge) -> dict[str, np.ndarray]:
        """Return what is kept of each picture: four numbers and a mosaic."""
        boxes, parts = self.faces(images), self.parts(images)
        gcd = [
            identity_given_face(image[None], [box], judge) if judge else np.nan
            for image, box in zip(images, boxes, strict=True)
        ]
        tiles = mosaic(images, self.config.blocks).permute(0, 2, 3, 1).numpy()
        return {
            "no_face": np.array([share_without_face([box]) for box in boxes]),
            "exposed": np.array([share_exposed([each]) for each in parts]),
            "intimate": np.array([share_exposed([each], harmless=False) for each in parts]),
            "gcd": np.array(gcd),
            "mosaics": tiles,
        }

    def report(self, request: str, method: str, found: dict, original: dict) -> None:
        """Write the rows of one method; ``original`` is what the first one drew."""
        config = self.config
        about = {"seeds": [config.seed], "unit": "share"}
        about["preprocessing"] = f"guidance {config.guidance:g}, {config.sample_steps} steps"
        judge = f"{config.judge}, in pictures with a face"
        extractors = {"no_face": "OpenCV's cascade", "gcd": judge}
        extractors |= dict.fromkeys(("exposed", "intimate"), "NudeNet")
        if config.detectors == "stand_in":
            extractors = dict.fromkeys(extractors, "a stand-in")
        for group, (said, _) in self.prompts[request].items():
            about["data"] = f"{len(said)} prompts, {group.replace('_', ' ')}"
            for quantity, extractor in extractors.items():
                values = found[f"{quantity}_{group}"]
                values = values[~np.isnan(values)]
                if len(values):
                    rest = about | {"n_samples": len(values), "feature_extractor": extractor}
                    row = f"{quantity}_{request}_{group}_{method}"
                    self.run.row(row, float(values.mean()), **rest)
            tiles = [each[f"mosaics_{group}"].astype(float) for each in (found, original)]
            change = float(np.abs(tiles[0] - tiles[1]).mean())
            rest = about | {"n_samples": len(tiles[0]), "unit": "levels of 255, of mosaics"}
            self.run.row(f"change_{request}_{group}_{method}", change, **rest)
        rest = about | {"unit": "s", "n_samples": 1, "data": "the forgetting itself"}
        self.run.row(f"seconds_{request}_{method}", float(found["seconds"]), **rest)

    def report_detectors(self) -> None:
        """Report what the detectors find in pictures whose content is known."""
        for place, kind in enumerate(KNOWN):
            first = TEST_BEGINS + place * self.config.n_known
            numbers = torch.arange(first, first + self.config.n_known)
            drawn, _ = captions.render(numbers, 128, kind=KINDS.index(kind))
            images = _enlarged(drawn.permute(0, 3, 1, 2))
            about = {"data": f"captioned avatars, {kind}", "seeds": [self.config.seed]}
            about |= {"unit": "share", "n_samples": len(images)}
            about["preprocessing"] = f"enlarged from 128 to {SEEN_AT} pixels"
            missing = share_without_face(self.faces(images))
            self.run.row(f"detector_no_face_{kind}", missing, **about)
            self.run.row(f"detector_exposed_{kind}", share_exposed(self.parts(images)), **about)


def _enlarged(images: Tensor) -> Tensor:
    larger = F.interpolate(images.float(), (SEEN_AT, SEEN_AT), mode="bicubic")
    return larger.round().clamp(0, 255).to(torch.uint8)


def _first(tiles: np.ndarray, n: int) -> np.ndarray:
    """Return the first ``n``, the last one again where there are fewer."""
    return tiles[np.minimum(np.arange(n), len(tiles) - 1)]


def _brightness(images: Tensor) -> Tensor:
    return images.float().flatten(1).mean(1) / 255


def _nothing_exposed(images: Tensor) -> list[set[str]]:
    return [set() for _ in images]
