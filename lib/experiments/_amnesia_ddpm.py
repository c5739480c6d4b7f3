"""One forgetting of a diffusion model, and the two expensive things that it starts from."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lib.experiments._diffusion import SAMPLE_BATCH, Sampling, draw, in_turn, stretch
from lib.experiments._digits import unit
from lib.methods import amnesia
from lib.methods.fisher_diffusion import diffusion_fisher
from lib.models.ddpm import ConditionalDDPM, to_signed
from lib.train import Fit, fit


@dataclass(frozen=True)
class Task:
    """One forgetting: the objective, the schedule, and the ways in which codes differ.

    ``reduction`` is that of the loss over the pixels of an image; over images it is always the
    mean. ``drop`` is the share of null classes among the replayed images; the forgotten class
    keeps its own. ``weights`` are those that samples are drawn from: ``ema`` or ``raw``. The
    average starts at the base.
    ``fisher_range`` is ``signed`` for images in [-1, 1], the model's own range, and ``unit`` for
    [0, 1], as in the authors' code. With ``stretched`` every image of the base runs from black to
    white before it is replayed or enters the Fisher information, also as in their code.
    """

    surrogate: str
    replay: bool
    lam: float
    ewc_factor: float
    reduction: str
    iterations: int
    batch: int
    lr: float
    drop: float
    ema_decay: float
    weights: str
    fisher_estimator: str
    fisher_steps: int
    fisher_samples: int
    fisher_range: str
    stretched: bool

    def __post_init__(self):
        choices = {
            "surrogate": ("noise", "grey"),
            "reduction": ("sum", "mean"),
            "weights": ("ema", "raw"),
            "fisher_range": ("signed", "unit"),
        }
        for field, known in choices.items():
            if (value := getattr(self, field)) not in known:
                raise ValueError(f"The {field} {value!r} is unknown; choose from {known}.")

    @property
    def fisher_settings(self) -> tuple:
        """Return all that the Fisher information depends on, the base and the seed apart."""
        return (
            self.fisher_estimator,
            self.fisher_steps,
            self.fisher_samples,
            self.fisher_range,
            "stretched" if self.stretched else "plain",
        )


@dataclass(frozen=True)
class Memory:
    """Samples of the base, drawn once: ``images`` uint8, and their classes ``labels``."""

    images: Tensor
    labels: Tensor

    @classmethod
    def of(
        cls, base: ConditionalDDPM, a_class: int, sampling: Sampling, generator: torch.Generator
    ) -> "Memory":
        """Draw as many samples of every class; the classes take turns."""
        c = in_turn(range(base.n_classes), a_class, generator.device)
        return cls(draw(base, c, sampling, generator), c)

    def stretched(self) -> "Memory":
        """Return the same samples, each from black to white."""
        return Memory(stretch(self.images), self.labels)

    def without(self, label: int) -> "Memory":
        """Return the samples of the other classes."""
        keep = self.labels != label
        return Memory(self.images[keep], self.labels[keep])

    def batch(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` images in [-1, 1] with their classes, with replacement."""
        index = torch.randint(
            len(self.images), (n,), generator=generator, device=self.images.device
        )
        return to_signed(self.images[index]), self.labels[index]


def fisher_of(
    base: ConditionalDDPM, memory: Memory, task: Task, generator: torch.Generator
) -> dict[str, Tensor]:
    """Estimate the diagonal Fisher information of the base on its first samples.

    Raises: ValueError if the memory holds fewer samples than the task asks for.
    """
    if task.fisher_samples > len(memory.images):
        raise ValueError(
            f"The Fisher information is asked for on {task.fisher_samples} samples, but only "
            f"{len(memory.images)} are drawn from the base; raise replay_a_class."
        )
    scale = {"signed": to_signed, "unit": unit}[task.fisher_range]
    images, labels = memory.images[: task.fisher_samples], memory.labels[: task.fisher_samples]

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for part, c in zip(images.split(SAMPLE_BATCH), labels.split(SAMPLE_BATCH), strict=True):
            yield scale(part), c

    return diffusion_fisher(
        base,
        batches(),
        estimator=task.fisher_estimator,
        n_steps=task.fisher_steps,
        generator=generator,
    )


def signed_noise(kind: str, model: ConditionalDDPM, device: torch.device) -> amnesia.Sampler:
    """Return the surrogate q(x | c_f) in the model's range: every pixel uniform on [-1, 1].

    ``grey`` is its mean.
    """
    make = {"noise": amnesia.uniform_noise, "grey": amnesia.constant_grey}[kind]
    draw_unit = make(model.image_shape, device=device)
    return lambda n, generator: to_signed(draw_unit(n, generator))


@dataclass(frozen=True)
class Forgotten:
    """A model after forgetting: its average, its last weights, and the record of :func:`fit`."""

    ema: nn.Module
    raw: nn.Module
    fit: Fit


def forget(
    base: ConditionalDDPM,
    label: int,
    task: Task,
    memory: Memory,
    fisher: dict[str, Tensor],
    generator: torch.Generator,
    *,
    bf16: bool = False,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Forgotten:
    """Copy ``base`` and make the copy forget a class; no data set is used.

    ``memory`` holds the samples of the base that are replayed, all classes or only the others.
    """
    device = generator.device
    model = deepcopy(base)
    anchor = amnesia.Anchor.of(model, fisher)
    surrogate = signed_noise(task.surrogate, base, device)
    replayed = memory.without(label)
    c_f = torch.full((task.batch,), label, device=device)

    def step_loss(model: nn.Module, generator) -> tuple[Tensor, dict[str, Tensor]]:
        def bound(x0: Tensor, c: Tensor) -> Tensor:
            t = torch.randint(
                model.schedule.n_steps, (len(x0),), generator=generator, device=device
            )
            noise = torch.randn(x0.shape, generator=generator, device=device)
            values = -model.loss_from_noise(x0, c, t, noise)
            return values / x0[0].numel() if task.reduction == "mean" else values

        replay = None
        if task.replay:
            x_r, c_r = replayed.batch(task.batch, generator)
            dropped = torch.rand(task.batch, generator=generator, device=device) < task.drop
            replay = x_r, c_r.masked_fill(dropped, model.null_class)
        penalty = amnesia.ewc_penalty(model, anchor, task.ewc_factor)
        q = surrogate(task.batch, generator), c_f
        return amnesia.amnesia_loss(bound, q, replay, penalty, task.lam)

    result = fit(
        model,
        step_loss,
        steps=task.iterations,
        lr=task.lr,
        generator=generator,
        device=device,
        # fit's average starts at the weights after the first step; without a rate that is the base.
        schedule=lambda progress: float(progress > 0),
        ema_decay=task.ema_decay,
        bf16=bf16,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
    )
    return Forgotten(result.model, model.eval(), result)
