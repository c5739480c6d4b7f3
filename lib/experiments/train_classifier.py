"""Train a judge of digits and ship it."""

from dataclasses import dataclass

from lib.experiments._digits import Digits
from lib.experiments._judges import Judge, train_judge
from lib.metrics.forgetting import accuracy
from lib.models.classifier import predict_logits
from lib.run import Run, seed_everything


@dataclass(frozen=True)
class Config(Judge):
    """A judge with its data and seed."""

    data: str
    seed: int


def run(config: Config, run: Run) -> None:
    """Train on labelled digits, ship the weights, and report the accuracy on test images."""
    seed_everything(config.seed)
    train = Digits.load(config.data, "train", 28, run.device)
    test = Digits.load(config.data, "test", 28, run.device)
    trained = train_judge(config, train, run.generator(config.seed))
    judge = run.ship(run.name, trained, config.arguments())
    images, labels = test.first(len(test.images))
    run.row(
        "test_accuracy",
        accuracy(predict_logits(judge, images), labels),
        n_samples=len(images),
        unit="share",
        data=test.source,
        seeds=[config.seed],
    )
