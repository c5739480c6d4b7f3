"""Make the conditional VAE forget several digits, one after the other."""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from lib.experiments._amnesia import (
    UNITS,
    RealDigits,
    Task,
    forget,
    judge_samples,
    load_models,
    sample_grid,
)
from lib.experiments._digits import Digits
from lib.metrics import forgetting as metrics
from lib.models.classifier import predict_logits
from lib.run import Run


@dataclass(frozen=True)
class Config(Task):
    """A task whose ``forget`` gives way to each of ``digits`` in turn."""

    digits: tuple[int, ...]
    vae: str
    judge: str
    data: str
    n_samples: int
    n_real: int
    n_importance: int
    seeds: tuple[int, ...]


def run(config: Config, run: Run) -> None:
    """Forget one digit after the other; each step starts, anchors and replays from the last.

    The digits forgotten earlier are replayed as the grey images they have become.
    A quantity ends in the digit and ``base`` or ``final``; ``kept_accuracy_after_k`` is the judge's
    accuracy on samples of the digits that are never forgotten, after k steps.
    """
    base, judge = load_models(config.vae, config.judge, run.device)
    splits = (Digits.load(config.data, split, 28, run.device) for split in ("train", "test"))
    real = RealDigits(*splits, n=config.n_real, n_importance=config.n_importance)
    task = Task(**{f.name: getattr(config, f.name) for f in fields(Task)})
    never = torch.tensor([d for d in range(10) if d not in config.digits], device=run.device)

    def measure(model, digit: int, seed: int) -> dict[str, float]:
        judged = judge_samples(model, judge, digit, config.n_samples, run.generator(1000 + seed))
        scored = real.measure(model, digit, config.n_samples, run.generator(2000 + seed))
        return {key: (judged | scored)[key] for key in _KEPT}

    def kept_accuracy(model, seed: int) -> float:
        c = never[torch.arange(config.n_samples, device=run.device) % len(never)]
        samples = model.sample(c, run.generator(3000 + seed))
        return metrics.accuracy(predict_logits(judge, samples), c)

    table = {seed: [{d: measure(base, d, seed) for d in config.digits}] for seed in config.seeds}
    accuracy = {seed: [kept_accuracy(base, seed)] for seed in config.seeds}
    grids = [sample_grid(base, 10)]
    for seed in config.seeds:
        model = base
        for step, digit in enumerate(config.digits):
            part = run.checkpoint(f"seed{seed}-step{step}")
            each = replace(task, forget=digit)
            model = forget(model, each, run.generator(seed), part, run.resume).model
            table[seed].append({d: measure(model, d, seed) for d in config.digits})
            accuracy[seed].append(kept_accuracy(model, seed))
            if seed == config.seeds[0]:
                grids.append(sample_grid(model, 10))

    for digit in config.digits:
        for suffix, when in (("base", 0), ("final", -1)):
            for quantity in _KEPT:
                real_images = quantity.startswith("log_p")
                run.row(
                    f"{quantity}_{digit}_{suffix}",
                    [table[seed][when][digit][quantity] for seed in config.seeds],
                    n_samples=real.n_of(quantity) if real_images else config.n_samples,
                    unit=UNITS[quantity],
                    data=real.test.source if real_images else "samples of the model",
                    seeds=config.seeds,
                    feature_extractor=config.judge if quantity in ("prob", "entropy") else None,
                )
    for step in range(len(config.digits) + 1):
        run.row(
            f"kept_accuracy_after_{step}",
            [accuracy[seed][step] for seed in config.seeds],
            n_samples=config.n_samples,
            unit="share",
            data="samples of the model",
            seeds=config.seeds,
            feature_extractor=config.judge,
        )
    first = table[config.seeds[0]]
    run.arrays(
        samples=np.stack(grids),
        digits=np.array(config.digits),
        quantities=np.array(_KEPT),
        by_step=np.array([[[at[d][q] for q in _KEPT] for d in config.digits] for at in first]),
    )


_KEPT = ("prob", "entropy", "grey_distance", "log_p_forget", "log_p_forget_refined", "nearest_real")
