"""Make the conditional diffusion model forget a class, in one or several variants, over seeds."""

from dataclasses import dataclass, field, fields, replace
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from lib.experiments._amnesia_ddpm import Forgotten, Memory, Task, fisher_of, forget
from lib.experiments._diffusion import (
    OF_THE_CLASS,
    OF_THE_OTHERS,
    Measures,
    Sampling,
    arguments_of,
    load_base,
    rank_correlation,
)
from lib.run import Run


@dataclass(frozen=True)
class Config(Task, Sampling):
    """A task with its seeds; ``variants`` maps a name to the fields of the task it changes.

    ``base`` and ``judge`` are shipped checkpoints; without a judge only the distances to noise are
    measured. ``data`` is only measured on, never trained on. ``replay_a_class`` samples of every
    class are drawn from the base for replay and for the Fisher information.
    Measured are ``n_samples`` of the class to forget and ``n_remember`` of each other, and
    the latter beside ``n_real`` real images a class. ``probe`` adds what a stretch of each picture
    and swapped arguments do to the measures, and how the variants' Fisher information differ.
    With ``ship`` the first seed's model is shipped under the run's name.
    """

    base: str
    judge: str | None
    data: str
    forget: int
    replay_a_class: int
    n_samples: int
    n_remember: int
    n_real: int
    seeds: tuple[int, ...]
    variants: dict[str, dict] = field(default_factory=dict)
    probe: bool = False
    bf16: bool = False
    ship: bool = False


def run(config: Config, run: Run) -> None:
    """Forget, then measure with a judge and without one, before and after.

    A quantity ends in ``_base`` for the model before forgetting, which is measured with the first
    seed; in ``_forgotten`` after it or, where there are variants, in their names; and in ``_real``
    for test images in the place of samples.
    """
    Lab(config, run).work()


def task_of(config: Config) -> Task:
    """Return the task that a config's variants start from."""
    return Task(**{f.name: getattr(config, f.name) for f in fields(Task)})


class Lab:
    """The base, what is drawn from it once, and the measures, for all variants of one run."""

    def __init__(self, config: Config, run: Run):
        self.config, self.run = config, run
        self.base = load_base(config.base, run.device)
        self.measures = Measures(
            config, config.forget, self.base.image_shape, self.base.n_classes, run, config.probe
        )
        task = task_of(config)
        self.tasks = {
            name: replace(task, **changes)
            for name, changes in (config.variants or {"forgotten": {}}).items()
        }
        # One copy for all variants, also in a run that is not resumed.
        self.memory, self.fisher, self.forgotten = map(
            cache, (self._memory, self._fisher, self._forgotten)
        )

    def work(self) -> None:
        """Measure the base and every variant; write rows, and the first seed's arrays.

        ``samples`` (models, classes, columns, h, w) and ``metrics`` (models, quantities) have the
        base first; the curves of the losses and ``lam`` have it not.
        """
        config, run = self.config, self.run
        first = config.seeds[0]
        parts = {"base": [run.part("base", partial(self.measures.of, self.base, first))]}
        for name, task in self.tasks.items():
            parts[name] = [
                run.part(f"{name}-{seed}", partial(self.one, name, task, seed))
                for seed in config.seeds
            ]
        self.measures.report_real()
        for name, found in parts.items():
            seeds = [first] if name == "base" else config.seeds
            self.measures.report(name, found, seeds)
            if name != "base":
                seconds = [float(each["seconds"]) for each in found]
                about = {"n_samples": self.tasks[name].iterations, "data": "samples of the base"}
                run.row(f"seconds_{name}", seconds, unit="s", seeds=seeds, **about)
                self.report_free(name, first)
        histories = [found[0] for name, found in parts.items() if name != "base"]
        measured = [q for q in (*OF_THE_CLASS, *OF_THE_OTHERS) if q in parts["base"][0]]
        run.arrays(
            samples=np.stack([found[0]["grid"] for found in parts.values()]),
            samples_of=np.array(list(parts)),
            metrics=np.array([[found[0][q] for q in measured] for found in parts.values()]),
            metrics_of=np.array(measured),
            lam=np.array([task.lam for task in self.tasks.values()]),
            loss_step=max((h["loss_step"] for h in histories), key=len),
            **{
                key: _padded([history[key] for history in histories])
                for key in ("loss_surrogate", "loss_replay", "loss_ewc")
            },
        )
        if config.probe:
            self.compare_fishers()

    def one(self, name: str, task: Task, seed: int) -> dict[str, float | np.ndarray]:
        """Forget once, and measure; the first seed of a run that ships is measured as shipped."""
        found = self.forgotten(replace(task, weights="ema"), seed)
        model = found.ema if task.weights == "ema" else found.raw
        if self.config.ship and seed == self.config.seeds[0]:
            model = self.run.ship(self.run.name, model, arguments_of(self.base))
        measured = self.measures.of(model, seed)
        history = found.fit.history
        return measured | {
            "seconds": found.fit.seconds,
            "loss_step": np.array([line["step"] for line in history]),
            **{
                f"loss_{term}": np.array([line.get(term, np.nan) for line in history])
                for term in ("surrogate", "replay", "ewc")
            },
        }

    def _memory(self, seed: int) -> Memory:
        config, generator = self.config, self.run.generator(3000 + seed)

        def compute() -> dict[str, np.ndarray]:
            memory = Memory.of(self.base, config.replay_a_class, config, generator)
            return {"images": memory.images.cpu().numpy(), "labels": memory.labels.cpu().numpy()}

        part = self.run.part(f"memory-{seed}", compute)
        return Memory(
            *(torch.tensor(part[k], device=self.run.device) for k in ("images", "labels"))
        )

    def _replayed(self, task: Task, seed: int) -> Memory:
        memory = self.memory(seed)
        return memory.stretched() if task.stretched else memory

    def _fisher(self, settings: tuple, seed: int) -> dict[str, Tensor]:
        task = next(t for t in self.tasks.values() if t.fisher_settings == settings)
        generator = self.run.generator(4000 + seed)

        def compute() -> dict[str, np.ndarray]:
            found = fisher_of(self.base, self._replayed(task, seed), task, generator)
            return {name: tensor.cpu().numpy() for name, tensor in found.items()}

        part = self.run.part("-".join(map(str, ("fisher", seed, *settings))), compute)
        return {name: torch.tensor(array, device=self.run.device) for name, array in part.items()}

    def _forgotten(self, task: Task, seed: int) -> Forgotten:
        """Train one task; variants that differ in ``weights`` alone share it."""
        name = next(n for n, t in self.tasks.items() if replace(t, weights="ema") == task)
        return forget(
            self.base,
            self.config.forget,
            task,
            self._replayed(task, seed),
            self.fisher(task.fisher_settings, seed),
            self.run.generator(seed),
            bf16=self.config.bf16,
            checkpoint=self.run.checkpoint(f"{name}-{seed}"),
            resume=self.run.resume,
        )

    def report_free(self, name: str, seed: int) -> None:
        """Report the weights that the penalty leaves free, and their share of the movement.

        Their Fisher information is 0: for the product estimator, all that came out negative. The
        movement is that of the last weights, squared and summed.
        """
        task = self.tasks[name]

        def compute() -> dict[str, float]:
            fisher = flat(self.fisher(task.fisher_settings, seed))
            after, before = (
                flat({key: weight.detach() for key, weight in model.named_parameters()})
                for model in (self.forgotten(replace(task, weights="ema"), seed).raw, self.base)
            )
            moved = (after - before) ** 2
            return {
                "free_weights": float((fisher == 0).mean()),
                "moved_free": float(moved[fisher == 0].sum() / moved.sum()),
            }

        about = {"unit": "share", "n_samples": task.fisher_samples, "seeds": [seed]}
        about |= {"data": "samples of the base", "preprocessing": _join(task.fisher_settings)}
        for quantity, share in self.run.part(f"free-{name}-{seed}", compute).items():
            self.run.row(f"{quantity}_{name}", float(share), **about)

    def compare_fishers(self) -> None:
        """Report how the Fisher information of variants differs from that of the first one."""
        seed = self.config.seeds[0]
        settings = {name: task.fisher_settings for name, task in self.tasks.items()}
        reference = next(iter(settings.values()))
        one = flat(self.fisher(reference, seed))
        for name, each in settings.items():
            if each != reference:
                other = flat(self.fisher(each, seed))
                about = {
                    "n_samples": self.tasks[name].fisher_samples,
                    "data": "samples of the base",
                    "seeds": [seed],
                    "preprocessing": f"{_join(each)}, beside {_join(reference)}",
                }
                self.run.row(f"fisher_ratio_{name}", other.sum() / one.sum(), unit="times", **about)
                rank = rank_correlation(one, other)
                self.run.row(f"fisher_rank_{name}", rank, unit="rank correlation", **about)


def flat(tensors: dict[str, Tensor]) -> np.ndarray:
    """Return all values of named tensors in one row."""
    return torch.cat([values.flatten() for values in tensors.values()]).double().cpu().numpy()


def _join(settings: tuple) -> str:
    return " ".join(map(str, settings))


def _padded(rows: list[np.ndarray]) -> np.ndarray:
    """Stack rows of different lengths; the shorter end in NaN."""
    longest = max(map(len, rows))
    return np.stack([np.pad(row, (0, longest - len(row)), constant_values=np.nan) for row in rows])
