"""Train a judge of faces, of binary attributes or of identities, and ship it."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.data.images import MISSING
from lib.experiments._digits import unit
from lib.experiments._faces import Faces
from lib.models.classifier import FaceCNN, predict_logits
from lib.run import Run, seed_everything
from lib.train import cosine, fit


@dataclass(frozen=True)
class Config:
    """Data, what is to be told from it, and schedule.

    ``splits`` maps the names in the results to splits of the data; ``train`` is trained on, the
    others are scored. The judge learns either ``attributes``, each 0, 1 or missing, or the first
    ``identities`` people. ``limit`` takes the first pictures of a split only. ``n_trivial`` images
    that show nothing are judged of each kind: flat grey of a random level, and uniform noise.
    """

    data: str
    size: int
    splits: dict[str, str]
    attributes: tuple[str, ...]
    identities: int
    flips: bool
    dropout: float
    iterations: int
    batch: int
    lr: float
    warmup: float
    seed: int
    n_trivial: int
    limit: int | None = None

    def __post_init__(self):
        if bool(self.attributes) == bool(self.identities):
            raise ValueError("name attributes or set identities above 0, one of the two")


def run(config: Config, run: Run) -> None:
    """Train; report each label's accuracy beside the trivial one, and what nothing is taken for."""
    seed_everything(config.seed)
    parts = {name: labelled(config, split) for name, split in config.splits.items()}
    train, targets = parts["train"]
    targets = targets.to(run.device)
    arguments = {
        "n_logits": config.identities or len(config.attributes),
        "image_shape": [train.n_channels, config.size, config.size],
        "names": list(config.attributes),
        "dropout": config.dropout,
    }
    loss = F.cross_entropy if config.identities else attribute_loss

    def step_loss(model: nn.Module, generator: torch.Generator):
        images, index = train.drawn(config.batch, generator, config.flips)
        total = loss(model(unit(images)), targets[torch.from_numpy(index).to(run.device)])
        return total, {"cross_entropy": total.detach()}

    fitted = fit(
        FaceCNN(**arguments),
        step_loss,
        steps=config.iterations,
        lr=config.lr,
        generator=run.generator(config.seed),
        device=run.device,
        schedule=partial(cosine, warmup=config.warmup),
        checkpoint=run.checkpoint("judge"),
        resume=run.resume,
    )
    judge = run.ship(run.name, fitted.model, arguments)
    about = {"data": train.source, "seeds": [config.seed], "n_samples": len(train)}
    run.row("training_time", fitted.seconds, unit="s", **about)
    for name, (faces, labels) in parts.items():
        if name != "train":
            report(name, judged(judge, faces, run.device), labels, faces.source, config, run)
    trivial = trivial_images(config.n_trivial, judge, run.generator(config.seed))
    for name, images in trivial.items():
        what = {"grey": "flat grey", "noise": "uniform noise"}[name]
        report(name, predict_logits(judge, images).cpu(), None, what, config, run)


def labelled(config: Config, split: str) -> tuple[Faces, Tensor]:
    """Load a split with its targets: (n, attributes), or (n,) for identities."""
    faces = Faces.load(config.data, split, config.size, limit=config.limit)
    if config.identities:
        faces = faces.where(faces.labels("identity") < config.identities)
        return faces, torch.from_numpy(faces.labels("identity"))
    columns = [faces.labels(name) for name in config.attributes]
    return faces, torch.from_numpy(np.stack(columns, axis=1))


def attribute_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over attributes of the binary cross-entropy of their known labels, in nats.

    Every attribute counts the same, however few of its labels are known.

    Shapes: both (batch, attributes), ``targets`` of 0, 1 and ``MISSING``.
    """
    known = (targets != MISSING).float()
    each = F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none")
    return ((each * known).sum(0) / known.sum(0).clamp(min=1)).mean()


def judged(judge: FaceCNN, faces: Faces, device: torch.device, batch: int = 1000) -> Tensor:
    """Return the logits (n, n_logits) of all pictures, on the CPU."""
    index = np.arange(len(faces))
    parts = [index[start : start + batch] for start in range(0, len(faces), batch)]
    return torch.cat([predict_logits(judge, unit(faces.at(i, device))).cpu() for i in parts])


def trivial_images(n: int, judge: FaceCNN, generator: torch.Generator) -> dict[str, Tensor]:
    """Make images that show nothing: flat grey of random levels, and uniform noise."""
    options = {"generator": generator, "device": generator.device}
    noise = torch.rand(n, *judge.image_shape, **options)
    return {"grey": torch.rand(n, 1, 1, 1, **options).expand_as(noise), "noise": noise}


def report(
    name: str, logits: Tensor, labels: Tensor | None, data: str, config: Config, run: Run
) -> None:
    """Add the rows of labelled pictures, or of images that show nothing and have no labels."""
    about = {"unit": "share", "data": data, "seeds": [config.seed]}
    if config.identities:
        for quantity, share in identity_shares(logits, labels).items():
            run.row(f"{quantity}_{name}", share, n_samples=len(logits), **about)
        return
    columns = []
    for column, attribute in enumerate(config.attributes):
        known = labels[:, column] != MISSING if labels is not None else slice(None)
        truth = labels[known, column] == 1 if labels is not None else None
        columns.append(attribute_shares(logits[known, column] > 0, truth))
        n_known = len(logits[known])
        for quantity, share in columns[-1].items():
            run.row(f"{quantity}_{attribute}_{name}", share, n_samples=n_known, **about)
    for quantity in ("accuracy", "balanced_accuracy") if labels is not None else ():
        mean = float(np.mean([shares[quantity] for shares in columns]))
        run.row(f"{quantity}_mean_{name}", mean, n_samples=len(logits), **about)


def attribute_shares(called: Tensor, truth: Tensor | None) -> dict[str, float]:
    """Return the share called positive, and, with labels, how often that is right.

    ``positives`` is the true share: calling all, or none, positive has that accuracy, or 1 minus
    it. The balanced accuracy is the mean over positives and negatives, where there are any.

    Shapes: truth values (n,).
    """
    if truth is None:
        return {"called": float(called.double().mean())}
    right = (called == truth).double()
    recalls = [float(right[kind].mean()) for kind in (truth, ~truth) if kind.any()]
    return {
        "accuracy": float(right.mean()),
        "balanced_accuracy": float(np.mean(recalls)),
        "positives": float(truth.double().mean()),
    }


def identity_shares(logits: Tensor, labels: Tensor | None) -> dict[str, float]:
    """Return how sure the judge is, its commonest answer's share, and, with labels, its accuracy.

    ``chance`` is the accuracy of always naming whoever has the most pictures.

    Shapes: ``logits`` (n, identities), ``labels`` (n,).
    """
    answers = logits.argmax(1)
    shares = {
        "confidence": float(logits.softmax(1).amax(1).mean()),
        "commonest_answer": float(answers.bincount().max() / len(answers)),
    }
    if labels is not None:
        shares["accuracy_identity"] = float((answers == labels).double().mean())
        shares["chance_identity"] = float(labels.bincount().max() / len(labels))
    return shares
