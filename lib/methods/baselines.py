"""The plain ways to make a conditional model forget a class, which the papers' are compared with.

Each is one objective on batches of real images. Like those of :mod:`lib.methods.amnesia` they know
no model: ``elbo(x, c) -> (batch,)`` in nats is any lower bound on log p(x | c), or any training
loss of an example with its sign turned. They return a loss to minimise and its terms.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lib.methods.amnesia import Batch, Elbo, Terms

Mask = Mapping[str, Tensor]


def fine_tune_loss(elbo: Elbo, rest: Batch) -> tuple[Tensor, Terms]:
    """Go on training on the other classes alone, and let catastrophic forgetting do the work.

    Nothing here asks for forgetting; what is not rehearsed only tends to get lost (McCloskey &
    Cohen 1989). It is the first baseline of most papers, such as Golatkar et al. (2020).

    ``rest`` holds images (batch, ...) and their classes (batch,). Returns the loss in nats.
    """
    kept = -elbo(*rest).mean()
    return kept, {"rest": kept.detach()}


def gradient_ascent_loss(
    elbo: Elbo, forget: Batch, rest: Batch | None, weight: float
) -> tuple[Tensor, Terms]:
    """Climb the training loss of the class to forget, and descend that of the others beside it.

    At ``weight`` 0 (``rest`` may then be None) it is the pure ascent of Graves et al. (2021) and
    Thudi et al. (2022); with a weight, NegGrad+ of Kurmanji et al. (2023). The bound has no lower
    end, so that the number of steps is part of the method: where it stops, it was stopped.

    ``forget`` and ``rest`` hold images (batch, ...) and their classes (batch,). Returns the loss
    in nats.
    Raises: ValueError if ``weight`` is negative, or positive and there is no rest.
    """
    _check_weight(weight, rest)
    bound = elbo(*forget).mean()
    if weight == 0:
        return bound, {"forget": bound.detach()}
    kept = -elbo(*rest).mean()
    return bound + weight * kept, {"forget": bound.detach(), "rest": kept.detach()}


def random_label_loss(
    elbo: Elbo, pictures: Tensor, label: int, rest: Batch | None, weight: float
) -> tuple[Tensor, Terms]:
    """Teach the class to forget to show the pictures of other classes, and rehearse the others.

    Wrong labels are the "unlearning" of Graves et al. (2021). A classifier gets images of the class
    with labels of others; for a generative model the roles turn round: the CONDITION ``label``
    gets others' pictures, so that asking for the class draws any other. Not one image of the
    class is needed.

    ``pictures`` (batch, ...) are drawn from all other classes; ``rest`` holds images and their own
    classes. Returns the loss in nats.
    Raises: ValueError if ``weight`` is negative, or positive and there is no rest.
    """
    _check_weight(weight, rest)
    c_f = torch.full((len(pictures),), label, device=pictures.device)
    wrong = -elbo(pictures, c_f).mean()
    if weight == 0:
        return wrong, {"wrong": wrong.detach()}
    kept = -elbo(*rest).mean()
    return wrong + weight * kept, {"wrong": wrong.detach(), "rest": kept.detach()}


def saliency_mask(
    model: nn.Module, elbo: Elbo, forget: Iterable[Batch], share: float
) -> dict[str, Tensor]:
    """Choose the ``share`` of all weights that the loss of the class to forget depends on most.

    They are those with the largest absolute gradient, summed over the batches ``forget`` and
    compared across all layers. SalUn (Fan et al. 2024) is :func:`random_label_loss` under this
    mask at share 0.5, with a small weight of the rest: 1e-3 in the released code for diffusion
    models, where 0 was reported to wipe out all classes.

    Returns one mask a trainable parameter, by name and shaped like it, True where a weight is
    chosen: exactly the rounded share of all, of equal gradients any.
    Raises: ValueError if ``share`` is not in (0, 1], or there is no batch.
    """
    if not 0 < share <= 1:
        raise ValueError(f"The share is {share}; choose one in (0, 1], where 1 masks nothing.")
    names, weights = zip(
        *((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True
    )
    total = None
    for x, c in forget:
        loss = -elbo(x, c).sum()
        gradient = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        total = gradient if total is None else torch._foreach_add(total, gradient)
    if total is None:
        raise ValueError("The saliency mask got no images of the class; give at least one batch.")
    size = torch.cat([each.flatten().abs() for each in total])
    chosen = torch.zeros_like(size, dtype=torch.bool)
    chosen[size.topk(round(share * len(size))).indices] = True
    parts = chosen.split([p.numel() for p in weights])
    return {name: part.view(p.shape) for name, part, p in zip(names, parts, weights, strict=True)}


@contextmanager
def only(model: nn.Module, mask: Mask) -> Iterator[None]:
    """Let gradients reach the masked weights alone, for as long as the context lasts.

    The others stay exactly where they are under an optimiser without weight decay that starts
    inside the context; momentum from before would still carry them.

    Raises: ValueError if the mask does not fit the model's trainable parameters.
    """
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if {n: p.shape for n, p in weights.items()} != {n: m.shape for n, m in mask.items()}:
        raise ValueError(
            f"The mask has {len(mask)} parameters that do not match the model's {len(weights)}; "
            "make it from this model with saliency_mask."
        )
    handles = [
        p.register_hook(lambda gradient, out=~mask[name]: gradient.masked_fill(out, 0))
        for name, p in weights.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_weight(weight: float, rest: Batch | None) -> None:
    if not weight >= 0 or (weight > 0 and rest is None):
        raise ValueError(
            f"The weight of the rest is {weight} with {'no' if rest is None else 'a'} batch of it; "
            "give at least 0, and a batch where it is above 0."
        )
