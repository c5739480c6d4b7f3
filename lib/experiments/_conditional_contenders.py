"""Who answers the request to forget a digit: conditional models, and what making them cost."""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lib.config import load_config
from lib.experiments._conditional_kinds import Kind, seconds, untrained
from lib.experiments._digits import Digits
from lib.methods import baselines
from lib.methods.amnesia import Elbo
from lib.methods.baselines import fine_tune_loss, gradient_ascent_loss, random_label_loss
from lib.run import Run
from lib.train import FUSED_ADAM

BASELINES = ("fine_tune", "gradient_ascent", "random_label", "saliency")


@dataclass(frozen=True)
class Plan:
    """How a baseline is trained, with Adam at ``lr`` and ``rest_weight`` of the other classes.

    It ends with the first check, every ``check_every`` steps, at which the share of the digit
    among what is drawn for it is at most ``Stop.share``; else after ``max_steps``.
    """

    max_steps: int
    lr: float
    check_every: int
    rest_weight: float = 1.0


@dataclass(frozen=True)
class Stop:
    """When a baseline has forgotten: at most this share of ``n_samples`` still shows the digit."""

    share: float
    n_samples: int


@dataclass(frozen=True)
class Baselines:
    """The plans, and what they share: ``batch`` images of each set, and the average of weights.

    ``mask_share`` of the weights are salient, by ``mask_images`` of the digit.
    """

    stop: Stop
    batch: int
    ema_decay: float | None
    mask_share: float
    mask_images: int
    fine_tune: Plan
    gradient_ascent: Plan
    random_label: Plan
    saliency: Plan


class Contender(NamedTuple):
    """A model and its cost: steps, seconds, different real pictures that it needs at most.

    ``stopped`` is 1 if a rule ended it, 0 if it ran to its last step.
    """

    model: nn.Module
    steps: int = 0
    seconds: float = 0.0
    forget_pictures: int = 0
    rest_pictures: int = 0
    stopped: float = 0.0


class Workshop:
    """Make every contender from one base; ``shows(images)`` is the share that shows the digit."""

    def __init__(self, config, kind: Kind, train: Digits, run: Run):
        self.config, self.kind, self.run, self.label = config, kind, run, config.forget
        is_digit = train.labels == config.forget
        self.forget = Digits(train.images[is_digit], train.labels[is_digit], train.source)
        self.rest = train.without([config.forget])
        self.base = untrained(kind, 0) if config.base == "random" else kind.load(config.base)

    def shipped(self, name: str, seed: int) -> nn.Module:
        """Load a model; beside an untrained base it is untrained, too."""
        return untrained(self.kind, seed) if self.config.base == "random" else self.kind.load(name)

    def ready(self, name: str) -> Contender:
        """Return the base, the retrained model or the one that Selective Amnesia made.

        The seconds of the last two are extrapolated; their steps are those of the run they name.
        """
        config, run = self.config, self.run
        if name == "original":
            return Contender(self.base)
        source = getattr(config, name)
        steps = load_config(source, run.profile).config.iterations
        if name == "retrained":
            cost = self.kind.retrained_seconds(
                self.base, source, self.rest, config.timed_steps, run
            )
            return Contender(self.shipped(source, 1), steps, cost, 0, len(self.rest.images))
        cost = self.kind.amnesia_seconds(self.base, source, config.timed_steps, run)
        return Contender(self.shipped(source, 2), steps, cost)

    def make(self, name: str, shows: Callable[[Tensor], float], seed: int) -> Contender:
        """Train one of the baselines."""
        shared: Baselines = self.config.baselines
        plan: Plan = getattr(shared, name)
        found = []
        cost = seconds(lambda: found.append(self._train(name, shared, plan, shows, seed)))
        model, steps, stopped = found[0]
        forget = {"gradient_ascent": steps * shared.batch, "saliency": shared.mask_images}
        sets = 1 if name in ("fine_tune", "gradient_ascent") else 2
        return Contender(
            model,
            steps,
            cost,
            min(forget.get(name, 0), len(self.forget.images)),
            min(sets * steps * shared.batch, len(self.rest.images)),
            float(stopped),
        )

    def _train(
        self,
        name: str,
        shared: Baselines,
        plan: Plan,
        shows: Callable[[Tensor], float],
        seed: int,
    ) -> tuple[nn.Module, int, bool]:
        kind, label, generator = self.kind, self.label, self.run.generator(seed)
        model = deepcopy(self.base).train()
        average = None
        if shared.ema_decay is not None:
            average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(shared.ema_decay))
        elbo = kind.bound(model, label, generator)
        asked = torch.full((shared.stop.n_samples,), label, device=self.run.device)
        watch = self.run.generator(7000 + seed)

        def latest() -> nn.Module:
            return model if average is None else average.module

        def forgotten() -> bool:
            pictures = kind.draw(latest().eval(), asked, watch)
            model.train()
            return shows(pictures) <= shared.stop.share

        limits = nullcontext()
        if name == "saliency":
            some = [self.forget.first(shared.mask_images)]
            limits = baselines.only(
                model, baselines.saliency_mask(model, elbo, some, shared.mask_share)
            )
        with limits:
            adam = FUSED_ADAM(model.parameters(), lr=plan.lr)
            for step in range(1, plan.max_steps + 1):
                total = self._loss(name, elbo, shared.batch, plan.rest_weight, generator)
                adam.zero_grad(set_to_none=True)
                total.backward()
                adam.step()
                if average is not None:
                    average.update_parameters(model)
                if step % plan.check_every == 0 and forgotten():
                    return latest().eval(), step, True
        return latest().eval(), plan.max_steps, False

    def _loss(
        self, name: str, elbo: Elbo, n: int, weight: float, generator: torch.Generator
    ) -> Tensor:
        rest = self.rest.batch(n, generator)
        if name == "fine_tune":
            return fine_tune_loss(elbo, rest)[0]
        if name == "gradient_ascent":
            return gradient_ascent_loss(elbo, self.forget.batch(n, generator), rest, weight)[0]
        pictures, _ = self.rest.batch(n, generator)
        return random_label_loss(elbo, pictures, self.label, rest, weight)[0]
