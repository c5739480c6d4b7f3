"""The diagonal Fisher information of a diffusion model, exactly and from a few timesteps.

Selective Amnesia squares one gradient a sample: that of the noise errors summed over ALL T
timesteps, with one fresh noise at each. Write h_t for the gradient at step t, mu_t and v_t for its
mean and variance over the noise (entry by entry), and mu and v for their sums over t. Then

    exact        E[(sum_t h_t)^2]  =  mu^2 + v

while the training objective is an expectation over the noise, whose gradient is mu: the square of
it, mu^2, is what the formula of the Fisher information asks for, and v is noise that one draw a
step leaves behind. The paper names a cheaper estimate as future work. The other two estimators
are our own addition: they take m steps, one drawn from each of m equal parts of the T, with
L = T / m as the weight of each. Let b be the sum, over the parts, of the variance of mu_t in a
part. Then

    subsampled   E[(L sum h)^2]                 =  mu^2 + L v + L^2 b
    product      E[(L sum h) (L sum h')]        =  mu^2

where h' are other steps and noises, drawn independently. So exact is unbiased for SA's formula,
mu^2 + v, and too large by v for mu^2; the plain square is too large for both; the product is
unbiased for mu^2 alone. At m = T each part is one step, and the plain square is the exact one.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor

Gradient = list[Tensor]
StepGradient = Callable[[Tensor, Tensor], Gradient]


class DiffusionModel(Protocol):
    """What the Fisher information asks of a model, an ``nn.Module`` such as ConditionalDDPM."""

    schedule: object  # with ``n_steps``, the number T

    def loss_from_noise(self, x0: Tensor, c: Tensor, t: Tensor, noise: Tensor) -> Tensor: ...

    def check_images(self, x0: Tensor) -> None: ...

    def check_classes(self, c: Tensor, batch: int) -> None: ...


def diffusion_fisher(
    model: DiffusionModel,
    samples: Iterable[tuple[Tensor, Tensor]],
    *,
    estimator: str = "product",
    n_steps: int = 8,
    chunk: int = 64,
    generator: torch.Generator,
    clamp: bool = True,
) -> dict[str, Tensor]:
    """Average a Fisher estimate of every sample, for every trainable parameter.

    ``samples`` yields batches: images (batch, ...) in the model's range, [-1, 1], and their
    classes (batch,), on the device of model and ``generator``. ``estimator`` is ``exact``,
    ``subsampled`` or ``product``. ``n_steps`` is m, the timesteps of one minibatch, of which the
    product takes two; the exact one takes all T. ``chunk`` bounds the timesteps that are in
    memory at once, and changes nothing else.

    Where the product's noise exceeds a parameter's information, its mean over the samples may be
    negative, which no penalty can use. ``clamp`` sets such entries to 0. That is a bias upwards,
    larger the noisier an entry is: with a normal error of standard deviation s, 0.4 s where the
    truth is 0, and 0.01 s where it is 2 s. It falls with more samples. The parameters at 0 are
    free to move. ``clamp=False`` keeps the unbiased values.

    Samples are taken one at a time: on a CPU this is faster than ``vmap``.

    Returns one tensor a parameter, by name, shaped like it, of squared units of the loss.
    Raises: ValueError if the estimator is unknown, ``n_steps`` is not in 1..T, ``chunk`` is below
    1, the model is in training mode, there are no samples, or an image, class or gradient is bad.
    """
    n_total = model.schedule.n_steps
    _check_settings(model, estimator, n_steps, chunk)
    free = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p) for name, p in free.items()}
    n_samples = 0
    for images, classes in samples:
        model.check_images(images)
        model.check_classes(classes, len(images))
        for x0, c in zip(images.split(1), classes.split(1), strict=True):
            gradient = gradient_of_steps(model, list(free.values()), x0, c, chunk, generator)
            value = ESTIMATORS[estimator](gradient, n_total, n_steps, generator)
            torch._foreach_add_(list(sums.values()), value)
        n_samples += len(images)
    if n_samples == 0:
        raise ValueError("The Fisher information got no samples; give at least one batch.")
    if not all(torch.isfinite(total).all() for total in sums.values()):
        raise ValueError(
            "A gradient is not finite; check the samples and the weights for NaN and infinity."
        )
    means = {name: total / n_samples for name, total in sums.items()}
    return {name: mean.clamp(min=0) for name, mean in means.items()} if clamp else means


def exact(
    gradient: StepGradient, n_total: int, n_steps: int, generator: torch.Generator
) -> Gradient:
    """Square the gradient of the sum over all T steps, as Selective Amnesia does.

    Unbiased for mu^2 + v, see the top of the file. ``n_steps`` and ``generator`` are not used.
    """
    steps = torch.arange(n_total, device=generator.device)
    return torch._foreach_pow(gradient(steps, torch.ones_like(steps)), 2)


def subsampled(
    gradient: StepGradient, n_total: int, n_steps: int, generator: torch.Generator
) -> Gradient:
    """Square the gradient of m steps, scaled up to T: its mean is mu^2 + L v + L^2 b."""
    return torch._foreach_pow(gradient(*stratified_steps(n_total, n_steps, generator)), 2)


def product(
    gradient: StepGradient, n_total: int, n_steps: int, generator: torch.Generator
) -> Gradient:
    """Multiply two independent gradients of m steps each, scaled up to T.

    Unbiased for mu^2, since E[g g'] = E[g] E[g']; single values may be negative. The steps must be
    independent too: with the same ones in both, L^2 b would remain.
    """
    first, second = (gradient(*stratified_steps(n_total, n_steps, generator)) for _ in range(2))
    return torch._foreach_mul(first, second)


ESTIMATORS = {"exact": exact, "subsampled": subsampled, "product": product}


def stratified_steps(
    n_total: int, n_steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw one step uniformly from each of m equal parts of 0..T-1.

    Every part counts by its length, so that a weighted sum over the drawn steps has the mean of
    the sum over all of them; unlike independent draws, it has no variance between the parts.
    Where m does not divide T, lengths differ by 1.

    Returns steps and lengths, both (m,) whole numbers.
    """
    edges = torch.arange(n_steps + 1, device=generator.device) * n_total // n_steps
    lengths = edges.diff()
    share = torch.rand(n_steps, generator=generator, device=generator.device, dtype=torch.float64)
    return edges[:-1] + (share * lengths).long(), lengths


def gradient_of_steps(
    model: DiffusionModel,
    parameters: list[Tensor],
    x0: Tensor,
    c: Tensor,
    chunk: int,
    generator: torch.Generator,
) -> StepGradient:
    """Return the function of steps and weights (m,) that gives one image's weighted gradient.

    Each call draws fresh noise at each step. Gradients of chunks add up; only their sum is
    squared by the estimators. Shapes: ``x0`` (1, ...), ``c`` (1,).
    """

    def gradient(steps: Tensor, weights: Tensor) -> Gradient:
        shape = (len(steps), *x0.shape[1:])
        noises = torch.randn(shape, generator=generator, device=x0.device, dtype=x0.dtype)
        total = [torch.zeros_like(p) for p in parameters]
        chunks = (tensor.split(chunk) for tensor in (steps, weights, noises))
        for t, weight, noise in zip(*chunks, strict=True):
            loss = model.loss_from_noise(x0.expand_as(noise), c.expand_as(t), t, noise)
            summed = (weight * loss).sum()
            # A parameter that the loss does not see has gradient 0, as in diagonal_fisher.
            part = torch.autograd.grad(
                summed, parameters, allow_unused=True, materialize_grads=True
            )
            torch._foreach_add_(total, part)
        return total

    return gradient


def _check_settings(model: DiffusionModel, estimator: str, n_steps: int, chunk: int) -> None:
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"The Fisher estimator is {estimator!r}; choose from {', '.join(ESTIMATORS)}."
        )
    n_total = model.schedule.n_steps
    if estimator != "exact" and not 1 <= n_steps <= n_total:
        raise ValueError(
            f"The Fisher estimator got n_steps = {n_steps}; the model has {n_total} timesteps: "
            f"choose 1 to {n_total}."
        )
    if chunk < 1:
        raise ValueError(f"The chunk is {chunk} timesteps; it must be at least 1.")
    if model.training:
        raise ValueError(
            "The model is in training mode, where dropout adds noise that is not the "
            "diffusion's; call model.eval() first."
        )
