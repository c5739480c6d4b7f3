"""One request, put to every way of making a text-to-image pipeline forget.

A config's experiment inherits :class:`Settings`, whose ``methods`` name what to compare::

    pipe, scorer, judge = load_models(config, run.device)
    request = Request(
        name="mira",
        words=("mira zoll",),
        forget=("a photo of mira zoll", "a drawing of mira zoll"),
        instead=("a photo of a person", "a drawing of a person"),
        keep=("a photo of ada birk", "the sea at night"),
    )
    workshop = Workshop(pipe, config, run)

    def measure() -> dict[str, float | np.ndarray]:
        eraser = workshop.make("sa", request)  # a name in config.methods
        images = eraser.draw(request.forget, 2, config.drawing, run.generator(config.seed))
        return {"seconds": eraser.seconds, ...}  # images: uint8 (2 prompts * 2, 3, height, width)

    run.part("mira-sa", measure)

A method is made where it is measured, inside ``run.part``: a resumed run then makes only what it
has not measured, and Selective Amnesia goes on from its checkpoint. What several methods share
(latents to replay, the Fisher information) is computed once and kept.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from lib.checkpoints import load_checkpoint
from lib.data import captions
from lib.experiments._amnesia_text import Memory, Task, fisher_of, forget, remember, surrogates
from lib.experiments._text_to_image import (
    Drawing,
    check_pipeline,
    draw_latents,
    esd_latent,
    replaced_tokens,
)
from lib.experiments.train_text_to_image import SHOWS
from lib.methods.erasing import ESDSettings, SafeGuidance, esd, uce_edit, unet_epsilon
from lib.methods.layers import layer_parameters
from lib.models.classifier import FaceCNN
from lib.models.scorer import Scorer
from lib.models.text_to_image import MiniSD, embed, load_pipeline, to_images
from lib.run import Run

KINDS = ("original", "sld", "esd", "uce", "sa")
SLD_STEPS = 50  # of the sampler that SLD's published warm-ups are counted in


@dataclass(frozen=True)
class Request:
    """What to forget, in prompts.

    ``words`` are short prompts that name it: ESD trains on all of them, SLD stays away from the
    first. The prompts to ``forget`` and those ``instead`` of them are pairs: Selective Amnesia and
    UCE put the one in the place of the other. What the prompts to ``keep`` show is to stay: they
    are replayed, held by the Fisher information, and preserved by UCE. ``name`` begins the names
    of files; give different requests different ones.
    """

    name: str
    words: tuple[str, ...]
    forget: tuple[str, ...]
    instead: tuple[str, ...]
    keep: tuple[str, ...]

    def __post_init__(self):
        if len(self.forget) != len(self.instead) or not (self.words and self.forget and self.keep):
            raise ValueError(
                f"The request {self.name!r} has {len(self.words)} words, {len(self.forget)} "
                f"prompts to forget, {len(self.instead)} in their places and {len(self.keep)} to "
                "keep; wanted as many to forget as in their places, and at least one of each."
            )


@dataclass(frozen=True)
class Eraser:
    """A method after its work: a UNet to draw with, or safe guidance, and the seconds it took."""

    name: str
    pipe: object
    unet: nn.Module
    safety: tuple[SafeGuidance, Tensor] | None = None
    seconds: float = 0.0

    def draw(
        self, prompts: Sequence[str], n: int, drawing: Drawing, generator: torch.Generator
    ) -> Tensor:
        """Draw ``n`` pictures of each prompt, one prompt after the other.

        Equal generators give all methods the same noise to begin with. The warm-up of SLD takes
        the same share of the steps as in the published one's fifty.

        Shapes: returns uint8 (prompts * n, 3, height, width).
        """
        safety = self.safety
        if safety:
            warmup = round(safety[0].warmup * drawing.steps / SLD_STEPS)
            safety = replace(safety[0], warmup=warmup), safety[1]
        condition = embed(self.pipe, prompts).repeat_interleave(n, 0)
        latents = draw_latents(
            self.pipe, condition, drawing, generator, unet=self.unet, safety=safety
        )
        return to_images(self.pipe.vae, latents)


@dataclass(frozen=True)
class UCESettings:
    """The weights of UCE's three terms; see :func:`lib.methods.erasing.uce`."""

    erase_scale: float = 1.0
    preserve_scale: float = 1.0
    lam: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The models, how pictures are drawn, and the methods to compare.

    ``pipeline`` is ``mini``, a model of the hub or a folder, as :func:`load_pipeline` wants it;
    ``scorer`` and ``judge`` are shipped checkpoints. ``random`` stands for a tiny untrained one.
    ``methods`` maps a name to its ``kind``, one of ``KINDS``, and to what it changes of that kind's
    block: ``{kind: sld, strength: medium}``, ``{kind: esd, layers: noxattn}``, ``{kind: uce}``,
    ``{kind: sa, layers: xattn, lam: 10.0}``. ESD draws its latents by ``esd_drawing``.
    """

    pipeline: str
    scorer: str
    judge: str
    guidance: float
    sample_steps: int
    methods: dict[str, dict]
    sa: Task
    n_surrogate: int
    n_replay: int
    esd: ESDSettings = field(default_factory=ESDSettings)
    esd_drawing: Drawing
    uce: UCESettings = field(default_factory=UCESettings)
    seed: int = 0
    bf16: bool = False

    def __post_init__(self):
        for name in self.methods:
            self.method(name)

    @property
    def drawing(self) -> Drawing:
        """Return how all pictures and latents are drawn, but ESD's."""
        return Drawing(self.guidance, self.sample_steps)

    def method(self, name: str) -> tuple[str, object]:
        """Return the kind of a method and its settings.

        Raises: ValueError if the name or the kind is unknown, or the kind has no such setting.
        """
        if name not in self.methods:
            raise ValueError(
                f"There is no method {name!r}; the config has {', '.join(self.methods)}."
            )
        changes = dict(self.methods[name])
        kind = changes.pop("kind", None)
        if kind not in KINDS:
            raise ValueError(
                f"The method {name!r} is of kind {kind!r}; choose from {', '.join(KINDS)}."
            )
        if kind == "sld":
            strength = changes.pop("strength", "medium")
            found = SafeGuidance.named(strength)
        else:
            found = None if kind == "original" else getattr(self, kind)
        known = asdict(found) if found else {}
        if unknown := changes.keys() - known.keys():
            raise ValueError(
                f"The method {name!r} changes {', '.join(sorted(unknown))}; {kind!r} has "
                f"{', '.join(known) or 'no settings'}."
            )
        return kind, replace(found, **changes) if found else None


def load_models(settings: Settings, device: torch.device) -> tuple[object, Scorer, FaceCNN]:
    """Load the pipeline, the scorer of text and image, and the judge of people.

    The judge's logits are those of ``SHOWS``: the named people, somebody, clown, no face.
    Raises: CheckpointError if one is not there.
    """
    arguments = {"words": captions.words(), "text_width": 16, "text_layers": 1}
    arguments |= {"max_length": captions.MOST_WORDS + 3}
    sizes = {"size": 16, "vae_channels": (4, 8), "unet_channels": (4, 8), "groups": 2}
    if settings.pipeline == "random":
        given = arguments | {"words": tuple(arguments["words"])} | sizes
        pipe = MiniSD(**given, latent_channels=2, unet_heads=2).pipeline().to(device)
        for part in (pipe.vae, pipe.text_encoder, pipe.unet):
            part.eval()
    else:
        pipe = load_pipeline(settings.pipeline, device)
    check_pipeline(pipe)
    if settings.scorer == "random":
        scorer = Scorer(**arguments)
    else:
        scorer = load_checkpoint(settings.scorer)
    if settings.judge == "random":
        side = pipe.vae.config.sample_size
        judge = FaceCNN(len(SHOWS), (3, side, side), SHOWS)
    else:
        judge = load_checkpoint(settings.judge)
    return pipe, scorer.to(device).eval(), judge.to(device).eval()


class Workshop:
    """Make erasers of one pipeline, which itself stays as it is."""

    def __init__(self, pipe, settings: Settings, run: Run):
        self.pipe, self.settings, self.run = pipe, settings, run
        self._found: dict[str, dict[str, np.ndarray]] = {}

    def make(self, name: str, request: Request) -> Eraser:
        """Put a request to the method that has this name in the config.

        Raises: ValueError if there is no such method.
        """
        kind, settings = self.settings.method(name)
        start = time.perf_counter()
        if kind == "original":
            return Eraser(name, self.pipe, self.pipe.unet)
        if kind == "sld":
            safety = settings, embed(self.pipe, request.words[:1])[0]
            return Eraser(name, self.pipe, self.pipe.unet, safety)
        if kind == "sa":
            return self._sa(name, request, settings)
        unet = {"esd": self._esd, "uce": self._uce}[kind](request, settings)
        return Eraser(name, self.pipe, unet, seconds=time.perf_counter() - start)

    def _esd(self, request: Request, settings: ESDSettings) -> nn.Module:
        steps = esd(
            self.pipe.unet,
            unet_epsilon,
            esd_latent(self.pipe, self.settings.esd_drawing),
            embed(self.pipe, request.words),
            embed(self.pipe, [""])[0],
            settings,
            self.run.generator(self.settings.seed),
        )
        *_, (unet, _) = steps
        return unet

    def _uce(self, request: Request, settings: UCESettings) -> nn.Module:
        pairs = replaced_tokens(self.pipe, request.forget, request.instead)
        keep = embed(self.pipe, request.keep).flatten(0, 1)
        return uce_edit(self.pipe.unet, *pairs, keep, **asdict(settings))

    def _sa(self, name: str, request: Request, task: Task) -> Eraser:
        surrogate, *seconds = self.surrogate(request)
        replay, *more = self.replay(request.keep)
        fisher, *most = self.fisher(request.keep, task)
        unet, fitted = forget(
            self.pipe,
            request.forget,
            surrogate,
            request.keep,
            replay,
            fisher,
            task,
            self.run.generator(self.settings.seed),
            bf16=self.settings.bf16,
            checkpoint=self.run.checkpoint(f"{request.name}-{name}"),
            resume=self.run.resume,
        )
        seconds = sum([*seconds, *more, *most, fitted.seconds])
        return Eraser(name, self.pipe, unet, seconds=seconds)

    def surrogate(self, request: Request) -> tuple[Memory, float]:
        """Return latents of what stands instead, for the prompts to forget, and their seconds."""

        def compute(generator: torch.Generator) -> dict[str, np.ndarray]:
            return _arrays(
                surrogates(
                    self.pipe,
                    request.forget,
                    request.instead,
                    self.settings.n_surrogate,
                    self.settings.drawing,
                    generator,
                )
            )

        return self._memory("surrogate", (*request.forget, *request.instead), compute)

    def replay(self, keep: Sequence[str]) -> tuple[Memory, float]:
        """Return latents of the prompts to keep, and the seconds it took to draw them."""

        def compute(generator: torch.Generator) -> dict[str, np.ndarray]:
            settings = self.settings
            return _arrays(
                remember(self.pipe, keep, settings.n_replay, settings.drawing, generator)
            )

        return self._memory("replay", keep, compute)

    def fisher(self, keep: Sequence[str], task: Task) -> tuple[dict[str, Tensor], float]:
        """Return the Fisher information of a task's layers on the prompts to keep, and seconds.

        It is computed of all layers, so that tasks that train others share it.
        """
        memory, _ = self.replay(keep)
        how = task.fisher_estimator, task.fisher_steps, task.fisher_samples
        everything = replace(task, layers="full")

        def compute(generator: torch.Generator) -> dict[str, np.ndarray]:
            found = fisher_of(self.pipe, keep, memory, everything, generator)
            return {name: values.cpu().numpy() for name, values in found.items()}

        found, seconds = self._kept("fisher", (*keep, *map(str, how)), 2000, compute)
        chosen = (f"unet.{name}" for name in layer_parameters(self.pipe.unet, task.layers))
        return {name: self._tensor(found[name]) for name in chosen}, seconds

    def _memory(self, what: str, prompts: Sequence[str], compute: Callable) -> tuple[Memory, float]:
        found, seconds = self._kept(what, prompts, 1000, compute)
        return Memory(*(self._tensor(found[key]) for key in ("latents", "prompts"))), seconds

    def _kept(
        self, what: str, of: Sequence[str], seed: int, compute: Callable
    ) -> tuple[dict[str, np.ndarray], float]:
        """Compute something once for whoever asks with the same words, also in a resumed run."""
        key = f"{what}-{hashlib.sha256('|'.join(of).encode()).hexdigest()[:10]}"
        if key not in self._found:

            def timed() -> dict[str, np.ndarray]:
                start = time.perf_counter()
                found = compute(self.run.generator(seed + self.settings.seed))
                return {**found, "seconds": np.float64(time.perf_counter() - start)}

            self._found[key] = self.run.part(key, timed)
        found = dict(self._found[key])
        return found, float(found.pop("seconds"))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.run.device)


def _arrays(memory: Memory) -> dict[str, np.ndarray]:
    return {"latents": memory.latents.cpu().numpy(), "prompts": memory.prompts.cpu().numpy()}
