"""Ask many judges about noise, grey and forgotten samples: what do prob and entropy measure?"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from lib.checkpoints import load_checkpoint, write_atomically
from lib.experiments._digits import Digits
from lib.experiments._judges import Judge, train_judge
from lib.metrics import forgetting as metrics
from lib.models.classifier import ARCHITECTURES, predict_logits
from lib.models.cvae import ConditionalVAE
from lib.run import Run, seed_everything


@dataclass(frozen=True)
class Config(Judge):
    """A judge, and the ``kinds`` of judges that differ from it in some fields.

    ``before`` and ``after`` are the shipped models before and after forgetting ``forget``;
    ``random`` stands for an untrained one.
    """

    kinds: dict[str, dict]
    seeds: tuple[int, ...]
    before: str
    after: str
    forget: int
    data: str
    n_samples: int


def run(config: Config, run: Run) -> None:
    """Train every kind of judge on every seed; report its answers to four kinds of images.

    The ensemble averages the probabilities of all judges with ten classes. The rows that end in
    ``_min`` and ``_max`` range over those judges, without the ensemble.
    """
    train, test = (Digits.load(config.data, split, 28, run.device) for split in ("train", "test"))
    images = _inputs(config, run)
    base = Judge(**{f.name: getattr(config, f.name) for f in fields(Judge)})

    def row(name: str, values: list[float], n: int, unit: str, data: str, judges: str) -> None:
        seeds = config.seeds[: len(values)]
        run.row(
            name, values, n_samples=n, unit=unit, data=data, seeds=seeds, feature_extractor=judges
        )

    answers: dict[str, list[dict[str, Tensor]]] = {}
    x, labels = test.first(len(test.images))
    for kind, changes in config.kinds.items():
        recipe = replace(base, **changes)
        judges = [_judge(recipe, train, run, f"{kind}-{seed}", seed) for seed in config.seeds]
        answers[kind] = [
            {name: predict_logits(judge, batch) for name, batch in images.items()}
            for judge in judges
        ]
        right = [metrics.accuracy(predict_logits(judge, x), labels) for judge in judges]
        row(f"test_accuracy_{kind}", right, len(x), "share", test.source, kind)

    everyone = [(kind, each) for kind, over_seeds in answers.items() for each in over_seeds]
    ten = [each for _, each in everyone if each["grey"].shape[1] == 10]
    ensemble = {name: metrics.ensemble_logits([each[name] for each in ten]) for name in images}
    for name in images:
        for measure, (value, unit) in _MEASURES.items():
            about = len(images[name]), unit, _DATA[name]
            for kind, over_seeds in {**answers, "ensemble": [ensemble]}.items():
                values = [value(each[name], config.forget) for each in over_seeds]
                row(f"{measure}_{name}_{kind}", values, *about, kind)
            values = [value(each[name], config.forget) for each in ten]
            for end, pick in (("min", min), ("max", max)):
                row(f"{measure}_{name}_{end}", [pick(values)], *about, f"{len(ten)} judges")
    run.arrays(
        judges=np.array([kind for kind, _ in everyone]),
        inputs=np.array(list(images)),
        mean_probability=np.array(
            [
                [_padded(each[name].softmax(1).mean(0)).tolist() for name in images]
                for _, each in everyone
            ]
        ),
    )


_MEASURES = {
    "prob": (lambda z, digit: float(metrics.class_probability(z, digit).mean()), "probability"),
    "entropy": (lambda z, digit: float(metrics.predictive_entropy(z).mean()), "nats"),
}
_DATA = {
    "noise": "uniform noise",
    "grey": "one flat image of 0.5",
    "before": "samples before forgetting",
    "after": "samples after forgetting",
}


def _inputs(config: Config, run: Run) -> dict[str, Tensor]:
    """Return the four kinds of images; samples before and after share their latents."""
    n, shape = config.n_samples, (1, 28, 28)
    found = {
        "noise": torch.rand(n, *shape, generator=run.generator(1), device=run.device),
        "grey": torch.full((1, *shape), 0.5, device=run.device),
    }
    c = torch.full((n,), config.forget, device=run.device)
    for name in ("before", "after"):
        checkpoint = getattr(config, name)
        random = checkpoint == "random"
        vae = ConditionalVAE(shape, 10) if random else load_checkpoint(checkpoint)
        found[name] = vae.to(run.device).sample(c, run.generator(2))
    return found


def _judge(recipe: Judge, train: Digits, run: Run, part: str, seed: int) -> nn.Module:
    """Train one judge, or read it back when the run is resumed."""
    path = run.checkpoint(part)
    if run.resume and path.is_file():
        judge = ARCHITECTURES[recipe.architecture](**recipe.arguments()).to(run.device)
        judge.load_state_dict(load(path.read_bytes()))
        return judge.eval()
    seed_everything(seed)
    judge = train_judge(recipe, train, run.generator(seed))
    write_atomically(path, save({k: v.cpu() for k, v in judge.state_dict().items()}))
    return judge


def _padded(probability: Tensor) -> Tensor:
    """Give ten probabilities an eleventh of 0, the class that shows nothing."""
    return torch.nn.functional.pad(probability, (0, 11 - len(probability)))
