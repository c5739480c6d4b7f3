"""Does the digit come back? The audit of a conditional model; read it beside the retrained one."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lib.experiments._attack import Inversion
from lib.experiments._conditional_kinds import Kind
from lib.experiments._digits import Digits
from lib.methods.audit import Inverted, hidden_features, invert, linear_probe, relearn
from lib.run import Run

Found = dict[str, float | np.ndarray]
N_KEPT = 8  # pictures for a figure


@dataclass(frozen=True)
class Relearning:
    """Training on the digit's first ``n_pictures``; ``n_samples`` are judged after ``at`` steps.

    A row reports what is reached after ``report`` of them, one of ``at``.
    """

    n_pictures: tuple[int, ...]
    at: tuple[int, ...]
    report: int
    batch: int
    lr: float
    n_samples: int

    def __post_init__(self):
        if self.report not in self.at:
            raise ValueError(f"report is {self.report}; choose one of the steps {list(self.at)}")


@dataclass(frozen=True)
class Redrawing:
    """``n_targets`` held-out pictures of the digit, and of others, with noise up to each of ``at``.

    Only a diffusion model can be asked so.
    """

    at: tuple[int, ...]
    n_targets: int


@dataclass(frozen=True)
class Audit:
    """The parts of the audit.

    ``n_probed`` held-out pictures of all digits are shown to the hidden layers, and ``n_members``
    of the digit, trained on and held out, are scored with ``member_draws`` draws of noise each.
    """

    relearning: Relearning
    inversion: Inversion
    n_probed: int
    n_members: int
    member_draws: int
    redrawing: Redrawing | None = None


class Auditor:
    """Audit models of one kind; ``right(images, classes)`` is the share that shows its class."""

    def __init__(
        self,
        plan: Audit,
        kind: Kind,
        label: int,
        train: Digits,
        test: Digits,
        right: Callable[[Tensor, Tensor], float],
        run: Run,
    ):
        self.plan, self.kind, self.label, self.right, self.run = plan, kind, label, right, run
        self.train, self.test, self.others = train, test, test.without([label])

    def shows(self, images: Tensor) -> float:
        """Return the share of pictures that shows the digit."""
        asked = torch.full((len(images),), self.label, device=images.device)
        return self.right(images, asked)

    def of(self, model: nn.Module, seed: int) -> Found:
        """Return the whole audit of a model."""
        frozen = deepcopy(model).eval().requires_grad_(False)
        return (
            self.relearned(frozen, seed)
            | self.inverted(frozen, seed)
            | self.probed(frozen, seed)
            | self.members(frozen, seed)
            | (self.redrawn(frozen, seed) if self.plan.redrawing else {})
        )

    def relearned(self, model: nn.Module, seed: int) -> Found:
        """Return the share of the digit while a model is taught it: ``curves`` (sizes, k)."""
        plan, kind, device = self.plan.relearning, self.kind, self.run.device
        asked = torch.full((plan.n_samples,), self.label, device=device)
        curves, found = [], {}

        def measure(taught: nn.Module) -> float:
            return self.shows(kind.draw(taught, asked, self.run.generator(8000 + seed)))

        for n in plan.n_pictures:
            x, c = self.train.first(n, self.label)

            def step_loss(taught: nn.Module, generator: torch.Generator, x=x, c=c):
                pick = torch.randint(len(x), (plan.batch,), generator=generator, device=device)
                elbo = kind.bound(taught, self.label, generator)
                return -elbo(x[pick], c[pick]).mean(), {}

            curve = relearn(
                model, step_loss, measure, plan.at, plan.lr, self.run.generator(9000 + seed)
            )
            curves.append(curve.values)
            found[f"relearn_{n}"] = float(curve.values[plan.at.index(plan.report)])
        return found | {"curves": np.stack(curves)}

    def inverted(self, model: nn.Module, seed: int) -> Found:
        """Search what draws held-out pictures; quantities as in :data:`OF_THE_AUDIT`.

        ``z`` searches the latent under the picture's own class, ``zc`` the condition with it.
        """
        plan, kind, found = self.plan.inversion, self.kind, {}
        sets = {
            "": self.test.first(plan.n_targets, self.label),
            "_others": self.others.first(plan.n_targets),
        }
        for suffix, (targets, labels) in sets.items():
            n = plan.rounds * len(targets)
            start = kind.latents(model, n, self.run.generator(9500 + seed))
            condition = kind.condition(model, labels).repeat(plan.rounds, 1)
            options = {"targets": targets, "start": start, "steps": plan.steps, "lr": plan.lr}
            fixed = invert(lambda z, c=condition: kind.decode(model, z, c), **options)
            free = invert(partial(kind.decode, model), condition=condition, **options)
            found[f"error_z{suffix}"] = float(fixed.error.mean())
            found[f"error_zc{suffix}"] = float(free.error.mean())
            if not suffix:
                found |= self._nearest(model, fixed, free, condition[: len(targets)])
        return found

    @torch.no_grad()
    def _nearest(
        self, model: nn.Module, fixed: Inverted, free: Inverted, condition: Tensor
    ) -> Found:
        """Judge the nearest pictures of the digit, and keep some."""
        z = self.kind.decode(model, fixed.inputs, condition).clamp(0, 1)
        zc = self.kind.decode(model, free.inputs, free.condition).clamp(0, 1)
        return {
            "share_z": self.shows(z),
            "share_zc": self.shows(zc),
            "norm_z": float((fixed.squared_norm / fixed.inputs[0].numel()).sqrt().mean()),
            "found_z": as_levels(z[:N_KEPT]),
            "found_zc": as_levels(zc[:N_KEPT]),
        }

    def probed(self, model: nn.Module, seed: int) -> Found:
        """Probe hidden layers for the digit; no class is told to the model."""
        x, labels = self.test.first(self.plan.n_probed)
        noise = torch.randn(x.shape, generator=self.run.generator(0), device=x.device)
        layers = self.kind.layers
        features = hidden_features(
            model, list(layers.values()), partial(self.kind.read, model), [x, noise]
        )
        probes = {
            name: linear_probe(features[layer], labels == self.label, seed, n_shuffles=1)
            for name, layer in layers.items()
        }
        found = {f"probe_{name}": probe.accuracy for name, probe in probes.items()}
        return found | {
            "probe_shuffled": float(np.mean([probe.shuffled for probe in probes.values()]))
        }

    @torch.no_grad()
    def members(self, model: nn.Module, seed: int) -> Found:
        """Compare the bounds of the digit's training and held-out pictures, asked as the digit.

        ``member_auc`` is the chance that one trained on has the higher bound of the two.
        """
        from sklearn.metrics import roc_auc_score  # takes seconds to import

        n = self.plan.n_members
        scores = []
        for data in (self.train, self.test):
            # As many of each, so that both see the same noise.
            x, c = data.first(n, self.label)
            elbo = self.kind.bound(model, self.label, self.run.generator(9900 + seed))
            draws = [elbo(x, c) for _ in range(self.plan.member_draws)]
            scores.append(torch.stack(draws).mean(0).double())
        members, strangers = (each.cpu().numpy() for each in scores)
        is_member = np.repeat([1, 0], [len(members), len(strangers)])
        return {
            "bound_members": float(members.mean()),
            "member_gap": float(members.mean() - strangers.mean()),
            "member_auc": float(roc_auc_score(is_member, np.concatenate([members, strangers]))),
        }

    @torch.no_grad()
    def redrawn(self, model: nn.Module, seed: int) -> Found:
        """Put noise on held-out pictures up to a step and see what the model makes of them.

        The share that shows the digit, and of the others that their own class; without guidance.
        """
        plan, kind, found = self.plan.redrawing, self.kind, {}
        x, c = self.test.first(plan.n_targets, self.label)
        rest, labels = self.others.first(plan.n_targets)
        noise = torch.randn(x.shape, generator=self.run.generator(9700 + seed), device=x.device)
        kept = []
        for t in plan.at:
            back = kind.redraw(model, x, c, t, noise)
            found[f"redraw_{t}"] = self.shows(back)
            kept.append(as_levels(back[:N_KEPT]))
            back = kind.redraw(model, rest, labels, t, noise)
            found[f"redraw_others_{t}"] = self.right(back, labels)
        return found | {"redrawn": np.stack(kept)}


def as_levels(pictures: Tensor) -> np.ndarray:
    """Return pictures (..., 1, h, w) in [0, 1] as uint8 (..., h, w)."""
    return (255 * pictures.squeeze(-3)).round().to(torch.uint8).cpu().numpy()
