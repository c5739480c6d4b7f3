"""Make the conditional VAE forget a digit, in one or several variants, each over seeds."""

from dataclasses import dataclass, field, fields, replace

import numpy as np

from lib.experiments._amnesia import (
    UNITS,
    RealDigits,
    Task,
    arguments_of,
    forget,
    judge_samples,
    load_models,
    sample_grid,
)
from lib.experiments._digits import Digits
from lib.run import Run


@dataclass(frozen=True)
class Config(Task):
    """A task with its seeds; ``variants`` maps a name to the fields of the task it changes.

    ``vae`` and ``judge`` are shipped checkpoints. ``data`` is only measured on, never trained on.
    With ``ship`` the first seed's model is shipped under the run's name.
    """

    vae: str
    judge: str
    data: str
    n_samples: int
    n_real: int
    n_importance: int
    seeds: tuple[int, ...]
    variants: dict[str, dict] = field(default_factory=dict)
    ship: bool = False


def run(config: Config, run: Run) -> None:
    """Forget, then measure with a judge and without one, before and after.

    A quantity ends in ``_base`` for the model before forgetting; with variants it ends in their
    names, and the base rows are those of each digit that some variant forgets.
    """
    base, judge = load_models(config.vae, config.judge, run.device)
    size = base.image_shape[-1]
    splits = (Digits.load(config.data, split, size, run.device) for split in ("train", "test"))
    real = RealDigits(*splits, n=config.n_real, n_importance=config.n_importance)
    task = Task(**{f.name: getattr(config, f.name) for f in fields(Task)})
    tasks = {
        suffix: replace(task, **changes)
        for suffix, changes in (config.variants or {"forgotten": {}}).items()
    }

    def measure(model, digit: int, seed: int) -> dict[str, float]:
        found = judge_samples(model, judge, digit, config.n_samples, run.generator(1000 + seed))
        generator = run.generator(2000 + seed)
        return found | real.measure(model, digit, config.n_samples, generator)

    def report(suffix: str, values: list[dict[str, float]]) -> None:
        for quantity in values[0]:
            real_images = quantity.startswith("log_p")
            binarised = quantity.endswith(("binarised", "refined"))
            judged = quantity in ("prob", "entropy", "remember_prob", "remember_accuracy")
            run.row(
                f"{quantity}_{suffix}",
                [found[quantity] for found in values],
                n_samples=real.n_of(quantity) if real_images else config.n_samples,
                unit=UNITS[quantity],
                data=real.test.source if real_images else "samples of the model",
                seeds=config.seeds,
                feature_extractor=config.judge if judged else None,
                preprocessing="pixels above 0.5 are 1" if binarised else None,
            )

    digits = sorted({each.forget for each in tasks.values()})
    for digit in digits:
        suffix = "base" if len(digits) == 1 else f"base_{digit}"
        report(suffix, [measure(base, digit, seed) for seed in config.seeds])
    grids, curves = [sample_grid(base, 10)], []
    for suffix, each in tasks.items():
        values = []
        for seed in config.seeds:
            part = run.checkpoint(f"{suffix}-{seed}")
            result = forget(base, each, run.generator(seed), part, run.resume)
            model, first = result.model, seed == config.seeds[0]
            if config.ship and first:
                model = run.ship(run.name, model, arguments_of(base))
            values.append(measure(model, each.forget, seed))
            if first:
                grids.append(sample_grid(model, 10))
                curves.append(result.history)
        report(suffix, values)
    longest = max(curves, key=len)
    total = np.full((len(curves), len(longest)), np.nan)  # a shorter variant ends in NaN
    for row, curve in zip(total, curves, strict=True):
        row[: len(curve)] = [line["total"] for line in curve]
    run.arrays(
        samples=np.stack(grids),
        samples_of=np.array(["base", *tasks]),
        loss_step=np.array([line["step"] for line in longest]),
        loss_total=total,
    )
