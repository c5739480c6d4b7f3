"""What Feature Unlearning is compared with: rules at sampling time, and training on the rest.

Each choice here is ours: our sources say that the paper compares with editing latents, not how.
"""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lib.methods.feature_unlearning import (
    Decode,
    Draw,
    Feature,
    Loss,
    Step,
    edited_latent,
    indicator,
)


def latent_rejection(
    n: int,
    draw: Draw,
    features: Sequence[Feature],
    generator: torch.Generator,
    max_rounds: int = 100,
) -> Tensor:
    """Draw latents until ``n`` of them have none of the features: never sample proj >= t.

    The model stays as it is, so whoever has its weights samples what they like.

    Shapes: ``draw(n, generator)`` returns (n, dim), and so does this function.
    Raises: ValueError if ``max_rounds`` draws of ``n`` latents do not suffice.
    """
    kept = []
    for _ in range(max_rounds):
        z = draw(n, generator)
        for z_e, t in features:
            z = z[indicator(z, z_e, t) == 0]
        kept.append(z)
        if sum(map(len, kept)) >= n:
            return torch.cat(kept)[:n]
    raise ValueError(
        f"Only {sum(map(len, kept))} of {max_rounds * n} latents lie below the threshold, wanted "
        f"{n}; raise the threshold."
    )


@torch.no_grad()
def edited_sample(
    model: nn.Module, decode: Decode, z: Tensor, features: Sequence[Feature]
) -> Tensor:
    """Decode latents after erasing the features from those that have them.

    Unlearning trains a copy of the model to draw these pictures from the latents as they were.

    Shapes: ``z`` (n, dim); returns what ``decode(model, z)`` does.
    """
    return decode(model, edited_latent(z, features)[0])


def finetune_on_negatives(
    base: nn.Module,
    loss: Loss,
    negatives: Tensor,
    generator: torch.Generator,
    lr: float = 1e-4,
    batch: int = 32,
    max_steps: int = 500,
) -> Iterator[Step]:
    """Go on training a copy with its own loss on pictures without the feature; yield each step.

    ``loss(model, images, generator)`` is what trained the model, for instance minus the ELBO of a
    VAE; for a GAN it is the generator's, and steps its critic inside. L_recon on the negative
    latents would not do in its place: at the start it is zero and has no gradient.

    Shapes: ``negatives`` (n, ...) as ``loss`` takes them. Terms: ``step`` and ``total``. The model
    is one object, in training mode, that the next step changes.
    Raises: ValueError if there are no pictures.
    """
    if len(negatives) == 0:
        raise ValueError("There are no negative pictures to train on; mark fewer or show more.")
    tuned = copy.deepcopy(base).train()
    optimizer = torch.optim.Adam(tuned.parameters(), lr=lr, fused=True)
    for step in range(max_steps + 1):
        chosen = torch.randint(
            len(negatives), (batch,), generator=generator, device=generator.device
        )
        total = loss(tuned, negatives[chosen.to(negatives.device)], generator)
        yield tuned, {"step": step, "total": total.item()}
        if step < max_steps:
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            optimizer.step()
