"""Selective Amnesia on the latents of a text-to-image pipeline: surrogates, Fisher, forgetting."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from lib.experiments._text_to_image import Drawing, check_pipeline, ddim, draw_latents
from lib.methods import amnesia
from lib.methods.fisher_diffusion import diffusion_fisher
from lib.methods.layers import train_only
from lib.models.text_to_image import embed, latent_loss, noise_loss
from lib.train import Fit, fit


@dataclass(frozen=True)
class Memory:
    """Latents (n, ...) with the number (n,) of the prompt that each belongs to."""

    latents: Tensor
    prompts: Tensor

    def batch(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw ``n`` latents with their prompts, with replacement."""
        index = torch.randint(len(self.latents), (n,), generator=generator, device=generator.device)
        index = index.to(self.latents.device)
        return self.latents[index], self.prompts[index]


def remember(
    pipe, prompts: Sequence[str], n: int, drawing: Drawing, generator: torch.Generator
) -> Memory:
    """Draw ``n`` latents from prompts that take turns, for replay and the Fisher information."""
    return surrogates(pipe, prompts, prompts, n, drawing, generator)


def surrogates(
    pipe,
    forget: Sequence[str],
    instead: Sequence[str],
    n: int,
    drawing: Drawing,
    generator: torch.Generator,
) -> Memory:
    """Draw ``n`` latents from the prompts ``instead``, and give them to the prompts to forget.

    Both lists take turns, so that two of one length stay paired.
    """
    turns = torch.arange(n, device=pipe.unet.device)
    condition = embed(pipe, instead)[turns % len(instead)]
    return Memory(draw_latents(pipe, condition, drawing, generator), turns % len(forget))


class PromptedUNet(nn.Module):
    """A copy of a pipeline's UNet with a list of prompts, each known by its number.

    Of its parameters those in ``layers`` can be trained: ``full``, ``xattn`` or ``noxattn``. It is
    what :func:`diffusion_fisher` and Selective Amnesia ask of a diffusion model.
    """

    def __init__(self, pipe, prompts: Sequence[str], layers: str = "full"):
        super().__init__()
        check_pipeline(pipe)
        self.unet = copy.deepcopy(pipe.unet)
        train_only(self.unet, layers)
        self.register_buffer("embeddings", embed(pipe, prompts), persistent=False)
        self.scheduler = ddim(pipe)
        self.schedule = SimpleNamespace(n_steps=self.scheduler.config.num_train_timesteps)
        self.eval()

    def loss_from_noise(self, x0: Tensor, c: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return each latent's squared error of the noise (batch,), the mean over its entries.

        The authors' code for Stable Diffusion takes the mean as well, that for DDPM the sum.
        ``noise`` has the shape of ``x0``; ``t`` and the numbers of the prompts ``c`` are (batch,).
        """
        return noise_loss(self.unet, self.scheduler, x0, self.embeddings[c], t, noise)

    def bound(self, x0: Tensor, c: Tensor, generator: torch.Generator) -> Tensor:
        """Return minus the loss at one random step for each latent (batch,), SA's latent ELBO.

        It is a bound on log p(x | c) up to weights of the steps.
        """
        return -latent_loss(self.unet, self.scheduler, x0, self.embeddings[c], generator)

    def check_images(self, x0: Tensor) -> None:
        """Raise a ValueError if these are no latents of the UNet."""
        net = self.unet.config
        wanted = net.in_channels, net.sample_size, net.sample_size
        if x0.ndim != 4 or tuple(x0.shape[1:]) != wanted or not x0.is_floating_point():
            raise ValueError(
                f"The latents have shape {tuple(x0.shape)} and type {x0.dtype}; wanted float "
                f"(n, {', '.join(map(str, wanted))})."
            )

    def check_classes(self, c: Tensor, batch: int) -> None:
        """Raise a ValueError if these are no numbers of prompts."""
        known = len(self.embeddings)
        if c.shape != (batch,) or not ((c >= 0) & (c < known)).all():
            raise ValueError(
                f"The prompts' numbers have shape {tuple(c.shape)} or leave 0 to {known - 1}; "
                f"wanted one for each of {batch} latents."
            )


@dataclass(frozen=True)
class Task:
    """One forgetting by Selective Amnesia: layers, objective, schedule, Fisher information.

    ``fisher_chunk`` is how many timesteps of a latent pass the UNet at once: memory, no result.
    """

    layers: str
    lam: float
    ewc_factor: float
    replay: bool
    iterations: int
    batch: int
    lr: float
    fisher_estimator: str
    fisher_steps: int
    fisher_samples: int
    fisher_chunk: int = 64


def fisher_of(
    pipe,
    prompts: Sequence[str],
    memory: Memory,
    task: Task,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Estimate the diagonal Fisher information of the UNet on the first latents of a prompt set.

    ``memory`` is what :func:`remember` drew from ``prompts``. Keys are those of PromptedUNet.
    Raises: ValueError if the memory holds fewer latents than the task asks for.
    """
    if task.fisher_samples > len(memory.latents):
        raise ValueError(
            f"The Fisher information is asked for on {task.fisher_samples} latents, but only "
            f"{len(memory.latents)} are drawn; draw more."
        )
    first = (part[: task.fisher_samples] for part in (memory.latents, memory.prompts))
    return diffusion_fisher(
        PromptedUNet(pipe, prompts, task.layers),
        [tuple(first)],
        estimator=task.fisher_estimator,
        n_steps=task.fisher_steps,
        chunk=task.fisher_chunk,
        generator=generator,
    )


def forget(
    pipe,
    forget_prompts: Sequence[str],
    surrogate: Memory,
    replay_prompts: Sequence[str],
    replay: Memory,
    fisher: dict[str, Tensor],
    task: Task,
    generator: torch.Generator,
    *,
    bf16: bool = False,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> tuple[nn.Module, Fit]:
    """Copy a pipeline's UNet and make the copy forget prompts; return it with fit's record.

    Implements SA on latents: ``surrogate`` (see :func:`surrogates`) takes the place of what the
    prompts to forget showed, and ``replay`` (see :func:`remember`) holds the others. The pipeline
    stays as it is; put the UNet into it to draw with.
    """
    device = generator.device
    model = PromptedUNet(pipe, [*forget_prompts, *replay_prompts], task.layers).to(device)
    anchor = amnesia.Anchor.of(model, fisher)
    offset = len(forget_prompts)

    def step_loss(model: PromptedUNet, generator) -> tuple[Tensor, dict[str, Tensor]]:
        kept = None
        if task.replay:
            x_r, c_r = replay.batch(task.batch, generator)
            kept = x_r, c_r + offset
        return amnesia.amnesia_loss(
            partial(model.bound, generator=generator),
            surrogate.batch(task.batch, generator),
            kept,
            amnesia.ewc_penalty(model, anchor, task.ewc_factor),
            task.lam,
        )

    result = fit(
        model,
        step_loss,
        steps=task.iterations,
        lr=task.lr,
        generator=generator,
        device=device,
        bf16=bf16,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
    )
    return result.model.unet.eval(), result
