"""Time the diffusion model of configs/ddpm_mnist.yaml: training, forgetting, and sampling.

``python benchmarks/ddpm.py``. Both training steps have the same UNet, batch, classes and fused
Adam; theirs is written as in diffusers' example of unconditional training: a scheduler that adds
the noise, the UNet, the mean squared error. The steps of Selective Amnesia have the settings of
configs/amnesia_ddpm_mnist.yaml and as many images. The straightforward one takes the two batches
one after the other, adds the penalty in a loop over the parameters, and leaves Adam at its
defaults. The table shows medians in CPU milliseconds of one thread. Sampling is 100 digits in 25
DDIM steps with guidance, once, in seconds of all cores.
"""

import os
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from _compare import compare, record
from amnesia_step import loop_penalty
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from lib.config import load_config
from lib.experiments._amnesia_ddpm import Memory, Task, signed_noise
from lib.experiments.amnesia_ddpm import task_of
from lib.methods.amnesia import Anchor, amnesia_loss, ewc_penalty
from lib.models.ddpm import ConditionalDDPM, to_signed
from lib.train import FUSED_ADAM

ROUNDS = 10  # of forgetting
ARGUMENTS = ("channels", "layers_per_block", "attention", "groups", "dropout", "patch")


def forgetting(model: ConditionalDDPM, task: Task, memory: Memory) -> dict[str, Callable]:
    """Move a model off its anchor; return two ways to its loss, equal for equal generators."""
    fisher = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    theta_star = {name: p.detach().clone() for name, p in model.named_parameters()}
    anchor, draw_noise = Anchor.of(model, fisher), signed_noise("noise", model, torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))

    def bound(x0, c, t, noise):
        return -model.loss_from_noise(x0, c, t, noise)

    def batches(generator):
        forget = draw_noise(task.batch, generator), torch.full((task.batch,), 0)
        replay = memory.batch(task.batch, generator)
        t = torch.randint(model.schedule.n_steps, (2 * task.batch,), generator=generator)
        noise = torch.randn(2 * task.batch, *model.image_shape, generator=generator)
        return forget, replay, t, noise

    def straightforward(generator):
        *both, t, noise = batches(generator)
        halves = zip(both, t.chunk(2), noise.chunk(2), strict=True)
        loss = -sum(bound(*images, *rest).mean() for images, *rest in halves)
        # The loop has the paper's factor, a half.
        return loss + task.lam * 2 * task.ewc_factor * loop_penalty(model, fisher, theta_star)

    def ours(generator):
        forget, replay, t, noise = batches(generator)
        elbo = partial(bound, t=t, noise=noise)
        penalty = ewc_penalty(model, anchor, task.ewc_factor)
        return amnesia_loss(elbo, forget, replay, penalty, task.lam)[0]

    return {"straightforward": straightforward, "ours": ours}


def forgetting_steps(
    models: Sequence[ConditionalDDPM], task: Task, memory: Memory
) -> dict[str, Callable[[], None]]:
    """Return the two forgetting steps, of one model each; their first losses are compared."""
    generator = torch.Generator().manual_seed(0)
    losses = [forgetting(model, task, memory) for model in models]
    first = [way(torch.Generator().manual_seed(1)) for way in losses[0].values()]
    torch.testing.assert_close(*first)
    slow, fast = (losses[i][way] for i, way in enumerate(losses[0]))
    return {
        "forgetting, straightforward": training_step(
            models[0], partial(slow, generator), torch.optim.Adam
        ),
        "forgetting, ours": training_step(models[1], partial(fast, generator)),
    }


def training_step(model: ConditionalDDPM, loss: Callable, optimizer: Callable = FUSED_ADAM):
    adam = optimizer(model.parameters(), lr=1e-4)

    def once() -> None:
        adam.zero_grad(set_to_none=True)
        loss().backward()
        adam.step()

    return once


def main() -> None:
    torch.manual_seed(0)
    config = load_config("ddpm_mnist", "cpu").config
    network = {name: getattr(config, name) for name in ARGUMENTS}
    models = [ConditionalDDPM((1, 28, 28), 10, **network).train() for _ in range(2)]
    images = torch.randint(0, 256, (config.batch, 1, 28, 28), dtype=torch.uint8)
    labels = torch.randint(0, 10, (config.batch,))
    scheduler = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02)

    def theirs():
        clean = F.pixel_unshuffle(images.float() / 127.5 - 1, config.patch)
        noise = torch.randn(clean.shape)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(clean),))
        noisy = scheduler.add_noise(clean, noise, t)
        return F.mse_loss(models[0].unet(noisy, t, labels).sample, noise)

    def ours():
        return models[1].loss(to_signed(images), labels, reduction="mean").mean()

    threads = os.cpu_count()
    torch.set_num_threads(1)
    training = training_step(models[0], theirs)
    compare(
        f"DDPM, one training step on {config.batch} digits, 1 CPU thread",
        {"diffusers": training, "ours": training_step(models[1], ours)},
    )
    task = task_of(load_config("amnesia_ddpm_mnist", "cpu").config)
    compare(
        f"DDPM, forgetting with {task.batch} + {task.batch} digits beside training on "
        f"{config.batch}, 1 CPU thread",
        {"training, diffusers": training} | forgetting_steps(models, task, Memory(images, labels)),
        ROUNDS,
    )
    torch.set_num_threads(threads)
    seconds = []
    for _ in range(3):  # by the clock, which other work on the machine only makes longer
        start = time.perf_counter()
        models[1].eval().sample(torch.arange(100) % 10, config.guidance, 25)
        seconds.append(time.perf_counter() - start)
    what = f"100 digits, DDIM 25 with guidance, {threads} CPU threads, best of {len(seconds)}"
    record(what, "ours", min(seconds), "s")


if __name__ == "__main__":
    main()
