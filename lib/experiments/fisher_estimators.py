"""Compare estimators of a diffusion model's Fisher information: bias, spread, and cost."""

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lib.experiments._diffusion import rank_correlation
from lib.experiments._digits import Digits
from lib.methods.fisher_diffusion import diffusion_fisher, gradient_of_steps
from lib.models.ddpm import ConditionalDDPM, to_signed
from lib.run import Run, seed_everything
from lib.train import cosine, fit

Fisher = np.ndarray  # one value a parameter, in the order of the model
SCATTERED = 2000


@dataclass(frozen=True)
class Config:
    """A small model, its own samples, and what is compared on them.

    ``channels`` to ``seed`` train the model. ``n_samples`` pictures with their classes are the
    population: its Fisher information is known from ``exact_draws`` exact gradients of each.
    Every estimator with each of ``steps`` timesteps takes all of them once, ``repetitions`` times.
    Then each spends a ``budget`` of gradient evaluations (one a timestep) on as many pictures as
    it can, drawn from the population with replacement.
    """

    data: str
    size: int
    channels: tuple[int, ...]
    groups: int
    patch: int
    iterations: int
    batch: int
    lr: float
    seed: int
    guidance: float
    sample_steps: int
    n_samples: int
    exact_draws: int
    chunk: int
    steps: tuple[int, ...]
    repetitions: int
    budget: int


def run(config: Config, run: Run) -> None:
    """Train the model, measure its exact Fisher information, then what estimators make of it."""
    seed_everything(config.seed)
    model = train(config, run)
    classes = torch.arange(config.n_samples, device=run.device) % 10
    samples = (
        model.sample(classes, config.guidance, config.sample_steps, run.generator(1)),
        classes,
    )
    seconds, n_steps = time.perf_counter(), model.schedule.n_steps
    draws, mean_squared = reference(model, samples, config, run)
    seconds = (time.perf_counter() - seconds) / (config.exact_draws * config.n_samples)
    truth = draws.mean(0)
    noise = 1 - mean_squared.sum() / truth.sum()
    record(run, config, "noise_share", [noise], "share of the exact Fisher's total")
    others = [np.delete(draws, k, 0).mean(0) for k in range(len(draws))]
    compare(run, config, "exact", draws, others, seconds)
    spend_budget(model, samples, "exact", n_steps, truth, config, run)
    scattered = {"exact": truth, "mean_squared": mean_squared}
    for m in config.steps:
        for estimator in ("subsampled", "product"):
            seconds = time.perf_counter()
            raw = [
                estimate(model, samples, estimator, m, config.chunk, run.generator(100 + k))
                for k in range(config.repetitions)
            ]
            each = (time.perf_counter() - seconds) / (config.repetitions * config.n_samples)
            name = f"{estimator}_{m}"
            compare(run, config, name, raw, [truth] * len(raw), each)
            if estimator == "product":
                compare_product(run, config, m, raw, mean_squared)
            spend_budget(model, samples, estimator, m, truth, config, run)
            scattered[name] = raw[0]
    picked = np.random.default_rng(0).permutation(len(truth))[:SCATTERED]
    run.arrays(**{name: value[picked].astype(np.float32) for name, value in scattered.items()})


def train(config: Config, run: Run) -> ConditionalDDPM:
    """Train a small diffusion model of digits."""
    data = Digits.load(config.data, "train", config.size, run.device)
    model = ConditionalDDPM(
        (1, config.size, config.size),
        10,
        config.channels,
        groups=config.groups,
        patch=config.patch,
    )

    def step_loss(model, generator):
        images, labels = data.batch(config.batch, generator)
        loss = model.loss(to_signed(images), labels, generator, 0.1, "mean").mean()
        return loss, {"simple_loss": loss.detach()}

    trained = fit(
        model,
        step_loss,
        steps=config.iterations,
        lr=config.lr,
        generator=run.generator(config.seed),
        device=run.device,
        schedule=cosine,
        checkpoint=run.checkpoint("model"),
        resume=run.resume,
    )
    loss = trained.history[-1]["simple_loss"]
    run.row(
        "train_simple_loss",
        loss,
        n_samples=config.batch,
        unit="squared error a pixel",
        data=data.source,
        seeds=[config.seed],
    )
    return trained.model


def reference(
    model: ConditionalDDPM, samples: tuple[Tensor, Tensor], config: Config, run: Run
) -> tuple[np.ndarray, Fisher]:
    """Draw the exact gradient of each sample several times, each with fresh noise.

    Returns the mean squares (draws, parameters), whose expectation is the exact Fisher
    information, and the mean product of two different draws: the square of the expected gradient.
    """
    generator, n_steps = run.generator(2), model.schedule.n_steps
    parameters = [p for p in model.parameters() if p.requires_grad]
    steps = torch.arange(n_steps, device=run.device)
    squares, products = 0.0, 0.0
    for x0, c in zip(samples[0].split(1), samples[1].split(1), strict=True):
        gradient = gradient_of_steps(model, parameters, x0, c, config.chunk, generator)
        drawn = [gradient(steps, torch.ones_like(steps)) for _ in range(config.exact_draws)]
        values = torch.stack([torch.cat([g.flatten() for g in each]) for each in drawn]).double()
        squares = squares + values.square()
        pairs = config.exact_draws * (config.exact_draws - 1)
        products = products + (values.sum(0).square() - values.square().sum(0)) / pairs
    n = config.n_samples
    return (squares / n).cpu().numpy(), (products / n).cpu().numpy()


def estimate(
    model: ConditionalDDPM,
    samples: tuple[Tensor, Tensor],
    estimator: str,
    m: int,
    chunk: int,
    generator: torch.Generator,
) -> Fisher:
    """Return an estimate as one vector, negative entries included."""
    found = diffusion_fisher(
        model,
        [samples],
        estimator=estimator,
        n_steps=m,
        chunk=chunk,
        generator=generator,
        clamp=False,
    )
    return torch.cat([value.flatten() for value in found.values()]).double().cpu().numpy()


def record(run: Run, config: Config, quantity: str, values: list[float], unit: str) -> None:
    """Record a quantity on the population, one value a repetition."""
    run.row(
        quantity,
        values,
        n_samples=config.n_samples,
        unit=unit,
        data="samples of the model",
        seeds=list(range(len(values))),
    )


def compare(
    run: Run, config: Config, name: str, raw: list[Fisher], truths: list[Fisher], seconds: float
) -> None:
    """Record how far repeated estimates on the whole population are from the exact Fisher."""
    pairs = list(zip(raw, truths, strict=True))
    bias = [found.sum() / truth.sum() - 1 for found, truth in pairs]
    record(run, config, f"bias_{name}", bias, "share of the exact Fisher's total")
    ranks = [rank_correlation(found, truth) for found, truth in pairs]
    record(run, config, f"rank_{name}", ranks, "Spearman correlation with the exact Fisher")
    shapes = [shape_error(found, truth) for found, truth in pairs]
    record(run, config, f"shape_error_{name}", shapes, "relative error at the best scale")
    record(run, config, f"seconds_{name}", [seconds], "s a sample")


def compare_product(
    run: Run, config: Config, m: int, raw: list[Fisher], mean_squared: Fisher
) -> None:
    """Record the product's bias for its own target, its negative entries, and what clamping does.

    A clamped estimate that is not 0 in an entry protects that parameter; ``held`` is the share of
    the target's total that lies in such entries.
    """
    bias = [found.sum() / mean_squared.sum() - 1 for found in raw]
    record(run, config, f"bias_of_mean_product_{m}", bias, "share of the target's total")
    negative = [(found < 0).mean() for found in raw]
    record(run, config, f"negative_product_{m}", negative, "share of parameters")
    added = [found.clip(min=0).sum() / found.sum() - 1 for found in raw]
    record(run, config, f"clamping_product_{m}", added, "share of the estimate's total")
    held = [mean_squared[found > 0].sum() / mean_squared.sum() for found in raw]
    record(run, config, f"held_product_{m}", held, "share of the target's total")


def spend_budget(
    model: ConditionalDDPM,
    samples: tuple[Tensor, Tensor],
    estimator: str,
    m: int,
    truth: Fisher,
    config: Config,
    run: Run,
) -> None:
    """Record the errors of estimates, clamped at 0, that cost the same number of gradients."""
    n = max(1, config.budget // (2 * m if estimator == "product" else m))
    found = []
    for k in range(config.repetitions):
        generator = run.generator(200 + k)
        index = torch.randint(config.n_samples, (n,), generator=generator, device=generator.device)
        drawn = samples[0][index], samples[1][index]
        found.append(estimate(model, drawn, estimator, m, config.chunk, generator).clip(min=0))
    name = estimator if estimator == "exact" else f"{estimator}_{m}"
    for quantity, measure, unit in (
        ("budget_rank", rank_correlation, "Spearman correlation with the exact Fisher"),
        ("budget_shape_error", shape_error, "relative error at the best scale"),
    ):
        run.row(
            f"{quantity}_{name}",
            [measure(each, truth) for each in found],
            n_samples=n,
            unit=unit,
            data="samples of the model",
            seeds=list(range(config.repetitions)),
        )


def shape_error(found: Fisher, truth: Fisher) -> float:
    """Return the relative distance after scaling ``truth`` to ``found``, which lambda can absorb.

    It is the sine of the angle between the two: 0 for proportional ones, 1 for unrelated ones.
    """
    share = found @ truth / (np.linalg.norm(found) * np.linalg.norm(truth))
    return float(np.sqrt(max(0.0, 1 - share**2)))
