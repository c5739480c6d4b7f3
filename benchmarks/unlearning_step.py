"""Time one step of Feature Unlearning on MNIST's VAE and GAN against a straightforward one.

``python benchmarks/unlearning_step.py``. The settings are those of the configs
unlearning_vae_mnist and unlearning_gan_mnist; the losses of the first step are compared. The
straightforward one follows the formulas: the frozen model draws every latent twice, as it is and
with the feature erased, MS-SSIM sees all pictures and those without the feature count nothing, and
Adam is left at its defaults. Ours draws each latent once, of whose two pictures only one counts.
The pictures with the feature are marked at random: by the paper's threshold half of all have it.
The table shows medians in CPU milliseconds of one thread.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from _compare import compare
from torch import nn
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

from lib.checkpoints import load_checkpoint
from lib.config import load_config
from lib.experiments._unlearning import Subject
from lib.methods.feature_unlearning import (
    Feature,
    UnlearningSettings,
    erased_latent,
    find_feature,
    indicator,
    ms_ssim_options,
    reconstruction_loss,
    unlearn,
    unlearn_loss,
)

ROUNDS = 12


def straightforward(
    subject: Subject, feature: Feature, settings: UnlearningSettings, generator: torch.Generator
) -> Iterator[float]:
    """Unlearn as the formulas are printed; yield the loss before every step."""
    frozen = subject.model
    unlearned = copy.deepcopy(frozen).requires_grad_(True)
    adam = torch.optim.Adam(unlearned.parameters(), lr=settings.lr)
    low, high = settings.value_range
    while True:
        z = subject.draw(settings.batch, generator)
        sim = indicator(z, *feature)
        with torch.no_grad():
            f = subject.decode(frozen, z)
            f_erased = subject.decode(frozen, erased_latent(z, *feature))
        g = subject.decode(unlearned, z)
        seen = [(images - low) / (high - low) for images in (g, f_erased)]
        options = ms_ssim_options(*g.shape[-2:])
        similarity = ms_ssim(*seen, reduction="none", data_range=1.0, **options)
        loss = settings.alpha * unlearn_loss(g, f_erased, sim)
        loss = loss + settings.alpha * (sim * (1 - similarity)).mean()
        loss = loss + reconstruction_loss(g, f, sim)
        yield loss.item()
        adam.zero_grad()
        loss.backward()
        adam.step()


def ours(
    subject: Subject, feature: Feature, settings: UnlearningSettings, generator: torch.Generator
) -> Iterator[float]:
    base = copy.deepcopy(subject.model).requires_grad_(True)
    steps = unlearn(base, subject.decode, subject.draw, [feature], settings, generator)
    return (terms["total"] for _, terms in steps)


def ways(name: str, base: nn.Module) -> tuple[dict[str, Iterator[float]], int]:
    """Return both, each yielding its loss before every step, and the size of their batches."""
    config = load_config(name, "cpu").config
    subject = Subject(base.eval().requires_grad_(False), config.space, nn.Identity(), "none", {})
    settings = replace(config.unlearning, value_range=subject.value_range)
    z = subject.draw(config.clicks, torch.Generator().manual_seed(0))
    n = len(z) // 10
    feature = find_feature(z[:n], z[n:], config.normalise, config.percentile)
    made = {
        way.__name__: way(subject, feature, settings, torch.Generator().manual_seed(1))
        for way in (straightforward, ours)
    }
    return made, settings.batch


def main() -> None:
    torch.set_num_threads(1)
    for name in ("unlearning_vae_mnist", "unlearning_gan_mnist"):
        base = load_config(name, "cpu").config.base
        steps, batch = ways(name, load_checkpoint(base))
        torch.testing.assert_close(*(next(step) for step in steps.values()), rtol=1e-4, atol=1e-6)
        what = f"{base}, one unlearning step on {batch} latents, 1 CPU thread"
        compare(what, {way: partial(next, step) for way, step in steps.items()}, ROUNDS)


if __name__ == "__main__":
    main()
