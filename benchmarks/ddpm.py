"""Time the diffusion model of configs/ddpm_mnist.yaml: training against diffusers, and sampling.

``python benchmarks/ddpm.py``. Both training steps have the same UNet, batch, classes and fused
Adam; theirs is written as in diffusers' example of unconditional training: a scheduler that adds
the noise, the UNet, the mean squared error. The table shows medians in CPU milliseconds of one
thread. Sampling is 100 digits in 25 DDIM steps with guidance, once, in seconds of all cores.
"""

import os
import time

import torch
import torch.nn.functional as F
from _compare import compare, record
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from lib.config import load_config
from lib.models.ddpm import ConditionalDDPM, to_signed
from lib.train import FUSED_ADAM

ARGUMENTS = ("channels", "layers_per_block", "attention", "groups", "dropout", "patch")


def main() -> None:
    torch.manual_seed(0)
    config = load_config("ddpm_mnist", "cpu").config
    network = {name: getattr(config, name) for name in ARGUMENTS}
    models = [ConditionalDDPM((1, 28, 28), 10, **network).train() for _ in range(2)]
    images = torch.randint(0, 256, (config.batch, 1, 28, 28), dtype=torch.uint8)
    labels = torch.randint(0, 10, (config.batch,))
    scheduler = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02)

    def ours(model: ConditionalDDPM):
        return model.loss(to_signed(images), labels, reduction="mean").mean()

    def theirs(model: ConditionalDDPM):
        clean = F.pixel_unshuffle(images.float() / 127.5 - 1, config.patch)
        noise = torch.randn(clean.shape)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(clean),))
        noisy = scheduler.add_noise(clean, noise, t)
        return F.mse_loss(model.unet(noisy, t, labels).sample, noise)

    def step(model, loss):
        adam = FUSED_ADAM(model.parameters(), lr=1e-4)

        def once():
            adam.zero_grad(set_to_none=True)
            loss(model).backward()
            adam.step()

        return once

    threads = os.cpu_count()
    torch.set_num_threads(1)
    compare(
        f"DDPM, one training step on {config.batch} digits, 1 CPU thread",
        {"diffusers": step(models[0], theirs), "ours": step(models[1], ours)},
    )
    torch.set_num_threads(threads)
    start = time.perf_counter()
    models[1].eval().sample(torch.arange(100) % 10, config.guidance, 25)
    what = f"100 digits, DDIM 25 with guidance, {threads} CPU threads"
    record(what, "ours", time.perf_counter() - start, "s")


if __name__ == "__main__":
    main()
