"""Does the digit come back? The audit of every contender, and of the retrained model beside it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lib.experiments._attack import Inversion, Opinions, Way, margins_of, outcome
from lib.experiments._digits import Digits, unit
from lib.experiments._unconditional_contenders import Contender, Yardstick, seeded
from lib.experiments._unlearning import Subject, as_uint8
from lib.experiments._unlearning_tuning import negative_elbo
from lib.experiments.unlearning_attack import pixels
from lib.methods.audit import Inverted, hidden_features, invert, linear_probe, relearn
from lib.methods.feature_unlearning import edited_latent
from lib.methods.latent_attack import pairs_loss, search

Found = dict[str, float | np.ndarray]


@dataclass(frozen=True)
class Relearning:
    """Fine-tuning on each of ``n_pictures`` of the digit; its share is measured after ``at``."""

    n_pictures: tuple[int, ...]
    at: tuple[int, ...]
    lr: float
    batch: int
    n_samples: int


@dataclass(frozen=True)
class Search:
    """A climb from ``n_starts`` latents; ``safe`` is a margin of logits the adversary trusts."""

    n_starts: int
    steps: int
    lr: float
    safe: float


@dataclass(frozen=True)
class Probing:
    """Layers to probe with ``n`` inputs: real pictures for encoders, latents for all others."""

    layers: tuple[str, ...]
    n: int
    side: int


@dataclass(frozen=True)
class Audit:
    """The parts of the audit; ``share`` of the prior counts as inside it."""

    share: float
    relearning: Relearning
    inversion: Inversion
    search: Search
    probing: Probing


def own_weights(contenders: Mapping[str, Contender]) -> dict[str, nn.Module]:
    """Return the models; whoever has the weights of a service has those of the original."""
    services = ("edited", "rejected")
    return {name: c.system.model for name, c in contenders.items() if name not in services}


def relearned(
    yardstick: Yardstick, model: nn.Module, pictures: Tensor, way: Way, audit: Audit, seed: int
) -> np.ndarray:
    """Return the share of samples with the digit (k,) as a model is taught it by ``pictures``.

    A VAE has its ELBO. A GAN's generator learns to draw the pictures from the latents where it
    comes nearest to them as it is.
    """
    subject, plan = yardstick.subject, audit.relearning
    data, loss = pictures, negative_elbo
    if subject.is_gan:
        found = inverted(subject, partial(pixels, subject, model), pictures, way, audit, seed)
        loss = pairs_loss(partial(pixels, subject), found.inputs, pictures)
        data = torch.arange(len(pictures), device=subject.device)
    z = yardstick.z[: plan.n_samples]

    def step_loss(taught: nn.Module, generator: torch.Generator):
        size = (min(plan.batch, len(data)),)
        index = torch.randint(len(data), size, generator=generator, device=generator.device)
        return loss(taught, data[index], generator), {}

    def share(taught: nn.Module) -> float:
        return float(yardstick.has(subject.pictures(taught, z)).float().mean())

    generator = seeded(subject.device, seed)
    return relearn(model, step_loss, share, plan.at, plan.lr, generator).values


def inverted(
    subject: Subject,
    decode: Callable[[Tensor], Tensor],
    targets: Tensor,
    way: Way,
    audit: Audit,
    seed: int,
) -> Inverted:
    """Search the latents that draw ``targets``, from draws of the prior."""
    plan = audit.inversion
    start = way.draw(plan.rounds * len(targets), seeded(subject.device, seed))
    return invert(decode, targets, start, plan.steps, plan.lr)


def inversions(
    yardstick: Yardstick,
    contenders: Mapping[str, Contender],
    targets: Mapping[str, Tensor],
    way: Way,
    audit: Audit,
    seed: int,
    n_shown: int,
) -> Found:
    """Look for real pictures in every contender but the one that refuses: errors, and how far."""
    found, subject = {}, yardstick.subject
    for name, contender in contenders.items():
        system = contender.system
        if system.refuses:
            continue

        def decode(z: Tensor, system=system) -> Tensor:
            return pixels(subject, system.model, edited_latent(z, system.edits)[0])

        for kind, wanted in targets.items():
            nearest = inverted(subject, decode, wanted, way, audit, seed)
            drawn = contender.pictures(nearest.inputs)
            distance = way.prior.distance(nearest.inputs)
            found[f"inversion_error_{kind}_{name}"] = float(nearest.error.mean())
            found[f"inversion_distance_{kind}_{name}"] = float(distance.mean())
            found[f"inversion_share_{kind}_{name}"] = float(yardstick.has(drawn).float().mean())
            found[f"errors_{kind}_{name}"] = nearest.error.cpu().numpy()
            found[f"distances_{kind}_{name}"] = distance.cpu().numpy()
            found[f"inverted_{kind}_{name}"] = as_uint8(drawn[:n_shown])
    return found


def searches(
    opinions: Opinions,
    contenders: Mapping[str, Contender],
    ways: Sequence[Way],
    audit: Audit,
    seed: int,
    n_shown: int,
) -> Found:
    """Climb the first judge in every contender; both must agree that there is the digit."""
    found, plan = {}, audit.search
    for way in ways:
        for name, contender in contenders.items():
            system = contender.system
            starts = way.draw(plan.n_starts, seeded(opinions.subject.device, seed))
            margins = margins_of(system, way, opinions, both=False)
            *_, (best, _) = search(margins, way.prior, starts, plan.lr, plan.steps, way.inside)
            result = outcome(best, system, way, opinions, n_shown)
            for quantity in ("claimed", "success", "distance"):
                found[f"search_{quantity}_{way.name}_{name}"] = float(result[quantity].mean())
            if way is ways[0]:
                found[f"searched_{name}"] = result["pictures"]
    return found


def probes(
    yardstick: Yardstick,
    contenders: Mapping[str, Contender],
    test: Digits,
    label: int,
    audit: Audit,
) -> Found:
    """Ask of hidden layers, by a line, whether there is the digit.

    An encoder sees real pictures, half of them the digit's. A decoder sees latents, of which the
    question is whether the ORIGINAL draws the digit from them; what the latents themselves tell is
    the control of that, ``probe_latents``.
    """
    subject, plan = yardstick.subject, audit.probing
    found = {}
    digit, _ = test.first(plan.n // 2, label)
    real = torch.cat([digit, unit(test.without([label]).images[: len(digit)])])
    is_digit = torch.arange(len(real)) < len(digit)
    z, forget = yardstick.z[: plan.n], yardstick.forget[: plan.n]

    def keep(name: str, features: Tensor, labels: Tensor) -> None:
        probe = linear_probe(features, labels)
        found[f"probe_{name}"] = probe.accuracy
        found[f"probe_{name}_shuffled"] = probe.shuffled

    keep("latents", z, forget)
    for name, model in own_weights(contenders).items():
        for layer in plan.layers:
            if layer.startswith("encoder"):
                x, labels, call = real, is_digit, model.encode
            else:
                x, labels, call = z, forget, partial(subject.decode, model)
            features = hidden_features(model, [layer], call, [x], plan.side)[layer]
            keep(f"{layer.replace('.', '_')}_{name}", features, labels)
    return found
