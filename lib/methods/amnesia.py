"""Selective Amnesia (Heng & Soh 2023): replace what a class shows, and keep the rest in place.

The paper maximises its objectives; the functions here return their negatives, to be minimised.
They know no model: ``elbo(x, c) -> (batch,)`` in nats is any lower bound on log p(x | theta, c),
or any training loss with its sign turned.

Expectations are batch means (``reduction="mean"``). The authors' VAE code sums over the batch
instead (``"sum"``) and leaves out the penalty's ½ (``factor=1``); with a batch of n images their
lambda is then the paper's 2 lambda / n.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Elbo = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]
Terms = dict[str, Tensor]
Sampler = Callable[[int, torch.Generator], Tensor]


@dataclass(frozen=True)
class Anchor:
    """The parameters theta* before forgetting, and how much each of them matters.

    Build it with :meth:`of`; the lists follow the order of ``model.named_parameters()``.
    """

    theta_star: list[Tensor]
    fisher: list[Tensor]

    @classmethod
    def of(cls, model: nn.Module, fisher: Mapping[str, Tensor]) -> "Anchor":
        """Copy the trainable parameters of ``model`` and join them with their Fisher information.

        Raises: ValueError if ``fisher`` does not fit the parameters or is negative or not finite.
        """
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if strangers := sorted(parameters.keys() ^ fisher.keys()):
            raise ValueError(
                f"The Fisher information and the model disagree on {len(strangers)} parameters "
                f"({', '.join(strangers[:3])}); compute it again with diagonal_fisher."
            )
        for name, parameter in parameters.items():
            if fisher[name].shape != parameter.shape:
                raise ValueError(
                    f"The Fisher information of {name!r} has shape {tuple(fisher[name].shape)}, "
                    f"the parameter has {tuple(parameter.shape)}; compute it again with "
                    "diagonal_fisher on this model."
                )
            if not (fisher[name] >= 0).all() or not torch.isfinite(fisher[name]).all():
                raise ValueError(
                    f"The Fisher information of {name!r} holds negative or non-finite values, but "
                    "it is a mean of squares; compute it again with diagonal_fisher."
                )
        return cls(
            [p.detach().clone() for p in parameters.values()],
            [fisher[n].detach().to(p.device, p.dtype) for n, p in parameters.items()],
        )


def ewc_penalty(model: nn.Module, anchor: Anchor, factor: float = 0.5) -> Tensor:
    """Measure how far the parameters moved from theta*, weighted by their Fisher information.

    The sum over i of F_i / 2 (theta_i - theta*_i)^2, the penalty that SA Eqs. (1) to (4) share.
    ``factor`` is the paper's ½; the authors' three code bases have 1, so that their lambda is
    twice the paper's.

    Returns a scalar in nats. Value and gradient come from one pass over the parameters.
    Raises: ValueError if the model's parameters are not those of ``anchor``.
    """
    theta = [p for p in model.parameters() if p.requires_grad]
    shapes = [p.shape for p in theta]
    if shapes != [p.shape for p in anchor.theta_star]:
        raise ValueError(
            f"The model has {len(theta)} trainable parameters that do not match the anchor's "
            f"{len(anchor.theta_star)}; make the anchor from this model with Anchor.of."
        )
    return _WeightedSquare.apply(factor, anchor, *theta)


class _WeightedSquare(torch.autograd.Function):
    """factor * sum F d^2 with d = theta - theta*, and its gradient 2 factor F d."""

    @staticmethod
    def forward(ctx, factor: float, anchor: Anchor, *theta: Tensor) -> Tensor:
        drift = torch._foreach_sub(theta, anchor.theta_star)
        pull = torch._foreach_mul(drift, anchor.fisher)
        value = sum(torch.dot(d.flatten(), p.flatten()) for d, p in zip(drift, pull, strict=True))
        ctx.factor, ctx.pull = factor, pull
        return factor * value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor):
        return None, None, *torch._foreach_mul(ctx.pull, 2 * ctx.factor * upstream)


def bayes_forget_loss(
    elbo: Elbo,
    forget: Batch,
    penalty: Tensor,
    lam: float,
    reduction: str = "mean",
) -> tuple[Tensor, Terms]:
    """Lower the likelihood of the class to forget and stay near theta*.

    Implements SA Eq. (1), with the bound in the place of log p. Kept because it fails: a lower
    bound can fall without limit while the likelihood stays.

    ``forget`` holds samples (batch, ...) of the original model and their class (batch,);
    ``penalty`` is :func:`ewc_penalty`. Returns the loss to minimise and its terms, in nats.
    Raises: ValueError if ``lam`` is negative or ``reduction`` is unknown.
    """
    return _add(forget=_reduce(elbo(*forget), reduction), ewc=_check_lambda(lam) * penalty)


def bayes_replay_loss(
    elbo: Elbo,
    forget: Batch,
    replay: Batch,
    penalty: Tensor,
    lam: float,
    reduction: str = "mean",
) -> tuple[Tensor, Terms]:
    """Lower the likelihood of the class to forget while replaying the classes to remember.

    Implements SA Eq. (3), which is twice SA Eq. (2) with a uniform prior on theta. The
    paper's Fig. 2 shows what goes wrong with the bound in the place of log p.

    ``replay`` holds samples of the original model for the other classes.
    Shapes, units and errors as in :func:`bayes_forget_loss`.
    """
    total, terms = bayes_forget_loss(elbo, forget, penalty, lam, reduction)
    kept = -_reduce(elbo(*replay), reduction)
    return total + kept, terms | {"replay": kept.detach()}


def amnesia_loss(
    elbo: Elbo,
    surrogate: Batch,
    replay: Batch | None,
    penalty: Tensor,
    lam: float,
    reduction: str = "mean",
) -> tuple[Tensor, Terms]:
    """Raise the likelihood of a surrogate under the forgotten class, and keep everything else.

    Implements SA Eq. (4), its lower line.

    ``surrogate`` holds draws of q(x | c_f) and the class to forget; ``replay`` holds samples of
    the original model for the other classes, or None to leave replay out. Both pass through
    ``elbo`` in one batch, which is faster than two.
    Shapes, units and errors as in :func:`bayes_forget_loss`.
    """
    ewc = _check_lambda(lam) * penalty
    if replay is None:
        return _add(surrogate=-_reduce(elbo(*surrogate), reduction), ewc=ewc)
    both = [torch.cat(pair) for pair in zip(surrogate, replay, strict=True)]
    values, kept = elbo(*both).split([len(surrogate[0]), len(replay[0])])
    return _add(surrogate=-_reduce(values, reduction), ewc=ewc, replay=-_reduce(kept, reduction))


def uniform_noise(image_shape: tuple[int, ...], device: torch.device | str = "cpu") -> Sampler:
    """Return the paper's surrogate q(x | c_f): every pixel uniform on [0, 1]."""

    def draw(n: int, generator: torch.Generator) -> Tensor:
        return torch.rand(n, *image_shape, generator=generator, device=device)

    return draw


def constant_grey(
    image_shape: tuple[int, ...], level: float = 0.5, device: torch.device | str = "cpu"
) -> Sampler:
    """Return a surrogate without noise: every pixel ``level``, the mean of the uniform one.

    Raises: ValueError if ``level`` is not in [0, 1].
    """
    if not 0 <= level <= 1:
        raise ValueError(f"The grey level is {level}; it must be in [0, 1].")

    def draw(n: int, generator: torch.Generator) -> Tensor:
        return torch.full((n, *image_shape), level, device=device)

    return draw


def _add(**terms: Tensor) -> tuple[Tensor, Terms]:
    return sum(terms.values()), {name: term.detach() for name, term in terms.items()}


def _reduce(values: Tensor, reduction: str) -> Tensor:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"The reduction is {reduction!r}; choose 'mean' or 'sum'.")
    return values.mean() if reduction == "mean" else values.sum()


def _check_lambda(lam: float) -> float:
    if not lam >= 0:
        raise ValueError(
            f"lambda is {lam}; it must be at least 0: a negative weight would reward forgetting "
            "everything."
        )
    return lam
