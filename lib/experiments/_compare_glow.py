"""The rivals that answer one request to forget, made from one Glow: taming and plain baselines."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lib.checkpoints import load_checkpoint
from lib.experiments._taming import Bench, training_seconds
from lib.machine import clock
from lib.methods.amnesia import Batch, Elbo
from lib.methods.baselines import fine_tune_loss, gradient_ascent_loss
from lib.methods.taming import TamingSettings, best_of, draw, nll_statistics, signed_distance
from lib.models.glow import Glow
from lib.results import read_results

SEED = 0


@dataclass(frozen=True)
class Plan:
    """Plain training of all weights with Adam: for how long, how fast, on how much.

    ``batch`` pictures of each set make a step. ``rest_weight`` is that of the rest where the
    forget set is climbed; ``check_every`` so many steps its stop rule is tested.
    """

    steps: int
    lr: float
    batch: int
    rest_weight: float = 1.0
    check_every: int = 10


@dataclass(frozen=True)
class Request:
    """What is to be forgotten, what is not, and how each method goes about it."""

    forget: Tensor
    remember: Tensor
    taming: TamingSettings
    fine_tune: Plan
    gradient_ascent: Plan


class Rival(NamedTuple):
    """A model and its cost: steps, seconds, and how many different pictures it needs at most.

    ``stopped`` is 1 if a rule ended it, 0 if it ran out of steps.
    """

    model: Glow
    steps: int
    seconds: float
    forget_pictures: int
    rest_pictures: int
    stopped: float = 0.0


def rivals(bench: Bench, request: Request, retrained: str | None) -> dict[str, Rival]:
    """Return the untouched base, what each method makes of it, and the retrained model if any."""
    found = {
        "original": Rival(bench.base, 0, 0.0, 0, 0),
        "taming": tamed(bench, request),
        "fine_tune": fine_tuned(bench, request),
        "gradient_ascent": ascended(bench, request),
    }
    if retrained is not None:
        found["retrained"] = trained_without(retrained, bench, request)
    return found


def tamed(bench: Bench, request: Request) -> Rival:
    """Tame the base; without a stop met, keep the nearest model, but count all steps."""
    settings, start, made = request.taming, clock(), 0

    def counted():
        nonlocal made
        for step in bench.steps(request.forget, request.remember, SEED, **asdict(settings)):
            made = step[1]["step"]
            yield step

    model, terms = best_of(counted())
    n_forget, n_rest = len(request.forget), len(request.remember)
    statistics = min(settings.statistics_images, n_rest) * (1 + made // settings.refresh_every)
    return Rival(
        model.eval(),
        made,
        clock() - start,
        # The stop rule looks at all of them.
        n_forget if settings.epsilon else min(n_forget, made * settings.batch_forget),
        min(n_rest, made * settings.batch_remember + statistics),
        terms["stopped"],
    )


def fine_tuned(bench: Bench, request: Request) -> Rival:
    """Go on training on the rest alone; the forget pictures are not even looked at."""
    plan = request.fine_tune

    def loss(elbo: Elbo, forget: Batch, rest: Batch):
        return fine_tune_loss(elbo, rest)[0]

    start = clock()
    model, made = train(bench, request, plan, loss)
    shown = min(len(request.remember), made * plan.batch)
    return Rival(model, made, clock() - start, 0, shown)


def ascended(bench: Bench, request: Request) -> Rival:
    """Climb the NLL of the forget set and descend that of the rest, up to taming's threshold.

    Nothing else would end an ascent: left alone it ruins the model within some tens of steps.
    """
    plan, settings = request.gradient_ascent, request.taming

    def loss(elbo: Elbo, forget: Batch, rest: Batch):
        return gradient_ascent_loss(elbo, forget, rest, plan.rest_weight)[0]

    def arrived(model: Glow, generator: torch.Generator) -> bool:
        shown = draw(request.remember, settings.statistics_images, generator)
        mu_r, sigma_r = nll_statistics(bench.score(model, shown, generator, 1))
        some = draw(request.forget, settings.statistics_images, generator)
        nll = bench.score(model, some, generator, 1)
        return bool(signed_distance(nll, mu_r, sigma_r, settings.delta).mean() >= 0)

    start = clock()
    model, made = train(bench, request, plan, loss, arrived)
    n_forget, n_rest = len(request.forget), len(request.remember)
    checks = (1 + made // plan.check_every) * settings.statistics_images
    return Rival(
        model,
        made,
        clock() - start,
        min(n_forget, made * plan.batch + checks),
        min(n_rest, made * plan.batch + checks),
        float(made < plan.steps),
    )


def train(
    bench: Bench,
    request: Request,
    plan: Plan,
    loss: Callable[[Elbo, Batch, Batch], Tensor],
    stop: Callable[[Glow, torch.Generator], bool] | None = None,
) -> tuple[Glow, int]:
    """Minimise ``loss(elbo, forget, rest)`` from the base on, up to a stop; count the steps.

    The "elbo" of a flow is exact: minus the bits per dimension. There are no classes.
    """
    model = copy.deepcopy(bench.base).train()
    adam = torch.optim.Adam(model.parameters(), lr=plan.lr, fused=True)
    generator = torch.Generator(bench.device).manual_seed(SEED)

    def elbo(x: Tensor, c: None) -> Tensor:
        return -bench.nll(model, x)

    def batch(images: Tensor) -> Batch:
        return bench.prepare(draw(images, plan.batch, generator), generator), None

    for step in range(plan.steps):
        if stop and step % plan.check_every == 0 and stop(model, generator):
            return model.eval(), step
        total = loss(elbo, batch(request.forget), batch(request.remember))
        adam.zero_grad(set_to_none=True)
        total.backward()
        adam.step()
    return model.eval(), plan.steps


def trained_without(name: str, bench: Bench, request: Request) -> Rival:
    """Load a Glow that never saw the person; ``random`` has the untrained base stand for it."""
    steps = 1 if name == "random" else read_results(name).value("training_iterations")
    model = bench.base if name == "random" else load_checkpoint(name).to(bench.device).eval()
    return Rival(model, int(steps), training_seconds(name), 0, len(request.remember))
