"""One judge of digits: its architecture and its training."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from lib.experiments._digits import Digits, unit
from lib.models.classifier import ARCHITECTURES
from lib.train import FUSED_ADAM


@dataclass(frozen=True)
class Judge:
    """A classifier and its schedule: Adam whose rate falls tenfold every ``decay_every`` epochs.

    With ``nothing_class`` a class more stands for images that show nothing; one image in eleven
    is then uniform noise or flat grey of a random level.
    """

    architecture: str
    dropout: float
    nothing_class: bool
    epochs: int
    batch: int
    lr: float
    decay_every: int

    def arguments(self) -> dict:
        """Return the keyword arguments of the model's class."""
        return {"n_classes": 11 if self.nothing_class else 10, "dropout": self.dropout}


def train_judge(config: Judge, data: Digits, generator: torch.Generator) -> nn.Module:
    """Train for whole epochs over ``data``; takes two to four minutes a judge on one core.

    Initial weights and dropout come from the global seed.
    Raises: ValueError if the architecture is unknown.
    """
    if config.architecture not in ARCHITECTURES:
        raise ValueError(
            f"The architecture {config.architecture!r} is unknown; choose from "
            f"{', '.join(ARCHITECTURES)}."
        )
    device = data.images.device
    judge = ARCHITECTURES[config.architecture](**config.arguments()).to(device).train()
    adam = FUSED_ADAM(judge.parameters(), lr=config.lr)
    schedule = torch.optim.lr_scheduler.StepLR(adam, config.decay_every, 0.1)
    for _ in tqdm(range(config.epochs), desc=config.architecture, mininterval=10):
        order = torch.randperm(len(data.images), generator=generator, device=device)
        for index in order.split(config.batch):
            images, labels = unit(data.images[index]), data.labels[index]
            if config.nothing_class:
                images, labels = _with_nothing(images, labels, generator)
            adam.zero_grad()
            F.cross_entropy(judge(images), labels).backward()
            adam.step()
        schedule.step()
    return judge.eval()


def _with_nothing(
    images: Tensor, labels: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Append a tenth of the batch as uniform noise and flat grey, labelled with class 10."""
    n = max(1, len(images) // 20)
    options = {"generator": generator, "device": images.device}
    noise = torch.rand(n, *images.shape[1:], **options)
    grey = torch.rand(n, 1, 1, 1, **options).expand_as(noise)
    return torch.cat([images, noise, grey]), F.pad(labels, (0, 2 * n), value=10)
