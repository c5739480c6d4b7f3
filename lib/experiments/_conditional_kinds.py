"""What the comparison of methods asks of a conditional model, the same of a VAE and a DDPM."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, replace
from functools import partial
from itertools import pairwise
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.checkpoints import load_checkpoint
from lib.config import load_config
from lib.experiments import _amnesia, _amnesia_ddpm
from lib.experiments._diffusion import Sampling, draw, load_base
from lib.experiments._digits import Digits, unit
from lib.machine import clock
from lib.methods.amnesia import Elbo
from lib.methods.audit import redraw
from lib.models.cvae import ConditionalVAE
from lib.models.ddpm import ConditionalDDPM, to_signed
from lib.models.diffusion import ddim_step, ddim_steps, q_sample
from lib.run import Run, seed_everything


class Kind(Protocol):
    """One kind of model. Pictures are floats in [0, 1], (n, 1, h, w), outside of it.

    ``unit`` is that of :meth:`bound`, and ``layers`` are hidden layers to probe, by short names.
    """

    unit: str
    layers: dict[str, str]

    def load(self, name: str) -> nn.Module:
        """Return a shipped model; ``random`` is an untrained one."""

    def bound(self, model: nn.Module, label: int, generator: torch.Generator) -> Elbo:
        """Return what training raises, (n,) of pictures and classes, negative for losses."""

    def draw(self, model: nn.Module, c: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a picture of each class."""

    def latents(self, model: nn.Module, n: int, generator: torch.Generator) -> Tensor:
        """Draw inputs of :meth:`decode` from their prior."""

    def condition(self, model: nn.Module, c: Tensor) -> Tensor:
        """Return the continuous condition (n, d) that stands for each class."""

    def decode(self, model: nn.Module, z: Tensor, condition: Tensor) -> Tensor:
        """Draw the picture of each latent and condition, differentiably in both."""

    def read(self, model: nn.Module, x: Tensor, noise: Tensor) -> None:
        """Run the model on pictures without telling it their class; noise has their shape."""

    def amnesia_seconds(self, base: nn.Module, name: str, n: int, run: Run) -> float:
        """Estimate what the run of Selective Amnesia costs, from ``n`` of its steps."""

    def retrained_seconds(
        self, base: nn.Module, name: str, data: Digits, n: int, run: Run
    ) -> float:
        """Estimate what training anew costs, from ``n`` of its steps."""


class Vae:
    """The conditional VAE; a condition is the weights of the classes."""

    unit = "nats"
    layers: ClassVar = {
        f"{part}_{i}": f"{part}.{2 * i - 1}" for part in ("encoder", "decoder") for i in (1, 2)
    }

    def __init__(self, sampling: Sampling, device: torch.device):
        self.device = device

    def load(self, name: str) -> ConditionalVAE:
        model = ConditionalVAE((1, 28, 28), 10) if name == "random" else load_checkpoint(name)
        return model.to(self.device).eval()

    def bound(self, model: ConditionalVAE, label: int, generator: torch.Generator) -> Elbo:
        return partial(model.elbo, generator=generator)

    def draw(self, model: ConditionalVAE, c: Tensor, generator: torch.Generator) -> Tensor:
        return model.sample(c, generator)

    def latents(self, model: ConditionalVAE, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, model.latent_dim, generator=generator, device=self.device)

    def condition(self, model: ConditionalVAE, c: Tensor) -> Tensor:
        return F.one_hot(c, model.n_classes).float()

    def decode(self, model: ConditionalVAE, z: Tensor, condition: Tensor) -> Tensor:
        return model.decode(z, condition)

    def read(self, model: ConditionalVAE, x: Tensor, noise: Tensor) -> None:
        c = torch.full((len(x), model.n_classes), 1 / model.n_classes, device=x.device)
        model.decode(model.encode(x, c)[0], c)

    def amnesia_seconds(self, base: nn.Module, name: str, n: int, run: Run) -> float:
        config = load_config(name, run.profile).config
        task = _amnesia.Task(**{f.name: getattr(config, f.name) for f in fields(_amnesia.Task)})

        def work(steps: int) -> None:
            shorter = replace(task, iterations=steps)
            _amnesia.forget(base, shorter, run.generator(0), progress=False)

        return extrapolated(work, n, task.iterations)

    def retrained_seconds(
        self, base: nn.Module, name: str, data: Digits, n: int, run: Run
    ) -> float:
        config = load_config(name, run.profile).config
        generator = run.generator(0)

        def loss(model: ConditionalVAE) -> Tensor:
            return -model.elbo(*data.batch(config.batch, generator), generator).mean()

        return extrapolated(partial(_train, base, loss), n, config.iterations)


class Ddpm:
    """The diffusion model; a latent is the first noise.

    A condition is ``SLOWER`` times the embedding of a class, so that a search of one rate for both
    moves it that much less; as fast as the latent, it led astray.

    Pictures that are searched for are drawn with ``COARSE`` steps and no guidance: a gradient goes
    through all of them. Hidden layers are read where the noise has ``READ_AT`` of its way.
    """

    unit = "squared error of the noise, summed over pixels"
    layers: ClassVar = {
        "down_1": "unet.down_blocks.0.resnets.0",
        "down_2": "unet.down_blocks.1.resnets.0",
        "middle": "unet.mid_block",
        "up_1": "unet.up_blocks.0.resnets.0",
    }
    COARSE, READ_AT, DROP, SLOWER = 5, 0.1, 0.1, 10.0

    def __init__(self, sampling: Sampling, device: torch.device):
        self.sampling, self.device = sampling, device

    def load(self, name: str) -> ConditionalDDPM:
        return load_base(name, self.device)

    def bound(self, model: ConditionalDDPM, label: int, generator: torch.Generator) -> Elbo:
        """Return minus the simple loss; a tenth of the classes but ``label`` becomes no class."""

        def minus_loss(x: Tensor, c: Tensor) -> Tensor:
            options = {"generator": generator, "device": x.device}
            t = torch.randint(model.schedule.n_steps, (len(x),), **options)
            noise = torch.randn(x.shape, **options)
            dropped = (torch.rand(len(x), **options) < self.DROP) & (c != label)
            c = c.masked_fill(dropped, model.null_class)
            return -model.loss_from_noise(to_signed(x), c, t, noise)

        return minus_loss

    def draw(self, model: ConditionalDDPM, c: Tensor, generator: torch.Generator) -> Tensor:
        return unit(draw(model, c, self.sampling, generator))

    def latents(self, model: ConditionalDDPM, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, *model.image_shape, generator=generator, device=self.device)

    def condition(self, model: ConditionalDDPM, c: Tensor) -> Tensor:
        return self.SLOWER * model.unet.class_embedding(c).detach()

    def decode(self, model: ConditionalDDPM, z: Tensor, condition: Tensor) -> Tensor:
        times = ddim_steps(model.schedule.n_steps, self.COARSE)
        unused = torch.zeros(len(z), dtype=torch.long, device=z.device)
        x = z
        with embedded(model, condition / self.SLOWER):
            for t, t_next in pairwise([*times, -1]):
                noise = model.predict_noise(x, torch.tensor(t, device=z.device), unused)
                x = ddim_step(x, noise, t, t_next, model.schedule)
        return (x + 1) / 2

    def draw_unguided(
        self, model: ConditionalDDPM, c: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Draw a picture of each class by the conditional model alone."""
        return unit(draw(model, c, replace(self.sampling, guidance=0.0), generator))

    def redraw(self, model: ConditionalDDPM, x: Tensor, c: Tensor, t: int, noise: Tensor) -> Tensor:
        """Put noise on pictures up to step t, and let the model take it off, told the classes."""
        steps, predict = self.sampling.sample_steps, model.guided(c, 0.0)
        back = redraw(predict, to_signed(x), t, noise, model.schedule, steps, clip=True)
        return (back.clamp(-1, 1) + 1) / 2

    def read(self, model: ConditionalDDPM, x: Tensor, noise: Tensor) -> None:
        t = torch.full((len(x),), round(self.READ_AT * model.schedule.n_steps), device=x.device)
        noisy = q_sample(to_signed(x), t, noise, model.schedule)
        model.predict_noise(noisy, t, torch.full_like(t, model.null_class))

    def amnesia_seconds(self, base: nn.Module, name: str, n: int, run: Run) -> float:
        config = load_config(name, run.profile).config
        task = _amnesia_ddpm.Task(
            **{f.name: getattr(config, f.name) for f in fields(_amnesia_ddpm.Task)}
        )
        generator, made = run.generator(0), []

        def prepare() -> None:
            memory = _amnesia_ddpm.Memory.of(base, config.replay_a_class, config, generator)
            made.extend([memory, _amnesia_ddpm.fisher_of(base, memory, task, generator)])

        def work(steps: int) -> None:
            shorter = replace(task, iterations=steps)
            _amnesia_ddpm.forget(base, config.forget, shorter, *made, generator, progress=False)

        before = seconds(prepare)
        return before + extrapolated(work, n, task.iterations)

    def retrained_seconds(
        self, base: nn.Module, name: str, data: Digits, n: int, run: Run
    ) -> float:
        config = load_config(name, run.profile).config
        generator = run.generator(0)

        def loss(model: ConditionalDDPM) -> Tensor:
            images, labels = data.batch(config.batch, generator)
            return model.loss(to_signed(images), labels, generator, config.drop).mean()

        return extrapolated(partial(_train, base, loss), n, config.iterations)


KINDS: dict[str, type[Kind]] = {"vae": Vae, "ddpm": Ddpm}


def untrained(kind: Kind, seed: int) -> nn.Module:
    """Return an untrained model that a seed decides."""
    seed_everything(seed)
    return kind.load("random")


@contextmanager
def embedded(model: ConditionalDDPM, condition: Tensor) -> Iterator[None]:
    """Have a diffusion model see continuous conditions (n, d) instead of those of its classes."""
    hook = model.unet.class_embedding.register_forward_hook(lambda *_: condition)
    try:
        yield
    finally:
        hook.remove()


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds of :func:`lib.machine.clock` that work takes."""
    start = clock()
    work()
    return clock() - start


def extrapolated(work: Callable[[int], object], n: int, total: int) -> float:
    """Estimate the seconds of ``work(total)`` from those of ``work(1)`` and ``work(1 + n)``."""
    few, more = (seconds(partial(work, steps)) for steps in (1, 1 + n))
    return few + (total - 1) * max(0.0, more - few) / n


def _train(start: nn.Module, loss: Callable[[nn.Module], Tensor], steps: int) -> None:
    """Train a copy as if it were new, which takes as long."""
    model = deepcopy(start).train()
    adam = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
    for _ in range(steps):
        adam.zero_grad(set_to_none=True)
        loss(model).backward()
        adam.step()
