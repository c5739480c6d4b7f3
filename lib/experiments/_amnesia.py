"""What the experiments with Selective Amnesia share: one forgetting, and how it is measured."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lib.checkpoints import load_checkpoint
from lib.experiments._digits import Digits
from lib.methods import amnesia
from lib.methods.fisher import diagonal_fisher
from lib.metrics import forgetting as metrics
from lib.models.classifier import SmallCNN, predict_logits
from lib.models.cvae import ConditionalVAE
from lib.train import Fit, fit


@dataclass(frozen=True)
class Task:
    """One forgetting: the digit, the objective and the schedule.

    ``objective`` is ``amnesia`` (Eq. 4), ``bayes_replay`` (Eq. 3) or ``bayes`` (Eq. 1).
    ``surrogate`` is ``noise``, ``grey`` or the digit that takes the forgotten one's place.
    ``ewc_factor`` and ``reduction`` are explained in :mod:`lib.methods.amnesia`.
    """

    forget: int
    objective: str
    surrogate: str | int
    replay: bool
    lam: float
    ewc_factor: float
    reduction: str
    iterations: int
    batch: int
    lr: float
    fisher_samples: int


def load_models(vae: str, judge: str, device: torch.device) -> tuple[ConditionalVAE, nn.Module]:
    """Load a shipped VAE and judge; the name ``random`` stands for untrained ones."""
    model = ConditionalVAE((1, 28, 28), 10) if vae == "random" else load_checkpoint(vae)
    opinion = SmallCNN() if judge == "random" else load_checkpoint(judge)
    return model.to(device).eval(), opinion.to(device).eval()


def generated_batches(
    model: ConditionalVAE, n: int, generator: torch.Generator, batch: int = 500
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield decoder means of uniformly drawn classes, the classes, and noise for the ELBO."""
    options = {"generator": generator, "device": generator.device}
    for start in range(0, n, batch):
        size = min(batch, n - start)
        c = torch.randint(model.n_classes, (size,), **options)
        yield model.sample(c, generator), c, torch.randn(size, model.latent_dim, **options)


def surrogate_sampler(kind: str | int, frozen: ConditionalVAE) -> amnesia.Sampler:
    """Return the surrogate q(x | c_f) that a config names.

    Raises: ValueError if the name is unknown.
    """
    device = next(frozen.parameters()).device
    if kind == "noise":
        return amnesia.uniform_noise(frozen.image_shape, device)
    if kind == "grey":
        return amnesia.constant_grey(frozen.image_shape, device=device)
    if type(kind) is int:
        return lambda n, generator: frozen.sample(torch.full((n,), kind, device=device), generator)
    raise ValueError(f"The surrogate {kind!r} is unknown; choose noise, grey or a digit.")


def forget(
    start: ConditionalVAE,
    task: Task,
    generator: torch.Generator,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Fit:
    """Copy ``start`` and make the copy forget; no data set is used, only the model's own samples.

    Raises: ValueError if the task names an unknown objective or surrogate.
    """
    objectives = ("amnesia", "bayes_replay", "bayes")
    if task.objective not in objectives:
        raise ValueError(f"The objective {task.objective!r} is unknown; choose from {objectives}.")
    frozen, model = copy_of(start), copy_of(start)
    device = generator.device
    fisher = diagonal_fisher(
        frozen,
        ConditionalVAE.elbo_from_noise,
        generated_batches(frozen, task.fisher_samples, generator),
    )
    anchor = amnesia.Anchor.of(model, fisher)
    surrogate = surrogate_sampler(task.surrogate, frozen)
    kept = torch.tensor([c for c in range(start.n_classes) if c != task.forget], device=device)
    c_f = torch.full((task.batch,), task.forget, device=device)
    loss_options = {"lam": task.lam, "reduction": task.reduction}

    def step_loss(model: nn.Module, generator) -> tuple[Tensor, dict[str, Tensor]]:
        elbo = partial(model.elbo, generator=generator)
        penalty = amnesia.ewc_penalty(model, anchor, task.ewc_factor)
        c_r = kept[torch.randint(len(kept), (task.batch,), generator=generator, device=device)]
        replay = (frozen.sample(c_r, generator), c_r) if task.replay else None
        if task.objective == "amnesia":
            q = surrogate(task.batch, generator), c_f
            return amnesia.amnesia_loss(elbo, q, replay, penalty, **loss_options)
        own = frozen.sample(c_f, generator), c_f
        if task.objective == "bayes":
            return amnesia.bayes_forget_loss(elbo, own, penalty, **loss_options)
        return amnesia.bayes_replay_loss(elbo, own, replay, penalty, **loss_options)

    return fit(
        model,
        step_loss,
        steps=task.iterations,
        lr=task.lr,
        generator=generator,
        device=device,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
    )


def copy_of(model: ConditionalVAE) -> ConditionalVAE:
    """Return a VAE of the same shape and weights that shares nothing with ``model``."""
    copy = ConditionalVAE(**arguments_of(model)).to(next(model.parameters()).device)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def arguments_of(model: ConditionalVAE) -> dict:
    """Return the keyword arguments that build a VAE of this shape again."""
    widths = [layer.out_features for layer in model.encoder if isinstance(layer, nn.Linear)]
    return {
        "image_shape": list(model.image_shape),
        "n_classes": model.n_classes,
        "hidden": widths[:-1],
        "latent_dim": model.latent_dim,
    }


UNITS = {
    "prob": "probability",
    "entropy": "nats",
    "remember_prob": "probability",
    "remember_accuracy": "share",
    "grey_distance": "rms a pixel",
    "nearest_real": "rms a pixel",
    "log_p_forget": "nats",
    "log_p_forget_binarised": "nats",
    "log_p_forget_refined": "nats",
    "log_p_remember": "nats",
    "log_p_remember_binarised": "nats",
}


def judge_samples(
    model: ConditionalVAE, judge: nn.Module, digit: int, n: int, generator: torch.Generator
) -> dict[str, float]:
    """Ask a judge about ``n`` samples of a digit and ``n`` of the others; needs no data.

    ``grey_distance`` is that of the digit's samples to flat 0.5, the mean of uniform noise.
    """
    device = generator.device
    samples = model.sample(torch.full((n,), digit, device=device), generator)
    others = torch.tensor([c for c in range(model.n_classes) if c != digit], device=device)
    c_r = others[torch.arange(n, device=device) % len(others)]
    logits = predict_logits(judge, samples)
    kept = predict_logits(judge, model.sample(c_r, generator))
    grey = torch.full(model.image_shape, 0.5, device=device)
    return {
        "prob": float(metrics.class_probability(logits, digit).mean()),
        "entropy": float(metrics.predictive_entropy(logits).mean()),
        "remember_prob": float(kept.softmax(1).gather(1, c_r[:, None]).mean()),
        "remember_accuracy": metrics.accuracy(kept, c_r),
        "grey_distance": float(metrics.distance_to_image(samples, grey).mean()),
    }


@dataclass(frozen=True)
class RealDigits:
    """Real images for the measures that need no judge: ``n`` test images a score.

    The score that searches a proposal for each image takes at most 200 of them.
    """

    train: Digits
    test: Digits
    n: int
    n_importance: int

    def n_of(self, quantity: str) -> int:
        """Return the number of images that a score is the mean of."""
        return min(self.n, 200) if quantity == "log_p_forget_refined" else self.n

    def measure(
        self, model: ConditionalVAE, digit: int, n_samples: int, generator: torch.Generator
    ) -> dict[str, float]:
        """Score real images under the model, and its samples by their nearest real neighbour.

        ``log_p_forget_refined`` is that of black and white images too, with a proposal searched
        for each image: it does not trust the encoder.
        """
        kept = self.test.labels != digit
        others = Digits(self.test.images[kept], self.test.labels[kept], self.test.source)
        found = {}
        for name, batch in (
            ("log_p_forget", self.test.first(self.n, digit)),
            ("log_p_remember", others.first(self.n)),
        ):
            for suffix, x in (("", batch[0]), ("_binarised", (batch[0] > 0.5).float())):
                scores = model.log_likelihood(x, batch[1], self.n_importance, generator)
                found[name + suffix] = float(scores.mean())
        x, c = self.test.first(self.n_of("log_p_forget_refined"), digit)
        x = (x > 0.5).float()
        found["log_p_forget_refined"] = float(
            model.log_likelihood(
                x,
                c,
                self.n_importance,
                generator,
                model.fit_posterior(x, c, generator=generator),
            ).mean()
        )
        samples = model.sample(torch.full((n_samples,), digit, device=generator.device), generator)
        real, _ = self.train.first(len(self.train.images), digit)
        found["nearest_real"] = float(metrics.nearest_real_distance(samples, real).mean())
        return found


def sample_grid(model: ConditionalVAE, a_class: int, seed: int = 0) -> Tensor:
    """Return the first samples of every class from one fixed set of z, as uint8.

    Shapes: (n_classes, a_class, height, width).
    """
    device = next(model.parameters()).device
    z = torch.randn(a_class, model.latent_dim, generator=torch.Generator().manual_seed(seed))
    c = torch.arange(model.n_classes, device=device).repeat_interleave(a_class)
    with torch.no_grad():
        images = model.decode(z.to(device).repeat(model.n_classes, 1), c)
    levels = (255 * images[:, 0]).round().to(torch.uint8)
    return levels.unflatten(0, (model.n_classes, a_class)).cpu()
