"""Audit a model that was made to forget: does it come back, and was it ever gone?

Nothing here knows a model or a method. Compare every answer with that of a model RETRAINED without
the data: it too learns the feature from a few pictures, comes near to pictures of it, and has
hidden layers that tell it apart. Only what is quicker, nearer or clearer than there was left behind
by the forgetting. The searches of :mod:`lib.methods.latent_attack` are more careful ones, for
latents of a known prior; here the input may be anything.
"""

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.models.diffusion import NoiseSchedule, PredictNoise, ddim_step, ddim_steps, q_sample

StepLoss = Callable[[nn.Module, torch.Generator], tuple[Tensor, dict[str, Tensor]]]
Measure = Callable[[nn.Module], float | Sequence[float]]


class Curve(NamedTuple):
    """What was measured when: ``steps`` (k,), and ``values`` (k,) or (k, m) for m numbers each."""

    steps: np.ndarray
    values: np.ndarray


def relearn(
    model: nn.Module,
    step_loss: StepLoss,
    measure: Measure,
    at: Sequence[int],
    lr: float,
    generator: torch.Generator,
) -> Curve:
    """Fine-tune a copy of a model, as a rule on a few forgotten pictures; measure it on the way.

    ``step_loss(model, generator)`` returns the total and its terms, as for :func:`lib.train.fit`,
    and draws its batch with ``generator``; the optimiser is Adam with all parameters.
    ``measure(model)`` is called in evaluation mode, without gradients, after each number of steps
    in ``at`` (0: before the first), and should use a generator of its own.

    Raises: ValueError if ``at`` is empty, negative, or not increasing.
    """
    at = list(at)
    if not at or at[0] < 0 or at != sorted(set(at)):
        raise ValueError(f"Got the steps {at}; give at least one, from 0 on and increasing.")
    taught = copy.deepcopy(model).requires_grad_(True)
    adam = torch.optim.Adam(taught.parameters(), lr=lr, fused=True)
    values = []
    for step in range(at[-1] + 1):
        if step in at:
            with torch.no_grad():
                values.append(measure(taught.eval()))
        if step < at[-1]:
            total, _ = step_loss(taught.train(), generator)
            adam.zero_grad(set_to_none=True)
            total.backward()
            adam.step()
    return Curve(np.array(at), np.array(values, dtype=float))


class Inverted(NamedTuple):
    """What comes nearest to each of n targets.

    ``error`` (n,) is the root mean square a pixel, ``inputs`` (n, ...) the latent and ``condition``
    (n, ...) the condition, None if there is none. ``squared_norm`` (n,) is that of the latent: for
    a standard normal prior the latent costs half of it, plus a constant, in nats.
    """

    error: Tensor
    inputs: Tensor
    condition: Tensor | None
    squared_norm: Tensor


def invert(
    decode: Callable[..., Tensor],
    targets: Tensor,
    start: Tensor,
    steps: int,
    lr: float,
    condition: Tensor | None = None,
) -> Inverted:
    """Search the inputs of a generator that draw given pictures, with Adam.

    In the spirit of Memories of Forgotten Concepts (Rusanovsky et al. 2025): where pictures of the
    forgotten are drawn as exactly, from latents as likely, as other pictures, the model still knows
    them. ``decode(inputs)`` returns pictures; with a ``condition`` to search as well, continuous
    and free of any constraint, it is ``decode(inputs, condition)``. No row may depend on another.

    ``start`` holds one input for every target, or several rounds of that, and so does
    ``condition``. Of each target the best of all rounds and steps is returned.

    Shapes: ``targets`` (n, ...), ``start`` and ``condition`` (rounds * n, ...).
    Raises: ValueError if the starts are not a multiple of the targets.
    """
    n = len(targets)
    rounds, rest = divmod(len(start), n) if n else (0, 0)
    if rest or not rounds or (condition is not None and len(condition) != len(start)):
        given = "none" if condition is None else len(condition)
        raise ValueError(
            f"Got {len(start)} starts and {given} conditions for {n} targets; give every target "
            "equally many starts, and every start a condition or none."
        )
    free = [x.detach().clone().requires_grad_() for x in (start, condition) if x is not None]
    wanted = targets.repeat(rounds, *[1] * (targets.ndim - 1))
    adam = torch.optim.Adam(free, lr=lr)
    least, best = torch.full((len(start),), torch.inf, device=start.device), free
    for step in range(steps + 1):
        with torch.enable_grad():
            squares = (decode(*free) - wanted).square().flatten(1).mean(1)
            gradients = torch.autograd.grad(squares.sum(), free)
        better = squares.detach() < least
        best = [
            _where(better, now.detach(), old.detach()) for now, old in zip(free, best, strict=True)
        ]
        least = torch.where(better, squares.detach(), least)
        if step < steps:
            for x, gradient in zip(free, gradients, strict=True):
                x.grad = gradient
            adam.step()
    round_, each = least.view(rounds, n).argmin(0), torch.arange(n, device=start.device)
    chosen = [x.unflatten(0, (rounds, n))[round_, each] for x in best]
    return Inverted(
        least.view(rounds, n)[round_, each].sqrt(),
        chosen[0],
        chosen[1] if condition is not None else None,
        chosen[0].square().flatten(1).sum(1),
    )


@torch.no_grad()
def redraw(
    predict: PredictNoise,
    x0: Tensor,
    t: int,
    noise: Tensor,
    schedule: NoiseSchedule,
    steps: int,
    clip: bool = False,
) -> Tensor:
    """Put noise on pictures up to step t, and let a diffusion model take it off by DDIM.

    SDEdit (Meng et al. 2022) edits pictures so. Here it asks at which noise a model no longer
    brings back what it was given: of little noise every model does, whatever it was trained on.
    ``steps`` are those of a whole way from T - 1 on; the later ones among them are taken.

    Shapes: ``x0`` and ``noise`` (batch, ...); returns (batch, ...).
    Raises: ValueError if ``t`` is not a step of the schedule, or ``steps`` not in 1..T.
    """
    if not 0 <= t < schedule.n_steps:
        raise ValueError(f"Got step {t}; choose one from 0 to {schedule.n_steps - 1}.")
    x = q_sample(x0, torch.full((len(x0),), t, device=x0.device), noise, schedule)
    later = [step for step in ddim_steps(schedule.n_steps, steps) if step < t]
    for now, after in pairwise([t, *later, -1]):
        x = ddim_step(x, predict(x, now), now, after, schedule, clip=clip)
    return x


class Probe(NamedTuple):
    """Balanced accuracy of a linear probe on held-out features, and of probes of shuffled labels.

    ``shuffled`` is the control, near 1 / (number of classes) if nothing leaks.
    """

    accuracy: float
    shuffled: float


def linear_probe(
    features: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    seed: int = 0,
    test_share: float = 0.5,
    n_shuffles: int = 3,
) -> Probe:
    """Ask whether labels can be read off features by a line: logistic regression, held-out half.

    Features are standardised by the training half, and classes weigh the same however rare.
    The control learns from labels in random order and is tested on the true ones.

    Shapes: ``features`` (n, d), ``labels`` (n,).
    Raises: ValueError if the shapes do not fit or a class has fewer than two examples.
    """
    from sklearn.linear_model import LogisticRegression  # takes seconds to import
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import train_test_split
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = (v.detach().cpu().numpy() if isinstance(v, Tensor) else v for v in (features, labels))
    classes, counts = np.unique(y, return_counts=True)
    if x.ndim != 2 or len(x) != len(y) or len(classes) < 2 or counts.min() < 2:
        raise ValueError(
            f"Got features of shape {x.shape} and classes of {counts.tolist()} examples; give "
            "(n, d) and (n,) with at least two classes, and two examples of each."
        )
    x_train, x_test, y_train, y_test = train_test_split(
        x, y, test_size=test_share, stratify=y, random_state=seed
    )

    def accuracy(taught: np.ndarray) -> float:
        regression = LogisticRegression(max_iter=1000, class_weight="balanced")
        probe = make_pipeline(StandardScaler(), regression).fit(x_train, taught)
        return float(balanced_accuracy_score(y_test, probe.predict(x_test)))

    shuffle = np.random.default_rng(seed).permutation
    return Probe(
        accuracy(y_train), float(np.mean([accuracy(shuffle(y_train)) for _ in range(n_shuffles)]))
    )


@torch.no_grad()
def hidden_features(
    model: nn.Module,
    layers: Sequence[str],
    call: Callable[..., object],
    inputs: Sequence[Tensor],
    side: int = 4,
    chunk: int = 500,
) -> dict[str, Tensor]:
    """Return what layers of a model answer to inputs, by their names, for :func:`linear_probe`.

    ``layers`` are names in ``model.named_modules()``, whose output is one tensor, once a call.
    ``call(*inputs)`` runs the model, for instance ``model.decode``, on ``chunk`` rows at a time.
    Feature maps larger than ``side``×``side`` are averaged to it.

    Shapes: each of ``inputs`` (n, ...); returns (n, d) a layer.
    Raises: ValueError if there is no such layer, or one does not answer once a call.
    """
    known = dict(model.named_modules())
    if missing := [name for name in layers if name not in known]:
        raise ValueError(f"There is no layer {missing[0]!r}; there are {', '.join(known)}.")
    found: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str) -> Callable:
        return lambda module, given, answer: found[name].append(_flat(answer, side))

    hooks = [known[name].register_forward_hook(keep(name)) for name in layers]
    parts = list(zip(*(x.split(chunk) for x in inputs), strict=True))
    try:
        for part in parts:
            call(*part)
    finally:
        for hook in hooks:
            hook.remove()
    for name, answers in found.items():
        if len(answers) != len(parts):
            raise ValueError(
                f"The layer {name!r} answered {len(answers)} times to {len(parts)} calls; choose "
                "layers that are used once a call."
            )
    return {name: torch.cat(answers) for name, answers in found.items()}


def _flat(answer: Tensor, side: int) -> Tensor:
    if answer.ndim == 4:
        size = [min(side, n) for n in answer.shape[2:]]
        answer = F.adaptive_avg_pool2d(answer.float(), size)
    return answer.flatten(1).clone()


def _where(chosen: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(chosen.view(-1, *[1] * (a.ndim - 1)), a, b)
